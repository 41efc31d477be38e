"""The ranks of a run that several processes share: who they are, what they tell each other, how gradients become one.

A batch is dealt to the ranks by rows, and every rank's loss is its part of the batch's (`losses.part_of`), so gradients add up.
Two ways to hold the model:

- Replicated (the default): every rank holds everything. Gradients are summed in buckets after the backward rather than by a
  wrapper's hooks: schedules call the model several times per step and read some weights outside of any call, which such hooks
  take for errors or miss.
- Sharded: see `fsdp.py`, which sums gradients by itself.

Messages among ranks are small and go over gloo on the CPU, whatever the device. Neighbours: `trainer.py`, `state.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_BUCKET_BYTES = 32 << 20
_PATIENCE = timedelta(days=2)
"""How long ranks wait for a message: the first one may read, cut and tokenise a corpus while the others wait."""


class RankError(ValueError):
    """Something went wrong on another rank, which says what."""


class ShardError(ValueError):
    """Tensors that the ranks cannot write or read; the message says why."""


def is_loss_of_rank(error: RuntimeError) -> bool:
    """Whether torch means to say that another rank is gone, by its own error or by gloo's, which has no type."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; control: the group that messages go through, None for a process on its own."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that logs, shows progress and writes what is not sharded."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This rank's rows of a batch."""
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values of all ranks added up, in float64; the same on every rank."""
        if self.control is None:
            return [float(value) for value in values]
        total = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return [float(value) for value in total]

    def first(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.control is None:
            return value
        box: list[Any] = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        taken: T = box[0]
        return taken

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Run `work` on the first rank while the others wait; its result there, None elsewhere; RankError where it failed."""
        result, error = None, None
        if self.is_first:
            try:
                result = work()
            except BaseException as raised:
                error = raised
        if self.first(error is not None) and error is None:
            raise RankError("the first rank failed")
        if error is not None:
            raise error
        return result

    def agree(self, works: bool) -> bool:
        """Whether something works on every rank."""
        return self.sum([float(not works)])[0] == 0

    def reduce_gradients(self, model: nn.Module) -> None:
        """Sum the gradients of a replicated model over the ranks, in place."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in model.parameters():
            if parameter.grad is not None:
                if bucket and not _fits(bucket, parameter.grad):
                    _reduce(bucket)
                    bucket = []
                bucket.append(parameter.grad)
        if bucket:
            _reduce(bucket)


ALONE = Ranks()
"""The ranks of an ordinary process."""


def _fits(bucket: list[Tensor], gradient: Tensor) -> bool:
    size = sum(one.nbytes for one in bucket) + gradient.nbytes
    return size <= _BUCKET_BYTES and gradient.dtype == bucket[0].dtype


def _reduce(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat)
    for gradient, part in zip(bucket, torch.split(flat, [gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Take part in the ranks that the launcher started, each on its own device; ALONE without a launcher."""
    if not is_launched():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The device of this rank: of several on one machine, each has the CUDA device of its number."""
    if device.type != "cuda" or not is_launched():
        return device
    if device.index is not None:
        raise ValueError(f"--device {device} is one device for all ranks; say --device cuda, and each takes its own")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(f"rank {index} of this machine has no CUDA device: there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to `max_norm`; returns their norm before, over all shards, the same on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class Silent:
    """Takes the place of `progress.Progress` on all ranks but the first, and says nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def log(self, event: str, **values: Any) -> None:
        """Nothing."""

    def show(self, *values: float) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""
