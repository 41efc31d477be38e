"""Starting from a checkpoint: the same architecture, a plain one that becomes recurrent, and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt_core.checkpoint import CheckpointError, load_config, save_checkpoint
from lrt_core.config import ModelConfig, RecurrenceConfig
from lrt_core.model import LatentRecurrentTransformer
from tests.helpers import VARIANTS, tiny_config, tiny_model, tiny_tokenizer
from tests.training.test_schedules import gradients, make_rows
from training.__main__ import main
from training.initial import initialize
from training.schedules.baseline import baseline
from training.schedules.interleaved import interleaved
from training.schedules.multi_refine import multi_refine


def saved(tmp_path: Path, config: ModelConfig) -> Path:
    save_checkpoint(tmp_path / "source", tiny_model(config), tiny_tokenizer())
    return tmp_path / "source"


def fresh(config: ModelConfig) -> LatentRecurrentTransformer:
    model = LatentRecurrentTransformer(config)
    model.init_weights(torch.Generator().manual_seed(7))
    return model


UPGRADES: dict[str, tuple[str, dict[str, Any]]] = {
    "layerwise": ("plain", {"recurrence": RecurrenceConfig(2)}),
    "shared": ("plain", {"recurrence": RecurrenceConfig(1, "shared")}),
    "residual-only": ("plain", {"recurrence": RecurrenceConfig(2, kv_projection=False)}),
    "kv-only": ("plain", {"recurrence": RecurrenceConfig(2, residual_injection=False)}),
    "more value embeddings": ("plain", {"recurrence": RecurrenceConfig(2), "value_embeddings": "all"}),
    "from a bare model": ("plain-bare", {"recurrence": RecurrenceConfig(2)}),
    "value embeddings for a bare model": ("plain-bare", {"recurrence": RecurrenceConfig(2), "value_embeddings": "all"}),
}


@pytest.mark.parametrize("name", UPGRADES)
def test_an_upgraded_model_starts_with_the_losses_of_the_plain_one(name: str, tmp_path: Path) -> None:
    """Forward by forward, to the rounding of products with another number of columns.

    And every weight that is new, but for its projections' gate, gets a gradient.
    """
    kind, changes = UPGRADES[name]
    plain = tiny_config(**VARIANTS[kind])
    directory, config = saved(tmp_path, plain), replace(plain, **changes)
    model = fresh(config)
    initialize(model, directory)
    tokens, targets = make_rows(plain.vocab_size, 12)
    expected = baseline(tiny_model(plain), tokens, targets)
    losses = multi_refine(model, tokens, targets, num_refinements=2)
    for one in losses.passes:
        torch.testing.assert_close(one.token_losses, expected.passes[0].token_losses, atol=2e-6, rtol=0)
    first = interleaved(model, tokens, targets)
    torch.testing.assert_close(first.passes[0].token_losses, expected.passes[0].token_losses, atol=2e-6, rtol=0)
    torch.testing.assert_close(first.total, expected.total)
    new = {weight for weight, _ in model.named_parameters()} - {weight for weight, _ in tiny_model(plain).named_parameters()}
    found = gradients(model, losses.total)
    assert new
    assert all(found[weight].abs().max() > 0 for weight in new if "gate" not in weight)


@pytest.mark.parametrize("variant", ["layerwise", "shared", "plain"])
def test_the_same_architecture_takes_every_weight(variant: str, tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS[variant])
    model = fresh(config)
    initialize(model, saved(tmp_path, config))
    for name, weight in tiny_model(config).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("plain", {"hidden_size": 64}, "source: hidden_size is 32 there and 64 in the model to train"),
        ("plain", {"num_layers": 2}, "num_layers is 3 there and 2"),
        ("plain", {"value_embeddings": "none", "recurrence": RecurrenceConfig(2)}, "value_embeddings is alternating there"),
        ("plain", {"value_embeddings": "all"}, "value_embeddings is alternating there"),
        ("layerwise", {"recurrence": None}, "recurrence is Recurrence.* there and None in the model"),
        ("layerwise", {"recurrence": RecurrenceConfig(2, "shared")}, "recurrence is "),
    ],
)
def test_what_does_not_fit_is_named(source: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS[source])
    with pytest.raises(CheckpointError, match=message):
        initialize(fresh(replace(config, **changes)), saved(tmp_path, config))


def test_the_command_upgrades(data: Path, tmp_path: Path) -> None:
    """Architecture and tokenizer are the checkpoint's, the recurrence is new, and the card says what it came from."""
    directory, run = saved(tmp_path, tiny_config(**VARIANTS["plain"])), tmp_path / "run"
    given = ["--data", str(data), "--run", str(run), "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    assert main(["--init-from", str(directory), "--schedule", "multi_refine", "--num-refinements", "1", *given]) == 0
    config = load_config(run / "checkpoint")
    assert config.recurrence == RecurrenceConfig(2)
    assert replace(config, recurrence=None) == load_config(directory)
    command = (run / "command.txt").read_text()
    assert command.startswith("lrt-train --init-from source --data ")
    assert "--schedule multi_refine --num-refinements 1" in command
    assert json.loads((run / "config.json").read_text())["schedule_options"] == {"num_refinements": 1}


def test_the_command_names_what_does_not_fit(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path, tiny_config(**VARIANTS["plain"]))
    assert main(["--init-from", str(directory), "--preset", "tiny", "--data", str(data), "--run", str(tmp_path / "run")]) == 1
    assert "num_layers is 3 there and 2 in the model to train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
