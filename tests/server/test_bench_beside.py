"""`lrt-bench beside` on a tiny model: what it prints and writes, and that everybody is gone afterwards. No figure is judged."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from lrt_core.checkpoint import save_checkpoint
from server.bench import beside, limits
from server.bench.__main__ import main
from server.bench.work import make_engine
from tests.helpers import contracting_model, tiny_tokenizer


def test_figures_at_two_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 2**21)
    save_checkpoint(tmp_path / "model", contracting_model(), tiny_tokenizer())
    out = tmp_path / "figures.json"
    arguments = ["beside", "--model", str(tmp_path / "model"), "--clients", "1", "3", "--prompt-len", "40", "--max-steps", "64"]
    assert main([*arguments, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert len(figures) == 2 * 5
    assert [figure["clients"] for figure in figures] == [1] * 5 + [3] * 5
    assert all(figure["low"] > 0 and figure["prompt_rows"] >= 1 and figure["prompt_len"] == 40 for figure in figures)
    alone, beside_, _more, ratio, _other = figures[:5]
    assert ratio["samples"] == [pytest.approx(b / a) for a, b in zip(alone["samples"], beside_["samples"], strict=True)]


def test_a_prompt_is_read_while_all_others_decode_and_nobody_stays() -> None:
    engine, slowest = make_engine(contracting_model(), 4, 128), list[float]()
    args = Namespace(prompt_len=40, max_steps=80)
    settled = []
    step = engine.step

    def counted():  # type: ignore[no-untyped-def]
        output = step()
        settled.append(output.stats.num_settled_prompt_tokens)
        return output

    engine.step = counted  # type: ignore[method-assign]
    assert beside._beside(engine, 3, args, slowest) > 0
    assert len(slowest) == 1 and sum(settled) == 3 * beside.START + 40
    assert not engine.has_work() and engine.blocks.num_free_blocks == engine.config.num_blocks
