from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrt_core.checkpoint import expected_shapes, load_model, load_tensors, save_checkpoint, write_checkpoint
from lrt_core.config import RecurrenceConfig
from lrt_core.files import CheckpointError
from lrt_core.official import config_from_official, official_name, read_official, read_record, write_official
from tests.helpers import GOLDEN, GOLDEN_NAMES, PLAIN_GOLDEN, tiny_config, tiny_model, tiny_tokenizer

BASE = {"sequence_len": 64, "vocab_size": 300, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
WHERE = Path("meta_000100.json")


def model_config(name: str) -> dict[str, Any]:
    meta = json.loads((GOLDEN / name / "checkpoint" / "meta_000100.json").read_text())
    config: dict[str, Any] = meta["model_config"]
    return config


def state_dict(folder: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(next(folder.glob("**/model_*.pt")), weights_only=True)
    return loaded


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """The same names, types and bits."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a recurrent golden case, to be damaged."""
    return copy(GOLDEN / "lrt-layerwise", tmp_path / "source")


def copy(source: Path, target: Path) -> Path:
    for path in source.glob("*/*"):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        (target / path.parent.name / path.name).write_bytes(path.read_bytes())
    return target


def read(folder: Path, step: int = 100) -> Any:
    checkpoint = folder / "checkpoint"
    return read_official(checkpoint / f"model_{step:06d}.pt", checkpoint / f"meta_{step:06d}.json", folder / "tokenizer")


def edit_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state: dict[str, Any] = dict(state_dict(folder))
    change(state)
    torch.save(state, folder / "checkpoint" / "model_000100.pt")


def edit_meta(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "checkpoint" / "meta_000100.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def store(source: Path, target: Path) -> Path:
    official = read(source)
    write_checkpoint(target, official.config, official.tensors, official.tokenizer, official=official.record.to_dict())
    return target


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    source = GOLDEN / name
    record = write_official(store(source, tmp_path / "ours"), tmp_path / "theirs")
    assert record.step == 100
    assert same(state_dict(tmp_path / "theirs"), state_dict(source))
    for file in ("checkpoint/meta_000100.json", "tokenizer/tokenizer.pkl"):
        assert (tmp_path / "theirs" / file).read_bytes() == (source / file).read_bytes(), file
    written, expected = (
        torch.load(folder / "tokenizer" / "token_bytes.pt", weights_only=True) for folder in (tmp_path / "theirs", source)
    )
    assert torch.equal(written, expected)


def test_types_survive_the_round_trip(source: Path, tmp_path: Path) -> None:
    """Runs on an accelerator keep embeddings in bfloat16 beside float32 matrices."""
    edit_state(source, lambda state: state.update({
        key: tensor.bfloat16() for key, tensor in state.items() if "embeds" in key or "wte" in key or key == "x0_lambdas"
    }))  # fmt: skip
    ours = store(source, tmp_path / "ours")
    assert load_tensors(ours)["embedding.weight"].dtype == torch.bfloat16
    write_official(ours, tmp_path / "theirs")
    assert same(state_dict(tmp_path / "theirs"), state_dict(source))
    assert load_model(ours).dtype == torch.float32


def test_padded_rows_survive(source: Path, tmp_path: Path) -> None:
    tensors = load_tensors(store(source, tmp_path / "ours"))
    assert tensors["embedding.weight"].shape[0] == 320
    assert torch.equal(tensors["embedding.weight"], state_dict(source)["transformer.wte.weight"])


def test_prefix_of_compiled_models_is_stripped(source: Path) -> None:
    original = read(GOLDEN / "lrt-layerwise").tensors
    state = state_dict(source)
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, source / "checkpoint/model_000100.pt")
    assert same(read(source).tensors, original)


def test_shared_storage_is_no_obstacle(source: Path, tmp_path: Path) -> None:
    edit_state(source, lambda state: state.update({"lm_head.weight": state["transformer.wte.weight"]}))
    assert torch.equal(load_tensors(store(source, tmp_path / "ours"))["head.weight"], state_dict(source)["lm_head.weight"])


def test_transposed_tensors_are_straightened(source: Path, tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_q.weight"
    edit_state(source, lambda state: state.update({name: state[name].T.contiguous().T}))
    assert not state_dict(source)[name].is_contiguous()
    write_official(store(source, tmp_path / "ours"), tmp_path / "theirs")
    assert same(state_dict(tmp_path / "theirs"), state_dict(source))


def test_old_file_format_is_read(source: Path) -> None:
    original = read(GOLDEN / "lrt-layerwise").tensors
    torch.save(state_dict(source), source / "checkpoint/model_000100.pt", _use_new_zipfile_serialization=False)
    assert same(read(source).tensors, original)


def test_own_model_goes_there_and_back(tmp_path: Path) -> None:
    """A model trained here has no record; it gets a meta of its own and comes back equal."""
    for name, config in {
        "layerwise": tiny_config(),
        "plain": tiny_config(recurrence=None, value_embeddings="alternating"),
        "plain-all": tiny_config(recurrence=None, value_embeddings="all", gate_channels=0),
        "plain-none": tiny_config(recurrence=None, value_embeddings="none", use_embedding_scale=False),
    }.items():
        model = tiny_model(config)
        save_checkpoint(tmp_path / name, model, tiny_tokenizer(), dtype=torch.bfloat16)
        assert write_official(tmp_path / name, tmp_path / f"{name}-theirs").step == 0
        back = read(tmp_path / f"{name}-theirs", step=0)
        assert back.config == config
        assert same(back.tensors, load_tensors(tmp_path / name))


def test_dtype_on_the_way_out(source: Path, tmp_path: Path) -> None:
    write_official(store(source, tmp_path / "ours"), tmp_path / "theirs", dtype=torch.bfloat16)
    types = {tensor.dtype for tensor in state_dict(tmp_path / "theirs").values() if tensor.ndim >= 2}
    assert types == {torch.bfloat16}
    assert state_dict(tmp_path / "theirs")["resid_lambdas"].dtype == torch.float32


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"recurrence": RecurrenceConfig(2, "shared")}, "memory projections are layerwise, not shared"),
        ({"recurrence": RecurrenceConfig(1)}, r"source is the last layer \(2\), not 1"),
        ({"recurrence": RecurrenceConfig(2, residual_injection=False)}, "residual injection cannot be switched off"),
        ({"recurrence": RecurrenceConfig(2, kv_projection=False)}, "KV projection cannot be switched off"),
        ({"value_embeddings": "alternating"}, "value embeddings on all layers, not alternating"),
        ({"value_embeddings": "none"}, "value embeddings on all layers, not none"),
        ({"rope_dtype": "float32"}, "rope is bfloat16, not float32"),
        ({"rope_base": 5e5}, "rope base is 10000, not 500000"),
        ({"logit_softcap": 30.0}, "logit softcap is 15, not 30"),
        ({"rope_dtype": "float32", "recurrence": None}, "rope is bfloat16, not float32"),
    ],
)
def test_what_the_release_lacks_is_refused_with_the_reason(overrides: dict[str, Any], reason: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours", tiny_model(tiny_config(**overrides)), tiny_tokenizer())
    with pytest.raises(CheckpointError, match=f"release has no such model: its {reason}|no such model: .*{reason}"):
        write_official(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_config_of_a_recurrent_model() -> None:
    config = config_from_official(model_config("lrt-gqa-window-refresh"), WHERE)
    assert config.recurrence == RecurrenceConfig(3, "layerwise", residual_injection=True, kv_projection=True)
    assert (config.value_embeddings, config.window_pattern, config.gate_channels) == ("all", "SL", 16)
    assert (config.num_kv_heads, config.rope_dtype, config.logit_softcap) == (2, "bfloat16", 15.0)


def test_config_defaults_of_missing_keys() -> None:
    config = config_from_official(BASE, WHERE)
    assert (config.window_pattern, config.gate_channels, config.value_embeddings) == ("L", 32, "alternating")
    assert config.recurrence is None
    assert config.use_residual_scale and config.use_embedding_scale


@pytest.mark.parametrize(
    ("changes", "attribute", "value"),
    [
        ({"use_multi_refine": True, "multi_refine_loss_weights": [0.1, 0.9]}, "recurrence", RecurrenceConfig(3)),
        ({"use_interleaved": True, "ve_every_layer": False}, "value_embeddings", "all"),
        ({"use_interleaved": True, "use_value_embeds": False}, "value_embeddings", "all"),
        ({"ve_every_layer": True}, "value_embeddings", "all"),
        ({"use_value_embeds": False}, "value_embeddings", "none"),
        ({"window_pattern": "ssl"}, "window_pattern", "SSL"),
        ({"ve_gate_channels": 0}, "gate_channels", 0),
        ({"ve_gate_channels": -1}, "gate_channels", 0),
        ({"use_resid_lambdas": False}, "use_residual_scale", False),
        ({"use_x0_residual": False}, "use_embedding_scale", False),
    ],
)
def test_config_keys(changes: dict[str, Any], attribute: str, value: object) -> None:
    assert getattr(config_from_official({**BASE, **changes}, WHERE), attribute) == value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BASE, "rope_base": 1, "n_experts": 8}, r"model_config has unknown key\(s\) n_experts, rope_base"),
        ({key: value for key, value in BASE.items() if key != "n_embd"}, r"model_config lacks key\(s\) n_embd"),
        ({**BASE, "n_layer": "4"}, "model_config.n_layer must be int, got '4'"),
        ({**BASE, "use_interleaved": 1}, "model_config.use_interleaved must be bool"),
        ({**BASE, "n_embd": 65}, "model_config: .*hidden_size must be a multiple"),
        ({**BASE, "window_pattern": "LM"}, "window_pattern must consist of S and L"),
    ],
)
def test_bad_model_configs_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"meta_000100.json: .*{message}|meta_000100.json: {message}"):
        config_from_official(config, WHERE)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_tensor_has_its_authors_name(name: str) -> None:
    config = config_from_official(model_config(name), WHERE)
    shapes = {official_name(ours, config): shape for ours, shape in expected_shapes(config).items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in state_dict(GOLDEN / name).items()}


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda d: edit_state(d, lambda s: s.pop("x0_lambdas")), "model_000100.pt: lacks x0_lambdas"),
    "extra tensor": (lambda d: edit_state(d, lambda s: s.update(smear=torch.ones(1))), "has unexpected smear"),
    "plain tensors under a recurrent meta": (
        lambda d: (d / "checkpoint/model_000100.pt").write_bytes(
            (GOLDEN / PLAIN_GOLDEN / "checkpoint/model_000100.pt").read_bytes()
        ),
        "lacks interleaved_init_value_embeds.0.weight",
    ),
    "not a tensor": (lambda d: edit_state(d, lambda s: s.update(step=3)), "entry 'step' is not a named dense tensor"),
    "sparse": (lambda d: edit_state(d, lambda s: s.update(s=torch.eye(3).to_sparse())), "entry 's' is not a named dense"),
    "not named": (lambda d: edit_state(d, lambda s: s.update({3: torch.ones(1)})), "entry 3 is not a named dense tensor"),
    "named twice": (
        lambda d: edit_state(d, lambda s: s.update({"_orig_mod.resid_lambdas": torch.ones(4)})),
        "resid_lambdas is there with and without the prefix",
    ),
    "a list": (lambda d: torch.save([1], d / "checkpoint/model_000100.pt"), "must hold a state dict, got list"),
    "no model": (lambda d: (d / "checkpoint/model_000100.pt").unlink(), "model_000100.pt: not a plain state dict"),
    "empty model": (lambda d: (d / "checkpoint/model_000100.pt").write_bytes(b""), "model_000100.pt: not a plain state dict"),
    "truncated model": (
        lambda d: (d / "checkpoint/model_000100.pt").write_bytes(
            (GOLDEN / "lrt-layerwise/checkpoint/model_000100.pt").read_bytes()[:-5000]
        ),
        "model_000100.pt: not a plain state dict",
    ),
    "no meta": (lambda d: (d / "checkpoint/meta_000100.json").unlink(), "meta_000100.json: cannot be read: No such file"),
    "meta not JSON": (lambda d: (d / "checkpoint/meta_000100.json").write_text("{"), "meta_000100.json: not valid JSON"),
    "meta not UTF-8": (lambda d: (d / "checkpoint/meta_000100.json").write_bytes(b"\xff"), "meta_000100.json: not UTF-8"),
    "meta without config": (lambda d: edit_meta(d, lambda m: m.pop("model_config")), "with an object|an object model_config"),
    "unknown key": (lambda d: edit_meta(d, lambda m: m["model_config"].update(rotary=1)), "unknown key.* rotary"),
    "no tokenizer": (lambda d: (d / "tokenizer/tokenizer.pkl").unlink(), "tokenizer.pkl: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case: str, source: Path) -> None:
    damage, message = BAD[case]
    read(source)
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        read(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(x0_lambdas=torch.zeros(5)), r"embedding_scale has shape \[5\]"),
        (lambda s: s["x0_lambdas"].fill_(float("nan")), "embedding_scale holds a value that is not finite"),
        (lambda s: s.update(x0_lambdas=torch.zeros(4, dtype=torch.int64)), "embedding_scale has type torch.int64"),
        (lambda s: s.update(x0_lambdas=torch.zeros(4, dtype=torch.float64)), "embedding_scale has type torch.float64"),
    ],
)
def test_bad_tensors_are_named_when_stored(change: Callable[[dict[str, Any]], object], message: str, source: Path) -> None:
    edit_state(source, change)
    with pytest.raises(CheckpointError, match=message):
        store(source, source.parent / "ours")
    assert not (source.parent / "ours").exists()


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_hostile_state_dict_does_not_run(source: Path, tmp_path: Path) -> None:
    path = source / "checkpoint/model_000100.pt"
    for new_format in (True, False):
        torch.save({"x": Hostile(tmp_path / "ran")}, path, _use_new_zipfile_serialization=new_format)
        with pytest.raises(CheckpointError, match="not a plain state dict"):
            read(source)
        assert not (tmp_path / "ran").exists()


def test_meta_with_numbers_that_json_lacks(source: Path, tmp_path: Path) -> None:
    """Python's own JSON writes Infinity for a best score that does not exist yet; it must come back."""
    edit_meta(source, lambda meta: meta.update(loop_state={"min_val_bpb": float("inf"), "name": "ü"}))
    write_official(store(source, tmp_path / "ours"), tmp_path / "theirs")
    meta = json.loads((tmp_path / "theirs/checkpoint/meta_000100.json").read_text())
    assert meta["loop_state"] == {"min_val_bpb": float("inf"), "name": "ü"}


def edit_record(folder: Path, **changes: Any) -> None:
    path = folder / "official.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, r"official\.json: unknown key\(s\): extra"),
        ({"step": -1}, "step must be an integer of at least 0"),
        ({"step": "1"}, "step must be an integer of at least 0"),
        ({"encoding_name": 3}, "encoding_name must be a string"),
        ({"meta": {}}, "meta must be a string"),
        ({"meta": "{"}, "not valid JSON"),
        ({"meta": "{}"}, "an object model_config"),
        ({"meta": json.dumps({"model_config": BASE})}, "is not the architecture in config.json"),
        ({"meta": json.dumps({"model_config": {**BASE, "x": 1}})}, r"unknown key\(s\) x"),
    ],
)
def test_a_damaged_record_is_named(changes: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    ours = store(source, tmp_path / "ours")
    edit_record(ours, **changes)
    with pytest.raises(CheckpointError, match=message):
        write_official(ours, tmp_path / "theirs")


def test_record_is_absent_from_checkpoints_of_our_own(checkpoint: Path) -> None:
    assert read_record(checkpoint) is None
