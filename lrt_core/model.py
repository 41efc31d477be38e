"""The Latent Recurrent Transformer: one forward for training, prompt reading and decoding alike.

Memory enters `forward` as an argument and latents leave it as a result; where keys and values live is the business of
the `kv` argument (`kv.py`). Nothing here knows which phase calls it. Source: arXiv 2605.26797, section 3.

The residual stream, latents and memories are at least float32, whatever the weights' type: in bfloat16 alone, two passes of
refinement would differ by rounding as much as the tolerance allows, and never settle.

Shapes: B batch, T tokens, D hidden size, L layers, N query heads, G key/value heads, H head size (N*H = D), V vocabulary.
A leading `...` is [B] in training and absent in serving, where the tokens of all sequences lie flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrt_core.config import ModelConfig
from lrt_core.kernels import norm, rope_norm
from lrt_core.kv import KV, Heads
from lrt_core.memory import Gates, Memory, MemoryProjection, ProjectedMemory, mix, no_memory, split_gates

_T = TypeVar("_T")


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of residual stream, latents and memories for weights of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class Rope(NamedTuple):
    """cos and sin of the rotation angles, each float32 [..., T, 1, H/2]."""

    cos: Tensor
    sin: Tensor


def make_rope(config: ModelConfig, positions: Tensor) -> Rope:
    """Rotation for integer positions [..., T]; rounded to config.rope_dtype, as the release that trained the model did."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    inverse_frequency = 1.0 / (config.rope_base ** (channels / config.head_dim))
    angles = positions.to(torch.float32).unsqueeze(-1) * inverse_frequency
    dtype = torch.bfloat16 if config.rope_dtype == "bfloat16" else torch.float32
    return Rope(*(part.to(dtype).float().unsqueeze(-2) for part in (angles.cos(), angles.sin())))


class ForwardResult(NamedTuple):
    """hidden: normed output of the last layer, what `logits` reads; latents: normed output of the source layer; [..., T, D]"""

    hidden: Tensor
    latents: Tensor


@dataclass
class Stream:
    """A forward under way: the residual stream x and its start x0 [..., T, D], and what every layer reads beside it."""

    x: Tensor
    x0: Tensor
    tokens: Tensor
    rope: Rope
    memory: Tensor | None
    projected: Sequence[ProjectedMemory] | None
    dtype: torch.dtype
    """What the layers' products compute in (under autocast, autocast's type)."""
    recompute: bool = False
    """Whether layers compute their parts a second time in the backward instead of keeping what lies between."""

    def run(self, part: Callable[..., _T], *arguments: object) -> _T:
        """Call a part of a layer, keeping no more than its arguments for the backward if the stream recomputes."""
        if not (self.recompute and torch.is_grad_enabled()):
            return part(*arguments)
        result: _T = checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
        return result

    def select(self, rows: Tensor) -> Stream:
        """The stream of some tokens [R] of a flat batch."""
        memory = self.memory.index_select(0, rows) if self.memory is not None else None
        rope = Rope(self.rope.cos.index_select(0, rows), self.rope.sin.index_select(0, rows))
        taken: dict[int, ProjectedMemory] = {}  # shared projections are one object in every layer's place
        for one in self.projected or ():
            if id(one) not in taken:
                taken[id(one)] = ProjectedMemory(one.key.index_select(0, rows), one.value.index_select(0, rows))
        projected = [taken[id(one)] for one in self.projected] if self.projected is not None else None
        x, x0, tokens = (part.index_select(0, rows) for part in (self.x, self.x0, self.tokens))
        return Stream(x, x0, tokens, rope, memory, projected, self.dtype, self.recompute)


class InputProjections(nn.Module):
    """Wq, Wk, Wv and the gates' Wg of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_gate_channels = config.num_gate_channels
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, config.kv_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.kv_size, bias=False)
        num_gates = config.num_gates(layer) * config.num_kv_heads
        self.gate = nn.Linear(config.num_gate_channels, num_gates, bias=False) if num_gates else None

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """a [..., T, D] -> query [..., T, D], key and value [..., T, G*H], raw gates [..., T, num_gates*G] or None."""
        gate = self.gate(a[..., : self.num_gate_channels]) if self.gate is not None else None
        return self.query(a), self.key(a), self.value(a), gate


class Attention(nn.Module):
    """Self-attention whose keys and values also carry memory and token-indexed value embeddings."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.input: nn.Module = InputProjections(config, layer)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        has_embedding = config.has_value_embedding(layer)
        self.value_embedding = nn.Embedding(config.padded_vocab_size, config.kv_size) if has_embedding else None

    def forward(self, a: Tensor, tokens: Tensor, rope: Rope, memory: ProjectedMemory | None) -> Heads:
        """a [..., T, D] normed input -> what attention reads; `output` takes what comes of it."""
        head_dim = self.config.head_dim
        flat_query, flat_key, flat_value, raw_gates = self.input(a)
        gates = split_gates(raw_gates, self.config, self.layer)
        query = flat_query.unflatten(-1, (-1, head_dim))
        raw_key = mix(flat_key.unflatten(-1, (-1, head_dim)), gates.local, memory and memory.key, gates.memory)
        value = mix(flat_value.unflatten(-1, (-1, head_dim)), gates.local, memory and memory.value, gates.memory)
        value = self._add_value_embedding(value, tokens, gates)
        return Heads(rope_norm(query, *rope), rope_norm(raw_key, *rope), value, raw_key, gates.memory)

    def _add_value_embedding(self, value: Tensor, tokens: Tensor, gates: Gates) -> Tensor:
        if self.value_embedding is None or gates.value_embedding is None:
            return value
        embedding = self.value_embedding(tokens).unflatten(-1, (-1, self.config.head_dim))
        embedded: Tensor = value + gates.value_embedding * embedding
        return embedded


class MLP(nn.Module):
    """W_down relu(W_up x)^2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., T, D] -> [..., T, D]."""
        out: Tensor = self.down(F.relu(self.up(x)).square())
        return out


class Layer(nn.Module):
    """Attention and MLP, each on the normed residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.index, self.attention = layer, Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, stream: Stream, memory: ProjectedMemory | None, kv: KV) -> Tensor:
        """Residual stream [..., T, D] after injection -> [..., T, D]; `stream` is what the layers have in common."""
        heads = stream.run(self._before, x, stream, memory)
        return stream.run(self._behind, x, kv.attend(self.index, heads), stream)

    def compile_parts(self, **options: Any) -> None:
        """torch.compile what lies before and behind attention, which stays the cache's business; options: torch.compile's."""
        self._before = torch.compile(self._before, **options)  # type: ignore[method-assign]
        self._behind = torch.compile(self._behind, **options)  # type: ignore[method-assign]

    def _before(self, x: Tensor, stream: Stream, memory: ProjectedMemory | None) -> Heads:
        heads: Heads = self.attention(norm(x, stream.dtype), stream.tokens, stream.rope, memory)
        return heads

    def _behind(self, x: Tensor, attended: Tensor, stream: Stream) -> Tensor:
        x = x + self.attention.output(attended.flatten(-2))
        out: Tensor = x + self.mlp(norm(x, stream.dtype))
        return out


class LatentRecurrentTransformer(nn.Module):
    """The model. `forward` gives hidden states and latents, `logits` reads hidden states.

    Setting `recompute` makes training hold less memory and take longer: see `Stream`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.recompute = config, False
        num_layers = config.num_layers
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(num_layers))
        self.head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.residual_scale = nn.Parameter(torch.ones(num_layers)) if config.use_residual_scale else None
        self.embedding_scale = nn.Parameter(torch.zeros(num_layers)) if config.use_embedding_scale else None
        self.memory_scale = nn.Parameter(torch.zeros(num_layers)) if config.residual_injection else None
        self.memory_projection: nn.Module | None = MemoryProjection(config) if config.kv_projection else None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrices, and of cached keys and values."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embedding.weight.device

    def forward(self, tokens: Tensor, positions: Tensor, memory: Memory, kv: KV) -> ForwardResult:
        """Run every layer over the given tokens.

        tokens, positions: integers [..., T] (positions may be [T] for a batch [B, T]). memory: [..., T, D], the latent of
        each token's predecessor, explicit zeros where there is none (ZERO_MEMORY: zeros for all, none of them multiplied); None
        exactly when the model has no recurrence.
        kv: stores these tokens' keys and values and attends. Raises ValueError when memory and recurrence disagree.
        """
        stream = self.begin(tokens, positions, memory)
        latents = self.run_to_source(stream, kv)
        return ForwardResult(self.run_from_source(stream, latents, kv), latents)

    # The forward in parts, for a caller that wants the layers above the source on some of the tokens only: memories depend on
    # the layers up to the source alone.

    def begin(self, tokens: Tensor, positions: Tensor, memory: Memory) -> Stream:
        """The residual stream before layer 0; arguments as in `forward`."""
        if (memory is None) != (self.config.recurrence is None):
            raise ValueError("memory must be given to a recurrent model (zeros at position 0) and to no other")
        x = norm(self.embedding(tokens).to(stream_dtype(self.dtype)))
        project, projected = self.memory_projection, None
        if project is not None and isinstance(memory, Tensor):
            projected = project(memory.to(self.dtype))
        elif project is not None:
            projected = [no_memory(x)] * len(self.layers)
        given = memory if isinstance(memory, Tensor) else None
        return Stream(x, x, tokens, make_rope(self.config, positions), given, projected, self.dtype, self.recompute)

    def run_to_source(self, stream: Stream, kv: KV) -> Tensor:
        """Run the layers up to the source, changing `stream.x`; returns the latents [..., T, D]."""
        self._run(stream, range(self.config.source_layer + 1), kv)
        return norm(stream.x)

    def run_from_source(self, stream: Stream, latents: Tensor, kv: KV) -> Tensor:
        """Run the layers above the source, if any, over what `run_to_source` left; returns the hidden states [..., T, D]."""
        above = range(self.config.source_layer + 1, self.config.num_layers)
        if not above:
            return latents
        self._run(stream, above, kv)
        return norm(stream.x)

    def _run(self, stream: Stream, layers: range, kv: KV) -> None:
        for index in layers:
            memory = stream.projected and stream.projected[index]
            stream.x = self.layers[index](self._inject(index, stream), stream, memory, kv)

    def _inject(self, layer: int, stream: Stream) -> Tensor:
        """alpha x + beta x0 + gamma memory for one layer, [..., T, D]."""
        x = stream.x
        if self.residual_scale is not None:
            x = self.residual_scale[layer] * x
        if self.embedding_scale is not None:
            x = x + self.embedding_scale[layer] * stream.x0
        if self.memory_scale is not None and stream.memory is not None:
            x = x + self.memory_scale[layer] * stream.memory
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> float32 logits [..., V], softly capped at +-config.logit_softcap."""
        cap = self.config.logit_softcap
        raw = self.head(hidden.to(self.dtype))[..., : self.config.vocab_size].float()
        return cap * torch.tanh(raw / cap)

    def zero_memory(self, *shape: int) -> Tensor | None:
        """Explicit zeros [*shape, D] for a recurrent model, None for a plain one."""
        if self.config.recurrence is None:
            return None
        return torch.zeros(*shape, self.config.hidden_size, dtype=stream_dtype(self.dtype), device=self.device)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights as the authors' release draws them: uniform of deviation 1/sqrt(D), outputs zero, gates neutral."""
        bound = (3.0 / self.config.hidden_size) ** 0.5
        for name, weight in self.named_parameters():
            if name == "embedding.weight":
                weight.normal_(0.0, 1.0, generator=generator)
            elif name == "head.weight":
                weight.normal_(0.0, 0.001, generator=generator)
            elif name.endswith(("attention.output.weight", "mlp.down.weight", "gate.weight")):
                weight.zero_()
            elif name in _INITIAL_SCALES:
                weight.fill_(_INITIAL_SCALES[name])
            else:
                weight.uniform_(-bound, bound, generator=generator)


_INITIAL_SCALES = {"residual_scale": 1.0, "embedding_scale": 0.1, "memory_scale": 0.1}
