"""Training and evaluation on a CUDA device against the CPU. Run where one is: `pytest -m gpu`."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrt_core.checkpoint import save_checkpoint
from tests.helpers import VARIANTS, contracting_model, tiny_config, tiny_model, tiny_tokenizer
from tests.training.helpers import tiny_corpus, tiny_run
from tests.training.test_devices import SCHEDULES
from training.evaluation import main as evaluate
from training.schedules.interleaved import interleaved
from training.schedules.registry import bind, entry
from training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]

CUDA = torch.device("cuda")


def rows() -> tuple[Tensor, Tensor]:
    """Two of 24 tokens, longer than the window."""
    ids = torch.randint(tiny_config().vocab_size, (2, 25), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def models(schedule: str, variant: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same on the CPU and on CUDA."""
    overrides = VARIANTS[variant] if entry(schedule).is_recurrent else VARIANTS["plain"]
    model = tiny_model(tiny_config(**{"sequence_len": 16, **overrides}))
    return model, copy.deepcopy(model).cuda()


def step(schedule: Any, model: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Every forward's losses and all gradients, on the CPU."""
    tokens, targets = (part.to(model.device) for part in rows())
    losses = schedule(model, tokens, targets)
    losses.total.backward()
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
    return [one.token_losses.detach().cpu() for one in losses.passes], gradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ["layerwise", "upper-middle-source", "full-heads"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_and_gradients_in_float32(name: str, variant: str, recompute: bool) -> None:
    schedule, options = SCHEDULES[name]
    here, there = models(schedule, variant)
    there.recompute = recompute
    expected, actual = (step(bind(schedule, options), model) for model in (here, there))
    for one, other in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert actual[1].keys() == expected[1].keys()
    for key, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_under_bfloat16_autocast(name: str) -> None:
    """Each forward's mean within two percent of float32's on the CPU, weights and gradients in float32."""
    schedule, options = SCHEDULES[name]
    here, there = models(schedule, "layerwise")
    expected, _ = step(bind(schedule, options), here)
    with torch.autocast("cuda", torch.bfloat16):
        tokens, targets = (part.cuda() for part in rows())
        losses = bind(schedule, options)(there, tokens, targets)
    losses.total.backward()  # type: ignore[no-untyped-call]
    for one, other in zip(losses.passes, expected, strict=True):
        assert one.token_losses.dtype == torch.float32
        assert one.token_losses.mean().item() == pytest.approx(other.mean().item(), rel=0.02)
    gradients = [weight.grad for weight in there.parameters() if weight.grad is not None]
    assert all(gradient.dtype == torch.float32 and bool(gradient.isfinite().all()) for gradient in gradients)


def test_given_latents_may_lie_on_the_cpu() -> None:
    """As a server's answer does."""
    here, there = models("interleaved", "layerwise")
    latents = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2))
    tokens, targets = rows()
    expected = interleaved(here, tokens, targets, latents=latents).total  # type: ignore[arg-type]
    actual = interleaved(there, tokens.cuda(), targets.cuda(), latents=latents).total  # type: ignore[arg-type]
    assert actual.item() == pytest.approx(expected.item(), rel=1e-4)


def trainer(run: Path, device: torch.device, **overrides: Any) -> Trainer:
    return Trainer.create(tiny_run(**overrides), run, tiny_corpus(), tiny_tokenizer(), "lrt-train", device)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_learns_as_on_the_cpu(tmp_path: Path, precision: str) -> None:
    """The first losses agree closely; later ones drift, for Muon orthogonalises in bfloat16 and rounds otherwise there."""
    here = trainer(tmp_path / "cpu", torch.device("cpu"), num_steps=12)
    there = trainer(tmp_path / "cuda", CUDA, num_steps=12, precision=precision)
    expected, actual = ([one.step() for _ in range(12)] for one in (here, there))
    assert actual[0].loss == pytest.approx(expected[0].loss, rel=1e-4 if precision == "float32" else 1e-2)
    assert [one.loss for one in actual] == pytest.approx([one.loss for one in expected], rel=0.05)
    assert not any(one.skipped for one in actual)
    bpb = there.evaluate()["bpb"]
    assert isinstance(bpb, float) and bpb == pytest.approx(float(str(here.evaluate()["bpb"])), rel=0.05)


@pytest.mark.parametrize("back_on", ["cuda", "cpu"])
def test_a_run_resumes(tmp_path: Path, back_on: str) -> None:
    """Saved on CUDA after three steps of six; sums of atomics have no order there, so equal but for rounding."""
    whole, first = trainer(tmp_path / "whole", CUDA), trainer(tmp_path / "parts", CUDA)
    expected = [whole.step().loss for _ in range(6)]
    losses = [first.step().loss for _ in range(3)]
    first.save()
    second = Trainer.resume(tmp_path / "parts", tiny_corpus(), torch.device(back_on))
    moments = [value for state in second.optimizer.adamw.state.values() for value in state.values()]
    assert all(value.device.type == back_on for value in moments if isinstance(value, Tensor) and value.ndim)
    losses += [second.step().loss for _ in range(3)]
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses[3] == pytest.approx(expected[3], rel=1e-3), "the first step after resuming sees the saved weights"


GRAPHED: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "in parts": {"accumulate": 2},
    "recomputed": {"recompute": True},
    "bfloat16": {"precision": "bfloat16"},
    "multi_refine": {"schedule": "multi_refine"},
    "chunked": {"schedule": "chunked", "chunk_len": 16},
    "baseline": {"schedule": "baseline", "model": VARIANTS["plain"]},
}


@pytest.mark.parametrize("name", GRAPHED)
def test_a_graph_trains_as_kernels_one_by_one(tmp_path: Path, name: str) -> None:
    """To rounding, since sums of atomics have no order there; the last losses show that every batch went in."""
    changes = {"precision": "float32", "num_steps": 8, **GRAPHED[name]}
    eager = trainer(tmp_path / "eager", CUDA, **changes, cuda_graphs=False)
    graphed = trainer(tmp_path / "graphed", CUDA, **changes)
    expected, actual = ([one.step() for _ in range(8)] for one in (eager, graphed))
    assert graphed.gradients.is_graphed and not eager.gradients.is_graphed
    exact = 5e-3 if name == "bfloat16" else 1e-5
    for index, tolerance in ((0, exact), (1, max(exact, 2e-3)), (-1, 0.05)):
        one, other = actual[index], expected[index]
        assert (one.loss, one.bpb) == pytest.approx((other.loss, other.bpb), rel=tolerance)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=10 * tolerance)
    assert len({one.loss for one in actual}) == 8


def test_a_schedule_that_cannot_be_recorded_runs_without_a_graph(tmp_path: Path) -> None:
    run, other = trainer(tmp_path / "run", CUDA), trainer(tmp_path / "other", CUDA, cuda_graphs=False)
    schedule = run.gradients.schedule

    def looks(model: Any, tokens: Tensor, targets: Tensor) -> Any:
        losses = schedule(model, tokens, targets)
        assert math.isfinite(losses.total.item())
        return losses

    run.gradients.schedule = looks
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph and runs without one"):
        first = run.step()
    assert not run.gradients.is_graphed
    assert [first.loss, run.step().loss] == pytest.approx([other.step().loss, other.step().loss], rel=2e-3)


def test_a_step_is_skipped(tmp_path: Path) -> None:
    run = trainer(tmp_path, CUDA)
    run.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    assert run.step().skipped == "gradient norm nan is not finite"
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


@pytest.mark.parametrize("variant", ["layerwise", "plain"])
def test_lrt_eval(tmp_path: Path, variant: str) -> None:
    """Every figure as on the CPU."""
    (tmp_path / "text.txt").write_text("the import of the other thing in a deep path\n\n" * 60)
    save_checkpoint(tmp_path / "model", contracting_model(variant), tiny_tokenizer())
    found = {}
    for device in ("cpu", "cuda"):
        target = tmp_path / f"{device}.json"
        small = ["--rows", "3", "--task-rows", "4", "--task-len", "12", "--json", str(target), "--device", device]
        assert evaluate([str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), *small]) == 0
        found[device] = json.loads(target.read_text())
    here, there = found["cpu"], found["cuda"]
    assert here.keys() == there.keys()
    for key in ("sequential_bpb", "merged_bpb", "parallel_bpb"):
        assert there[key] == pytest.approx(here[key], rel=1e-4), key
    assert there["sequential_method"] == here["sequential_method"]
    assert (there["contraction"] is None) == (here["contraction"] is None) == (variant == "plain")
    if here["contraction"] is not None:
        assert there["contraction"] == pytest.approx(here["contraction"], rel=0.05)
    for name, task in here["tasks"].items():
        assert there["tasks"][name]["loss"] == pytest.approx(task["loss"], rel=1e-3)
    for one, other in zip(there["layers"], here["layers"], strict=True):
        assert one == {key: pytest.approx(value, rel=1e-2, abs=1e-3) for key, value in other.items()}
