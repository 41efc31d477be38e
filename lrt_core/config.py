"""The architecture of one model, frozen and validated; what `config.json` of a checkpoint holds.

Neighbours: `model.py` builds from it, `checkpoint.py` writes it, `official.py` translates the authors' configuration.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Variant = Literal["shared", "layerwise"]
ValueEmbeddings = Literal["none", "alternating", "all"]
RopeDtype = Literal["bfloat16", "float32"]

VOCAB_MULTIPLE = 64
"""Embedding and head rows are padded to a multiple of this; logits are cut at `vocab_size`."""


class ConfigError(ValueError):
    """A configuration that no model can have; the message names the key."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_type(owner: str, name: str, value: object, kind: type) -> None:
    fits = type(value) is kind or (kind is float and type(value) is int)
    _require(fits, f"{owner}.{name} must be {kind.__name__}, got {value!r}")


@dataclass(frozen=True)
class RecurrenceConfig:
    """How the memory m_{t-1} enters token t (paper section 3).

    variant: one pair of memory projections for all layers (`shared`) or one per layer (`layerwise`).
    source_layer: index of the layer whose output, normed, is the latent; 0..num_layers-1.
    residual_injection: add memory_scale[i] * memory to layer i's input.
    kv_projection: mix projected memory into keys and values through the gates.
    """

    source_layer: int
    variant: Variant = "layerwise"
    residual_injection: bool = True
    kv_projection: bool = True

    def __post_init__(self) -> None:
        _require_type("recurrence", "source_layer", self.source_layer, int)
        _require(
            self.variant in get_args(Variant), f"recurrence.variant must be one of {get_args(Variant)}, got {self.variant!r}"
        )
        for name in ("residual_injection", "kv_projection"):
            _require_type("recurrence", name, getattr(self, name), bool)
        _require(
            self.residual_injection or self.kv_projection,
            "recurrence needs residual_injection, kv_projection or both; set recurrence to null to switch it off",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Every number that fixes the model's shape and arithmetic. Derived sizes are properties.

    sequence_len: trained context; also the window of L layers (S layers see half of it).
    window_pattern: S and L tiled over the layers; the last layer is always L.
    value_embeddings: which layers own a token-indexed value embedding (`alternating` counts back from the last).
    gate_channels: leading channels of the normed input that feed the gates; 0 means all.
    recurrence: None is the plain backbone.
    """

    vocab_size: int
    sequence_len: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    window_pattern: str = "L"
    value_embeddings: ValueEmbeddings = "all"
    gate_channels: int = 32
    use_residual_scale: bool = True
    use_embedding_scale: bool = True
    rope_base: float = 10000.0
    rope_dtype: RopeDtype = "bfloat16"
    logit_softcap: float = 15.0
    recurrence: RecurrenceConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sequence_len", "num_layers", "num_heads", "num_kv_heads", "hidden_size"):
            _require_type("config", name, getattr(self, name), int)
            _require(getattr(self, name) >= 1, f"config.{name} must be at least 1, got {getattr(self, name)}")
        for name, kind in (("gate_channels", int), ("rope_base", float), ("logit_softcap", float)):
            _require_type("config", name, getattr(self, name), kind)
        for name in ("use_residual_scale", "use_embedding_scale"):
            _require_type("config", name, getattr(self, name), bool)
        self._check_choices()
        self._check_shapes()

    def _check_choices(self) -> None:
        _require_type("config", "window_pattern", self.window_pattern, str)
        _require(
            bool(self.window_pattern) and set(self.window_pattern) <= {"S", "L"},
            f"config.window_pattern must consist of S and L, got {self.window_pattern!r}",
        )
        choices = (("value_embeddings", get_args(ValueEmbeddings)), ("rope_dtype", get_args(RopeDtype)))
        for name, allowed in choices:
            _require(getattr(self, name) in allowed, f"config.{name} must be one of {allowed}, got {getattr(self, name)!r}")
        _require(self.rope_base > 1, f"config.rope_base must be above 1, got {self.rope_base}")
        _require(self.logit_softcap > 0, f"config.logit_softcap must be positive, got {self.logit_softcap}")

    def _check_shapes(self) -> None:
        _require(self.hidden_size % self.num_heads == 0, "config.hidden_size must be a multiple of num_heads")
        _require(self.head_dim % 2 == 0, f"config.hidden_size / num_heads must be even for rope, got {self.head_dim}")
        _require(self.num_heads % self.num_kv_heads == 0, "config.num_heads must be a multiple of num_kv_heads")
        _require(0 <= self.gate_channels <= self.hidden_size, "config.gate_channels must lie in 0..hidden_size")
        if self.recurrence is not None:
            _require(isinstance(self.recurrence, RecurrenceConfig), "config.recurrence must be an object or null")
            _require(
                0 <= self.recurrence.source_layer < self.num_layers,
                f"recurrence.source_layer must lie in 0..{self.num_layers - 1}, got {self.recurrence.source_layer}",
            )

    @property
    def head_dim(self) -> int:
        """H: numbers per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """G*H: numbers per token in one layer's keys (and as many in its values)."""
        return self.num_kv_heads * self.head_dim

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_gate_channels(self) -> int:
        """c: input width of the gates."""
        return self.gate_channels or self.hidden_size

    @property
    def source_layer(self) -> int:
        """Index of the layer whose output is the latent (the last one for the plain backbone)."""
        return self.recurrence.source_layer if self.recurrence is not None else self.num_layers - 1

    @property
    def latents_are_hidden(self) -> bool:
        """Whether a token's latent is also what the head reads (source layer last)."""
        return self.source_layer == self.num_layers - 1

    @property
    def kv_projection(self) -> bool:
        """Whether memory is mixed into keys and values."""
        return self.recurrence is not None and self.recurrence.kv_projection

    @property
    def residual_injection(self) -> bool:
        """Whether memory is added to every layer's input."""
        return self.recurrence is not None and self.recurrence.residual_injection

    def has_value_embedding(self, layer: int) -> bool:
        """Whether `layer` owns a value embedding."""
        if self.value_embeddings == "alternating":
            return layer % 2 == (self.num_layers - 1) % 2
        return self.value_embeddings == "all"

    def num_gates(self, layer: int) -> int:
        """Gates per KV head in `layer`: local and memory when keys and values take memory, one for a value embedding."""
        return 2 * int(self.kv_projection) + int(self.has_value_embedding(layer))

    def window(self, layer: int) -> int:
        """Largest distance at which a query of `layer` sees a key, in tokens."""
        letter = "L" if layer == self.num_layers - 1 else self.window_pattern[layer % len(self.window_pattern)]
        return self.sequence_len if letter == "L" else self.sequence_len // 2

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; an unknown or missing key is a ConfigError that names it."""
        _check_keys(cls, "config", data)
        values = dict(data)
        recurrence = values.get("recurrence")
        if recurrence is not None:
            _require(isinstance(recurrence, dict), "config.recurrence must be an object or null")
            _check_keys(RecurrenceConfig, "recurrence", recurrence)
            values["recurrence"] = RecurrenceConfig(**recurrence)
        return cls(**values)


def _check_keys(cls: type[ModelConfig] | type[RecurrenceConfig], owner: str, data: dict[str, Any]) -> None:
    """Raise ConfigError unless `data` has exactly the keys of `cls`, so that no checkpoint relies on a default."""
    known = {field.name for field in fields(cls)}
    unknown, missing = sorted(set(data) - known), sorted(known - set(data))
    _require(not unknown, f"unknown {owner} key(s): {', '.join(unknown)}")
    _require(not missing, f"missing {owner} key(s): {', '.join(missing)}")
