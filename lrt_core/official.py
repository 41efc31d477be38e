"""The checkpoint files of the authors' public release, both ways; `convert.py` is the command around it.

    checkpoint/model_NNNNNN.pt    a state dict under the authors' names
    checkpoint/meta_NNNNNN.json   its `model_config` is the architecture
    tokenizer/                    see `official_tokenizer.py`

Tensors keep every bit and their type. What the files say beyond the architecture (training settings, step, scores) goes
into `official.json` of our checkpoint and comes back from there. The release knows one recurrence: layerwise, from the last
layer, with both pathways and value embeddings everywhere; whatever it cannot express is refused with the reason.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt_core.checkpoint import OFFICIAL_FILE, expected_shapes, load_config, load_tensors, load_tokenizer
from lrt_core.config import ConfigError, ModelConfig, RecurrenceConfig, ValueEmbeddings
from lrt_core.files import CheckpointError, check_keys, existing, read_json, replaced_directory, sync, write_text
from lrt_core.official_tokenizer import BYTES_FILE, PICKLE_FILE, read_official_tokenizer, write_official_tokenizer
from lrt_core.tokenizer import Tokenizer

_REQUIRED: dict[str, type] = dict.fromkeys(("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"), int)
_OPTIONAL: dict[str, Any] = {
    "window_pattern": "L",
    "use_value_embeds": True,
    "ve_every_layer": False,
    "use_x0_residual": True,
    "use_resid_lambdas": True,
    "ve_gate_channels": 32,
    "use_interleaved": False,
    "use_multi_refine": False,
}
"""Keys that shape the model, with what a file means that leaves them out."""
_TRAINING = {
    "interleaved_num_passes",
    "interleaved_kv_refresh",
    "multi_refine_num_passes",
    "multi_refine_detach",
    "multi_refine_loss_weights",
}
"""Keys of training alone: kept, not interpreted."""

# Our name of a tensor as a pattern, and the authors' name for it.
_NAMES = [
    (r"embedding\.weight", r"transformer.wte.weight"),
    (r"head\.weight", r"lm_head.weight"),
    (r"residual_scale", r"resid_lambdas"),
    (r"embedding_scale", r"x0_lambdas"),
    (r"memory_scale", r"interleaved_lambdas"),
    (r"memory_projection\.value\.(\d+)\.weight", r"interleaved_projections.\1.W_v.weight"),
    (r"memory_projection\.key\.(\d+)\.weight", r"interleaved_key_projections.\1.W_v.weight"),
    (r"layers\.(\d+)\.attention\.input\.query\.weight", r"transformer.h.\1.attn.c_q.weight"),
    (r"layers\.(\d+)\.attention\.input\.key\.weight", r"transformer.h.\1.attn.c_k.weight"),
    (r"layers\.(\d+)\.attention\.input\.value\.weight", r"transformer.h.\1.attn.c_v.weight"),
    (r"layers\.(\d+)\.attention\.output\.weight", r"transformer.h.\1.attn.c_proj.weight"),
    (r"layers\.(\d+)\.mlp\.up\.weight", r"transformer.h.\1.mlp.c_fc.weight"),
    (r"layers\.(\d+)\.mlp\.down\.weight", r"transformer.h.\1.mlp.c_proj.weight"),
]
_RECURRENT_NAMES = [
    (r"layers\.(\d+)\.attention\.input\.gate\.weight", r"transformer.h.\1.attn.triple_gate.weight"),
    (r"layers\.(\d+)\.attention\.value_embedding\.weight", r"interleaved_init_value_embeds.\1.weight"),
]
_PLAIN_NAMES = [
    (r"layers\.(\d+)\.attention\.input\.gate\.weight", r"transformer.h.\1.attn.ve_gate.weight"),
    (r"layers\.(\d+)\.attention\.value_embedding\.weight", r"value_embeds.\1.weight"),
]


@dataclass(frozen=True)
class OfficialRecord:
    """What the authors' files hold beyond weights and architecture: step of the file name, whole meta, Encoding's name."""

    step: int
    meta: dict[str, Any]
    encoding_name: str = "rustbpe"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `official.json`; meta as JSON text, because theirs may hold NaN and Infinity."""
        return {"step": self.step, "encoding_name": self.encoding_name, "meta": json.dumps(self.meta)}


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The authors' checkpoint in our terms: tensors under our names, in the stored types."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    record: OfficialRecord


def read_official(model_file: Path, meta_file: Path, tokenizer_dir: Path) -> OfficialCheckpoint:
    """Read the authors' files strictly; CheckpointError names the file and the key or tensor that is wrong."""
    meta = _read_meta(meta_file)
    config = config_from_official(meta["model_config"], meta_file)
    tokenizer, encoding_name = read_official_tokenizer(tokenizer_dir)
    stored = _read_state_dict(model_file)
    names = {official_name(name, config): name for name in expected_shapes(config)}
    missing, extra = sorted(set(names) - set(stored)), sorted(set(stored) - set(names))
    if missing or extra:
        what, which = ("lacks", missing) if missing else ("has unexpected", extra)
        raise CheckpointError(f"{model_file}: {what} {', '.join(which[:5])} (of {len(which)}) for the model_config beside it")
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    return OfficialCheckpoint(config, tensors, tokenizer, OfficialRecord(_step(model_file), meta, encoding_name))


def write_official(source: Path, target: Path, *, dtype: torch.dtype | None = None) -> OfficialRecord:
    """Turn our checkpoint `source` into the authors' files under `target` (checkpoint/ and tokenizer/), atomically.

    dtype: cast matrices to it; None keeps every tensor as it is. CheckpointError when their release has no such model.
    Returns what was written beside the weights.
    """
    source = existing(source)
    config, tokenizer = load_config(source), load_tokenizer(source)
    record = _record_for(source, config)
    tensors = {
        official_name(name, config): tensor if dtype is None or tensor.ndim < 2 else tensor.to(dtype)
        for name, tensor in load_tensors(source).items()
    }
    model_name, meta_name = f"checkpoint/model_{record.step:06d}.pt", f"checkpoint/meta_{record.step:06d}.json"
    ours = {"checkpoint", "tokenizer", model_name, meta_name, f"tokenizer/{PICKLE_FILE}", f"tokenizer/{BYTES_FILE}"}
    with replaced_directory(target, ours.__contains__) as folder:
        for name in ("checkpoint", "tokenizer"):
            (folder / name).mkdir()
        torch.save(tensors, folder / model_name)
        sync(folder / model_name)
        write_text(folder / meta_name, json.dumps(record.meta, indent=2))
        write_official_tokenizer(folder / "tokenizer", tokenizer, record.encoding_name)
    return record


def official_name(name: str, config: ModelConfig) -> str:
    """The authors' name of our tensor `name` in a model of this architecture."""
    for ours, theirs in _NAMES + (_PLAIN_NAMES if config.recurrence is None else _RECURRENT_NAMES):
        match = re.fullmatch(ours, name)
        if match:
            return match.expand(theirs)
    raise AssertionError(f"no rule names {name}")


def config_from_official(model_config: Mapping[str, Any], path: Path) -> ModelConfig:
    """Our architecture of the authors' `model_config`; CheckpointError names a key that is unlisted, missing or wrong."""
    unknown = sorted(set(model_config) - set(_REQUIRED) - set(_OPTIONAL) - _TRAINING)
    missing = sorted(set(_REQUIRED) - set(model_config))
    if unknown or missing:
        what, which = ("has unknown", unknown) if unknown else ("lacks", missing)
        raise CheckpointError(f"{path}: model_config {what} key(s) {', '.join(which)}")
    kinds = _REQUIRED | {key: type(value) for key, value in _OPTIONAL.items()}
    values = {**_OPTIONAL, **model_config}
    for key, kind in kinds.items():
        if type(values[key]) is not kind:
            raise CheckpointError(f"{path}: model_config.{key} must be {kind.__name__}, got {values[key]!r}")
    recurrent = values["use_interleaved"] or values["use_multi_refine"]
    try:
        return ModelConfig(
            vocab_size=values["vocab_size"],
            sequence_len=values["sequence_len"],
            num_layers=values["n_layer"],
            num_heads=values["n_head"],
            num_kv_heads=values["n_kv_head"],
            hidden_size=values["n_embd"],
            window_pattern=values["window_pattern"].upper(),
            value_embeddings=_value_embeddings(values, recurrent),
            gate_channels=max(0, values["ve_gate_channels"]),
            use_residual_scale=values["use_resid_lambdas"],
            use_embedding_scale=values["use_x0_residual"],
            recurrence=RecurrenceConfig(values["n_layer"] - 1) if recurrent else None,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: model_config: {error}") from None


def _value_embeddings(values: Mapping[str, Any], recurrent: bool) -> ValueEmbeddings:
    if recurrent:
        return "all"
    if not values["use_value_embeds"]:
        return "none"
    return "all" if values["ve_every_layer"] else "alternating"


def config_to_official(config: ModelConfig, path: Path) -> dict[str, Any]:
    """The authors' `model_config` of our architecture; CheckpointError says why their release has no such model."""
    reason = _inexpressible(config)
    if reason:
        raise CheckpointError(f"{path}: the authors' release has no such model: {reason}")
    return {
        "sequence_len": config.sequence_len,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_kv_head": config.num_kv_heads,
        "n_embd": config.hidden_size,
        "window_pattern": config.window_pattern,
        "use_value_embeds": config.recurrence is not None or config.value_embeddings != "none",
        "ve_every_layer": config.recurrence is None and config.value_embeddings == "all",
        "use_x0_residual": config.use_embedding_scale,
        "use_resid_lambdas": config.use_residual_scale,
        "ve_gate_channels": config.gate_channels,
        "use_interleaved": config.recurrence is not None,
        "interleaved_num_passes": 2,
        "interleaved_kv_refresh": False,
    }


def _inexpressible(config: ModelConfig) -> str | None:
    """Why the authors' release cannot hold this architecture, or None."""
    recurrence = config.recurrence
    reasons = [
        (config.rope_dtype != "bfloat16", f"its rope is bfloat16, not {config.rope_dtype}"),
        (config.rope_base != 10000, f"its rope base is 10000, not {config.rope_base:g}"),
        (config.logit_softcap != 15, f"its logit softcap is 15, not {config.logit_softcap:g}"),
    ]
    if recurrence is not None:
        last = config.num_layers - 1
        reasons += [
            (recurrence.variant != "layerwise", f"its memory projections are layerwise, not {recurrence.variant}"),
            (recurrence.source_layer != last, f"its source is the last layer ({last}), not {recurrence.source_layer}"),
            (not recurrence.residual_injection, "its residual injection cannot be switched off"),
            (not recurrence.kv_projection, "its KV projection cannot be switched off"),
            (
                config.value_embeddings != "all",
                f"its recurrent models have value embeddings on all layers, not {config.value_embeddings}",
            ),
        ]
    return next((reason for applies, reason in reasons if applies), None)


def read_record(folder: Path) -> OfficialRecord | None:
    """The content of `official.json`, validated; None where a checkpoint never came from the authors' files."""
    path = folder / OFFICIAL_FILE
    if not path.exists():
        return None
    data = read_json(path)
    check_keys(path, data, {"step", "meta", "encoding_name"})
    if type(data["step"]) is not int or data["step"] < 0:
        raise CheckpointError(f"{path}: step must be an integer of at least 0, got {data['step']!r}")
    for key in ("meta", "encoding_name"):
        if type(data[key]) is not str:
            raise CheckpointError(f"{path}: {key} must be a string, got {data[key]!r}")
    return OfficialRecord(data["step"], _parse_meta(path, data["meta"]), data["encoding_name"])


def _record_for(source: Path, config: ModelConfig) -> OfficialRecord:
    """The record to write back: the one kept from the authors' files, or a new one for a model trained here."""
    model_config = config_to_official(config, source)
    record = read_record(source)
    if record is None:
        return OfficialRecord(0, {"step": 0, "model_config": model_config})
    if config_from_official(record.meta["model_config"], source / OFFICIAL_FILE) != config:
        raise CheckpointError(f"{source / OFFICIAL_FILE}: its model_config is not the architecture in config.json")
    return record


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        return _parse_meta(path, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8 text") from None


def _parse_meta(path: Path, text: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise CheckpointError(f"{path}: must hold an object with an object model_config")
    return meta


def _step(model_file: Path) -> int:
    return int(model_file.stem.rpartition("_")[2])


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by the authors' names, without the prefix that compiling adds."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a broken or hostile file can raise nearly anything
        reason = str(error).strip().splitlines()[:1]
        raise CheckpointError(f"{path}: not a plain state dict: {''.join(reason) or type(error).__name__}") from None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: must hold a state dict, got {type(stored).__name__}")
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: entry {key!r} is not a named dense tensor")
        name = key.removeprefix("_orig_mod.")
        if name in tensors:
            raise CheckpointError(f"{path}: {name} is there with and without the prefix of a compiled model")
        tensors[name] = tensor.contiguous()
    return _unshared(tensors)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with memory of its own, as safetensors demands: a state dict may hold one under two names."""
    owners: set[int] = set()
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        if address in owners:
            tensors[name] = tensor.clone()
        owners.add(address)
    return tensors
