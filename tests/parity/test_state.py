"""Whatever way a sequence's state came about (cold, cached, forked, copied, lost and found), it is what the oracle computes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lrt_core import kernels
from lrt_core.generate import read
from lrt_core.kv import KV
from lrt_core.model import LatentRecurrentTransformer, Stream
from lrt_core.refine import relative_change
from lrt_core.window import PERIOD
from server.engine.batch import slots_of
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from tests.engines import Run, make_engine, oracle, request, run
from tests.helpers import VARIANTS, contracting_model, random_ids, tiny_config, tiny_model

TOLERANCE = 1e-4
"""Of logprobs in float32."""


def conversations(count: int) -> list[GenerationRequest]:
    """Prompts of common beginnings that end within blocks and at their borders; one to three samples each."""
    rng = random.Random(7)
    stem = random_ids(40)
    return [
        request(
            [*stem[: rng.choice([8, 15, 24, 40])], *random_ids(rng.choice([1, 3, 8]), seed=number)],
            rng.choice([6, 11]),
            n=1 + number % 3,
            logprobs=0,
            prompt_logprobs=0 if number % 2 else None,
            temperature=1.0 if number % 3 else 0.0,
            seed=number,
        )
        for number in range(count)
    ]


def check(model: LatentRecurrentTransformer, requests: list[GenerationRequest], done: Run) -> list[list[int]]:
    """Every greedy token is the oracle's likeliest, every logprob the oracle's; returns prompt and output of each sample."""
    wholes = []
    for item, samples in zip(requests, done.outcomes, strict=True):
        for sample in samples:
            whole = [*item.prompt_ids, *sample.token_ids]
            exact = torch.log_softmax(read(model, whole).logits, -1)
            expected = [float(exact[position, token]) for position, token in enumerate(whole[1:])]
            num_prompt = len(item.prompt_ids)
            actual = [token.logprob for token in sample.tokens]
            assert actual == pytest.approx(expected[num_prompt - 1 :], abs=TOLERANCE)
            if item.prompt_logprobs is not None:
                assert sample.prompt_logprobs is not None
                scored = [token.logprob for token in sample.prompt_logprobs[1:]]
                assert scored == pytest.approx(expected[: num_prompt - 1], abs=TOLERANCE)
            if item.sampling.temperature == 0:
                assert sample.token_ids == exact[num_prompt - 1 : -1].argmax(-1).tolist()
            wholes.append(whole)
    return wholes


@pytest.mark.parametrize(("variant", "prefill"), [*((variant, "window") for variant in VARIANTS), ("layerwise", "sequential")])
def test_sequences_score_themselves_as_the_oracle_does(variant: str, prefill: str) -> None:
    """Generated under pressure, then read back as prompts by the same engine from what it has cached by then."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    engine = make_engine(model, prefill=prefill, max_model_len=64, num_blocks=20, block_size=4, max_num_seqs=6)
    requests = conversations(7)
    first = run(engine, requests)
    wholes = check(model, requests, first)
    assert first.total("num_preemptions") > 0
    assert first.total("num_prefix_hits") > 0
    again = [request(whole, 0, prompt_logprobs=0) for whole in wholes[:4]]
    second = run(engine, again)
    check(model, again, second)
    assert (second.total("num_prefix_hits") > 0) == model.config.latents_are_hidden
    warm = run(engine, requests[:3])
    assert warm.total("num_prefix_hits") > 0
    for before, after in zip(first.outcomes, warm.outcomes, strict=False):
        assert [sample.token_ids for sample in after] == [sample.token_ids for sample in before]


def non_contracting_model(variant: str) -> LatentRecurrentTransformer:
    """Memories louder than tokens in the residual stream: a change in one reaches the next undiminished, pass after pass."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    with torch.no_grad():
        assert model.memory_scale is not None
        model.memory_scale.fill_(10.0)
    return model


def read_prompt(engine: Engine, ids: list[int]) -> tuple[Tensor, list[int], int]:
    """Latents [T, D] of a prompt once it is read, the window's width at every step, and the rows that it took."""
    [sequence] = engine.add(request(ids, max_tokens=2))
    widths, num_rows = [], 0
    while sequence.num_output_tokens == 0:
        num_rows += engine.step().stats.num_scheduled_tokens
        assert sequence.window is not None
        widths.append(sequence.window.width)
    latents = engine.runner.pool.latents[slots_of(sequence.block_table, 0, len(ids), engine.config.block_size)]
    engine.finish(sequence, "abort")
    return latents, widths, num_rows


@pytest.mark.parametrize("variant", ["layerwise", "residual-only"])
def test_a_recurrence_that_does_not_contract_narrows_its_window_and_is_read_right(variant: str) -> None:
    """A token a pass, as token by token; the windows that ran beside it in vain cost few rows."""
    model, ids = non_contracting_model(variant), random_ids(120)
    latents, widths, num_rows = read_prompt(make_engine(model, window=64), ids)
    assert float(relative_change(latents, read(model, ids).latents).max()) <= 1e-5
    assert len(widths) == 120
    assert min(widths) == 1
    assert num_rows < PERIOD * (64 + 32 + 16 + 8 + 4 + 2) + 2 * 120
    item = request(ids, 4)
    assert run(make_engine(model, window=64), [item]).token_ids == [oracle(model, item)]


@pytest.mark.parametrize("num_prompts", [2, 4])
def test_prompts_that_share_rows_narrow_their_windows_too(num_prompts: int) -> None:
    """Each is given a part of the 16 rows, and soon takes one or two."""
    model = non_contracting_model("layerwise")
    engine = make_engine(model, window=16, num_prompt_rows=16, max_num_batched_tokens=64)
    sequences = [engine.add(request(random_ids(120, seed), max_tokens=2))[0] for seed in range(num_prompts)]
    num_rows = 0
    while any(sequence.num_output_tokens == 0 for sequence in sequences):
        num_rows += engine.step().stats.num_scheduled_tokens
    assert all(sequence.window is not None and sequence.window.width <= 2 for sequence in sequences)
    share = 16 // num_prompts
    assert num_rows < num_prompts * (PERIOD * (share + share + 4 + 2) + 2 * 120)


def test_a_recurrence_that_contracts_keeps_its_window() -> None:
    _, widths, _ = read_prompt(make_engine(contracting_model(), window=64, tolerance=1e-4), random_ids(120))
    assert set(widths) == {64}


@pytest.fixture
def layer_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """Counts the rows that go through every layer of models that torch runs."""
    rows: Counter[int] = Counter()
    plain = LatentRecurrentTransformer._run

    def counted(self: LatentRecurrentTransformer, stream: Stream, layers: range, kv: KV) -> None:
        for index in layers:
            rows[index] += stream.x.shape[0]
        plain(self, stream, layers, kv)

    monkeypatch.setattr(LatentRecurrentTransformer, "_run", counted)
    with kernels.native(False):
        yield rows


def test_layers_above_the_source_run_on_settled_rows_alone(layer_rows: Counter[int]) -> None:
    """Three layers with the source in the second; in all a position goes through the third once. Of the native step
    `test_step.py` shows the same."""
    model = tiny_model(tiny_config(**VARIANTS["upper-middle-source"]))
    requests = [request(random_ids(length, length), 6, logprobs=2, prompt_logprobs=1) for length in (1, 18, 45)]
    done = run(make_engine(model), requests)
    num_positions = sum(len(item.prompt_ids) + 5 for item in requests)
    assert layer_rows[0] == layer_rows[1] == done.total("num_scheduled_tokens") > 2 * num_positions
    assert layer_rows[2] == num_positions
    check(model, requests, done)


def test_without_a_last_layer_above_it_there_is_nothing_to_run_again(layer_rows: Counter[int]) -> None:
    done = run(make_engine(tiny_model()), [request(random_ids(30), 4)])
    assert layer_rows[0] == layer_rows[2] == done.total("num_scheduled_tokens")
