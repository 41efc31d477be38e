"""The oracle's own behaviour; that its numbers are right is the golden tests' and `test_model.py`'s business."""

from __future__ import annotations

import pytest
import torch

from lrt_core.generate import Stepper, check_ids, generate, read
from lrt_core.sampling_params import SamplingParams
from tests.helpers import TINY_VOCAB_SIZE, VARIANTS, tiny_config, tiny_model

PROMPT = [5, 9, 200, 13]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_takes_the_likeliest_after_all_before(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    output = list(generate(model, PROMPT, 6))
    logits = read(model, PROMPT + output).logits
    assert output == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_reading_gives_a_row_per_token() -> None:
    result = read(tiny_model(), PROMPT)
    assert result.logits.shape == (4, TINY_VOCAB_SIZE)
    assert result.logits.dtype == torch.float32
    assert result.latents.shape == (4, 32)


def test_each_token_hands_its_latent_on() -> None:
    stepper = Stepper(tiny_model(), 4)
    assert stepper.memory is not None
    assert not stepper.memory.any()
    for token in PROMPT:
        _, latent = stepper.step(token)
        assert torch.equal(stepper.memory[0, 0], latent)


def test_plain_models_carry_no_memory() -> None:
    stepper = Stepper(tiny_model(tiny_config(**VARIANTS["plain"])), 4)
    stepper.step(1)
    assert stepper.memory is None


def test_end_of_sequence_is_the_last_token() -> None:
    model = tiny_model()
    free = list(generate(model, PROMPT, 8))
    eos = free[3]
    first = free.index(eos)
    assert list(generate(model, PROMPT, 8, eos_ids={eos})) == free[: first + 1]


def test_max_tokens_bounds_the_output() -> None:
    model = tiny_model()
    assert [len(list(generate(model, PROMPT, count))) for count in (0, 1, 3)] == [0, 1, 3]


def test_a_seed_repeats_and_none_is_zero() -> None:
    model = tiny_model()
    outputs = [list(generate(model, PROMPT, 12, SamplingParams(seed=seed))) for seed in (None, 0, 0, 1)]
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]


def test_penalties_see_prompt_and_output() -> None:
    model = tiny_model()
    banned = SamplingParams(temperature=0, repetition_penalty=1e6)
    output = list(generate(model, PROMPT, 20, banned))
    assert len(set(PROMPT + output)) == len(PROMPT + output), "positive logits of what was seen become zero"


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    tokens = generate(tiny_model(), PROMPT, 10**4)
    assert next(tokens) == next(generate(tiny_model(), PROMPT, 1))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty"),
        ([1, TINY_VOCAB_SIZE], f"token id {TINY_VOCAB_SIZE} at position 1 lies outside 0..{TINY_VOCAB_SIZE - 1}"),
        ([-1], "token id -1 at position 0"),
    ],
)
def test_bad_ids_are_refused(ids: list[int], message: str) -> None:
    model = tiny_model()
    for refuse in (lambda: check_ids(model, ids), lambda: read(model, ids), lambda: next(generate(model, ids, 1))):
        with pytest.raises(ValueError, match=message):
            refuse()
