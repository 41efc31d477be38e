"""What tests of training share: a corpus, a tokenizer and a configuration that a step takes milliseconds on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers import tiny_config, tiny_tokenizer
from training.config import TrainingConfig
from training.data import Corpus, Document
from training.schedules.flags import option_names
from training.trainer import Trainer


def tiny_corpus() -> Corpus:
    """Twelve documents to train on, three to validate, none like another."""
    texts = [f"def f{index}(self, a):\n    return {index} + a.in{index}[{index % 3}]\n" * 8 for index in range(15)]
    documents = [Document(f"{index}.py", text) for index, text in enumerate(texts)]
    return Corpus(train=documents[3:], validation=documents[:3])


def tiny_run(**overrides: Any) -> TrainingConfig:
    """Six steps of two rows of 24 tokens in float32, with everything periodic happening on the way.

    Options of the schedule may stand among the overrides.
    """
    options = {name: overrides.pop(name) for name in option_names() if name in overrides}
    overrides.setdefault("schedule_options", options)
    model = tiny_config(sequence_len=24, **overrides.pop("model", {}))
    base = TrainingConfig(
        model=model,
        schedule="interleaved" if model.recurrence is not None else "baseline",
        num_steps=6,
        batch_size=2,
        eval_every=3,
        eval_rows=4,
        save_every=4,
        log_every=1,
        precision="float32",
    )
    return replace(base, **overrides)


def tiny_trainer(run: Path, **overrides: Any) -> Trainer:
    """A new run in `run`."""
    return Trainer.create(tiny_run(**overrides), run, tiny_corpus(), tiny_tokenizer(), "lrt-train --preset tiny")
