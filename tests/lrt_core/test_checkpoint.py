from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrt_core.checkpoint import (
    CheckpointError,
    GenerationConfig,
    expected_shapes,
    load_config,
    load_generation_config,
    load_model,
    load_tensors,
    load_tokenizer,
    save_checkpoint,
    write_checkpoint,
)
from tests.helpers import MERGES, VARIANTS, tiny_config, tiny_model, tiny_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    data = json.loads((folder / name).read_text())
    data.update(changes)
    (folder / name).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_bytes(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_of_every_variant(variant: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(tiny_config(**VARIANTS[variant])), tiny_tokenizer()
    save_checkpoint(tmp_path / "out", model, tokenizer, model_card="# A card\n")
    loaded = load_model(tmp_path / "out")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"
    assert load_tokenizer(tmp_path / "out").encode("the end") == tokenizer.encode("the end")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_matrices_are_stored_smaller(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model()
    save_checkpoint(tmp_path / "out", model, tiny_tokenizer(), dtype=dtype)
    loaded = load_model(tmp_path / "out")
    assert loaded.dtype == dtype
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (dtype if tensor.ndim >= 2 else torch.float32), name
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name


def test_load_casts_when_asked(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.ndim >= 2} == {torch.bfloat16}
    assert loaded.residual_scale is not None and loaded.residual_scale.dtype == torch.float32


def test_mixed_matrices_load_as_float32(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors["embedding.weight"] = tensors["embedding.weight"].bfloat16()
    write_checkpoint(tmp_path / "out", model.config, tensors, tiny_tokenizer())
    assert load_tensors(tmp_path / "out")["embedding.weight"].dtype == torch.bfloat16
    loaded = load_model(tmp_path / "out")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.embedding.weight, tensors["embedding.weight"].float())


def test_weights_are_mapped_not_copied(checkpoint: Path) -> None:
    loaded = load_model(checkpoint)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see what is mapped")
    address = loaded.head.weight.data_ptr()
    ranges = [line.split() for line in maps.read_text().splitlines() if line.endswith(WEIGHTS)]
    bounds = [[int(end, 16) for end in fields[0].split("-")] for fields in ranges]
    assert any(start <= address < end for start, end in bounds)


def test_a_loaded_model_can_be_trained_without_touching_the_file(checkpoint: Path) -> None:
    before = (checkpoint / WEIGHTS).read_bytes()
    loaded = load_model(checkpoint).train()
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        loaded.head.weight.add_(1)
    assert (checkpoint / WEIGHTS).read_bytes() == before


def test_generation_config(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    save_checkpoint(tmp_path / "default", model, tokenizer)
    assert load_generation_config(tmp_path / "default") == GenerationConfig(tuple(sorted(tokenizer.eos_ids)))
    chosen = GenerationConfig((5,), temperature=0.7, top_p=0.9, top_k=50, max_new_tokens=10)
    save_checkpoint(tmp_path / "chosen", model, tokenizer, generation=chosen)
    assert load_generation_config(tmp_path / "chosen") == chosen


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_ids": [1]},
        {"eos_token_ids": (-1,)},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_new_tokens": 0},
    ],
)
def test_generation_config_names_its_bad_field(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        GenerationConfig(**{"eos_token_ids": (), **values})


# One entry per way in which a file can be wrong: what is done to a good checkpoint, and what the error must say.
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: file not found"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{,}"), r"config\.json: not valid JSON"),
    "config not UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), r"config\.json: not UTF-8"),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), r"config\.json: must hold a JSON object"),
    "config with NaN": (lambda d: edit_json(d, "config.json", rope_base=float("nan")), r"config\.json.*NaN"),
    "unknown key": (lambda d: edit_json(d, "config.json", flash=True), r"config\.json: unknown config key\(s\): flash"),
    "missing key": (lambda d: edit_json(d, "config.json", num_heads=...), r"config\.json: missing config key\(s\): num_heads"),
    "bad value": (lambda d: edit_json(d, "config.json", num_heads=5), r"config\.json: .*num_heads"),
    "newer format": (lambda d: edit_json(d, "config.json", format_version=2), "format_version 2 is newer than 1"),
    "no format": (lambda d: edit_json(d, "config.json", format_version=...), "format_version must be a positive integer"),
    "odd format": (lambda d: edit_json(d, "config.json", format_version="1"), "format_version must be a positive integer"),
    "other model": (lambda d: edit_json(d, "config.json", model_type="gpt2"), "model_type must be"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), rf"{WEIGHTS}: file not found"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), rf"{WEIGHTS}: truncated or corrupted"),
    "half the weights": (lambda d: edit_bytes(d / WEIGHTS, lambda b: b[: len(b) // 2]), rf"{WEIGHTS}: truncated or corrupted"),
    "a byte short": (lambda d: edit_bytes(d / WEIGHTS, lambda b: b[:-1]), rf"{WEIGHTS}: truncated or corrupted"),
    "a byte long": (lambda d: edit_bytes(d / WEIGHTS, lambda b: b + b"\0"), rf"{WEIGHTS}: truncated or corrupted"),
    "broken header": (
        lambda d: edit_bytes(d / WEIGHTS, lambda b: b[:8] + b"x" * 40 + b[48:]),
        rf"{WEIGHTS}: truncated or corrupted",
    ),
    "huge header": (lambda d: edit_bytes(d / WEIGHTS, lambda b: b"\xff" * 8 + b[8:]), rf"{WEIGHTS}: truncated or corrupted"),
    "missing tensor": (
        lambda d: edit_weights(d, lambda t: t.pop("head.weight")),
        rf"{WEIGHTS}: missing tensor\(s\): head\.weight",
    ),
    "extra tensor": (
        lambda d: edit_weights(d, lambda t: t.update({"bias": torch.zeros(3)})),
        rf"{WEIGHTS}: unexpected tensor\(s\): bias",
    ),
    "mis-shaped tensor": (
        lambda d: edit_weights(d, lambda t: t.update({"memory_scale": torch.zeros(4)})),
        r"memory_scale has shape \[4\], the configuration needs \[3\]",
    ),
    "integer tensor": (
        lambda d: edit_weights(d, lambda t: t.update({"memory_scale": torch.zeros(3, dtype=torch.int32)})),
        "memory_scale has type I32",
    ),
    "NaN": (
        lambda d: edit_weights(d, lambda t: t["head.weight"][2].fill_(float("nan"))),
        r"head\.weight holds a value that is",
    ),
    "infinity": (lambda d: edit_weights(d, lambda t: t["residual_scale"].fill_(-float("inf"))), "residual_scale holds a value"),
    "other architecture": (
        lambda d: edit_json(d, "config.json", recurrence=None),
        r"unexpected tensor\(s\): memory_projection",
    ),
    "weights twice": (lambda d: (d / INDEX).write_text("{}"), "holds both"),
    "no generation config": (lambda d: (d / "generation_config.json").unlink(), r"generation_config\.json: file not found"),
    "unknown generation key": (lambda d: edit_json(d, "generation_config.json", beams=4), "unknown key.*beams"),
    "bad generation value": (lambda d: edit_json(d, "generation_config.json", top_p=2), r"generation_config\.json: .*top_p"),
    "eos outside": (
        lambda d: edit_json(d, "generation_config.json", eos_token_ids=[9999]),
        r"eos_token_ids \[9999\] are not below vocab_size",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.tiktoken").unlink(), r"tokenizer\.tiktoken: file not found"),
    "tokenizer smaller": (
        lambda d: edit_json(d, "config.json", vocab_size=281),
        r"the tokenizer has 280 tokens, config\.vocab_size is 281",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case: str, checkpoint: Path) -> None:
    damage, message = BAD[case]
    load_model(checkpoint)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint)


def test_missing_folder_and_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_model(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a directory"):
        load_config(tmp_path / "file")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = tiny_model()
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "out", model.config, tensors, tiny_tokenizer(), max_shard_bytes=60_000)
    return tmp_path / "out"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_shards(sharded: Path) -> None:
    names = [path.name for path in shards(sharded)]
    assert len(names) > 2
    assert names == [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    assert not (sharded / WEIGHTS).exists()
    reference = tiny_model().state_dict()
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"].keys() == reference.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in reference.values())
    for path in shards(sharded):
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 60_000 or len(tensors) == 1
    assert all(torch.equal(tensor, reference[name]) for name, tensor in load_model(sharded).state_dict().items())


def _swap_shards(folder: Path) -> None:
    first, second, *_ = shards(folder)
    shutil.move(first, folder / "x")
    shutil.move(second, first)
    shutil.move(folder / "x", second)


def _edit_map(folder: Path, name: str, file_name: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file_name
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shards(d)[1].unlink(), "model-00002.*file not found"),
        (lambda d: edit_bytes(shards(d)[1], lambda data: data[:-9]), "model-00002.*truncated or corrupted"),
        (_swap_shards, "model-0000.*missing tensor"),
        (lambda d: _edit_map(d, "bias", "model-00001-of-00003.safetensors"), r"unexpected tensor\(s\): bias"),
        (lambda d: _edit_map(d, "head.weight", "../../secret.safetensors"), "head.weight is said to be in '../../secret"),
        (lambda d: _edit_map(d, "head.weight", 3), "which is not the name of a shard"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "missing key.*metadata"),
        (lambda d: (d / INDEX).write_text('{"metadata": {}, "weight_map": []}'), "weight_map must be an object"),
        (lambda d: (d / INDEX).write_text('{"metadata": {}, "weight_map": {}}'), r"missing tensor\(s\).* and \d+ more"),
    ],
)
def test_bad_shards_are_named(sharded: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        load_model(sharded)


def test_saving_replaces_an_older_checkpoint_whole(sharded: Path) -> None:
    save_checkpoint(sharded, tiny_model(seed=1), tiny_tokenizer())
    assert not shards(sharded)
    assert not (sharded / INDEX).exists()
    assert torch.equal(load_model(sharded).head.weight, tiny_model(seed=1).head.weight)
    assert [path.name for path in sharded.parent.iterdir()] == ["out"]


def test_what_cannot_be_loaded_is_not_saved(checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    broken = tiny_model()
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"head\.weight holds a value that is not finite"):
        save_checkpoint(checkpoint, broken, tiny_tokenizer())
    overflowing = tiny_model()
    with torch.no_grad():
        overflowing.head.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"head\.weight holds a value that is not finite"):
        save_checkpoint(checkpoint, overflowing, tiny_tokenizer(), dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"type torch\.float64"):
        save_checkpoint(checkpoint, tiny_model(), tiny_tokenizer(), dtype=torch.float64)
    with pytest.raises(CheckpointError, match="the tokenizer has 280 tokens"):
        save_checkpoint(checkpoint, tiny_model(tiny_config(vocab_size=270)), tiny_tokenizer())
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_write_refuses_tensors_that_do_not_fit_the_config(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()}
    del tensors["head.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensor\(s\): head\.weight"):
        write_checkpoint(tmp_path / "out", config, tensors, tiny_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_reader_finds_what_a_dead_writer_left(checkpoint: Path) -> None:
    """A crash between the writer's two renames leaves the old checkpoint under its backup name only."""
    checkpoint.rename(checkpoint.with_name(".checkpoint.previous"))
    assert torch.equal(load_model(checkpoint).head.weight, tiny_model().head.weight)
    save_checkpoint(checkpoint, tiny_model(seed=2), tiny_tokenizer())
    assert torch.equal(load_model(checkpoint).head.weight, tiny_model(seed=2).head.weight)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_the_helpers_vocabulary_is_the_one_in_the_messages() -> None:
    assert len(MERGES) == 19
    assert tiny_config().vocab_size == 280


def test_other_users_may_read_what_the_umask_lets_them(checkpoint: Path) -> None:
    modes = {path.stat().st_mode for path in checkpoint.iterdir()}
    assert len(modes) == 1, "a server that runs as another user reads every file or none"
