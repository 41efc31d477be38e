"""A stream says byte for byte what a plain response says, over two hundred random requests: every sampling field, several
prompts and samples, text of many bytes, stop strings across the borders of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lrt_core.checkpoint import save_checkpoint
from lrt_core.tokenizer import Tokenizer
from server.api.schemas import CompletionRequest
from tests.helpers import MERGES, SPECIAL_NAMES, tiny_config, tiny_model, tiny_tokenizer
from tests.server.bodies import Body, valid
from tests.server.fakes import NAME, events
from tests.server.test_http import Api

PIECES = [text.encode() for text in ("日本", "é", "ü", "\U0001f600", "ж", "—")]
"""What the model of these tests often says: some pieces are tokens, some only halves of them are."""
WITHOUT = frozenset({"stream", "stream_options", "stop", "seed", "best_of"})
"""Fields that the test sets itself, or (best_of) that are about choosing when all is over."""


def many_bytes_tokenizer() -> Tokenizer:
    """The tiny tokenizer with half characters among its tokens."""
    tiny = tiny_tokenizer()
    halves = [b"\xe6\x97", b"\xa5\xe6\x9c", b"\xac", b"\xc3", b"\xf0\x9f", b"\x98\x80", b"\xd0\xb6", b"\xe2\x80\x94"]
    merges = [pair.encode() for pair in MERGES]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks.update({piece: 256 + index for index, piece in enumerate([*merges, *(half for half in halves if len(half) > 1)])})
    special = {name: len(ranks) + index for index, name in enumerate(SPECIAL_NAMES)}
    return Tokenizer(tiny.pattern, ranks, special, "<|bos|>", ["<|assistant_end|>"], True, None)


@pytest.fixture
def api(tmp_path: Path) -> Api:
    """Deterministic, so that logprobs can be compared to the bit."""
    tokenizer = many_bytes_tokenizer()
    model = tiny_model(tiny_config(vocab_size=tokenizer.vocab_size))
    save_checkpoint(tmp_path / "checkpoint", model, tokenizer)
    return Api(tmp_path / "checkpoint", deterministic=True, max_num_seqs=32)


class Streamed:
    """The choices, usage and order of a stream's chunks, which must be well-formed."""

    def __init__(self, response: httpx.Response, has_usage: bool) -> None:
        chunks = events(response)
        assert not any("error" in chunk for chunk in chunks)
        self.usage: Body | None = None
        if has_usage:
            last = chunks.pop()
            assert last["choices"] == []
            self.usage = last["usage"]
        assert all(
            len(chunk["choices"]) == 1 and chunk["usage"] is None if has_usage else "usage" not in chunk for chunk in chunks
        )
        heads = [{key: value for key, value in chunk.items() if key not in ("choices", "usage")} for chunk in chunks]
        assert all(head == heads[0] for head in heads)
        parts = [choice for chunk in chunks for choice in chunk["choices"]]
        self.order = [part["index"] for part in parts]
        self.texts = [part["text"] for part in parts]
        self.choices = [join([part for part in parts if part["index"] == index]) for index in sorted(set(self.order))]


def join(parts: Sequence[Body]) -> Body:
    """The choice that its chunks make up: texts and lists one after the other, the rest said once."""
    assert [part["finish_reason"] is not None for part in parts] == [*[False] * (len(parts) - 1), True]
    whole: Body = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = value if key not in whole or key == "index" else _add(whole[key], value)
    return whole


def _add(known: Any, more: Any) -> Any:
    if known is None or more is None:
        return known if more is None else more
    if isinstance(known, dict):
        return {key: _add(value, more[key]) for key, value in known.items()}
    return known + more


def starts(choices: Sequence[Body], body: Body, api: Api) -> list[str]:
    """The echoed prompt of every choice, empty without echo."""
    if not body.get("echo"):
        return [""] * len(choices)
    prompt = body["prompt"]
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    texts = [item if isinstance(item, str) else api.engine.tokenizer.decode(item) for item in prompts]
    return [texts[choice["index"] // body.get("n", 1)] for choice in choices]


@pytest.mark.slow
def test_a_stream_says_what_a_plain_response_says(api: Api) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        body = {"model": NAME, "ignore_eos": data.draw(st.booleans()), **data.draw(valid(CompletionRequest, WITHOUT))}
        body["seed"] = data.draw(st.integers(0, 2**32))
        (reference,) = api.complete(body)
        assume(reference.status_code == 200)
        full = reference.json()["choices"]
        body["stop"] = stop = data.draw(
            stops([choice["text"].removeprefix(start) for choice, start in zip(full, starts(full, body, api), strict=True)])
        )
        options = data.draw(st.sampled_from([{}, {"stream_options": {"include_usage": True}}]))
        plain, streamed = api.complete(body, {**body, "stream": True, **options})
        assert (plain.status_code, streamed.status_code) == (200, 200), (plain.text, streamed.text)
        stream, answer = Streamed(streamed, bool(options)), plain.json()
        assert stream.choices == answer["choices"]
        assert "".join(stream.texts).encode() or not any(choice["text"] for choice in answer["choices"])
        if stream.usage is not None:
            assert without_cached(stream.usage) == without_cached(answer["usage"])
        check_order(stream.order, body.get("n", 1))
        count(seen, stream, body)
        if len(stop) == 1 and not body.get("min_tokens"):
            check_stop(full, answer["choices"], starts(full, body, api), stop[0], bool(body.get("include_stop_str_in_output")))
            seen["crossing"] += len(stop[0]) > 2 and any(choice["stop_reason"] == stop[0] for choice in answer["choices"])

    compare()
    assert min(seen[what] for what in ("several", "many bytes", "logprobs", "echo", "usage", "crossing")) >= 5, seen


def stops(texts: Sequence[str]) -> st.SearchStrategy[list[str]]:
    """Stop strings, most of them pieces of these texts, of up to eight characters."""
    pieces = [text[start : start + size] for text in texts for size in (1, 2, 3, 5, 8) for start in range(len(text) - size + 1)]
    known = st.sampled_from(pieces) if pieces else st.text(min_size=1, max_size=3)
    return st.one_of(known.map(lambda piece: [piece]), st.lists(st.one_of(known, st.text(min_size=1, max_size=3)), max_size=4))


def without_cached(usage: Body) -> Body:
    """Usage but for the tokens found in the cache, of which the later request finds more."""
    return {key: value for key, value in usage.items() if key != "prompt_tokens_details"}


def check_order(order: Sequence[int], n: int) -> None:
    """The samples of a prompt come on together: each has begun before any of them gets on."""
    for first in range(0, max(order) + 1, n):
        own = [index for index in order if first <= index < first + n]
        assert sorted(own[:n]) == list(range(first, first + n)), order


def check_stop(full: Sequence[Body], cut: Sequence[Body], starts: Sequence[str], stop: str, included: bool) -> None:
    """With the stop string every text is what it was without, up to the first place of the string."""
    for whole, part, start in zip(full, cut, starts, strict=True):
        text = whole["text"].removeprefix(start)
        place = text.find(stop)
        if place < 0:
            assert part["text"] == whole["text"] and part["stop_reason"] == whole["stop_reason"]
        else:
            assert part["text"] == start + text[: place + (len(stop) if included else 0)]
            assert (part["finish_reason"], part["stop_reason"]) == ("stop", stop)


def count(seen: Counter[str], stream: Streamed, body: Body) -> None:
    """What the requests came to, so that the comparison is known to have met it."""
    text = "".join(stream.texts)
    seen["several"] += len(stream.choices) > 1 and len(stream.order) > len(stream.choices)
    seen["many bytes"] += any(ord(character) > 127 and character != "\ufffd" for character in text)
    seen["logprobs"] += body.get("logprobs") is not None
    seen["echo"] += bool(body.get("echo"))
    seen["usage"] += stream.usage is not None
