"""From trained weights to a checkpoint directory: round, measure what will be served, write with a model card.

Neighbours: `trainer.py` holds the weights, `lrt_core/checkpoint.py` writes the directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from lrt_core.checkpoint import save_checkpoint
from lrt_core.files import read_text
from training.evaluate import ParallelBpb, parallel_bpb, sequential_bpb
from training.model_card import model_card
from training.packing import split_rows
from training.schedules.losses import IGNORE
from training.state import COMMAND_FILE
from training.trainer import Trainer


class Results(NamedTuple):
    """BPB of the rounded weights in float32 arithmetic on `num_tokens` validation tokens that are targets."""

    parallel: ParallelBpb
    sequential: float
    num_tokens: int


def finish(trainer: Trainer, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Results:
    """Write the trainer's model to `directory` with matrices in `dtype`.

    The trainer's own weights are rounded to `dtype` first, so that the figures on the card are those of the file.
    """
    trainer.gradients.release()
    round_matrices(trainer.model, dtype)
    trainer.model.eval()
    results = Results(
        parallel_bpb(trainer.model, trainer.schedule, trainer.eval_rows, trainer.byte_lengths),
        sequential_bpb(trainer.model, trainer.eval_rows, trainer.byte_lengths),
        int((split_rows(trainer.eval_rows)[1] != IGNORE).sum()),
    )
    command = read_text(trainer.run_folder / COMMAND_FILE).strip()
    card = model_card(trainer, results.parallel, results.sequential, results.num_tokens, command)
    save_checkpoint(directory, trainer.model, trainer.tokenizer, dtype=dtype, model_card=card)
    return results


@torch.no_grad()
def round_matrices(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give every matrix the values it has in `dtype`; the scales stay as they are."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.copy_(parameter.to(dtype))
