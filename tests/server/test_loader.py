"""From a checkpoint directory to an engine that serves it, and the numbers that machine and model decide."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lrt_core.checkpoint import CheckpointError, load_model, save_checkpoint
from lrt_core.hardware import has_fast_bf16
from lrt_core.kernels import is_native, native
from lrt_core.native_model import NativeModel, Quantization, can_take
from lrt_core.official_tokenizer import CHAT_TEMPLATE
from lrt_core.paged import PagedPool
from server.engine import loader
from server.engine.loader import (
    LoadError,
    LoadOptions,
    default_window,
    fingerprint,
    is_bf16_fast,
    is_small,
    load_chat_template,
    load_engine,
    prompt_rows,
    resolve,
)
from tests.engines import oracle, request
from tests.helpers import tiny_config, tiny_model, tiny_tokenizer

CONFIG = tiny_config()
FLOAT32_SLOT = PagedPool.bytes_per_slot(CONFIG, torch.float32)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes of a made-up machine: plenty unless changed."""
    machine = {"free": 2**40}
    monkeypatch.setattr(loader, "available_memory", lambda device: machine["free"])
    return machine


def options(**values: Any) -> LoadOptions:
    return LoadOptions(Path("unused"), **values)


def test_an_engine_from_a_checkpoint_says_what_the_oracle_says(checkpoint: Path) -> None:
    async def serve() -> list[int]:
        engine = load_engine(LoadOptions(checkpoint, dtype="float32", max_num_seqs=2, check_invariants=True))
        await engine.start()
        ids = [token async for delta in engine.admit(item) for token in delta.token_ids]
        await engine.stop()
        return ids

    item = request([1, 2, 3], 10)
    assert asyncio.run(serve()) == oracle(load_model(checkpoint), item, tiny_tokenizer().eos_ids)


@pytest.mark.skipif(not is_native(), reason="the package's build found no C++ compiler")
def test_forms_of_weights(checkpoint: Path, tmp_path: Path) -> None:
    engines = {
        form: load_engine(LoadOptions(checkpoint, dtype="float32", quantize=form)).engine for form in get_args(Quantization)
    }
    assert len({engine.weights_id for engine in engines.values()}) == 3, "their cached states are not each other's"
    models = {form: engine.runner.model for form, engine in engines.items()}
    sizes = {form: model.step_bytes for form, model in models.items() if isinstance(model, NativeModel)}
    assert sizes["none"] > sizes["int8-memory"] > sizes["int8"]
    with native(False), pytest.raises(LoadError, match="--quantize int8-memory needs the native kernels"):
        load_engine(LoadOptions(checkpoint, quantize="int8-memory"))
    plain = tmp_path / "plain"
    save_checkpoint(plain, tiny_model(tiny_config(recurrence=None)), tiny_tokenizer())
    with pytest.raises(LoadError, match="--quantize int8-memory: this checkpoint has no memory projections"):
        load_engine(LoadOptions(plain, quantize="int8-memory"))


def test_a_shape_that_native_code_does_not_take_is_served_as_torch_serves() -> None:
    shape = replace(CONFIG, num_heads=32, num_kv_heads=1, hidden_size=32 * CONFIG.head_dim)
    assert can_take(CONFIG, "cpu") == is_native() and not can_take(shape, "cpu") and not can_take(CONFIG, "cuda")
    assert default_window(shape, "cpu") == 128 and prompt_rows(16, shape, "cpu") is None
    assert is_bf16_fast(shape, "cpu") == has_fast_bf16("cpu")
    assert prompt_rows(16, CONFIG, "cpu") == (16 if is_native() else None)
    assert prompt_rows(16, CONFIG, "cuda") is None and prompt_rows(16, replace(CONFIG, recurrence=None), "cpu") is None


def test_ends_are_the_generation_configs(checkpoint: Path) -> None:
    engine = load_engine(LoadOptions(checkpoint, dtype="float32"))
    assert engine.engine.eos_ids == tiny_tokenizer().eos_ids


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("fast", "small"), [(True, False), (True, True), (False, False)])
def test_the_type_follows_machine_and_size(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, small: bool, native: bool
) -> None:
    monkeypatch.setattr(loader, "has_fast_bf16", lambda device: fast and not native)
    monkeypatch.setattr(loader, "can_take", lambda config, device: fast and native)
    monkeypatch.setattr(loader, "SMALL_MODEL", 10**9 if small else 1)
    assert is_small(CONFIG, "cpu") == small and not is_small(CONFIG, "cuda")
    runner = load_engine(LoadOptions(checkpoint)).engine.runner
    is_bfloat16 = fast and not small
    assert runner.model.dtype == runner.pool.keys.dtype == (torch.bfloat16 if is_bfloat16 else torch.float32)
    assert runner.config.tolerance == (4e-3 if is_bfloat16 else 1e-5)
    assert load_engine(LoadOptions(checkpoint, dtype="float32")).engine.runner.model.dtype == torch.float32


def test_defaults(memory: dict[str, int]) -> None:
    config = resolve(options(), CONFIG, torch.float32)
    assert config.max_model_len == CONFIG.sequence_len == 64
    assert config.num_blocks == 64 * 64 // 16, "64 sequences of full length"
    assert (config.window, config.prefill, config.tolerance) == (16 if is_native() else 128, "window", 1e-5)
    with native(False):
        assert resolve(options(), CONFIG, torch.float32).window == 128
    assert resolve(options(device="cuda"), CONFIG, torch.bfloat16).window == 128


def test_a_window_is_no_larger_than_a_step(memory: dict[str, int]) -> None:
    assert resolve(options(max_num_batched_tokens=80, prefill_window=128), CONFIG, torch.float32).window == 80


def test_a_share_of_free_memory_bounds_the_cache(memory: dict[str, int]) -> None:
    memory["free"] = 1000 * FLOAT32_SLOT
    assert resolve(options(), CONFIG, torch.float32).num_blocks == 400 // 16


def test_a_given_cache_is_taken_as_given(memory: dict[str, int]) -> None:
    memory["free"] = 0
    config = resolve(options(kv_cache_memory=1000 * FLOAT32_SLOT, block_size=8), CONFIG, torch.float32)
    assert (config.num_blocks, config.block_size) == (125, 8)


def test_zero_tolerance_is_not_the_default(memory: dict[str, int]) -> None:
    assert resolve(options(prefill_tolerance=0.0), CONFIG, torch.bfloat16).tolerance == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_cache_memory": 100}, "--kv-cache-memory must hold at least one block"),
        ({"max_model_len": 10**9}, "lower --max-model-len"),
        ({"max_num_seqs": 600}, "max_num_batched_tokens"),
        ({"block_size": 0}, "--block-size"),
        ({"block_size": -4, "kv_cache_memory": 10**6}, "--block-size"),
        ({"max_model_len": -1}, "max_model_len"),
        ({"prefill_tolerance": -1.0}, "tolerance"),
        ({"prefill_window": 0}, "window"),
    ],
)
def test_numbers_that_make_no_engine(memory: dict[str, int], values: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        resolve(options(**values), CONFIG, torch.float32)


def test_a_device_that_is_not_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoadError, match="usable CUDA devices"):
        load_engine(LoadOptions(checkpoint, device="cuda"))


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        load_engine(LoadOptions(tmp_path / "nothing"))


def test_a_fingerprint_names_the_weights(tmp_path: Path) -> None:
    model = tiny_model()
    name = fingerprint(model)
    assert len(name) == 8
    assert int(name, 16) >= 0
    save_checkpoint(tmp_path / "c", model, tiny_tokenizer())
    assert fingerprint(load_model(tmp_path / "c")) == name
    assert fingerprint(tiny_model(seed=1)) != name
    assert fingerprint(model.to(torch.bfloat16)) != name


def test_the_chat_template_is_the_checkpoints_unless_a_file_is_given(tmp_path: Path) -> None:
    file = tmp_path / "other.jinja"
    file.write_text("other", "utf-8")
    own = load_chat_template(tiny_tokenizer(), None)
    assert own is not None and own.source == CHAT_TEMPLATE
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(chat_template=None)):
        given = load_chat_template(tokenizer, file)
        assert given is not None and given.source == "other"
    assert load_chat_template(tiny_tokenizer(chat_template=None), None) is None


def test_a_broken_chat_template(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"^the checkpoint's chat template: line 1: "):
        load_chat_template(tiny_tokenizer(chat_template="{% if %}"), None)
    file = tmp_path / "broken.jinja"
    with pytest.raises(LoadError, match=r"^--chat-template: .*broken\.jinja: file not found"):
        load_chat_template(tiny_tokenizer(), file)
    file.write_text("\n{{ 1 | nope }}", "utf-8")
    with pytest.raises(LoadError, match=r"^--chat-template: .*broken\.jinja: line 2: No filter named 'nope'"):
        load_chat_template(tiny_tokenizer(), file)
