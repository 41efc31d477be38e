"""Checkpoints of trained weights: what the card says is what the file does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrt_core.checkpoint import load_model, load_tokenizer
from tests.training.helpers import tiny_trainer
from training.evaluate import sequential_bpb
from training.finish import finish


@pytest.mark.parametrize("recurrent", [True, False])
def test_figures_are_those_of_the_file(tmp_path: Path, recurrent: bool) -> None:
    trainer = tiny_trainer(tmp_path / "run", **({} if recurrent else {"model": {"recurrence": None}}))
    for _ in range(6):
        trainer.step()
    out = tmp_path / "checkpoint"
    results = finish(trainer, out)
    stored = load_model(out)
    assert stored.dtype == torch.bfloat16
    model = load_model(out, dtype=torch.float32)
    assert sequential_bpb(model, trainer.eval_rows, trainer.byte_lengths) == pytest.approx(results.sequential, rel=1e-6)
    assert load_tokenizer(out).ranks == trainer.tokenizer.ranks
    assert results.num_tokens == trainer.eval_rows[:, 1:].numel()


def test_the_card_says_how_the_model_came_to_be(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", seed=7)
    trainer.step()
    results = finish(trainer, tmp_path / "checkpoint")
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    for said in (
        "    lrt-train --preset tiny\n",
        "Seed 7; 1 steps of 2 x 24 tokens, 48 tokens in all",
        "schedule `interleaved`, subsets: 2",
        "`python-sources`: 12 training pieces",
        "The model writes\nPython",
        "licences of their packages",
        f"| sequential, token by token, as served | {results.sequential:.4f} |",
        f"| {results.parallel.merged:.4f} |",
    ):
        assert said in card, said


def test_other_data_are_not_called_python(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", data=("/corpus/novels",))
    trainer.step()
    finish(trainer, tmp_path / "checkpoint")
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "`novels`" in card
    assert "Python" not in card
