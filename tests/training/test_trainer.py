"""The loop: it learns, resumes bit for bit, stops where it should, and refuses what is not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt_core.files import CheckpointError
from tests.training.helpers import tiny_corpus, tiny_trainer
from training.config import OptimizerConfig
from training.data import Document
from training.schedules.losses import IGNORE
from training.state import STATES_FOLDER, StateError
from training.trainer import StepResult, Trainer, uses_bfloat16


def read_log(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model": {"recurrence": None}},
        {"num_subsets": 3, "kv_refresh": True},
        {"schedule": "multi_refine", "num_refinements": 1, "loss_weights": (0.3, 0.7), "recompute": True},
    ],
)
def test_learns(tmp_path: Path, overrides: dict[str, Any]) -> None:
    trainer = tiny_trainer(tmp_path, num_steps=40, **overrides)
    before = trainer.evaluate()["bpb"]
    results = [trainer.step() for _ in range(40)]
    losses = [result.loss for result in results]
    assert not any(result.skipped for result in results), "an ordinary run skips nothing"
    after = trainer.evaluate()["bpb"]
    assert losses[-1] < 0.6 * losses[0]
    assert isinstance(before, float) and isinstance(after, float)
    assert after < 0.6 * before


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Saved at step 4 of 6; the rest is the same to the last bit, and so are the weights."""
    whole = tiny_trainer(tmp_path / "whole")
    expected = [whole.step() for _ in range(6)]
    first = tiny_trainer(tmp_path / "parts")
    results = [first.step() for _ in range(4)]
    first.save()
    second = Trainer.resume(tmp_path / "parts", tiny_corpus())
    assert second.num_steps_done == 4
    assert not second.data_changed
    results += [second.step() for _ in range(2)]
    assert results == expected
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_run_logs_evaluates_and_saves(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    assert trainer.run()
    steps = read_log(tmp_path, "step")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["tokens"] == 6 * 2 * 24 == trainer.num_tokens_done
    assert {"loss", "bpb", "grad_norm", "lr_scale", "skipped", "tokens_per_second", "elapsed"} <= set(steps[0])
    evaluations = read_log(tmp_path, "evaluation")
    assert [line["step"] for line in evaluations] == [3, 6]
    assert len(evaluations[0]["bpb_per_pass"]) == 3
    assert read_log(tmp_path, "stop")[0]["finished"] is True
    assert Trainer.resume(tmp_path, tiny_corpus()).num_steps_done == 6


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path)
    step = trainer.step

    def stop_after_two() -> StepResult:
        trainer.stop_requested = trainer.num_steps_done == 1
        return step()

    monkeypatch.setattr(trainer, "step", stop_after_two)
    assert not trainer.run()
    resumed = Trainer.resume(tmp_path, tiny_corpus())
    assert resumed.num_steps_done == 2
    assert resumed.run()
    assert [line["step"] for line in read_log(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]
    assert [line["finished"] for line in read_log(tmp_path, "stop")] == [False, True]


def test_prompts_are_cut_in_the_warmdown(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, num_steps=10, warmdown=0.4, prompt_cuts=0.25)
    shares = []
    for _ in range(10):
        trainer.step()
        shares.append(trainer.packer.cut_share)
    assert shares == [0.0] * 6 + [0.25] * 4


def test_time_budget_ends_the_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, num_steps=1_000_000, time_budget=1e-9)
    assert trainer.run()
    assert trainer.num_steps_done == 1
    assert trainer.progress == 1.0


@pytest.mark.parametrize(
    "overrides", [{"num_subsets": 3}, {"schedule": "multi_refine", "num_refinements": 1, "loss_weights": (0.3, 0.7)}]
)
def test_parts_of_a_batch_are_the_batch(tmp_path: Path, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with different numbers of targets, of which the forwards' subsets get different numbers too."""
    results = []
    for accumulate in (1, 2, 4):
        trainer = tiny_trainer(tmp_path / str(accumulate), batch_size=4, accumulate=accumulate, **overrides)
        batch = trainer.packer.batch

        def masked(rows: slice, batch: Any = batch) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, targets = (part.clone() for part in batch(rows))
            for row, start in enumerate((1, 20, 9, 16)):
                targets[row, start:] = IGNORE
            return tokens, targets

        monkeypatch.setattr(trainer.packer, "batch", masked)
        results.append([value for _ in range(4) for value in trainer.step()[:3]])
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_the_best_state_is_kept_and_can_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, num_steps=6, eval_every=1, save_every=2, keep_last=1, keep_best=True)
    figures = iter([3.0, 2.0, 1.0, 2.5, 2.0, 1.5])
    monkeypatch.setattr(trainer, "evaluate", lambda: {"step": trainer.num_steps_done, "bpb": next(figures)})
    assert trainer.run()
    assert sorted(path.name for path in (tmp_path / STATES_FOLDER).iterdir()) == ["step-00000003", "step-00000006"]
    assert Trainer.resume(tmp_path, tiny_corpus(), which="best").num_steps_done == 3
    assert Trainer.resume(tmp_path, tiny_corpus()).num_steps_done == 6


@pytest.mark.parametrize("save_every", [4, 5])
def test_the_end_is_evaluated_and_may_be_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int) -> None:
    """Whether or not its state is saved on the way as well."""
    trainer = tiny_trainer(tmp_path, num_steps=5, eval_every=2, save_every=save_every, keep_last=1, keep_best=True)
    figures = iter([3.0, 2.5, 2.0])
    monkeypatch.setattr(trainer, "evaluate", lambda: {"step": trainer.num_steps_done, "bpb": next(figures)})
    assert trainer.run()
    assert [line["step"] for line in read_log(tmp_path, "evaluation")] == [2, 4, 5]
    assert [path.name for path in (tmp_path / STATES_FOLDER).iterdir()] == ["step-00000005"]
    resumed = Trainer.resume(tmp_path, tiny_corpus(), which="best")
    assert resumed.num_steps_done == 5
    assert resumed.run() and len(read_log(tmp_path, "evaluation")) == 3, "a run that has ended is not evaluated again"


def test_an_end_in_a_skipped_step_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, time_budget=1e6, eval_every=4)
    step = trainer.step

    def last_skipped() -> StepResult:
        if trainer.num_steps_done < 3:
            return step()
        trainer.elapsed = 1e6
        return StepResult(9.0, 9.0, 9.0, 1.0, "loss 9 explodes")

    monkeypatch.setattr(trainer, "step", last_skipped)
    assert trainer.run()
    assert [line["step"] for line in read_log(tmp_path, "evaluation")] == [3]
    assert Trainer.resume(tmp_path, tiny_corpus(), which="best").num_steps_done == 3


def test_a_batch_in_parts_must_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 4 rows cannot be cut into 3 equal parts"):
        tiny_trainer(tmp_path, batch_size=4, accumulate=3)


def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, optimizer=OptimizerConfig(clip_norm=0.01))
    seen = []

    def record(lr_scale: float) -> None:
        gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(gradients).item())

    monkeypatch.setattr(trainer.optimizer, "step", record)
    assert trainer.step().grad_norm > 0.01
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    losses = [tiny_trainer(tmp_path / str(index), seed=seed).step().loss for index, seed in enumerate((0, 0, 1))]
    assert losses[0] == losses[1] != losses[2]


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    tiny_trainer(tmp_path).save()
    with pytest.raises(StateError, match="holds a run already"):
        tiny_trainer(tmp_path)


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    tiny_trainer(tmp_path).save()
    corpus = tiny_corpus()
    corpus.train.append(Document("new.py", "import new\n"))
    assert Trainer.resume(tmp_path, corpus).data_changed


def test_a_run_goes_on_over_fewer_documents(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.step()
    trainer.save()
    corpus = tiny_corpus()
    del corpus.train[1:]
    resumed = Trainer.resume(tmp_path, corpus)
    assert resumed.packer.position.epoch == trainer.packer.position.epoch + 1
    resumed.step()
    assert resumed.num_steps_done == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.tiktoken", f"{STATES_FOLDER}/step-00000000/state.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    tiny_trainer(tmp_path).save()
    (tmp_path / name).unlink()
    with pytest.raises((StateError, CheckpointError), match=Path(name).name):
        Trainer.resume(tmp_path, tiny_corpus())


def test_bfloat16_autocast_trains_close_to_float32(tmp_path: Path) -> None:
    losses = {
        precision: [trainer.step().loss for _ in range(3)]
        for precision in ("float32", "bfloat16")
        for trainer in [tiny_trainer(tmp_path / precision, precision=precision)]
    }
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.02)


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert uses_bfloat16("bfloat16", cpu)
    assert not uses_bfloat16("float32", cpu)
    assert uses_bfloat16("auto", cpu) == torch.cpu.get_capabilities().get("avx512_bf16", False)
    assert not uses_bfloat16("auto", torch.device("meta"))


def test_tokens_are_counted_once_a_step_whatever_the_schedule(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, num_subsets=4)
    trainer.step()
    assert trainer.num_tokens_done == 48
