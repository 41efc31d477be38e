from __future__ import annotations

import json
from typing import Any

import pytest

from lrt_core.config import ConfigError, ModelConfig, RecurrenceConfig
from tests.helpers import TINY_VOCAB_SIZE, VARIANTS, tiny_config


@pytest.mark.parametrize("variant", VARIANTS)
def test_json_round_trip(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_derived_sizes() -> None:
    config = tiny_config(vocab_size=130)
    assert (config.head_dim, config.kv_size, config.intermediate_size) == (8, 16, 128)
    assert config.padded_vocab_size == 192
    assert tiny_config(vocab_size=128).padded_vocab_size == 128
    assert config.num_gate_channels == 16
    assert tiny_config(gate_channels=0).num_gate_channels == 32


def test_windows_tile_and_the_last_layer_is_long() -> None:
    config = tiny_config(num_layers=5, window_pattern="SSL")
    assert [config.window(layer) for layer in range(5)] == [32, 32, 64, 32, 64]
    assert [tiny_config(num_layers=2, window_pattern="S").window(layer) for layer in range(2)] == [32, 64]


def test_alternating_value_embeddings_count_from_the_last_layer() -> None:
    for num_layers in (1, 4, 5):
        config = tiny_config(num_layers=num_layers, value_embeddings="alternating", recurrence=None)
        owners = [layer for layer in range(num_layers) if config.has_value_embedding(layer)]
        assert owners == list(range((num_layers - 1) % 2, num_layers, 2))


@pytest.mark.parametrize(
    ("overrides", "gates"),
    [
        ({}, 3),
        ({"value_embeddings": "none"}, 2),
        ({"recurrence": RecurrenceConfig(2, kv_projection=False)}, 1),
        ({"recurrence": None, "value_embeddings": "none"}, 0),
    ],
)
def test_num_gates(overrides: dict[str, Any], gates: int) -> None:
    assert tiny_config(**overrides).num_gates(2) == gates


def test_source_layer_of_the_plain_backbone_is_the_last() -> None:
    config = tiny_config(recurrence=None)
    assert config.source_layer == 2
    assert not config.kv_projection
    assert not config.residual_injection


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"num_layers": 2.0, "recurrence": None}, "num_layers must be int"),
        ({"num_heads": True}, "num_heads must be int"),
        ({"hidden_size": 30}, "hidden_size must be a multiple of num_heads"),
        ({"hidden_size": 36, "num_heads": 4}, "must be even for rope"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"gate_channels": 33}, "gate_channels must lie in"),
        ({"gate_channels": -1}, "gate_channels must lie in"),
        ({"window_pattern": ""}, "window_pattern must consist of S and L"),
        ({"window_pattern": "SX"}, "window_pattern must consist of S and L"),
        ({"value_embeddings": "some"}, "value_embeddings must be one of"),
        ({"rope_dtype": "float16"}, "rope_dtype must be one of"),
        ({"rope_base": 1.0}, "rope_base must be above 1"),
        ({"logit_softcap": 0.0}, "logit_softcap must be positive"),
        ({"use_residual_scale": 1}, "use_residual_scale must be bool"),
        ({"recurrence": "layerwise"}, "recurrence must be an object or null"),
        ({"recurrence": RecurrenceConfig(3)}, "source_layer must lie in 0..2"),
        ({"recurrence": RecurrenceConfig(-1)}, "source_layer must lie in 0..2"),
    ],
)
def test_impossible_values_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**overrides)


def test_recurrence_without_a_pathway_is_refused() -> None:
    with pytest.raises(ConfigError, match="residual_injection, kv_projection or both"):
        RecurrenceConfig(0, residual_injection=False, kv_projection=False)
    with pytest.raises(ConfigError, match=r"recurrence\.variant must be one of"):
        RecurrenceConfig(0, variant="per-head")  # type: ignore[arg-type]


def test_unknown_and_missing_keys_are_named() -> None:
    data = tiny_config().to_dict()
    with pytest.raises(ConfigError, match=r"unknown config key\(s\): dropout, window"):
        ModelConfig.from_dict({**data, "window": 3, "dropout": 0})
    del data["rope_base"]
    with pytest.raises(ConfigError, match=r"missing config key\(s\): rope_base"):
        ModelConfig.from_dict(data)


def test_unknown_and_missing_recurrence_keys_are_named() -> None:
    data = tiny_config().to_dict()
    data["recurrence"]["depth"] = 2
    with pytest.raises(ConfigError, match=r"unknown recurrence key\(s\): depth"):
        ModelConfig.from_dict(data)
    del data["recurrence"]["depth"], data["recurrence"]["variant"]
    with pytest.raises(ConfigError, match=r"missing recurrence key\(s\): variant"):
        ModelConfig.from_dict(data)
    with pytest.raises(ConfigError, match="recurrence must be an object or null"):
        ModelConfig.from_dict({**data, "recurrence": [1]})


def test_vocabulary_of_the_shared_builders_agrees() -> None:
    assert tiny_config().vocab_size == TINY_VOCAB_SIZE
