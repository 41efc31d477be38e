"""The engine's own numbers, after defaults are resolved; `server/config.py` makes one from flags and environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PrefillMode = Literal["window", "sequential"]


@dataclass(frozen=True)
class EngineConfig:
    """Sizes in tokens unless said otherwise.

    max_model_len: prompt + output of one sequence. max_num_seqs: sequences that run at once. max_num_batched_tokens: rows of
    one step's forward. num_blocks * block_size: capacity of the paged pool. max_num_waiting: queue length beyond which
    requests are refused. prefill: how prompts are read; window is the largest refinement window; tolerance the relative L2
    change of an incoming memory below which a position counts as settled. prefix_caching: reuse settled blocks of earlier
    sequences. num_prompt_rows: rows of a step that prompts share, one at least for each; None: each has its window.
    """

    max_model_len: int
    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 1024
    prefill: PrefillMode = "window"
    window: int = 128
    tolerance: float = 1e-5
    prefix_caching: bool = True
    num_prompt_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_prompt_rows is not None and self.num_prompt_rows < 1:
            raise ValueError(f"num_prompt_rows must be at least 1, got {self.num_prompt_rows}")
        for name in ("max_num_waiting", "tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence needs a token a step"
            )

    @property
    def max_num_admitted(self) -> int:
        """Samples that may be unfinished at once, running and waiting."""
        return self.max_num_seqs + self.max_num_waiting

    @property
    def capacity(self) -> int:
        """Tokens that the paged pool holds."""
        return self.num_blocks * self.block_size
