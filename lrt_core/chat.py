"""Conversations to token ids: a checkpoint's Jinja2 chat template, rendered in a sandbox, from which no message can break out.

A special token's name becomes that token where the template wrote it, and stays text where a message did. To tell one from the
other every message's text is rendered between two marks, characters that occur nowhere else; special tokens are then looked
for in the template's own characters alone. A template may trim messages, change their case, choose by what they hold, leave
them out or repeat them. One that does more to a message (splits, escapes or shortens it) shows by its result being another
without the marks; messages that could have no part in a special token are rendered without them then, all others are refused.

Neighbours: `tokenizer.py` holds the template's source, `server/api/chat.py` renders requests, and fine-tuning takes `render`'s
ids with its mask.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lrt_core.tokenizer import Tokenizer

MAX_CHARACTERS = 2**25
"""Of a rendered conversation."""
MAX_SECONDS = 10.0
"""A rendering that takes longer is given up."""
MAX_MESSAGES = 4096
_MAX_POWER_BITS = 4096

Message = Mapping[str, str]
"""`role` and `content`."""


class ChatTemplateError(ValueError):
    """A chat template that cannot be used; the message says where it is wrong."""


class ChatError(ValueError):
    """Messages that this template does not render; the message is for whoever sent them."""


class _Refusal(Exception):
    """The template called raise_exception."""


class Conversation(NamedTuple):
    """A rendered conversation.

    assistant_mask: per id, whether it is the assistant's: its text and the special token that ends its turn, which is what a
    model learns to say. None where the template transforms messages so that this cannot be told. text: what the ids encode.
    """

    ids: list[int]
    assistant_mask: list[bool] | None
    text: str


class _Piece(NamedTuple):
    """A run of rendered text; owner: index of the message it comes from, None for the template's own."""

    text: str
    owner: int | None


class ChatTemplate:
    """A compiled template and the tokenizer whose special tokens it may write. Safe to use from several threads.

    The template sees `messages`, `add_generation_prompt`, `bos_token`, `eos_token` and the function `raise_exception`. Raises
    ChatTemplateError for a source that is no template or fails on the simplest conversation.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        if any(re.search(r"\s", name) for name in names):
            raise ChatTemplateError("a chat template needs special tokens without white space in their names")
        self.source, self._tokenizer, self._names = source, tokenizer, names
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"line {error.lineno}: {error.message}") from None
        try:
            self._fill([{"role": "user", "content": "Hello"}], True)
        except _Refusal:
            pass  # it wants other conversations
        except ChatError as error:
            raise ChatTemplateError(f"it cannot render a message from the user: {error}") from None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, continue_final_message: bool = False
    ) -> Conversation:
        """Token ids of a conversation.

        add_generation_prompt: end with what opens the assistant's turn. continue_final_message: end with the last message's
        text, its turn left open; the two exclude each other. Raises ChatError when the template refuses the messages or
        cannot render them safely and in bounds, TokenizerError when the tokenizer gives up on their text.
        """
        assert not (add_generation_prompt and continue_final_message)
        if len(messages) > MAX_MESSAGES:
            raise ChatError(f"there are {len(messages)} messages, more than {MAX_MESSAGES}")
        try:
            plain = self._fill(messages, add_generation_prompt)
            pieces = self._pieces(messages, plain, add_generation_prompt)
        except _Refusal as refusal:
            raise ChatError(f"the chat template refuses these messages: {refusal}") from None
        is_known = pieces is not None
        if pieces is None:
            self._check_harmless(messages)
            pieces = [_Piece(plain, None)]
        if continue_final_message:
            pieces = _cut_behind(pieces, len(messages) - 1, messages[-1]["content"] if messages else "")
        ids, mask = self._encode(pieces, messages)
        return Conversation(ids, mask if is_known else None, "".join(piece.text for piece in pieces))

    def _fill(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The rendered text. Raises ChatError, or _Refusal."""
        tokenizer, parts, length = self._tokenizer, [], 0
        token = _deadline.set(time.monotonic() + MAX_SECONDS)
        try:
            for part in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=tokenizer.bos_token or "",
                eos_token=tokenizer.eos_tokens[0] if tokenizer.eos_tokens else "",
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_CHARACTERS:
                    raise ChatError(f"the rendered conversation is longer than {MAX_CHARACTERS} characters")
                _check_time()
        except (_Refusal, ChatError):
            raise
        except Exception as error:  # a template can fail in as many ways as a program
            raise ChatError(f"the chat template failed: {type(error).__name__}: {str(error)[:300]}") from None
        finally:
            _deadline.reset(token)
        return "".join(parts)

    def _pieces(self, messages: Sequence[Message], plain: str, add_generation_prompt: bool) -> list[_Piece] | None:
        """Who wrote what in `plain`; None where that cannot be told. The second attempt lets the template trim messages."""
        marks = _unused([self.source, *self._names, *(text for item in messages for text in item.values())], len(messages) + 1)
        for inside_space in (False, True):
            marked = [
                {**message, "content": _mark(message["content"], mark, marks[-1], inside_space)}
                for message, mark in zip(messages, marks, strict=False)
            ]
            try:
                pieces = _parse(self._fill(marked, add_generation_prompt), marks)
            except (_Refusal, ChatError):
                continue  # it did render the messages as they are
            if pieces is not None and _is_faithful(pieces, messages, plain):
                return pieces
        return None

    def _check_harmless(self, messages: Sequence[Message]) -> None:
        """Raise ChatError unless no text of these messages can be part of a special token's name, in whatever case."""
        edges = {edge for name in self._names for edge in (name[0].casefold(), name[-1].casefold())}
        inner = [name.casefold() for name in self._names]
        for message in messages:
            text = message["content"].casefold()
            if any(edge in text for edge in edges) or any(text.strip() and text.strip() in name for name in inner):
                raise ChatError(
                    "this model's chat template transforms messages in a way that leaves special tokens in them "
                    f"indistinguishable from its own; messages must not hold any of {' '.join(sorted(edges))}"
                )

    def _encode(self, pieces: Sequence[_Piece], messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        text = "".join(piece.text for piece in pieces)
        (hidden,) = _unused([text, *self._names], 1)
        own = "".join(piece.text if piece.owner is None else hidden * len(piece.text) for piece in pieces)
        specials = [(match.start(), match.end()) for match in self._special.finditer(own)]
        spoken = self._spoken(pieces, messages, text, specials)
        ids: list[int] = []
        mask: list[bool] = []
        position = 0
        for start, end in [*specials, (len(text), len(text))]:
            run = self._tokenizer.encode(text[position:start], add_bos=False)
            ids += run
            mask += self._token_mask(run, text[position:start], spoken[position:start])
            if start < end:
                ids.append(self._tokenizer.special_tokens[text[start:end]])
                mask.append(bool(spoken[start]))
            position = end
        return ids, mask

    def _spoken(
        self, pieces: Sequence[_Piece], messages: Sequence[Message], text: str, specials: Sequence[tuple[int, int]]
    ) -> bytearray:
        """Per character 1 for the assistant's: its messages, on to the end of the token that ends the turn."""
        spoken, position, next_special = bytearray(len(text)), 0, 0
        for piece in pieces:
            end = position + len(piece.text)
            if piece.owner is not None and messages[piece.owner]["role"] == "assistant":
                while next_special < len(specials) and specials[next_special][0] < end:
                    next_special += 1
                spoken[position:end] = b"\1" * (end - position)
                if next_special < len(specials):
                    start, stop = specials[next_special]
                    if self._tokenizer.special_tokens[text[start:stop]] in self._tokenizer.eos_ids:
                        spoken[end:stop] = b"\1" * (stop - end)
            position = end
        return spoken

    def _token_mask(self, ids: Sequence[int], text: str, spoken: bytearray) -> list[bool]:
        """Per token of `text`, whether all its bytes are spoken."""
        if not any(spoken):
            return [False] * len(ids)
        if all(spoken):
            return [True] * len(ids)
        per_byte = b"".join(bytes([flag]) * len(char.encode("utf-8")) for char, flag in zip(text, spoken, strict=True))
        ends = list(accumulate(len(self._tokenizer.token_bytes(id)) for id in ids))
        return [all(per_byte[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _unused(texts: Sequence[str], count: int) -> list[str]:
    """`count` characters for private use that occur in none of the texts."""
    used = {char for text in texts for char in re.findall("[\U000f0000-\U0010fffd]", text)}
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if code & 0xFFFE != 0xFFFE and chr(code) not in used)
    found = [char for char, _ in zip(free, range(count), strict=False)]
    if len(found) < count:
        raise ChatError("the messages use nearly every character that Unicode leaves for private use")
    return found


def _mark(content: str, opening: str, closing: str, inside_space: bool) -> str:
    core = content.strip() if inside_space else content
    if not core:
        return content
    start = content.index(core)
    return content[:start] + opening + core + closing + content[start + len(core) :]


def _parse(marked: str, marks: Sequence[str]) -> list[_Piece] | None:
    """The pieces between the marks, or None if those are not paired. The last mark closes, each other opens its message."""
    owners: dict[str, int | None] = {mark: index for index, mark in enumerate(marks[:-1])}
    owners[marks[-1]] = None
    pieces: list[_Piece] = []
    owner: int | None = None
    for part in re.split(f"([{''.join(marks)}])", marked):
        if part in owners:
            if (owner is None) == (owners[part] is None):
                return None
            owner = owners[part]
        elif part:
            pieces.append(_Piece(part, owner))
    return pieces if owner is None else None


def _is_faithful(pieces: Sequence[_Piece], messages: Sequence[Message], plain: str) -> bool:
    """Whether the pieces make up the text rendered without marks, each message's being all its text in whatever case."""
    if "".join(piece.text for piece in pieces) != plain:
        return False
    return all(
        piece.owner is None or piece.text.casefold().strip() == messages[piece.owner]["content"].casefold().strip()
        for piece in pieces
    )


def _cut_behind(pieces: Sequence[_Piece], owner: int, content: str) -> list[_Piece]:
    """The pieces up to the end of the last one of this owner, whose text is `content`. Raises ChatError."""
    core = content.rstrip()
    space = content[len(core) :]
    for index in reversed(range(len(pieces))):
        piece = pieces[index]
        if piece.owner == owner and piece.text:
            rest = pieces[index + 1].text if index + 1 < len(pieces) else ""
            is_cut = space and piece.text == piece.text.rstrip() and rest.startswith(space)
            return [*pieces[: index + 1], *([_Piece(space, None)] if is_cut else [])]
    if len(pieces) == 1 and core.strip() and (found := pieces[0].text.rfind(core.strip())) >= 0:
        return [_Piece(pieces[0].text[: found + len(core.strip())], None)]
    raise ChatError("there is no final message with text to continue")


_deadline: ContextVar[float] = ContextVar("deadline")


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise ChatError(f"rendering took longer than {MAX_SECONDS:g} seconds")


class _Sandbox(ImmutableSandboxedEnvironment):
    """No access to Python's inside, no changes to what it is given, and bounds on time and on what one operation may make."""

    intercepted_binops = frozenset(("*", "**"))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """See the base class."""
        _check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """See the base class."""
        _check_time()
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See the base class, which names the parameters so that keywords stay free."""
        _check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See the base class."""
        if operator == "**":
            is_large = isinstance(left, int) and isinstance(right, int) and right * left.bit_length() > _MAX_POWER_BITS
        else:
            is_large = any(
                hasattr(many, "__len__") and isinstance(times, int) and len(many) * times > MAX_CHARACTERS
                for many, times in ((left, right), (right, left))
            )
        if is_large:
            raise ChatError("the chat template computes something too large")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message)[:1000])


def _to_json(value: Any, indent: int | None = None) -> str:
    """As text, without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _make_environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    return environment


_ENVIRONMENT = _make_environment()
