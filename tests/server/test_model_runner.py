"""One step on the model: what settles, what is sampled, which rows the head runs on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lrt_core.generate import read
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.refine import refine
from server.engine import model_runner
from server.engine.block_manager import BlockManager
from server.engine.model_runner import ModelRunner, WindowResult
from server.engine.request import GenerationRequest
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence
from tests.engines import engine_config, make_engine, request, run
from tests.helpers import VARIANTS, contracting_model, random_ids, tiny_config, tiny_model


class Bench:
    """A runner, blocks, and sequences placed by hand."""

    def __init__(self, model: LatentRecurrentTransformer, **overrides: Any) -> None:
        self.config = engine_config(**overrides)
        self.runner = ModelRunner(model, self.config)
        self.blocks = BlockManager(self.config.num_blocks, self.config.block_size)

    def place(self, item: GenerationRequest) -> Sequence:
        sequence = Sequence(item, 0, item.sampling.seed or 0)
        sequence.place(self.blocks.place(sequence, []), self.config.window)
        return sequence

    def execute(self, *windows: tuple[Sequence, int]) -> list[WindowResult]:
        return self.runner.execute([ScheduledWindow(own, own.num_computed_tokens, count) for own, count in windows])


@pytest.fixture
def head_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the head."""
    rows: list[int] = []
    plain = LatentRecurrentTransformer.logits

    def counted(self: LatentRecurrentTransformer, hidden: Tensor) -> Tensor:
        rows.append(hidden.shape[0])
        return plain(self, hidden)

    monkeypatch.setattr(LatentRecurrentTransformer, "logits", counted)
    return rows


def test_latent_rows_that_are_wrong_are_found() -> None:
    bench = Bench(tiny_model())
    sequence = bench.place(request(random_ids(5)))
    bench.runner.check_invariants([sequence], {})
    bench.execute((sequence, 1))
    sequence.advance(1, 1)
    named = {b"its hash": sequence.block_table[0]}
    bench.runner.check_invariants([sequence], named)
    latents = bench.runner.pool.latents
    latents[sequence.block_table[0] * bench.config.block_size, 2] += 1.0
    with pytest.raises(AssertionError, match="have changed"):
        bench.runner.check_invariants([sequence], named)
    bench.runner.check_invariants([sequence], {b"another": sequence.block_table[0]})
    latents[sequence.block_table[0] * bench.config.block_size, 3] = math.nan
    with pytest.raises(AssertionError, match="no number"):
        bench.runner.check_invariants([sequence], {})
    latents[bench.runner.pool.zero_row, 0] = 1.0
    with pytest.raises(AssertionError, match="of no token"):
        bench.runner.check_invariants([], {})


def test_the_first_pass_settles_one_row_of_a_strong_recurrence() -> None:
    bench = Bench(tiny_model())
    sequence = bench.place(request(random_ids(12)))
    [result] = bench.execute((sequence, 12))
    assert result.num_settled == 1
    assert result.residual == pytest.approx(1.0), "memories were zeros"
    assert result.tokens == []
    assert sequence.num_computed_tokens == 0, "the engine moves sequences, not the runner"


def test_passes_are_those_of_plain_refinement() -> None:
    """While nothing but the first row settles, window pass j has the residual of refinement pass j."""
    model = tiny_model()
    ids = random_ids(8)
    bench = Bench(model, tolerance=0.0, window=8)
    sequence = bench.place(request(ids))
    residuals = []
    while sequence.num_uncomputed_tokens > 1:
        [result] = bench.execute((sequence, sequence.num_uncomputed_tokens))
        assert result.num_settled == 1
        sequence.advance(result.num_settled, result.window.num_tokens)
        residuals.append(result.residual)
    assert residuals == pytest.approx(refine(model, torch.tensor([ids]), 0.0).residuals[:7], rel=1e-2, abs=1e-6)


def test_a_plain_model_settles_all_at_once() -> None:
    bench = Bench(tiny_model(tiny_config(**VARIANTS["plain"])))
    [result] = bench.execute((bench.place(request(random_ids(12))), 12))
    assert (result.num_settled, result.residual) == (12, None)
    assert len(result.tokens) == 1


def test_a_loose_tolerance_settles_all_at_once() -> None:
    bench = Bench(tiny_model(), tolerance=math.inf)
    [result] = bench.execute((bench.place(request(random_ids(12))), 12))
    assert result.num_settled == 12


def test_nothing_settles_behind_a_number_that_is_none() -> None:
    model = contracting_model()
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    bench = Bench(model)
    sequence = bench.place(request([1, 2, 7, 3, 4]))
    for _ in range(6):
        [result] = bench.execute((sequence, sequence.num_uncomputed_tokens))
        sequence.advance(result.num_settled, result.window.num_tokens)
        if sequence.num_uncomputed_tokens <= 2:
            break
    assert sequence.num_computed_tokens == 3, "it still gets on, one token a step"


def test_the_head_runs_on_rows_that_are_read(head_rows: list[int]) -> None:
    bench = Bench(contracting_model())
    reading, decoding = bench.place(request(random_ids(20))), bench.place(request([3]))
    results = bench.execute((reading, 16), (decoding, 1))
    assert head_rows == [1]
    assert results[0].window.sequence is decoding
    assert [len(result.tokens) for result in results] == [1, 0]
    assert bench.execute((reading, 16))[0].tokens == []
    assert head_rows == [1], "no row read, no head"


def test_no_token_beyond_what_is_wanted(head_rows: list[int]) -> None:
    bench = Bench(tiny_model())
    [result] = bench.execute((bench.place(request([3], max_tokens=0)), 1))
    assert (result.num_settled, result.tokens) == (1, [])
    assert head_rows == []


def test_prompt_rows_go_through_the_head_in_chunks(head_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "LOGITS_CHUNK", 4)
    model = tiny_model()
    ids = random_ids(12)
    bench = Bench(model, tolerance=math.inf)
    [result] = bench.execute((bench.place(request(ids, max_tokens=0, prompt_logprobs=2)), 12))
    assert head_rows == [4, 4, 3], "the last row predicts nothing of the prompt"
    assert [entry.token_id for entry in result.prompt_logprobs] == ids[1:]
    assert [len(entry.top) for entry in result.prompt_logprobs] == [2] * 11


def test_only_settled_prompt_rows_are_scored() -> None:
    bench = Bench(tiny_model())
    sequence = bench.place(request(random_ids(12), prompt_logprobs=0))
    [result] = bench.execute((sequence, 12))
    assert (result.num_settled, len(result.prompt_logprobs)) == (1, 1)


def test_logprobs_are_the_models_even_where_sampling_is_not() -> None:
    """Bias and temperature change what is drawn, never what is reported."""
    model = tiny_model()
    ids = random_ids(5)
    exact = torch.log_softmax(read(model, ids).logits[-1], -1)
    bench = Bench(model, prefill="sequential")
    sequence = bench.place(request(ids, logprobs=3, temperature=0.5, logit_bias={9: 100.0}))
    for _ in ids:
        [result] = bench.execute((sequence, 1))
        sequence.advance(1, 1)
    [token] = result.tokens
    assert token.token_id == 9
    assert token.logprob == pytest.approx(float(exact[9]), abs=1e-4)
    top = exact.topk(3)
    assert [alternative for alternative, _ in token.top] == top.indices.tolist()
    assert [logprob for _, logprob in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    bench = Bench(tiny_model())
    wanted = [None, 0, 4, 10**6]
    results = bench.execute(*((bench.place(request([5], logprobs=count)), 1) for count in wanted))
    tokens = [token for result in results for token in result.tokens]
    assert [len(token.top) for token in tokens] == [0, 0, 4, 280]
    assert tokens[0].logprob is None
    assert len({token.logprob for token in tokens[1:]}) == 1


def test_latents_lie_where_their_tokens_do() -> None:
    model = tiny_model()
    ids = random_ids(6)
    bench = Bench(model, prefill="sequential")
    sequence = bench.place(request(ids))
    for _ in ids:
        bench.execute((sequence, 1))
        sequence.advance(1, 1)
    slots = [sequence.block_table[p // 4] * 4 + p % 4 for p in range(6)]
    torch.testing.assert_close(bench.runner.pool.latents[slots], read(model, ids).latents, atol=1e-5, rtol=0)
    assert not bench.runner.pool.latents[bench.runner.pool.zero_row].any()


def test_prompts_are_scored_by_the_head_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of all prompts of a step, cached or computed, are one product, and the logprobs are each one's own."""
    model, items = contracting_model(), [request(random_ids(9 + index, seed=index), prompt_logprobs=1) for index in range(3)]
    engine = make_engine(model)
    cold = [run(engine, [item]).outcomes[0][0].prompt_logprobs for item in items]
    head_rows, plain = list[int](), engine.runner.model.logits

    def counted(hidden: Tensor) -> Tensor:
        head_rows.append(hidden.shape[0])
        return plain(hidden)

    monkeypatch.setattr(engine.runner.model, "logits", counted)
    warm = run(engine, items)
    assert warm.total("num_prefix_hits") == warm.total("num_scored_tokens") == 3 * 8
    assert [rows for rows in head_rows if rows > 3] == [24], "cached positions of all three"
    for outcome, expected in zip(warm.outcomes, cold, strict=True):
        found = outcome[0].prompt_logprobs
        assert found is not None and expected is not None
        assert [(entry.token_id, entry.rank) for entry in found] == [(entry.token_id, entry.rank) for entry in expected]
        assert [entry.logprob for entry in found[1:]] == pytest.approx([entry.logprob for entry in expected[1:]], abs=1e-5)
