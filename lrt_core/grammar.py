"""Grammars that generated text has to match, by llguidance: JSON schemas, regular expressions, choices, context-free grammars.

A `GrammarSource` is compiled once for a tokenizer; every sample then follows the `Grammar` with a `GrammarState` of its own,
which says before each token which ids may come next. llguidance is loaded with the first compiler. What a grammar may cost is
bounded here; what llguidance does not bound (time, recursion) is the caller's care: the server tries a source out in a process
of its own first. No torch. Neighbours: `sampling.py` applies the permitted ids, `generate.py` and the server's engine keep the
states.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from lrt_core.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")
GrammarKind = Literal["json", "regex", "choice", "grammar"]

MAX_SOURCE_BYTES = 64 * 1024
"""Of a grammar's source, as UTF-8."""
JSON_WHITESPACE = r"( |\n {0,32})?"
"""Between the tokens of JSON: nothing, a blank, or a new line with its indentation; or a model might never stop."""
MAX_STEP_SECONDS = 0.1
"""Of computation that one sample's next token may take before the sample ends with an error: whoever runs beside it waits."""
_ENCODED_CHARACTERS = 512
"""Text that a grammar forces is cut into tokens as the tokenizer would for this many characters, and into bytes beyond."""

_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//.*')
"""A string, a regular expression or a comment of a Lark grammar."""


class GrammarError(ValueError):
    """A source that is no grammar, or one too large to follow."""


@dataclass(frozen=True)
class GrammarSource:
    """What to match. text: a JSON schema, a regular expression (for the whole output), a JSON list of strings, or a grammar in
    llguidance's dialect of Lark or in GBNF. origin: the request's field that it came from, named in errors."""

    kind: GrammarKind
    text: str
    origin: str = field(default="grammar", compare=False)

    def __post_init__(self) -> None:
        size = len(self.text.encode("utf-8", "surrogatepass"))
        if size > MAX_SOURCE_BYTES:
            raise GrammarError(f"is {size} bytes long, the limit is {MAX_SOURCE_BYTES}")


class GrammarCompiler:
    """Compiles for one vocabulary, of which `eos_ids` end a sample. Special tokens have no text, so no grammar admits them.

    Any thread may compile; a state belongs to one thread at a time.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        import llguidance

        self._llguidance = llguidance
        vocabulary = _Vocabulary(tokenizer, eos_ids)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary),
            n_vocab=len(vocabulary.tokens),
            eos_token=sorted(eos_ids) or [vocabulary.eos_token_id],
        )
        # So that a step stays within some milliseconds, and a sample's state within some tens of megabytes.
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=50_000,
            step_max_items=20_000,
            max_items_in_row=2_000,
            max_lexer_states=50_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )
        self._ends = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        self._ends[sorted(eos_ids)] = True
        self._text = np.array(tokenizer.byte_lengths()) > 0
        self._text[sorted(eos_ids)] = False

    def compile(self, source: GrammarSource) -> Grammar:
        """Raises GrammarError for a source that is invalid, too large, or admits no text at all."""
        try:
            definition = _unless_panic(lambda: self._definition(source))
        except (ValueError, RecursionError) as error:
            raise GrammarError(_first_lines(str(error))) from None
        matcher = _unless_panic(
            lambda: self._llguidance.LLMatcher(self._tokenizer, definition, log_level=0, limits=self._limits)
        )
        if matcher.is_error():
            raise GrammarError(_first_lines(matcher.get_error()))
        grammar = Grammar(source, matcher, self._text, self._ends)
        state = grammar.start()
        if not state.permitted().any() and not state.is_complete:
            raise GrammarError("admits no text" if (state.error or "NoExtension").startswith("NoExtension") else state.error)
        return grammar

    def _definition(self, source: GrammarSource) -> str:
        """The source in llguidance's own notation."""
        matcher = self._llguidance.LLMatcher
        if source.kind == "json":
            # Overrides win over what the schema says about its own compilation: nothing in it is left out in silence.
            with contextlib.suppress(json.JSONDecodeError, RecursionError):  # the library says what is wrong
                _check_counts(json.loads(source.text))
            options: Any = {"whitespace_pattern": JSON_WHITESPACE, "lenient": False, "coerce_one_of": False}
            return matcher.grammar_from_json_schema(source.text, overrides=options)
        if source.kind == "regex":
            return matcher.grammar_from_regex(source.text)
        if source.kind == "choice":
            choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(source.text)]
            return matcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(choices))
        if source.text.lstrip().startswith("{"):
            raise ValueError("must be a grammar in Lark or GBNF")
        bare = _LITERAL.sub('""', source.text)
        if "::=" not in bare and re.search(r"\[[^\]]*\btemperature\s*=", bare):  # which the library would pass over
            raise ValueError("must not set a rule's temperature: a sample has one temperature")
        return self._llguidance.grammar_from("grammar", source.text)


_VALUES = ("const", "enum", "default", "examples")
"""Keywords of JSON Schema that hold values, not schemas."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Those that hold schemas by names of the schema's own."""


def _check_counts(schema: object) -> None:
    """ValueError for a `minProperties` that the library would let an object reach by saying a key twice."""
    if isinstance(schema, list):
        for item in schema:
            _check_counts(item)
    elif isinstance(schema, dict):
        fewest, declared, required = schema.get("minProperties"), schema.get("properties"), schema.get("required")
        if isinstance(fewest, (int, float)) and fewest > 1:
            names = set(declared) if isinstance(declared, dict) else set()
            if len(names.intersection(map(str, required if isinstance(required, list) else ()))) < fewest:
                raise ValueError("minProperties above 1 is supported only where so many declared properties are required")
        for name, value in schema.items():
            if name in _BY_NAME and isinstance(value, dict):
                _check_counts(list(value.values()))
            elif name not in _VALUES:
                _check_counts(value)


class _Vocabulary:
    """A tokenizer as llguidance asks for one. It needs an end-of-sequence id; where a model has none, one more id is it."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(eos_ids, default=tokenizer.vocab_size)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), self.eos_token_id})
        # Names that no grammar can spell, so that none asks for a special token.
        special = {id: f"\x00{id}".encode() for id in self.special_token_ids}
        num_tokens = max(tokenizer.vocab_size, self.eos_token_id + 1)
        self.tokens = [special.get(id) or tokenizer.token_bytes(id) for id in range(num_tokens)]

    def __call__(self, text: str | bytes) -> list[int]:
        """How a text is cut into tokens; never fails, and takes time in proportion to the text."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        try:
            start, rest = data.decode("utf-8"), b""
            start, rest = start[:_ENCODED_CHARACTERS], start[_ENCODED_CHARACTERS:].encode("utf-8")
        except UnicodeDecodeError:
            start, rest = "", data
        return self._tokenizer.encode(start, add_bos=False) + [self._tokenizer.ranks[bytes([byte])] for byte in rest]


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled source, shared by all that follow it."""

    source: GrammarSource
    _matcher: llguidance.LLMatcher
    _text: npt.NDArray[np.bool_]
    _ends: npt.NDArray[np.bool_]

    def start(self, may_end: bool = True) -> GrammarState:
        """A state before the first token; may_end: end-of-sequence ids end a sample where the grammar is complete."""
        return GrammarState(self._matcher.deep_copy(), self._text, self._ends if may_end else np.zeros_like(self._ends))


class GrammarState:
    """How far one sample has come. Nothing here raises: what goes wrong stands in `error`, and the sample cannot go on."""

    def __init__(self, matcher: llguidance.LLMatcher, text: npt.NDArray[np.bool_], ends: npt.NDArray[np.bool_]) -> None:
        self._matcher, self._text, self._ends = matcher, text, ends
        self._permitted: npt.NDArray[np.bool_] | None = None
        self.error: str | None = None
        """Why no token can follow."""

    @property
    def is_complete(self) -> bool:
        """Whether the text so far matches as it is."""
        return self.error is None and bool(self._try(self._matcher.is_accepting))

    @property
    def is_exhausted(self) -> bool:
        """Whether the text matches and nothing can follow but its end."""
        return self.is_complete and not (self.permitted() & self._text).any()

    def permitted(self) -> npt.NDArray[np.bool_]:
        """Which ids may come next: bool [V]; an end-of-sequence id where the text is complete. Nothing after an error."""
        if self._permitted is None:
            bits = self._try(self._matcher.compute_bitmask)
            if bits is None:
                return np.zeros_like(self._text)
            flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little", count=len(self._text))
            self._permitted = flags.astype(np.bool_) & self._text
            if self.is_complete:
                self._permitted |= self._ends
        return self._permitted

    def accept(self, token_id: int) -> None:
        """Take in the sample's next token, which is no end-of-sequence id."""
        if self.error is None and not self.permitted()[token_id]:
            self.error = self.error or "no token is left that the grammar admits"
        self._permitted = None
        self._try(lambda: self._matcher.consume_token(token_id))

    def _try(self, action: Callable[[], T]) -> T | None:
        """What the matcher says; None, and `error` set, if it has failed."""
        if self.error is not None:
            return None
        started = time.thread_time()
        try:
            result = _unless_panic(action)
        except GrammarError as error:
            self.error = str(error)
            return None
        if self._matcher.is_error():
            self.error = _first_lines(self._matcher.get_error())
        elif time.thread_time() - started > MAX_STEP_SECONDS:
            self.error = "takes too long to follow"
        return result if self.error is None else None


def _unless_panic(action: Callable[[], T]) -> T:
    """A failed assertion in the library must not pass for the end of the process: GrammarError instead."""
    try:
        return action()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise GrammarError("the grammar library failed on it") from None


def _first_lines(message: str, length: int = 300) -> str:
    """The part of the library's message that concerns a client: without hints at what a request cannot have."""
    text = re.sub(r"<non-verbose/>|\. Enable '\w+' option.*|; following special tokens.*?\u27e7", "", message, flags=re.DOTALL)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
