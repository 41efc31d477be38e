"""What request bodies may hold: strategies made from the fields that the schemas declare, so that a new field is tried at once.

A field gets valid values from the table `VALUES`, or, where that does not know it, from its type and bounds; `mutated` spoils
valid bodies and `foreign` makes what was never one. Neighbours: the fuzz and the comparison of streams draw from here.
"""

from __future__ import annotations

import json
from random import Random
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tests.helpers import SPECIAL_NAMES, TINY_VOCAB_SIZE
from tests.server.fakes import NAME

Body = dict[str, Any]

ID = st.integers(0, TINY_VOCAB_SIZE - 1)
TEXT = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(
        ["the end", "日本語", "\U0001f600\U0001f468\u200d\U0001f469", "e\u0301 é", "a\x00b", "\ufffd", *SPECIAL_NAMES]
    ),
)
IDS = st.lists(ID, min_size=1, max_size=12)

VALUES: dict[str, SearchStrategy[Any]] = {
    "model": st.sampled_from([NAME, "alias"]),
    "prompt": st.one_of(TEXT, IDS, st.lists(TEXT, min_size=1, max_size=3), st.lists(IDS, min_size=1, max_size=3)),
    "messages": st.lists(TEXT, min_size=1, max_size=3).map(
        lambda texts: [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    ),
    "tokens": IDS,
    "max_tokens": st.integers(1, 24),
    "min_tokens": st.integers(0, 8),
    "temperature": st.sampled_from([0, 0.0, 0.3, 1, 1.5, 2.0]),
    "top_p": st.sampled_from([0.01, 0.5, 0.95, 1]),
    "top_k": st.integers(-1, TINY_VOCAB_SIZE + 1),
    "min_p": st.sampled_from([0, 0.05, 0.5, 1]),
    "n": st.integers(1, 3),
    "best_of": st.integers(1, 4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=5)),
    "stop_token_ids": st.lists(ID, max_size=3),
    "logprobs": st.integers(0, 5),
    "prompt_logprobs": st.integers(0, 5),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.sampled_from([0.5, 1, 1.3]),
    "logit_bias": st.dictionaries(ID.map(str), st.integers(-100, 100), max_size=3),
    "allowed_token_ids": st.lists(ID, min_size=1, max_size=20, unique=True),
    "bad_words": st.lists(TEXT, max_size=3),
    "truncate_prompt_tokens": st.integers(1, 20),
    "priority": st.integers(-5, 5),
    "latents": st.sampled_from(["last", "all"]),
}
"""Valid values of the fields whose type says too little, kept small so that a request takes milliseconds."""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, 5e-324, float("nan"), float("inf")]),
    st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=12),  # lone surrogates too
    TEXT,
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
"""What JSON can say, and NaN and infinities, which it cannot."""


def values(annotation: Any, constraints: tuple[Any, ...] = ()) -> SearchStrategy[Any]:
    """JSON values that a field of this type mostly accepts; types that validate themselves get anything."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for more in arguments[1:] for item in (more.metadata if isinstance(more, FieldInfo) else [more])]
        return values(arguments[0], (*constraints, *inner))
    if origin in (Union, UnionType):
        return st.one_of([values(argument, constraints) for argument in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (list, tuple, set, frozenset):
        return st.lists(values(arguments[0]) if arguments else ANYTHING, max_size=4)
    if origin is dict:
        return st.dictionaries(values(arguments[0]).map(str), values(arguments[1]), max_size=4)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return st.fixed_dictionaries({}, optional=field_values(annotation))
    return _scalars(annotation, constraints)


def _scalars(annotation: Any, constraints: tuple[Any, ...]) -> SearchStrategy[Any]:
    bounds: dict[str, Any] = {}
    for constraint in constraints:
        for kind, name in (
            (annotated_types.Ge, "ge"),
            (annotated_types.Gt, "gt"),
            (annotated_types.Le, "le"),
            (annotated_types.Lt, "lt"),
        ):
            if isinstance(constraint, kind):
                bounds[name] = getattr(constraint, name)
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if annotation is int:
        return st.integers(low if "gt" not in bounds else low + 1, high if "lt" not in bounds else high - 1)
    if annotation is float:
        return st.floats(
            low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_nan=False, allow_infinity=False
        )
    known = {bool: st.booleans(), str: TEXT, NoneType: st.none()}
    return known.get(annotation, ANYTHING)


def field_values(kind: type[BaseModel]) -> dict[str, SearchStrategy[Any]]:
    """Per field of a schema the values that it mostly accepts."""
    return {
        name: VALUES[name] if name in VALUES else values(field.annotation, tuple(field.metadata))
        for name, field in kind.model_fields.items()
    }


def valid(kind: type[BaseModel], without: frozenset[str] = frozenset()) -> SearchStrategy[Body]:
    """Bodies that are mostly valid: the required fields and up to six others, none of `without`. Fields may still conflict."""
    known = field_values(kind)
    required = {name: known[name] for name, field in kind.model_fields.items() if field.is_required()}
    names = sorted(set(known) - set(required) - without)
    # Evenly, which hypothesis' own choices are not: over a few hundred bodies every field comes up often.
    chosen = st.integers(0, 2**60).map(Random).map(lambda rng: rng.sample(names, rng.randint(0, min(6, len(names)))))
    bodies = chosen.flatmap(lambda some: st.fixed_dictionaries({**required, **{name: known[name] for name in some}}))
    return st.builds(_streamed, bodies, st.booleans() if "stream" in names else st.just(False))


def _streamed(body: Body, stream: bool) -> Body:
    """Most single fields are drawn seldom; whether to stream is asked of every body."""
    return {**body, "stream": True} if stream else {name: value for name, value in body.items() if name != "stream_options"}


def mutated(kind: type[BaseModel]) -> SearchStrategy[Body]:
    """Valid bodies with up to three fields spoiled, removed, unknown, or wrapped in lists and objects."""
    names = st.one_of(st.sampled_from(sorted(kind.model_fields)), st.text(max_size=8))

    def change(body: Body, changes: list[tuple[str, str, Any]]) -> Body:
        changed = dict(body)
        for name, how, value in changes:
            if how == "remove":
                changed.pop(name, None)
            elif how == "wrap":
                changed[name] = [changed.get(name)]
            elif how == "nest":
                changed[name] = {name: changed.get(name)}
            elif how == "text":
                changed[name] = str(changed.get(name))
            else:
                changed[name] = value
        return changed

    hows = st.sampled_from(["remove", "wrap", "nest", "text", "replace", "replace", "replace"])
    return st.builds(change, valid(kind), st.lists(st.tuples(names, hows, ANYTHING), max_size=3))


def foreign(kind: type[BaseModel]) -> SearchStrategy[bytes]:
    """Bytes that are hardly a body: other JSON, damaged JSON, endless numbers, deep nesting, any bytes at all."""

    def damage(body: Body, how: str, place: int) -> bytes:
        text = dump(body)
        place %= len(text)
        return {
            "cut": text[:place],
            "twice": text + text,
            "byte": text[:place] + b"\xff" + text[place:],
            "long": text.replace(b"1", b"9" * 5000, 1),
            "deep": b'{"prompt":' + b"[" * 3000 + b"]" * (3000 - place) + b"}",
            "large": text[:-1] + b" " * 20_000 + b"}",
            "key": text[:-1] + b"," + text[1:-1] + b"}",
        }[how]

    hows = st.sampled_from(["cut", "twice", "byte", "long", "deep", "large", "key"])
    return st.one_of(
        ANYTHING.map(dump),
        st.dictionaries(st.sampled_from(sorted(kind.model_fields)), ANYTHING, max_size=5).map(dump),
        st.builds(damage, valid(kind), hows, st.integers(0, 2**16)),
        st.binary(max_size=40),
    )


def dump(content: Any) -> bytes:
    """JSON, with NaN and infinities as Python writes them and lone surrogates as escapes."""
    return json.dumps(content).encode()
