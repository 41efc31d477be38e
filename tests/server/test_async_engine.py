"""The engine behind an event loop: streams, aborts, draining, refusals, death, and counts that are exact."""

from __future__ import annotations

import asyncio

import pytest

from lrt_core.grammar import GrammarSource
from server.engine.async_engine import AsyncEngine, EngineDeadError
from server.engine.request import AdmissionError, RequestError
from server.engine.worker import EngineWorker, StepReport
from tests.engines import make_engine, oracle, request
from tests.server.async_bench import MODEL, TOKENIZER, Bench, collect, ids_of, lettered, plain_text, run, text_of


def test_a_stream_gives_every_token_once_and_ends() -> None:
    async def test() -> None:
        async with Bench() as bench:
            item = request([1, 2, 3], 9)
            deltas = await collect(bench.engine.admit(item))
            expected = oracle(MODEL, item)
            assert ids_of(deltas) == expected
            assert text_of(deltas) == plain_text(expected)
            assert [delta.finish_reason for delta in deltas] == [None] * 8 + ["length"]
            assert deltas[-1].stop_reason is None
            await bench.until(bench.all_free)

    run(test)


def test_end_of_sequence_has_an_id_and_no_text() -> None:
    bos = TOKENIZER.bos_id
    assert bos is not None

    async def test() -> None:
        async with Bench(eos_ids=[bos]) as bench:
            item = request([1, 2, 3], 9, allowed_token_ids=(bos,), logprobs=0)
            [delta] = await collect(bench.engine.admit(item))
            assert (delta.token_ids, delta.text, delta.finish_reason) == ([bos], "", "stop")
            assert len(delta.logprobs) == 1

    run(test)


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("cut", [(0, 1), (3, 5), (4, 9), (10, 11)])
def test_stop_strings_never_leak_and_later_tokens_never_count(cut: tuple[int, int], runs_ahead: bool) -> None:
    """The stop string is what tokens `cut` spell, so it crosses their borders. Held up, the loop hears of all 20 at once."""
    ids = oracle(MODEL, lettered())
    text, stop = plain_text(ids), plain_text(ids[cut[0] : cut[1]])
    last = next(count for count in range(1, 21) if stop in plain_text(ids[:count]))

    async def test() -> None:
        async with Bench() as bench:
            stream = bench.engine.admit(lettered(stop=(stop, "\n"), logprobs=0))
            if runs_ahead:
                bench.block_until(lambda: bench.runner.num_steps >= 20)
            deltas = await collect(stream)
            assert text_of(deltas) == text[: text.index(stop)]
            assert ids_of(deltas) == ids[:last]
            assert sum(len(delta.logprobs) for delta in deltas) == last
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
            await bench.until(bench.all_free)
            assert len(bench.recorder.tokens) == last
            assert [stats.generation_tokens for stats in bench.recorder.finished] == [last]

    run(test)


def test_text_held_for_a_stop_string_comes_at_the_end() -> None:
    text = plain_text(oracle(MODEL, lettered()))

    async def test() -> None:
        async with Bench() as bench:
            deltas = await collect(bench.engine.admit(lettered(stop=(text[-2:] + "never",))))
            assert text_of(deltas) == text
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("length", None)
            assert len(deltas[-1].text) >= 2

    run(test)


def test_samples_have_their_own_seeds() -> None:
    async def test() -> None:
        async with Bench() as bench:
            prompt = [4, 5, 6]
            together = await collect(bench.engine.admit(request(prompt, 10, n=3, temperature=1.0, seed=70)))
            for index in range(3):
                alone = await collect(bench.engine.admit(request(prompt, 10, temperature=1.0, seed=70 + index)))
                assert ids_of(together, index) == ids_of(alone)
            assert sum(delta.finish_reason == "length" for delta in together) == 3

    run(test)


def test_only_reading_a_prompt() -> None:
    async def test() -> None:
        async with Bench() as bench:
            deltas = await collect(bench.engine.admit(request([7, 8, 9], 0, n=2, prompt_logprobs=1)))
            assert sorted(delta.index for delta in deltas) == [0, 1]
            for delta in deltas:
                assert (delta.token_ids, delta.text, delta.finish_reason) == ([], "", "length")
                assert delta.prompt_logprobs is not None
                assert [entry.token_id for entry in delta.prompt_logprobs] == [7, 8, 9]
            assert bench.recorder.tokens == []
            assert [stats.first_token for stats in bench.recorder.finished] == [None, None]

    run(test)


def test_prompt_logprobs_come_once_with_the_first_delta() -> None:
    async def test() -> None:
        async with Bench() as bench:
            deltas = await collect(bench.engine.admit(request([7, 8], 4, prompt_logprobs=0)))
            assert [delta.prompt_logprobs is not None for delta in deltas] == [True, False, False, False]

    run(test)


def test_counts_are_exact() -> None:
    async def test() -> None:
        async with Bench() as bench:
            streams = [bench.engine.admit(request([3] * size, 4, n=size)) for size in (1, 2, 3)]
            assert bench.engine.num_in_flight == 3
            for stream in streams:
                await collect(stream)
            await bench.until(bench.all_free)
            await bench.engine.stop()
        recorder = bench.recorder
        assert recorder.requests == [(1, 4, 1), (2, 4, 2), (3, 4, 3)]
        assert [count for count, _, _ in recorder.tokens] == [1] * 24
        assert sum(since_arrival is not None for _, since_arrival, _ in recorder.tokens) == 6
        assert sum(since_previous is not None for _, _, since_previous in recorder.tokens) == 18
        assert sorted(stats.prompt_tokens for stats in recorder.finished) == [1, 2, 2, 3, 3, 3]
        for stats in recorder.finished:
            assert (stats.generation_tokens, stats.cached_tokens, stats.finish_reason) == (4, 0, "length")
            assert stats.scheduled is not None
            assert stats.first_token is not None
            assert stats.last_token is not None
            assert stats.arrival <= stats.scheduled <= stats.first_token <= stats.last_token <= stats.finished
        assert sum(step.num_settled_prompt_tokens for step in recorder.steps) == 1 + 2 + 3, "samples share one read"
        last = recorder.steps[-1]
        assert (last.num_running, last.num_waiting, last.kv_cache_usage) == (0, 0, 0.0)
        assert bench.engine.num_in_flight == 0

    run(test)


def test_closing_a_stream_frees_its_blocks_and_brings_gauges_back() -> None:
    async def test() -> None:
        async with Bench() as bench:
            stream = bench.engine.admit(request([1, 2, 3], 150, n=2))
            first = await stream.__anext__()
            assert first.token_ids
            await stream.aclose()
            await stream.aclose()
            await bench.until(bench.all_free)
            assert [stats.finish_reason for stats in bench.recorder.finished] == ["abort", "abort"]
            await bench.until(lambda: bench.recorder.steps[-1].kv_cache_usage == 0.0)
            assert bench.recorder.steps[-1].num_running == 0
            rest = await collect(stream)
            assert [delta.finish_reason for delta in rest if delta.finish_reason] == ["abort", "abort"]
            assert len(bench.recorder.tokens) == len(first.token_ids) + sum(len(delta.token_ids) for delta in rest)

    run(test)


def test_cancelling_the_consumer_aborts() -> None:
    async def test() -> None:
        async with Bench() as bench:
            bench.gate.clear()
            stream = bench.engine.admit(request([1, 2, 3], 150))
            consumer = asyncio.create_task(collect(stream))
            await bench.until(bench.core.has_work)
            consumer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await consumer
            assert bench.engine.num_in_flight == 0
            bench.gate.set()
            await bench.until(bench.all_free)

    run(test)


def test_abort_before_the_engine_has_taken_the_request() -> None:
    async def test() -> None:
        async with Bench() as bench:
            bench.gate.clear()
            running = bench.engine.admit(request([1], 3))
            await bench.until(bench.core.has_work)
            early = bench.engine.admit(request([2] * 50, 100, n=2))
            await early.aclose()
            assert [delta.finish_reason for delta in await collect(early)] == ["abort", "abort"]
            bench.gate.set()
            assert len(ids_of(await collect(running))) == 3
            await bench.until(bench.all_free)
            assert sum(step.num_settled_prompt_tokens for step in bench.recorder.steps) == 1, "it was never read"
            aborted = [stats for stats in bench.recorder.finished if stats.finish_reason == "abort"]
            assert [(stats.scheduled, stats.generation_tokens) for stats in aborted] == [(None, 0)] * 2

    run(test)


def test_who_waits_for_a_grammar_waits_in_the_queue() -> None:
    async def test() -> None:
        async with Bench(max_num_seqs=1, max_num_waiting=1) as bench:
            waiting = [asyncio.ensure_future(bench.engine.compile(GrammarSource("regex", text))) for text in "ab"]
            await asyncio.sleep(0)
            with pytest.raises(AdmissionError) as refused:
                await bench.engine.compile(GrammarSource("regex", "c"))
            assert refused.value.reason == "queue_full"
            assert [grammar.source.text for grammar in await asyncio.gather(*waiting)] == ["a", "b"]
            assert (await bench.engine.compile(GrammarSource("regex", "c"))).source.text == "c"
            assert bench.recorder.rejections == ["queue_full"]

    run(test)


def test_a_full_queue_refuses() -> None:
    async def test() -> None:
        async with Bench(max_num_seqs=1, max_num_waiting=2) as bench:
            bench.gate.clear()
            streams = [bench.engine.admit(request([1], 2)), bench.engine.admit(request([2], 2))]
            with pytest.raises(AdmissionError, match="waiting") as refused:
                bench.engine.admit(request([3], 2, n=2))
            assert refused.value.reason == "queue_full"
            streams.append(bench.engine.admit(request([3], 2)))
            assert bench.recorder.rejections == ["queue_full"]
            assert len(bench.recorder.requests) == 3
            bench.gate.set()
            assert [len(ids_of(await collect(stream))) for stream in streams] == [2, 2, 2]
            assert len(ids_of(await collect(bench.engine.admit(request([4], 2))))) == 2

    run(test)


def test_what_can_never_be_served_is_no_rejection_for_load() -> None:
    async def test() -> None:
        async with Bench() as bench:
            with pytest.raises(RequestError, match="prompt is empty"):
                bench.engine.admit(request([], 2))
            assert bench.recorder.rejections == bench.recorder.requests == []
            assert bench.engine.num_in_flight == 0

    run(test)


def test_draining_finishes_what_runs_and_takes_no_more() -> None:
    async def test() -> None:
        async with Bench() as bench:
            bench.gate.clear()
            stream = bench.engine.admit(request([1, 2], 6))
            assert bench.engine.is_ready
            stopping = asyncio.create_task(bench.engine.stop())
            await bench.until(lambda: bench.engine.is_draining)
            assert not bench.engine.is_ready
            with pytest.raises(AdmissionError) as refused:
                bench.engine.admit(request([1], 1))
            assert refused.value.reason == "draining"
            bench.gate.set()
            assert len(ids_of(await collect(stream))) == 6
            await stopping
            await bench.engine.stop()
            assert bench.all_free()

    run(test)


def test_stopping_without_draining_aborts() -> None:
    async def test() -> None:
        async with Bench() as bench:
            stream = bench.engine.admit(request([1, 2], 150, n=2))
            await stream.__anext__()
            await bench.engine.stop(drain=False)
            assert bench.all_free()
            rest = await collect(stream)
            assert [delta.finish_reason for delta in rest if delta.finish_reason] == ["abort", "abort"]

    run(test)


def test_the_engines_death_reaches_everyone() -> None:
    async def test() -> None:
        async with Bench(max_num_seqs=2) as bench:
            bench.gate.clear()
            streams = [bench.engine.admit(request([1, 2], 50)) for _ in range(4)]
            consumers = [asyncio.create_task(collect(stream)) for stream in streams[:3]]
            bench.runner.error = MemoryError("no more")
            bench.gate.set()
            for result in await asyncio.gather(*consumers, return_exceptions=True):
                assert isinstance(result, EngineDeadError)
                assert "no more" not in str(result), "internals stay inside"
            with pytest.raises(EngineDeadError):
                await streams[3].__anext__()
            assert [delta async for delta in streams[3]] == [], "the error is the end"
            assert bench.engine.error is bench.runner.error
            assert not bench.engine.is_ready
            assert bench.engine.num_in_flight == 0
            with pytest.raises(AdmissionError) as refused:
                bench.engine.admit(request([1], 1))
            assert refused.value.reason == "engine_dead"
            await bench.engine.stop()

    run(test)


def test_not_started_takes_nothing() -> None:
    engine = AsyncEngine(make_engine(MODEL), TOKENIZER)
    assert not engine.is_ready
    with pytest.raises(AdmissionError) as refused:
        engine.admit(request([1], 1))
    assert refused.value.reason == "engine_dead"


def test_age_of_the_last_step_grows_only_with_work() -> None:
    async def test() -> None:
        async with Bench() as bench:
            assert bench.engine.last_step_age == 0.0
            bench.gate.clear()
            stream = bench.engine.admit(request([1], 1))
            await bench.until(lambda: bench.engine.last_step_age > 0.0)
            bench.gate.set()
            await collect(stream)
            assert bench.engine.last_step_age == 0.0

    run(test)


def test_many_streams_closed_at_random_points_leave_nothing_behind() -> None:
    async def consume(bench: Bench, number: int) -> None:
        stream = bench.engine.admit(request([number] * (1 + number % 30), 20, n=1 + number % 2))
        async for delta in stream:
            if len(delta.token_ids) and number % 3 == 0 and stream.samples[0].num_tokens > number % 17:
                await stream.aclose()

    async def test() -> None:
        async with Bench(num_blocks=40, max_num_seqs=8) as bench:
            await asyncio.gather(*(consume(bench, number) for number in range(40)))
            await bench.until(bench.all_free)
            assert bench.engine.num_in_flight == 0
            assert len(bench.recorder.finished) == 60
            assert len(bench.recorder.tokens) == sum(stats.generation_tokens for stats in bench.recorder.finished)
            assert sum(step.num_preemptions for step in bench.recorder.steps) > 0

    run(test)


def test_requests_that_belong_together_are_admitted_together_or_not_at_all() -> None:
    async def test() -> None:
        async with Bench(max_num_seqs=1, max_num_waiting=1) as bench:
            pair = [request([1], 2), request([2], 2)]
            with pytest.raises(RequestError, match="3 samples in one request, the server takes 2 in all"):
                bench.engine.admit_all([*pair, request([3], 2)])
            with pytest.raises(RequestError) as refused:
                bench.engine.admit(request([3], 2, n=3))
            assert refused.value.param == "n"
            running = bench.engine.admit(request([1], 2))
            with pytest.raises(AdmissionError):
                bench.engine.admit_all(pair)
            await collect(running)
            assert [len(ids_of(await collect(stream))) for stream in bench.engine.admit_all(pair)] == [2, 2]
        assert bench.recorder.rejections == ["queue_full"]

    run(test)


def test_what_ends_as_the_thread_stops_leaves_the_gauges_at_zero() -> None:
    reports: list[StepReport] = []
    deaths: list[BaseException] = []
    worker = EngineWorker(make_engine(MODEL), reports.append, deaths.append)
    worker.add(request([1, 2, 3]), 0)
    worker.finish(0, "abort")
    worker.stop()
    worker.start()
    worker.join()
    assert deaths == []
    assert (reports[-1].stats.num_running, reports[-1].stats.num_waiting, reports[-1].stats.kv_cache_usage) == (0, 0, 0)
