"""How one request wants its tokens drawn; plain data, so that the scheduler needs no torch. `sampling.py` applies it."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class SamplingParams:
    """Applied in this order: penalties, logit_bias, allowed_token_ids and bad_words, temperature, top_k, top_p, min_p.

    temperature: 0 is greedy. top_k: 0 or -1 keeps all. seed: None draws one per request. repetition_penalty divides
    positive and multiplies negative logits of tokens seen in prompt or output; presence and frequency penalties are
    subtracted for tokens seen in the output. bad_words: sequences of ids that the output may not contain: a sequence's
    last id is forbidden wherever the output ends with the ids before it. Raises ValueError naming the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < math.inf, f"temperature must be finite and at least 0, got {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        _require(self.top_k >= -1, f"top_k must be at least -1, got {self.top_k}")
        _require(0 <= self.min_p <= 1, f"min_p must lie in [0, 1], got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, f"{name} must lie in [-2, 2], got {value}")
        _require(0 < self.repetition_penalty < math.inf, f"repetition_penalty must be positive, got {self.repetition_penalty}")
        _require(all(math.isfinite(bias) for bias in self.logit_bias.values()), "logit_bias must be finite")
        _require(self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "allowed_token_ids must not be empty")
        _require(all(self.bad_words), "bad_words must not hold an empty sequence")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def needs_history(self) -> bool:
        """Whether tokens seen so far change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @cached_property
    def takes_logits_as_they_are(self) -> bool:
        """Whether tokens are drawn from the model's own logits."""
        is_restricted = self.allowed_token_ids is not None or bool(self.bad_words)
        return not (self.needs_history or self.logit_bias or is_restricted)

    def pack(self, seed: int) -> bytes:
        """What a native step draws a sample's tokens by; `Draw` in `plan.h`."""
        return struct.pack("=dddqQ", self.temperature, self.top_p, self.min_p, self.top_k, seed & (2**64 - 1))

    @cached_property
    def longest_bad_word(self) -> int:
        """Ids of the longest of bad_words, 0 without any."""
        return max(map(len, self.bad_words), default=0)

    @cached_property
    def id_ranges(self) -> dict[str, tuple[int, int]]:
        """The smallest and the largest token id that each field names, of those that name any."""
        ids: dict[str, Collection[int]] = {
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [id for word in self.bad_words for id in word],
        }
        return {name: (min(own), max(own)) for name, own in ids.items() if own}

    @cached_property
    def ends_of_bad_words(self) -> frozenset[int]:
        """Ids that bad_words may come to forbid."""
        return frozenset(word[-1] for word in self.bad_words)

    @cached_property
    def allowed_array(self) -> array[int]:
        """allowed_token_ids as 64-bit integers, made once for all steps."""
        return array("q", self.allowed_token_ids or ())

    @cached_property
    def bias_arrays(self) -> tuple[array[int], array[float]]:
        """logit_bias as 64-bit integers and floats, made once for all steps."""
        return array("q", self.logit_bias.keys()), array("d", self.logit_bias.values())
