"""The bench runs on a checkpoint, prints what it measured and writes it as JSON; no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from server.bench import contraction, main, repeat
from tests.helpers import contracting_model

ARGUMENTS = ("--dtype", "float32", "--repetitions", "2", "--prompt-len", "12")


def test_offline(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    arguments = ["offline", "--model", str(checkpoint), "--clients", "1", "3", "--new-tokens", "4", "--json", str(out)]
    assert main([*arguments, *ARGUMENTS]) == 0
    data = json.loads(out.read_text())
    assert data["read_bandwidth_gb_s"] > 0 and data["bf16_gflop_s"] > 0 and data["threads"] == torch.get_num_threads()
    assert [figure["name"] for figure in data["figures"]] == [
        "checkpoint: decode, 1 client(s)",
        "checkpoint: decode, 3 client(s)",
    ]
    for figure in data["figures"]:
        assert 0 < figure["slowest"] <= figure["median"] <= figure["fastest"]
    printed = capsys.readouterr().out
    assert "read bandwidth" in printed and "decode, 3 client(s)" in printed


def test_prefill_reads_both_ways(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefill", "--model", str(checkpoint), *ARGUMENTS]) == 0
    printed = capsys.readouterr().out
    assert "read 12 tokens, window" in printed and "read 12 tokens, sequential" in printed


def test_a_wrong_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["offline", "--model", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "no such directory" in capsys.readouterr().err


def test_repeat_reports_median_and_spread() -> None:
    rates = iter([99.0, 3.0, 1.0, 2.0])
    figure = repeat("rate", 3, lambda: next(rates))
    assert (figure.slowest, figure.median, figure.fastest) == (1.0, 2.0, 3.0), "the first run only warms up"


def test_contraction_of_a_contracting_recurrence() -> None:
    model = contracting_model()
    tokens = torch.arange(48).remainder(model.config.vocab_size).unsqueeze(0)
    assert contraction(model, tokens) > 1.5
