"""What one of two ranks does for `test_distributed.py`: `python -m tests.training.two_ranks FOLDER`, as torchrun starts it.

Every case of the test is trained replicated and sharded, and taken up from the state that one process left. The first rank
writes all losses to FOLDER/losses.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers import tiny_tokenizer
from tests.training.helpers import tiny_corpus, tiny_run
from training.distributed import Ranks, joined
from training.run_folder import write_settings
from training.trainer import Trainer

NUM_STEPS, SAVED_STEP = 20, 15
CASES: dict[str, dict[str, Any]] = {
    "interleaved": {"num_subsets": 2, "kv_refresh": True},
    "multi_refine": {"schedule": "multi_refine", "num_refinements": 1, "loss_weights": (0.3, 0.7)},
    "chunked": {"schedule": "chunked", "chunk_len": 12, "accumulate": 2},
    "baseline": {"model": {"recurrence": None}},
}


def begin(folder: Path, case: str, **options: Any) -> Trainer:
    """A new run of a case in `folder`; options: the Trainer's."""
    settings = {**CASES[case], "model": {"num_layers": 2, **CASES[case].get("model", {})}}
    config = tiny_run(num_steps=NUM_STEPS, batch_size=4, **settings)
    ranks = options.get("ranks", Ranks())
    ranks.on_first(lambda: write_settings(config, folder, tiny_tokenizer(), "lrt-train"))
    return Trainer(config, folder, tiny_corpus(), tiny_tokenizer(), **options)


def losses(trainer: Trainer) -> list[list[float]]:
    """Loss, BPB and gradient norm of every step to the end; the state is saved on the way."""
    results = []
    while trainer.progress < 1.0:
        results.append(list(trainer.step()))
        if trainer.num_steps_done == SAVED_STEP:
            trainer.save()
    return results


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    with joined(torch.device("cpu")) as ranks:
        for case in CASES:
            for sharded in (False, True):
                options: dict[str, Any] = {"ranks": ranks, "sharded": sharded}
                name = f"{case} {'sharded' if sharded else 'replicated'}"
                trainer = begin(folder / name, case, **options)
                results[name] = losses(trainer)
                results[f"{name} evaluation"] = trainer.evaluate()
                results[f"{name} resumed"] = losses(Trainer.resume(folder / case, tiny_corpus(), **options))
        if ranks.is_first:
            (folder / "losses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
