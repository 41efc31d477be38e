"""The cache of compiled grammars, and the process that hostile ones are tried out in."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lrt_core.grammar import Grammar, GrammarError, GrammarSource
from server.engine import grammars
from server.engine.grammar_probe import Probe, byte_compiler, try_out
from server.engine.grammars import GrammarCache
from server.engine.request import AdmissionError
from tests.helpers import tiny_tokenizer


def with_cache(play: Callable[[GrammarCache], Awaitable[None]], **bounds: Any) -> None:
    async def run() -> None:
        tokenizer = tiny_tokenizer()
        cache = GrammarCache(tokenizer, tokenizer.eos_ids, **bounds)
        try:
            await play(cache)
        finally:
            await cache.close()

    asyncio.run(run())


def regex(text: str) -> GrammarSource:
    return GrammarSource("regex", text)


def test_a_source_is_compiled_once_for_all_that_ask() -> None:
    async def play(cache: GrammarCache) -> None:
        first, second = await asyncio.gather(cache.get(regex("a+")), cache.get(GrammarSource("regex", "a+", "elsewhere")))
        assert first._matcher is second._matcher
        assert (first.source.origin, second.source.origin) == ("grammar", "elsewhere")
        assert (await cache.get(regex("a+")))._matcher is first._matcher
        cache.forget(regex("a+"))
        assert (len(cache), cache.size) == (0, 0)
        assert (await cache.get(regex("a+")))._matcher is not first._matcher

    with_cache(play)


def test_number_and_size_are_bounded_and_the_latest_stay() -> None:
    async def play(cache: GrammarCache) -> None:
        kept = await cache.get(regex("x"))
        for text in ("a" * 10, "b" * 10, "x", "c" * 10):
            await cache.get(regex(text))
        assert len(cache) == 3
        assert (await cache.get(regex("x")))._matcher is kept._matcher
        await cache.get(regex("d" * 90))
        assert cache.size <= 100
        await cache.get(regex("e" * 1000))
        assert len(cache) == 1

    with_cache(play, max_grammars=3, max_bytes=100)


def test_what_is_refused_stays_refused_and_the_rest_goes_on() -> None:
    async def play(cache: GrammarCache) -> None:
        for _ in range(2):
            with pytest.raises(GrammarError, match="unclosed group"):
                await cache.get(regex("(a"))
        await cache.get(regex("a"))

    with_cache(play)


def test_who_gives_up_takes_the_grammar_from_nobody() -> None:
    async def play(cache: GrammarCache) -> None:
        first = asyncio.ensure_future(cache.get(regex("a{1,50}")))
        second = asyncio.ensure_future(cache.get(regex("a{1,50}")))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).source == regex("a{1,50}")

    with_cache(play)


def test_who_waits_is_counted_and_refused_when_the_cache_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(cache: GrammarCache) -> None:
        begun, goes_on, check = threading.Event(), threading.Event(), cache._probe.check

        def check_slowly(source: GrammarSource) -> None:
            begun.set()
            assert goes_on.wait(60)
            check(source)

        monkeypatch.setattr(cache._probe, "check", check_slowly)
        answers = [asyncio.ensure_future(cache.get(regex("a" * count))) for count in range(1, 6)]
        await asyncio.to_thread(begun.wait)
        assert cache.num_waiting == 5
        closing = asyncio.ensure_future(cache.close())
        await asyncio.sleep(0)
        goes_on.set()
        first, *others = await asyncio.gather(*answers, return_exceptions=True)
        assert isinstance(first, Grammar)
        assert [str(other) for other in others if isinstance(other, AdmissionError)] == [
            "the server is shutting down and takes no new requests"
        ] * 4
        assert cache.num_waiting == 0
        await closing

    monkeypatch.setattr(grammars, "MAX_AT_ONCE", 1)
    with_cache(play)


def test_a_cheap_form_does_not_wait_for_dear_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(cache: GrammarCache) -> None:
        goes_on, check = threading.Event(), cache._probe.check

        def check_slowly(source: GrammarSource) -> None:
            assert not source.text.startswith("dear") or goes_on.wait(60)
            check(source)

        monkeypatch.setattr(cache._probe, "check", check_slowly)
        dear = [asyncio.ensure_future(cache.get(regex(f"dear{number}"))) for number in range(grammars.MAX_AT_ONCE - 1)]
        for text in ("cheap", "cheaper"):
            assert isinstance(await asyncio.wait_for(cache.get(regex(text)), 60), Grammar)
        assert not any(task.done() for task in dear)
        goes_on.set()
        await asyncio.gather(*dear)

    with_cache(play)


def test_who_has_waited_too_long_is_refused_but_not_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(cache: GrammarCache) -> None:
        monkeypatch.setattr(grammars, "MAX_WAIT_SECONDS", -1.0)
        with pytest.raises(AdmissionError, match="being tried out") as refused:
            await cache.get(regex("a"))
        assert refused.value.reason == "queue_full" and len(cache) == 0
        monkeypatch.undo()
        await cache.get(regex("a"))

    with_cache(play)


def chain(length: int) -> str:
    """A schema of references to references."""
    links = ",".join(f'"d{i}":{{"type":"object","properties":{{"a":{{"$ref":"#/$defs/d{i + 1}"}}}}}}' for i in range(length))
    return f'{{"$ref":"#/$defs/d0","$defs":{{{links},"d{length}":{{"type":"integer"}}}}}}'


HOSTILE = {
    "endless arithmetic": GrammarSource("json", '{"type":"integer","multipleOf":9999991}'),
    "deep references": GrammarSource("json", chain(900)),
    "doubling terminals": GrammarSource(
        "grammar", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(24)) + 'A24: "a"\n'
    ),
    "a million forced blanks": GrammarSource("regex", " {1000000}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_and_the_next_one_compiled(name: str) -> None:
    probe = Probe()
    try:
        with pytest.raises(GrammarError, match=r"takes too long|too deeply or too large|too big"):
            probe.check(HOSTILE[name])
        probe.check(regex("a+"))
    finally:
        probe.close()


@pytest.mark.parametrize(
    "source",
    [
        regex("(a{1,1000}){1,1000}"),
        regex("((a|aa)+)+"),
        regex("(a|b)*a(a|b){1000}"),
        regex("(" * 200 + "a" + ")" * 200),
        GrammarSource("json", '{"enum":[' + ",".join(f'"value-{i}"' for i in range(4000)) + "]}"),
        GrammarSource("json", chain(30)),
        GrammarSource("json", '{"type":"array","items":{"type":"integer"},"minItems":100000,"maxItems":1000000}'),
        GrammarSource("json", '{"$ref":"#/$defs/n","$defs":{"n":{"type":"array","items":{"$ref":"#/$defs/n"}}}}'),
        GrammarSource("grammar", 'start: e\ne: e e | e e e | "a" | '),
    ],
)
def test_what_looks_hostile_and_is_not_passes(source: GrammarSource) -> None:
    assert try_out(byte_compiler(), source) is None


def test_hostile_and_harmless_ones_at_once_each_get_their_answer() -> None:
    probe, sources = Probe(), [*HOSTILE.values(), *(regex("a" * count) for count in range(1, 9))]

    def refusal(source: GrammarSource) -> str | None:
        try:
            probe.check(source)
        except GrammarError as error:
            return str(error)
        return None

    try:
        with ThreadPoolExecutor(len(sources)) as threads:
            answers = list(threads.map(refusal, sources))
    finally:
        probe.close()
    assert all(answers[: len(HOSTILE)]) and answers[len(HOSTILE) :] == [None] * 8, answers


def test_a_crash_says_something_else_than_a_lack_of_time() -> None:
    probe = Probe()
    try:
        with pytest.raises(GrammarError, match="too deeply or too large"):
            probe.check(HOSTILE["deep references"])
        with pytest.raises(GrammarError, match="takes too long"):
            probe.check(HOSTILE["endless arithmetic"])
    finally:
        probe.close()


def test_a_probe_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    probe = Probe()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="has ended: exit status 1"):
            probe.check(regex("a"))
    probe.close()


def test_a_probe_that_dies_with_a_grammar_says_so_to_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one that was started meanwhile is none of their business."""
    probe, hand_over = Probe(), Probe._hand_over
    probe.check(regex("a"))

    def hand_over_and_kill(self: Probe, connection: socket.socket) -> subprocess.Popen[bytes]:
        process = self._process
        assert process is not None
        process.kill()
        process.wait()
        monkeypatch.undo()
        probe.check(regex("b"))
        return process

    try:
        monkeypatch.setattr(Probe, "_hand_over", hand_over_and_kill)
        with pytest.raises(RuntimeError, match="has ended: exit status -9"):
            probe.check(regex("c"))
        assert Probe._hand_over is hand_over
    finally:
        probe.close()


def test_a_probe_that_died_is_started_anew() -> None:
    probe = Probe()
    try:
        probe.check(regex("a"))
        assert probe._process is not None
        probe._process.kill()
        probe._process.wait()
        probe.check(regex("b"))
    finally:
        probe.close()
