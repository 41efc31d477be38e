"""Every parameter of a completion over a real engine: the output changes as it should, and what is out of bounds is a 400 that
names it. What generation comes to in each shape of request is `test_http.py`'s; forms of output are `test_structured.py`'s."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrt_core.checkpoint import load_model
from lrt_core.generate import generate, read
from lrt_core.sampling_params import SamplingParams
from server.api.errors import ApiError
from server.api.schemas import CompletionRequest, GenerationFields, parse_fields
from server.api.values import MAX_CHARACTERS, MAX_STRINGS
from tests.helpers import TINY_VOCAB_SIZE, tiny_tokenizer
from tests.server.fakes import assert_envelope, events
from tests.server.test_http import Api

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
TOKENIZER = tiny_tokenizer()
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
SAMPLED = {**GREEDY, "temperature": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lrt_core.checkpoint import save_checkpoint
    from tests.helpers import contracting_model

    save_checkpoint(tmp_path_factory.mktemp("matrix") / "checkpoint", contracting_model("layerwise"), TOKENIZER)
    return tmp_path_factory.getbasetemp() / "matrix0" / "checkpoint"


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[Api]:
    yield Api(folder, max_num_seqs=8)


def body_of(api: Api, base: dict[str, Any], **fields: Any) -> dict[str, Any]:
    (response,) = api.complete({**base, **fields})
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def choice_of(api: Api, base: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return body_of(api, base, **fields)["choices"][0]  # type: ignore[no-any-return]


def ids_of(api: Api, base: dict[str, Any] = GREEDY, **fields: Any) -> list[int]:
    return choice_of(api, base, **fields)["token_ids"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.7},
        {"logit_bias": {"20": 100, "21": 99.5}},
        {"allowed_token_ids": [30, 31, 32]},
        {"temperature": 1.5, "seed": 3, "min_p": 0.9},
        {"temperature": 1.5, "seed": 3, "top_k": 2},
        {"temperature": 1.5, "seed": 3, "top_p": 0.05},
        {"temperature": 1.5, "seed": 4},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_what_is_drawn_is_the_oracles_and_another_than_without(api: Api, folder: Path, fields: dict[str, Any]) -> None:
    base = GREEDY if "temperature" not in fields else SAMPLED
    found = ids_of(api, base, **fields)
    bias = {int(key): value for key, value in fields.get("logit_bias", {}).items()}
    params = {"temperature": 0.0, **{key: value for key, value in fields.items() if key != "logit_bias"}, "logit_bias": bias}
    allowed = params.pop("allowed_token_ids", None)
    exact = SamplingParams(**params, allowed_token_ids=None if allowed is None else tuple(allowed))
    assert found == list(generate(load_model(folder, dtype=torch.float32), PROMPT, 12, exact))
    assert found != ids_of(api, base)


def test_bias_and_allowed_ids_and_penalties_do_what_they_say(api: Api) -> None:
    assert set(ids_of(api, logit_bias={"20": 100})) == {20}
    assert set(ids_of(api, SAMPLED, allowed_token_ids=[30, 31])) <= {30, 31}
    forbidden = ids_of(api)[0]
    assert forbidden not in ids_of(api, logit_bias={str(forbidden): -100})
    crowded = ids_of(api, logit_bias={"20": 100, "21": 99.5}, frequency_penalty=2)
    assert set(crowded) == {20, 21}, "a penalty goes before the bias"


def test_bad_words(api: Api) -> None:
    word = TOKENIZER.token_bytes(65).decode()
    pushed = {"logit_bias": {"65": 100, "66": 90}}
    assert set(ids_of(api, **pushed)) == {65}
    assert 65 not in ids_of(api, **pushed, bad_words=[word])
    pair = ids_of(api, **pushed, bad_words=["AA"])
    assert "AA" not in TOKENIZER.decode(pair) and 65 in pair, "only what ends the word is forbidden"


def test_min_tokens_puts_every_end_off(api: Api) -> None:
    first = ids_of(api)[0]
    ended = choice_of(api, GREEDY, stop_token_ids=[first])
    assert (ended["token_ids"], ended["finish_reason"], ended["stop_reason"]) == ([first], "stop", first)
    late = choice_of(api, GREEDY, stop_token_ids=[first], min_tokens=5)
    assert len(late["token_ids"]) >= 5 and first not in late["token_ids"][:5]
    eos = min(TOKENIZER.eos_ids)
    wanted = {"logit_bias": {str(eos): 100}, "ignore_eos": False}
    assert ids_of(api, **wanted) == [eos]
    assert eos not in (found := ids_of(api, **wanted, min_tokens=4))[:4] and found[4] == eos
    text = {"logit_bias": {"65": 100}, "stop": "A"}
    assert len(ids_of(api, **text)) == 1 and len(ids_of(api, **text, min_tokens=3)) == 3


def test_stops_are_cut_off_unless_wanted(api: Api) -> None:
    pushed = {"logit_bias": {"65": 100}, "frequency_penalty": 0}
    cut = choice_of(api, GREEDY, **pushed, stop=["AAA"])
    assert (cut["text"], cut["stop_reason"], cut["token_ids"]) == ("", "AAA", [65, 65, 65])
    kept = choice_of(api, GREEDY, **pushed, stop=["AAA"], include_stop_str_in_output=True)
    assert (kept["text"], kept["stop_reason"]) == ("AAA", "AAA")
    by_id = choice_of(api, GREEDY, **pushed, stop_token_ids=[65])
    assert (by_id["text"], by_id["stop_reason"]) == ("", 65)
    assert choice_of(api, GREEDY, **pushed, stop_token_ids=[65], include_stop_str_in_output=True)["text"] == "A"


def test_ignore_eos(api: Api) -> None:
    wanted = {"logit_bias": {str(min(TOKENIZER.eos_ids)): 100}}
    assert choice_of(api, GREEDY, **wanted, ignore_eos=False)["finish_reason"] == "stop"
    assert choice_of(api, GREEDY, **wanted)["finish_reason"] == "length"


def test_best_of_answers_the_likeliest(api: Api) -> None:
    fields = {**SAMPLED, "logprobs": 0}
    every = body_of(api, fields, n=6)["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) / 12 for choice in every]
    best = body_of(api, fields, n=2, best_of=6)
    order = sorted(range(6), key=lambda index: means[index], reverse=True)[:2]
    assert [choice["token_ids"] for choice in best["choices"]] == [every[index]["token_ids"] for index in order]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 72, "every sample was generated"
    assert body_of(api, SAMPLED, best_of=2)["choices"][0]["logprobs"] is None, "ranked by what was not asked for"


def test_prompt_logprobs_are_the_oracles(api: Api, folder: Path) -> None:
    entries = choice_of(api, GREEDY, prompt_logprobs=2)["prompt_logprobs"]
    exact = torch.log_softmax(read(load_model(folder, dtype=torch.float32), PROMPT).logits, -1)
    assert entries[0] is None and len(entries) == len(PROMPT)
    for position, (entry, token) in enumerate(zip(entries[1:], PROMPT[1:], strict=True)):
        row = exact[position]
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert own["rank"] == 1 + int((row > row[token]).sum())
        assert own["decoded_token"] == TOKENIZER.decode([token])
        assert {str(id) for id in row.topk(2).indices.tolist()} <= set(entry) and len(entry) <= 3
    again = choice_of(api, GREEDY, prompt_logprobs=2)["prompt_logprobs"]
    assert [set(entry or ()) for entry in again] == [set(entry or ()) for entry in entries], "with a prefix hit too"


def latents_of(choice: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    given = choice["latents"]
    assert given["dtype"] == "float32"
    return np.frombuffer(base64.b64decode(given["data"]), "<f4").reshape(given["shape"])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5, "n": 3}])
def test_latents_are_the_oracles(api: Api, folder: Path, sampling: dict[str, Any]) -> None:
    model = load_model(folder, dtype=torch.float32)
    for choice in body_of(api, GREEDY, **sampling, latents="all")["choices"]:
        computed = [*PROMPT, *choice["token_ids"][:-1]]
        exact = read(model, computed).latents.numpy()
        found = latents_of(choice)
        assert found.shape == exact.shape == (len(computed), model.config.hidden_size)
        assert np.abs(found - exact).max() < 1e-3 * np.abs(exact).max() + 1e-3
    whole = latents_of(choice_of(api, GREEDY, latents="all"))
    assert np.array_equal(latents_of(choice_of(api, GREEDY, latents="last")), whole[-1:])
    (response,) = api.complete({**GREEDY, "latents": "last", "stream": True})
    ends = [chunk["choices"][0] for chunk in events(response)]
    assert np.array_equal(latents_of(ends[-1]), whole[-1:]) and all("latents" not in choice for choice in ends[:-1])


def test_special_tokens_in_text(api: Api) -> None:
    bos = TOKENIZER.bos_id
    prompt = {"prompt": "<|bos|>hi"}
    plain = choice_of(api, GREEDY, **prompt)["prompt_token_ids"]
    assert plain.count(bos) == 1 and plain[0] == bos, "the checkpoint's own; the text stays text"
    assert choice_of(api, GREEDY, **prompt, add_special_tokens=False)["prompt_token_ids"] == plain[1:]
    assert choice_of(api, GREEDY, **prompt, allow_special=True)["prompt_token_ids"][:2] == [bos, bos]


def test_truncation_keeps_the_end(api: Api) -> None:
    cut = choice_of(api, GREEDY, truncate_prompt_tokens=3)
    assert cut["prompt_token_ids"] == PROMPT[-3:] and cut["token_ids"] == ids_of(api, GREEDY, prompt=PROMPT[-3:])
    long = list(range(1, 200)) * 2
    fitting = choice_of(api, GREEDY, prompt=long, truncate_prompt_tokens=-1)
    room = api.engine.config.max_model_len
    assert fitting["prompt_token_ids"] == long[-(room - 1) :] and fitting["finish_reason"] == "length"


def test_names_of_a_request(api: Api) -> None:
    assert body_of(api, GREEDY, request_id="my-request.1")["id"] == "my-request.1"
    assert body_of(api, GREEDY, user="me")["id"].startswith("cmpl-")


def test_salts_and_priorities_change_no_token(api: Api) -> None:
    prompt = {"prompt": [40] * 40}
    first = body_of(api, GREEDY, **prompt, cache_salt="a")
    again = body_of(api, GREEDY, **prompt, cache_salt="a")
    other = body_of(api, GREEDY, **prompt, cache_salt="b", priority=-3)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len({tuple(body["choices"][0]["token_ids"]) for body in (first, again, other)}) == 1


def test_lower_priorities_are_served_first(folder: Path) -> None:
    api = Api(folder, max_num_seqs=1)
    ranks = [5, 3, -2, 4]
    served: list[int] = []
    place = api.engine.engine.scheduler._place
    api.engine.engine.scheduler._place = lambda sequence, matched: (  # type: ignore[method-assign]
        served.append(sequence.request.priority),
        place(sequence, matched),
    )[1]
    api.complete(*({**GREEDY, "max_tokens": 40, "priority": rank} for rank in ranks))
    assert sorted(served[1:]) == served[1:] and sorted(served) == sorted(ranks), "the first found nobody beside it"


def test_usage_so_far_in_every_chunk(api: Api) -> None:
    (response,) = api.complete({**GREEDY, "stream": True, "stream_options": {"continuous_usage_stats": True}})
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(response)]
    assert counts == sorted(counts) and counts[-1] == 12 and len(counts) > 1


BAD: list[tuple[str, Any, str]] = [
    ("min_tokens", -1, "greater than or equal to 0"),
    ("min_tokens", 13, "more than max_tokens"),
    ("min_p", 1.1, "less than or equal to 1"),
    ("presence_penalty", 2.1, "less than or equal to 2"),
    ("frequency_penalty", -2.1, "greater than or equal to -2"),
    ("repetition_penalty", 0, "greater than or equal to 0.01"),
    ("logit_bias", {"x": 1}, "token ids as keys"),
    ("logit_bias", {"1": 101}, "from -100 to 100"),
    ("logit_bias", {str(TINY_VOCAB_SIZE): 1}, "outside"),
    ("allowed_token_ids", [], "must not be empty"),
    ("allowed_token_ids", [TINY_VOCAB_SIZE], "outside"),
    ("bad_words", [""], "empty string"),
    ("bad_words", "word", "list of strings"),
    ("stop", ["x"] * (MAX_STRINGS + 1), "more than"),
    ("stop_token_ids", [TINY_VOCAB_SIZE], "outside"),
    ("stop_token_ids", [1.5], "integer token ids"),
    ("include_stop_str_in_output", 1, "valid boolean"),
    ("best_of", 0, "greater than or equal to 1"),
    ("prompt_logprobs", 21, "less than or equal to 20"),
    ("logprobs", 21, "less than or equal to 20"),
    ("truncate_prompt_tokens", 0, "at least 1"),
    ("truncate_prompt_tokens", 10_000, "maximum context length"),
    ("priority", 2**63, "less than"),
    ("cache_salt", "", "at least 1 character"),
    ("user", "u" * 513, "at most 512"),
    ("request_id", "a b", "letters, digits"),
    ("latents", "first", "'last' or 'all'"),
    ("add_special_tokens", "yes", "valid boolean"),
    ("allow_special", 1, "valid boolean"),
    ("suffix", "x", "suffix"),
]


@pytest.mark.parametrize(
    ("field", "value", "message"), BAD, ids=[f"{field}-{index}" for index, (field, _, _) in enumerate(BAD)]
)
def test_what_is_out_of_bounds_is_refused_by_name(api: Api, field: str, value: Any, message: str) -> None:
    (response,) = api.complete({**GREEDY, field: value})
    assert_envelope(response, 400, response.json()["error"]["code"], field)
    assert message in response.json()["error"]["message"]


def test_stops_are_bounded_together() -> None:
    with pytest.raises(ApiError, match="characters in all"):
        parse_fields(CompletionRequest, {"prompt": "x", "stop": "x" * (MAX_CHARACTERS + 1)})


def test_what_does_not_go_together(api: Api) -> None:
    for fields, param in (
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"bad_words": ["A"], "allowed_token_ids": [65]}, "allowed_token_ids"),
    ):
        (response,) = api.complete({**GREEDY, **fields})
        assert response.json()["error"]["param"] == param, response.text
        assert response.status_code == 400


def test_every_field_is_tried_somewhere() -> None:
    """Fields without a test of their own here, and where they have one."""
    elsewhere = {
        *("model", "prompt", "max_tokens", "temperature", "n", "seed", "echo", "stream", "stream_options", "return_token_ids"),
        *("response_format", "structured_outputs"),
    }
    tried = {field for field, _, _ in BAD} | {"top_p", "top_k", "ignore_eos"} | elsewhere
    assert set(CompletionRequest.model_fields) | set(GenerationFields.model_fields) <= tried
    assert math.isclose(CompletionRequest(prompt="x").repetition_penalty, 1)  # type: ignore[arg-type]
