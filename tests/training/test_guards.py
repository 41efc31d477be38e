"""Steps that are skipped: the rule, runs around a skipped step bit for bit, and runs that end because of too many."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.helpers import tiny_corpus, tiny_run, tiny_trainer
from tests.training.test_trainer import read_log
from training.config import TrainingConfig
from training.data import Document
from training.guards import MIN_HISTORY, Guard, GuardConfig
from training.schedules.losses import Losses
from training.trainer import Trainer, TrainingError

CONFIG = GuardConfig(skip_window=20, skip_deviations=5.0, skip_nats=1.0, skip_ratio=4.0, max_skipped=3)


def accustomed(config: GuardConfig = CONFIG, count: int = MIN_HISTORY) -> Guard:
    """A guard that has seen losses of 2 ± 0.1 and norms of 0.5 ± 0.02."""
    guard = Guard(config)
    for index in range(count):
        sign = 1 if index % 2 else -1
        guard.record(2 + 0.1 * sign, 0.5 + 0.02 * sign, False)
    return guard


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss: float) -> None:
    assert Guard(CONFIG).judge(loss, 1.0) == f"loss {loss} is not finite"
    assert Guard(CONFIG).judge(1.0, loss) == f"gradient norm {loss} is not finite"
    assert Guard(replace(CONFIG, skip_deviations=0.0)).judge(loss, 1.0)


def test_a_loss_explodes_by_deviations_and_nats() -> None:
    """The level is 2 ± 0.1: five deviations end at 2.5, one nat at 3."""
    assert accustomed().judge(2.99, 0.5) == ""
    assert accustomed().judge(3.01, 0.5) == "loss 3.01 explodes (2 ± 0.1 over 16 steps)"
    wide = accustomed(replace(CONFIG, skip_deviations=20.0, skip_factor=0.0))
    assert wide.judge(3.9, 0.5) == "" and wide.judge(4.1, 0.5)
    assert accustomed().judge(0.0, 0.5) == "", "a fall is no explosion"


def test_a_slow_ascent_ends_although_every_level_rises_with_it() -> None:
    """2 ± 0.1, then two percent a step: no step is far above those before it; above twice 2 and one nat they are skipped."""
    guard, loss, skipped = accustomed(), 2.0, []
    while not guard.gives_up and loss < 100:
        loss *= 1.02
        reason = guard.judge(loss, 0.5)
        guard.record(loss, 0.5, bool(reason))
        skipped += [(loss, reason)] * bool(reason)
    assert [loss > 5 for loss, _ in skipped] == [True] * (CONFIG.max_skipped + 1)
    assert loss < 5.5 and skipped[0][1] == "loss 5.073 explodes (its mean was 2 before)"
    restored = Guard(CONFIG)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert restored.judge(loss, 0.5)
    for changes in ({"skip_factor": 0.0}, {"skip_deviations": 0.0}, {"skip_factor": 3.0}):
        other = Guard(replace(CONFIG, **changes))
        other.load_state_dict(guard.state_dict())
        assert other.judge(loss, 0.5) == ""
    guard.forget()
    assert guard.judge(loss, 0.5) == ""


def test_a_state_of_before_there_was_a_lowest_mean_begins_with_its_history() -> None:
    state = accustomed(replace(CONFIG, skip_deviations=1000.0)).state_dict()
    del state["lowest"]
    guard = Guard(replace(CONFIG, skip_deviations=1000.0))
    guard.load_state_dict(state)
    assert guard.judge(4.9, 0.5) == "" and guard.judge(5.1, 0.5)


def test_a_norm_explodes_by_deviations_and_ratio() -> None:
    """The level is 0.5 ± 0.02: five deviations end at 0.6, four times the mean is 2."""
    assert accustomed().judge(2.0, 1.99) == ""
    assert accustomed().judge(2.0, 2.01) == "gradient norm 2.01 explodes (0.5 ± 0.02 over 16 steps)"
    wide = accustomed(replace(CONFIG, skip_deviations=100.0))
    assert wide.judge(2.0, 2.4) == "" and wide.judge(2.0, 2.6)
    clipped = Guard(CONFIG, clip_norm=3.0)
    clipped.load_state_dict(accustomed().state_dict())
    assert clipped.judge(2.0, 2.99) == "" and clipped.judge(2.0, 3.01)


def test_nothing_explodes_before_there_is_a_level_nor_when_told_not_to() -> None:
    assert accustomed(count=MIN_HISTORY - 1).judge(1000.0, 1000.0) == ""
    assert accustomed(replace(CONFIG, skip_deviations=0.0)).judge(1000.0, 1000.0) == ""


def test_skipped_steps_do_not_move_the_level() -> None:
    guard = accustomed()
    for _ in range(3):
        guard.record(1000.0, 1000.0, True)
    assert guard.judge(3.01, 0.5)
    assert guard.num_skipped == 3 and not guard.gives_up


@pytest.mark.parametrize("skips", ["1111", "1010101", "1001001001"])
def test_too_many_in_a_row_or_not_give_up(skips: str) -> None:
    guard = accustomed()
    for index, skip in enumerate(skips):
        guard.record(2.0, 0.5, skip == "1")
        assert guard.gives_up == (index == len(skips) - 1)


def test_skips_of_long_ago_count_no_more() -> None:
    guard = accustomed()
    for index in range(100):
        guard.record(2.0, 0.5, index % 7 == 0)
        assert not guard.gives_up
    assert guard.num_skipped == 15


def test_a_restored_guard_decides_alike() -> None:
    guard = accustomed(count=37)
    guard.record(math.nan, 1.0, True)
    state = json.loads(json.dumps(guard.state_dict()))
    other = Guard(CONFIG)
    other.load_state_dict(state)
    assert other.state_dict() == guard.state_dict()
    assert [other.judge(loss, 0.5) for loss in (2.99, 3.01)] == [guard.judge(loss, 0.5) for loss in (2.99, 3.01)]
    narrower = Guard(replace(CONFIG, skip_window=16))
    narrower.load_state_dict(state)
    assert narrower.state_dict()["losses"] == state["losses"][-16:]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("skip_window", 15, "skip_window must be an integer of at least 16, got 15"),
        ("max_skipped", -1, "max_skipped must be an integer of at least 0"),
        ("max_skipped", 20, "max_skipped must lie below skip_window, which is 20, got 20"),
        ("skip_deviations", math.nan, "skip_deviations must be a number of at least 0"),
        ("skip_factor", 0.5, "skip_factor must be 0 or at least 1, got 0.5"),
        ("skip_nats", "x", "skip_nats must be a number of at least 0"),
    ],
)
def test_bad_settings_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **{field: value})


def poison(trainer: Trainer, batches: set[int], harm: Callable[[Losses], Losses]) -> None:
    """Do `harm` to the losses of these batches, counted from 0."""
    schedule, count = trainer.gradients.schedule, iter(range(10**6))

    def poisoned(model: Any, tokens: Tensor, targets: Tensor) -> Losses:
        losses = schedule(model, tokens, targets)
        return harm(losses) if torch.is_grad_enabled() and next(count) in batches else losses

    trainer.gradients.schedule = poisoned


def nan_gradients(losses: Losses) -> Losses:
    """The loss is as it was; its gradient is not a number."""
    zero = losses.total.detach() - losses.total
    return losses._replace(total=losses.total + zero.abs().sqrt() * zero)


def exploding(losses: Losses) -> Losses:
    return losses._replace(total=losses.total * 50)


def nan_loss(losses: Losses) -> Losses:
    return losses._replace(total=losses.total * math.nan)


HARMS = {"nan loss": nan_loss, "nan gradients": nan_gradients, "exploding": exploding}


@pytest.mark.parametrize("name", HARMS)
def test_a_skipped_step_leaves_the_run_as_if_its_batch_had_not_been(tmp_path: Path, name: str) -> None:
    """Weights, optimizers and losses to the last bit, against a run that passes over the batch; saved and resumed between."""
    where = MIN_HISTORY if name == "exploding" else 2
    length = where + 3
    settings = {"num_steps": length}
    guarded = tiny_trainer(tmp_path / "guarded", **settings)
    poison(guarded, {where}, HARMS[name])
    results = [guarded.step() for _ in range(where)]
    before = {key: value.clone() for key, value in guarded.model.state_dict().items()}
    skipped = guarded.step()
    expected = {"nan loss": "loss nan is not", "nan gradients": "gradient norm nan is not", "exploding": "loss"}[name]
    assert skipped.skipped.startswith(expected)
    assert guarded.num_steps_done == where and guarded.num_tokens_done == where * 48
    assert all(torch.equal(value, before[key]) for key, value in guarded.model.state_dict().items())
    guarded.save()
    resumed = Trainer.resume(tmp_path / "guarded", tiny_corpus())
    assert resumed.guard.state_dict() == guarded.guard.state_dict()
    results += [resumed.step() for _ in range(length - where)]

    other = tiny_trainer(tmp_path / "other", **settings)
    wanted = [other.step() for _ in range(where)]
    other.packer.batch()
    wanted += [other.step() for _ in range(length - where)]
    assert results == wanted
    assert not any(result.skipped for result in results)
    torch.testing.assert_close(resumed.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.optimizer.tensors(), other.optimizer.tensors(), rtol=0, atol=0)


def test_skips_are_counted_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(tmp_path)
    poison(trainer, {1, 4}, nan_loss)
    assert trainer.run()
    lines = read_log(tmp_path, "skipped")
    assert [(line["step"], line["skipped"]) for line in lines] == [(2, 1), (4, 2)]
    assert lines[0]["loss"] is None and lines[0]["reason"] == "loss nan is not finite"
    assert [line["skipped"] for line in read_log(tmp_path, "step")] == [0, 1, 1, 2, 2, 2]
    assert [line["step"] for line in read_log(tmp_path, "evaluation")] == [3, 6]
    assert "step 2: skipped: loss nan is not finite" in capsys.readouterr().err
    assert Trainer.resume(tmp_path, tiny_corpus()).guard.num_skipped == 2


def test_too_many_end_the_run_with_the_last_state_as_it_was(tmp_path: Path) -> None:
    """Saved at step 4; what was done since is lost, nothing before it. Smaller rates and a wider guard go on from there."""
    trainer = tiny_trainer(tmp_path, num_steps=10, guard=GuardConfig(max_skipped=2))
    poison(trainer, set(range(5, 100)), nan_gradients)
    with pytest.raises(
        TrainingError, match=r"step 6: 3 of the last 100 steps were skipped.* finite; the state saved at step 4 "
    ):
        trainer.run()
    assert read_log(tmp_path, "stop")[-1]["gave_up"] is True
    stored = trainer.config
    smaller = replace(stored, optimizer=replace(stored.optimizer, lr_scale=0.25), guard=GuardConfig(max_skipped=5))
    resumed = Trainer.resume(tmp_path, tiny_corpus(), config=smaller)
    assert resumed.num_steps_done == 4 and resumed.guard.num_skipped == 0
    assert resumed.step().lr_scale == pytest.approx(0.25), "a step on the plateau"
    assert Trainer.resume(tmp_path, tiny_corpus()).config == smaller, "the run keeps what it was resumed with"


def test_a_run_that_fails_at_once_can_be_resumed(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, guard=GuardConfig(max_skipped=0))
    poison(trainer, {0}, nan_loss)
    with pytest.raises(TrainingError, match="the state saved at step 0 is left as it was"):
        trainer.run()
    assert Trainer.resume(tmp_path, tiny_corpus()).run()


def test_smaller_rates_move_the_weights_less(tmp_path: Path) -> None:
    moved = []
    for scale in (1.0, 0.5):
        trainer = tiny_trainer(tmp_path / str(scale))
        config = replace(trainer.config, optimizer=replace(trainer.config.optimizer, lr_scale=scale))
        trainer.save()
        resumed = Trainer.resume(tmp_path / str(scale), tiny_corpus(), config=config)
        before = resumed.model.head.weight.detach().clone()
        resumed.step()
        moved.append(float((resumed.model.head.weight.detach() - before).norm()))
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-3)


def test_other_data_begins_a_new_level(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.step()
    trainer.save()
    corpus = tiny_corpus()
    assert len(Trainer.resume(tmp_path, corpus).guard.state_dict()["losses"]) == 1
    corpus.train.append(Document("new.py", "import new\n"))
    assert Trainer.resume(tmp_path, corpus).guard.state_dict()["losses"] == []


def test_a_run_of_before_the_factor_has_it_from_here_on() -> None:
    data = tiny_run().to_dict()
    del data["guard"]["skip_factor"]
    assert TrainingConfig.from_dict(data) == tiny_run()


def test_a_guard_in_a_configuration_is_checked() -> None:
    data = tiny_run().to_dict()
    data["guard"]["max_skipped"] = 1000
    with pytest.raises(ValueError, match="max_skipped must lie below"):
        TrainingConfig.from_dict(data)
