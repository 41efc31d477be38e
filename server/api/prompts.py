"""From the prompts of a request to token ids that the model can take, every refusal an `ApiError`.

Neighbours: `schemas.py` has checked the types; `completions.py` makes engine requests of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lrt_core.tokenizer import Tokenizer, TokenizerError
from server.api.errors import ApiError, bad_request
from server.api.schemas import CompletionRequest
from server.api.threads import MANY_CHARACTERS, run_beside


@dataclass(frozen=True)
class Prompt:
    """Token ids and, for a prompt given as text, that text, of which the `hidden` first ids (put before it) are no part."""

    ids: tuple[int, ...]
    text: str | None = None
    hidden: int = 0


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are read. add_special_tokens: put the document-start token before a text, None as the checkpoint says.
    allow_special: names of special tokens in a text mean those tokens. truncate: keep that many of a prompt's last tokens, -1
    as many as fit; None takes a prompt whole or not at all."""

    add_special_tokens: bool | None = None
    allow_special: bool = False
    truncate: int | None = None

    @classmethod
    def of(cls, fields: CompletionRequest) -> PromptOptions:
        """What a request says of them."""
        return cls(fields.add_special_tokens, fields.allow_special, fields.truncate_prompt_tokens)


_PLAIN = PromptOptions()


@dataclass(frozen=True)
class PromptReader:
    """Encodes and checks prompts against a vocabulary and a context length in tokens."""

    tokenizer: Tokenizer
    max_model_len: int
    longest_token: int
    """Bytes of the longest token that text can hold; bounds the length of a text before it is encoded."""
    param: str = "prompt"
    """The field that errors name."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, max_model_len: int, param: str = "prompt") -> PromptReader:
        """A reader for this tokenizer."""
        names = [len(name.encode("utf-8")) for name in tokenizer.special_tokens]
        return cls(tokenizer, max_model_len, max(1, *tokenizer.byte_lengths(), *names), param)

    async def read(
        self, prompts: Sequence[str | tuple[int, ...]], max_tokens: int, options: PromptOptions = _PLAIN
    ) -> list[Prompt]:
        """Checked ids of every prompt; room for one token is needed unless max_tokens is 0. Raises ApiError (400)."""
        if options.truncate is not None and options.truncate > self.max_model_len:
            message = f"'truncate_prompt_tokens' must be at most {self.max_model_len}, the model's maximum context length"
            raise bad_request(message, param="truncate_prompt_tokens")
        is_long = sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) > MANY_CHARACTERS
        return await run_beside(is_long, partial(self._read_all, prompts, max_tokens, options))

    def _read_all(self, prompts: Sequence[str | tuple[int, ...]], max_tokens: int, options: PromptOptions) -> list[Prompt]:
        return [self._read_one(prompt, max_tokens, options) for prompt in prompts]

    def _read_one(self, given: str | tuple[int, ...], max_tokens: int, options: PromptOptions) -> Prompt:
        prompt = self._encode(given, options) if isinstance(given, str) else Prompt(given)
        if options.truncate is not None:
            fitting = max(1, self.max_model_len - (max_tokens > 0))
            prompt = _last(prompt, fitting if options.truncate == -1 else options.truncate)
        self.check_length(len(prompt.ids), max_tokens)
        self._check_ids(prompt)
        return prompt

    def _encode(self, text: str, options: PromptOptions) -> Prompt:
        if not text:
            raise bad_request(
                "'prompt' is empty; to start from nothing, give the document-start token as an id", param="prompt"
            )
        if options.truncate is None:
            self.check_size(len(text.encode("utf-8")))
        add_bos = adds_bos(self.tokenizer, options.add_special_tokens)
        try:
            ids = self.tokenizer.encode(text, add_bos=add_bos, allow_special=options.allow_special)
        except TokenizerError as error:
            raise bad_request(f"'prompt' cannot be tokenised: {error}", param="prompt") from None
        return Prompt(tuple(ids), text, hidden=int(add_bos))

    def _check_ids(self, prompt: Prompt) -> None:
        limit = self.tokenizer.vocab_size
        wrong = next((id for id in prompt.ids if not 0 <= id < limit), None)
        if wrong is not None:
            raise bad_request(f"'prompt' holds the token id {str(wrong)[:40]}; ids go from 0 to {limit - 1}", param="prompt")

    def check_size(self, num_bytes: int) -> None:
        """Raise ApiError (400) for a text of so many bytes that its tokens cannot fit."""
        at_least = -(-num_bytes // self.longest_token)
        if at_least > self.max_model_len:
            raise self._too_long(f"at least {at_least}")

    def check_length(self, num_tokens: int, max_tokens: int) -> None:
        """Raise ApiError (400) unless a prompt of so many tokens leaves room for one more, or for none if max_tokens is 0."""
        if num_tokens > self.max_model_len or (max_tokens > 0 and num_tokens == self.max_model_len):
            raise self._too_long(str(num_tokens))

    def _too_long(self, length: str) -> ApiError:
        message = (
            f"This model's maximum context length is {self.max_model_len} tokens, prompt and completion together. However, "
            f"your prompt has {length} tokens. Please shorten it."
        )
        return bad_request(message, param=self.param, code="context_length_exceeded")


def adds_bos(tokenizer: Tokenizer, wanted: bool | None) -> bool:
    """Whether the document-start token goes before a text: as wanted, None as the checkpoint says. Raises ApiError (400)."""
    if wanted and tokenizer.bos_id is None:
        message = "'add_special_tokens' asks for a document-start token, and this checkpoint has none"
        raise bad_request(message, param="add_special_tokens")
    return tokenizer.add_bos if wanted is None else wanted


def _last(prompt: Prompt, count: int) -> Prompt:
    """The prompt's last tokens; what is cut is no longer the text that was given."""
    return prompt if len(prompt.ids) <= count else Prompt(prompt.ids[len(prompt.ids) - count :])
