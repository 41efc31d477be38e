"""What lrt-eval measures: true recurrence by passes, contraction, rows of text, buckets, gates."""

from __future__ import annotations

import pytest
import torch

from lrt_core.kv import CausalKV
from lrt_core.memory import shift
from lrt_core.refine import refine
from tests.helpers import VARIANTS, contracting_model, tiny_config, tiny_model, tiny_tokenizer
from tests.training.test_evaluate import make_rows
from training.evaluate import bits_per_byte, sequential_bpb
from training.measures import (
    contraction,
    late_minus_early,
    layer_diagnostics,
    pack_rows,
    position_buckets,
    refined_losses,
)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_refined_losses_are_those_of_decoding(variant: str) -> None:
    model = contracting_model(variant) if "plain" not in variant else tiny_model(tiny_config(**VARIANTS[variant]))
    rows, byte_lengths = make_rows(model.config.vocab_size, length=40), torch.ones(model.config.vocab_size, dtype=torch.long)
    refined = refined_losses(model, rows, 1e-6, 30, batch_size=2)
    assert refined.settled
    assert len(refined.residuals) < 30
    expected = sequential_bpb(model, rows, byte_lengths)
    assert bits_per_byte(refined.losses, rows[:, 1:], byte_lengths) == pytest.approx(expected, rel=1e-5)


def test_too_few_passes_do_not_settle() -> None:
    rows = make_rows(tiny_config().vocab_size, length=40)
    assert not refined_losses(tiny_model(), rows, 1e-6, 2).settled
    assert refined_losses(tiny_model(), rows[:, :4], 0.0, 3).settled, "as many passes as positions are exact"


def test_passes_end_where_rounding_begins() -> None:
    """A tolerance below float32's rounding is never reached; without `rounding` every pass there is would run."""
    model, tokens = contracting_model(), make_rows(tiny_config().vocab_size, length=60)
    ended, endless = (refine(model, tokens, 1e-12, 40, rounding) for rounding in (1e-5, 0.0))
    assert len(ended.residuals) < 25
    assert len(endless.residuals) > len(ended.residuals)
    torch.testing.assert_close(ended.hidden, endless.hidden, rtol=1e-4, atol=1e-5)


def test_contraction_is_the_mean_factor_above_rounding() -> None:
    assert contraction([1.0, 0.5, 0.125, 1e-7, 1e-7]) == pytest.approx(0.125**0.5)
    assert contraction([1.0, 2.0]) == pytest.approx(2.0)
    assert contraction([1.0]) is None
    assert contraction([]) is None


def test_rows_are_the_stream_of_texts() -> None:
    """Bos opens every row and stands between texts, but not twice."""
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_id
    rows = pack_rows(["abc", "xy", "pqrstu"], tokenizer, 4, 10)
    spelled = [[chr(id) if id != bos else "|" for id in row] for row in rows.tolist()]
    assert ["".join(row) for row in spelled] == ["|abc|", "|xy|p", "|qrst"]


def test_rows_are_spread() -> None:
    rows = pack_rows(["".join(chr(ord("A") + index) * 3 for index in range(8))], tiny_tokenizer(), 3, 4)
    assert [chr(row[1]) for row in rows.tolist()] == ["A", "C", "E", "G"]


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="no full row of 100 tokens"):
        pack_rows(["short"], tiny_tokenizer(), 100, 1)


def test_buckets_double() -> None:
    losses = torch.arange(10.0).repeat(2, 1)
    assert position_buckets(losses) == [(0, 1, 0.0), (1, 2, 1.0), (2, 4, 2.5), (4, 8, 5.5), (8, 10, 8.5)]


def test_late_minus_early() -> None:
    assert late_minus_early(torch.tensor([[4.0, 2.0, 1.0, 0.0, 1.0, 0.0, 1.0, 2.0]])) == {
        "early": 3.0,
        "late": 1.5,
        "late_minus_early": -1.5,
    }


def test_diagnostics_of_neutral_gates_and_known_scales() -> None:
    model = tiny_model()
    with torch.no_grad():
        for layer in model.layers:
            layer.get_parameter("attention.input.gate.weight").zero_()
    rows = make_rows(model.config.vocab_size)
    layers = layer_diagnostics(model, rows, 1e-6)
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    assert all(layer["gate_memory"] == {"mean": 1.0, "std": 0.0} for layer in layers)
    assert model.memory_scale is not None
    assert [layer["memory_scale"] for layer in layers] == pytest.approx(model.memory_scale.tolist())
    recorded = CausalKV(model.config, record=True)
    memory = shift(refine(model, rows[:, :-1], 1e-6, 20).latents)
    with torch.no_grad():
        model(rows[:, :-1], torch.arange(10), memory, recorded)
        assert model.memory_projection is not None and recorded.recorded is not None
        added, whole = model.memory_projection(memory)[0].key, recorded.recorded[0].raw_key
    assert layers[0]["key_memory"] == pytest.approx(float(added.norm() / whole.norm()), rel=1e-4)


def test_diagnostics_leave_out_what_a_layer_lacks() -> None:
    rows = make_rows(tiny_config().vocab_size)
    bare = layer_diagnostics(tiny_model(tiny_config(**VARIANTS["plain-bare"])), rows, 1e-6)
    assert bare == [{"layer": 0}, {"layer": 1}, {"layer": 2}]
    residual = layer_diagnostics(tiny_model(tiny_config(**VARIANTS["residual-only"])), rows, 1e-6)
    assert {"memory_scale", "gate_value_embedding"} <= set(residual[0])
    assert not {"gate_memory", "key_memory"} & set(residual[0])
