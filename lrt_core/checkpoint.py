"""A checkpoint directory: architecture, weights, tokenizer and generation defaults, saved atomically and read strictly.

    config.json              format_version, model_type and every field of ModelConfig
    model.safetensors        the weights; above 4 GB in shards model-00001-of-0000N.safetensors + model.safetensors.index.json
    tokenizer.tiktoken, tokenizer_config.json    see `tokenizer.py`
    chat_template.jinja          where the model can chat, see `chat.py`
    generation_config.json   what ends a generation, and sampling defaults
    README.md                the model card
    official.json            only in checkpoints converted from the authors' files, see `official.py`

No file is a pickle. Whatever a file lacks, has too much or has wrong is a CheckpointError that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt_core.config import ConfigError, ModelConfig
from lrt_core.files import (
    CheckpointError,
    check_keys,
    existing,
    read_json,
    replaced_directory,
    write_json,
    write_text,
)
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from lrt_core.tokenizer import RANKS_FILE, TEMPLATE_FILE, Tokenizer
from lrt_core.weights import MAX_SHARD_BYTES, is_weight_file, read_weights, write_weights

__all__ = [
    "BUNDLED",
    "CheckpointError",
    "GenerationConfig",
    "expected_shapes",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tensors",
    "load_tokenizer",
    "save_checkpoint",
    "write_checkpoint",
]

FORMAT_VERSION = 1
MODEL_TYPE = "latent-recurrent-transformer"
BUNDLED = Path(__file__).parent / "bundled"
"""The checkpoint that is served when none is named; part of the package."""

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"
OFFICIAL_FILE = "official.json"
_FILES = {CONFIG_FILE, GENERATION_FILE, CARD_FILE, OFFICIAL_FILE, RANKS_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE}


@dataclass(frozen=True)
class GenerationConfig:
    """What ends a generation and how the command line samples when not told.

    temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off. ValueError names a field out of range.
    """

    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        ids = self.eos_token_ids
        checks = {
            "eos_token_ids": isinstance(ids, tuple) and all(type(id) is int and id >= 0 for id in ids),
            "temperature": type(self.temperature) in (int, float) and 0 <= self.temperature < float("inf"),
            "top_p": type(self.top_p) in (int, float) and 0 < self.top_p <= 1,
            "top_k": type(self.top_k) is int and self.top_k >= 0,
            "max_new_tokens": type(self.max_new_tokens) is int and self.max_new_tokens >= 1,
        }
        for name, holds in checks.items():
            if not holds:
                raise ValueError(f"generation config: {name} has no meaning as {getattr(self, name)!r}")


def save_checkpoint(
    directory: Path,
    model: LatentRecurrentTransformer,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.float32,
    generation: GenerationConfig | None = None,
    model_card: str = "",
) -> None:
    """Write a whole checkpoint, atomically, in the place of an older one if there is one.

    Matrices are stored in `dtype` (float32, bfloat16 or float16), the per-layer scales always in float32. generation: None
    takes the tokenizer's eos tokens and the defaults. CheckpointError when model and tokenizer disagree, a weight is not
    finite, or `directory` holds something that is no checkpoint.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.ndim >= 2 else torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }
    write_checkpoint(directory, model.config, tensors, tokenizer, generation=generation, model_card=model_card)


def write_checkpoint(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    generation: GenerationConfig | None = None,
    model_card: str = "",
    official: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """As `save_checkpoint`, from tensors that are stored as they are; official: content of `official.json`, if any."""
    generation = generation or GenerationConfig(tuple(sorted(tokenizer.eos_ids)))
    _check_vocabulary(Path(directory), config, tokenizer.vocab_size, generation)
    with replaced_directory(Path(directory), _is_ours) as folder:
        header = {"format_version": FORMAT_VERSION, "model_type": MODEL_TYPE}
        write_json(folder / CONFIG_FILE, {**header, **config.to_dict()})
        write_weights(folder, tensors, expected_shapes(config), max_shard_bytes)
        tokenizer.save(folder)
        write_json(folder / GENERATION_FILE, asdict(generation))
        write_text(folder / CARD_FILE, model_card or _default_card(config))
        if official is not None:
            write_json(folder / OFFICIAL_FILE, dict(official))


def load_config(directory: Path) -> ModelConfig:
    """The architecture; CheckpointError on an unknown or missing key, a bad value or a newer format version."""
    path = existing(Path(directory)) / CONFIG_FILE
    data = read_json(path)
    version = data.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format_version must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest this program reads")
    model_type = data.pop("model_type", None)
    if model_type != MODEL_TYPE:
        raise CheckpointError(f"{path}: model_type must be {MODEL_TYPE!r}, got {model_type!r}")
    try:
        return ModelConfig.from_dict(data)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_generation_config(directory: Path) -> GenerationConfig:
    """The generation defaults, strictly."""
    path = existing(Path(directory)) / GENERATION_FILE
    data = read_json(path)
    check_keys(path, data, {field.name for field in fields(GenerationConfig)})
    ids = data.pop("eos_token_ids")
    try:
        return GenerationConfig(tuple(ids) if isinstance(ids, list) else ids, **data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer, checked against the architecture and the generation defaults beside it."""
    folder = existing(Path(directory))
    tokenizer = Tokenizer.from_directory(folder)
    _check_vocabulary(folder, load_config(folder), tokenizer.vocab_size, load_generation_config(folder))
    return tokenizer


def load_tensors(directory: Path) -> dict[str, Tensor]:
    """Every weight as stored, on the CPU, backed by the mapped files."""
    folder = existing(Path(directory))
    return read_weights(folder, expected_shapes(load_config(folder)))


def load_model(
    directory: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LatentRecurrentTransformer:
    """The model in eval mode, its whole checkpoint checked.

    dtype: type of the matrices; None keeps the stored one (the widest, where a converted checkpoint mixes several). The
    per-layer scales are float32 always. Weights that need neither a cast nor a move stay views of the mapped files.
    CheckpointError names the file and the key or tensor that is wrong.
    """
    folder = existing(Path(directory))
    config = load_config(folder)
    load_tokenizer(folder)
    tensors = read_weights(folder, expected_shapes(config))
    target = dtype or _widest(tensors)
    with torch.device("meta"):
        model = LatentRecurrentTransformer(config)
    state = {
        name: tensor.to(device, target if tensor.ndim >= 2 else torch.float32)  # no copy where nothing changes
        for name, tensor in tensors.items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight a model of this architecture has."""
    with torch.device("meta"):
        model = LatentRecurrentTransformer(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _widest(tensors: Mapping[str, Tensor]) -> torch.dtype:
    matrix_types = {tensor.dtype for tensor in tensors.values() if tensor.ndim >= 2}
    return matrix_types.pop() if len(matrix_types) == 1 else torch.float32


def _is_ours(name: str) -> bool:
    return name in _FILES or is_weight_file(name)


def _check_vocabulary(folder: Path, config: ModelConfig, vocab_size: int, generation: GenerationConfig) -> None:
    """A model whose every logit has text, and whose end of generation can be sampled."""
    if vocab_size != config.vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer has {vocab_size} tokens, config.vocab_size is {config.vocab_size}")
    outside = [id for id in generation.eos_token_ids if id >= vocab_size]
    if outside:
        raise CheckpointError(f"{folder / GENERATION_FILE}: eos_token_ids {outside} are not below vocab_size {vocab_size}")


def _default_card(config: ModelConfig) -> str:
    recurrence = config.recurrence
    kind = "plain backbone, no recurrence" if recurrence is None else f"{recurrence.variant}, source {recurrence.source_layer}"
    shape = f"{config.num_layers} layers, hidden size {config.hidden_size}, vocabulary {config.vocab_size}"
    return f"# Latent Recurrent Transformer\n\n{shape}; recurrence: {kind}.\n"
