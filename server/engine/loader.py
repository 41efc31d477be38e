"""From a checkpoint directory and a few numbers to an engine; defaults that depend on model and machine are settled here."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lrt_core.chat import ChatTemplate, ChatTemplateError
from lrt_core.checkpoint import expected_shapes, load_config, load_generation_config, load_model, load_tokenizer
from lrt_core.config import ModelConfig
from lrt_core.files import CheckpointError, read_text
from lrt_core.fused import fuse
from lrt_core.hardware import available_memory, has_fast_bf16
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.native_model import NativeModel, Quantization, can_run, can_take
from lrt_core.packed import pack
from lrt_core.paged import PagedPool
from lrt_core.tokenizer import Tokenizer
from server.engine.async_engine import AsyncEngine
from server.engine.config import EngineConfig, PrefillMode
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.engine.stats import EngineObserver

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Relative change below which a memory counts as settled; bfloat16 itself rounds to 4e-3."""
SMALL_MODEL = 16 * 2**20
"""Parameters below which the weights may stay in a CPU's cache; bfloat16 and a second thread then cost more than they save
(measured with 6 million parameters on two cores)."""
NARROW_WINDOW = 16
"""Rows of a window where rows are dear (measured: docs/bench)."""
_MEMORY_SHARE = 0.4
"""Largest share of the memory still available that the cache takes unless told otherwise."""


class LoadError(ValueError):
    """These numbers make no engine for this checkpoint on this machine."""


@dataclass(frozen=True)
class LoadOptions:
    """What to load and how. None lets model and machine decide: max_model_len is the trained context, kv_cache_memory (bytes)
    what max_num_seqs sequences of full length need within a share of the free memory, the tolerance follows the type. dtype
    auto is bfloat16 where it pays and the model is not small. quantize: which weights are int8. deterministic: logprobs
    bit-equal alone and in any batch, whatever was cached, forked or preempted; prompts are then read sequentially."""

    checkpoint: Path
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 1024
    kv_cache_memory: int | None = None
    block_size: int = 16
    prefill: PrefillMode = "window"
    prefill_window: int | None = None
    prefill_tolerance: float | None = None
    prefix_caching: bool = True
    check_invariants: bool = False
    quantize: Quantization = "none"
    deterministic: bool = False


def load_engine(options: LoadOptions, observer: EngineObserver | None = None) -> AsyncEngine:
    """Load the checkpoint and build an engine over it (not started).

    Raises CheckpointError for the checkpoint, LoadError for numbers that do not go together.
    """
    _check_device(torch.device(options.device))
    dtype = DTYPES.get(options.dtype) or _auto_dtype(options)
    model = load_model(options.checkpoint, dtype=dtype, device=options.device)
    tokenizer = load_tokenizer(options.checkpoint)
    generation = load_generation_config(options.checkpoint)
    weights_id = fingerprint(model) + ("" if options.quantize == "none" else f"-{options.quantize}")
    config = resolve(options, model.config, dtype)
    _check_native(options, model)
    runner = _make_runner(serving_model(model, config.max_model_len, options.quantize), config)
    engine = Engine(runner, generation.eos_token_ids, options.check_invariants, weights_id=weights_id)
    return AsyncEngine(engine, tokenizer, observer)


def load_chat_template(tokenizer: Tokenizer, file: Path | None) -> ChatTemplate | None:
    """The chat template in `file`, else the checkpoint's; None if it has none. Raises LoadError for one that is broken."""
    if file is None and tokenizer.chat_template is None:
        return None
    try:
        source = tokenizer.chat_template if file is None else read_text(file)
        assert source is not None
        return ChatTemplate(source, tokenizer)
    except (ChatTemplateError, CheckpointError) as error:
        where = "the checkpoint's chat template" if file is None else "--chat-template"
        path = "" if file is None or isinstance(error, CheckpointError) else f"{file}: "
        raise LoadError(f"{where}: {path}{error}") from None


def serving_model(
    model: LatentRecurrentTransformer, max_len: int, quantize: Quantization = "none"
) -> LatentRecurrentTransformer | NativeModel:
    """The model as it is served, for sequences of up to max_len tokens: native where that exists, else fused and packed.

    quantize: which weights are int8; native code's alone.
    """
    return NativeModel(model, max_len, quantize) if can_run(model) else pack(fuse(model))


def _check_native(options: LoadOptions, model: LatentRecurrentTransformer) -> None:
    """Raise LoadError for what only native code can do, where there is none."""
    needs = ((f"--quantize {options.quantize}", options.quantize != "none"), ("--deterministic", options.deterministic))
    for flag, wanted in needs:
        if wanted and not can_run(model):
            raise LoadError(f"{flag} needs the native kernels: --device cpu, and an install that found a C++ compiler")
    if options.quantize == "int8-memory" and not model.config.kv_projection:
        raise LoadError("--quantize int8-memory: this checkpoint has no memory projections")


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoadError(f"--device {device}: this machine has {torch.cuda.device_count()} usable CUDA devices")


def _auto_dtype(options: LoadOptions) -> torch.dtype:
    config = load_config(options.checkpoint)
    is_fast = is_bf16_fast(config, options.device) and not is_small(config, options.device)
    return torch.bfloat16 if is_fast else torch.float32


def is_bf16_fast(config: ModelConfig, device: str) -> bool:
    """Whether bfloat16 pays: in hardware, or by native code, which any CPU feeds with half the bytes in less time."""
    return has_fast_bf16(device) or can_take(config, device)


def is_small(config: ModelConfig, device: str) -> bool:
    """Whether a model of this shape runs from the cache of a CPU."""
    num_parameters = sum(math.prod(shape) for shape in expected_shapes(config).values())
    return torch.device(device).type == "cpu" and num_parameters < SMALL_MODEL


def _make_runner(model: LatentRecurrentTransformer | NativeModel, config: EngineConfig) -> ModelRunner:
    try:
        return ModelRunner(model, config)
    except RuntimeError as error:  # what torch raises when memory is short
        size = config.capacity * PagedPool.bytes_per_slot(model.config, model.dtype)
        raise LoadError(f"a cache of {config.capacity} tokens ({size} bytes) cannot be had; lower --kv-cache-memory") from error


def resolve(options: LoadOptions, model_config: ModelConfig, dtype: torch.dtype) -> EngineConfig:
    """Settle what the options leave open. Raises LoadError."""
    if options.block_size < 1:
        raise LoadError(f"--block-size must be at least 1, got {options.block_size}")
    max_model_len = options.max_model_len or model_config.sequence_len
    tolerance = DEFAULT_TOLERANCE[dtype] if options.prefill_tolerance is None else options.prefill_tolerance
    wanted = default_window(model_config, options.device) if options.prefill_window is None else options.prefill_window
    window = min(wanted, options.max_num_batched_tokens)
    try:
        return EngineConfig(
            max_model_len=max_model_len,
            num_blocks=_num_blocks(options, max_model_len, PagedPool.bytes_per_slot(model_config, dtype)),
            block_size=options.block_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_waiting=options.max_num_waiting,
            # A state that is read token by token depends on its tokens alone, not on how windows fell.
            prefill="sequential" if options.deterministic else options.prefill,
            window=window,
            num_prompt_rows=prompt_rows(window, model_config, options.device),
            tolerance=tolerance,
            prefix_caching=options.prefix_caching,
        )
    except ValueError as error:
        raise LoadError(str(error)) from None


def default_window(model_config: ModelConfig, device: str) -> int:
    """Largest refinement window, in rows, unless told otherwise.

    On a CPU a step of some ten rows takes little longer than a step of one, beyond that every row has its price, and a narrow
    window computes a token fewer times. A plain model computes every token once, however wide.
    """
    return NARROW_WINDOW if _rows_are_dear(model_config, device) else 128


def prompt_rows(window: int, model_config: ModelConfig, device: str) -> int | None:
    """What prompts share in a step: where windows are narrow because rows are dear, one window's rows."""
    return window if window <= NARROW_WINDOW and _rows_are_dear(model_config, device) else None


def _rows_are_dear(model_config: ModelConfig, device: str) -> bool:
    return can_take(model_config, device) and model_config.recurrence is not None


def fingerprint(model: LatentRecurrentTransformer) -> str:
    """Eight hex digits that name the weights: a hash over each tensor's name, shape and a spread of its bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def _num_blocks(options: LoadOptions, max_model_len: int, bytes_per_slot: int) -> int:
    bytes_per_block = bytes_per_slot * options.block_size
    one_sequence = -(-max_model_len // options.block_size)
    if options.kv_cache_memory is not None:
        num_blocks = options.kv_cache_memory // bytes_per_block
        if num_blocks < 1:
            raise LoadError(f"--kv-cache-memory must hold at least one block of {bytes_per_block} bytes")
        return num_blocks
    affordable = int(available_memory(options.device) * _MEMORY_SHARE) // bytes_per_block
    if affordable < one_sequence:
        raise LoadError(
            f"one sequence of {max_model_len} tokens needs {one_sequence * bytes_per_block} bytes of cache and too little "
            "memory is free; lower --max-model-len or --block-size"
        )
    return min(affordable, one_sequence * options.max_num_seqs)
