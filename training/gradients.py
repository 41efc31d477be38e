"""A batch's gradients: the schedule's forwards and the backward, in parts, over all ranks, on CUDA as one graph.

Small models do not fill a CUDA device: their kernels take less time than launching them. So a step's forwards and backward
are recorded once, as a CUDA graph, which then launches all of them at once. A graph is bound to its tensors: batches are copied
into the recorded ones, and gradients lie where they lay when it was recorded. Neighbour: `trainer.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lrt_core.model import LatentRecurrentTransformer
from training.distributed import Ranks
from training.evaluate import merge, text_sums
from training.schedules import Schedule
from training.schedules.losses import count_targets, part_of

_WARMUP = 3
"""Steps that torch's documentation asks for before one is recorded: libraries prepare themselves in them."""


class Gradients:
    """Called with a batch, leaves its gradients in the model.

    byte_lengths: of every token, on the model's device. accumulate: parts in which each rank computes its rows. autocast:
    makes the context that forwards run in. graphed: record a CUDA graph, if the model is on such a device and there is one
    rank alone. Once it is recorded, neither the schedule nor a hook on a parameter runs as Python again.
    """

    def __init__(
        self,
        model: LatentRecurrentTransformer,
        schedule: Schedule,
        byte_lengths: Tensor,
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager[object]],
        *,
        accumulate: int = 1,
        sharded: bool = False,
        graphed: bool = True,
    ) -> None:
        self.model, self.schedule, self.byte_lengths, self.ranks = model, schedule, byte_lengths, ranks
        self.autocast, self.accumulate, self.sharded = autocast, accumulate, sharded
        self._wants_graph = graphed and byte_lengths.device.type == "cuda" and ranks.size == 1 and not sharded
        self._graph: _Graph | None = None

    @property
    def is_graphed(self) -> bool:
        """Whether batches go through a CUDA graph."""
        return self._graph is not None

    def __call__(self, tokens: Tensor, targets: Tensor) -> list[float]:
        """Leave the whole batch's gradients in the model, from this rank's rows [B, T] of it.

        Returns the batch's loss, its merged forwards' loss in nats over targets that are text, and these targets' bytes.
        """
        device = self.byte_lengths.device
        tokens, targets = tokens.to(device), targets.to(device)
        if self._wants_graph and self._graph is None:
            self._record(tokens, targets)
        sums = self._backward(tokens, targets) if self._graph is None else self._graph(tokens, targets)
        if not self.sharded:
            self.ranks.reduce_gradients(self.model)
        return self.ranks.sum(sums.tolist())

    def _record(self, tokens: Tensor, targets: Tensor) -> None:
        self._wants_graph = False
        graph = _Graph(self.model, tokens, targets)
        try:
            graph.record(self._backward)
        except RuntimeError as error:  # also for want of memory, which one kernel after the other may do with less of
            self.model.zero_grad(set_to_none=True)
            cause: BaseException = error
            while cause.__context__ is not None:  # what came first; then the end of the recording failed, too
                cause = cause.__context__
            reason = str(cause).strip().partition("\n")[0]
            warnings.warn(f"the step cannot be recorded as a CUDA graph and runs without one: {reason}", stacklevel=3)
            return
        self._graph = graph

    def release(self) -> None:
        """Let go of the recorded step and its memory, and of the gradients; the next batch runs without a graph."""
        self._wants_graph, self._graph = False, None
        self.model.zero_grad(set_to_none=True)

    def _backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Gradients of this rank's rows, on the model's device; returns this rank's part of the three sums, float64 [3]."""
        is_whole = self.accumulate * self.ranks.size == 1
        sums, counts = torch.zeros(3, dtype=torch.float64, device=tokens.device), None
        for some_tokens, some_targets in zip(tokens.chunk(self.accumulate), targets.chunk(self.accumulate), strict=True):
            with self.autocast():
                losses = self.schedule(self.model, some_tokens, some_targets)
            if is_whole:
                total = losses.total
            else:
                # Which positions a forward covers is the same for all rows, so the first part tells what to divide by.
                counts = self._over_ranks(count_targets(losses.passes, targets)) if counts is None else counts
                total = part_of(losses, counts, count_targets(losses.passes, some_targets))
            total.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                text = text_sums(merge(losses.passes), some_targets, self.byte_lengths)
                sums += torch.stack([total.detach().double(), *text])
        return sums

    def _over_ranks(self, counts: Tensor) -> Tensor:
        if self.ranks.size == 1:
            return counts
        return torch.tensor(self.ranks.sum(counts.tolist()), device=counts.device, dtype=torch.float64)


class _Graph:
    """A function of a batch that leaves gradients in a model, recorded for batches of one shape."""

    def __init__(self, model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor) -> None:
        self._model, self._tokens, self._targets = model, tokens.clone(), targets.clone()

    def record(self, work: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Run `work` a few times, with no gradients left of it, then once more for the record.

        RuntimeError when it does what cannot be recorded.
        """
        # A recording that fails leaves its own stream the current one.
        with torch.cuda.device(self._tokens.device), torch.cuda.stream(torch.cuda.current_stream(self._tokens.device)):
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(_WARMUP):
                    work(self._tokens, self._targets)
                    self._model.zero_grad(set_to_none=True)
            torch.cuda.current_stream().wait_stream(beside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = work(self._tokens, self._targets)
        self._gradients = [parameter.grad for parameter in self._model.parameters()]

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """What `work` returns for the batch; the model's gradients are then this batch's."""
        self._tokens.copy_(tokens)
        self._targets.copy_(targets)
        self._graph.replay()
        for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return self._result
