"""Training schedules: which forwards a step makes and what each is fed.

A schedule is a function (model, tokens, targets) -> Losses; each file here holds one of the file's own name, marked with
`registry.schedule`, and adding one adds one file: its options become settings of a run and flags of the commands. The trainer
backpropagates `total`; evaluation reads `passes`. One that does the same with every batch may be marked as `fixed`: on CUDA its
step is then recorded once and replayed, and its Python not run again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lrt_core.model import LatentRecurrentTransformer
from training.schedules.losses import Losses

Schedule = Callable[[LatentRecurrentTransformer, Tensor, Tensor], Losses]
"""tokens and targets are integers [B, T]; targets[:, t] is the token after tokens[:, t]."""
