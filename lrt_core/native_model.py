"""A model for serving on a CPU whose layers run in native code: one call takes all rows of a step through them.

It has the parts of `LatentRecurrentTransformer` (begin, run_to_source, run_from_source, logits), over the paged pool alone.
Every output of a product is summed in one order whatever the number of rows, so a row's result is bit-equal alone and in any
batch. Neighbours: `kernels/step.cpp` does the work, `model.py` is its twin, the server's model runner calls it.

Shapes: T rows, S sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lrt_core import kernels
from lrt_core.config import ModelConfig
from lrt_core.fused import FusedInputProjections
from lrt_core.kernels.plan import (
    KINDS,
    MOST_QUERIES,
    PARTIAL_SIZE,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    PackedMatrix,
    PoolStruct,
    StepStruct,
    padded,
    pointer,
)
from lrt_core.kernels.products import apply
from lrt_core.memory import MemoryProjection
from lrt_core.model import InputProjections, LatentRecurrentTransformer, Layer, make_rope
from lrt_core.paged import NativeKV

EPS = torch.finfo(torch.float32).eps
Quantization = Literal["none", "int8", "int8-memory"]
"""Which products have int8 weights: none, all of them, the memory projections alone."""


@dataclass
class NativeStream:
    """A forward under way: the residual stream x and its start x0 [T, D padded], and what every layer reads beside it."""

    x: Tensor
    x0: Tensor
    tokens: Tensor
    positions: Tensor
    memory: Tensor | None

    def select(self, rows: Tensor) -> NativeStream:
        """The stream of some rows [R]."""
        memory = None if self.memory is None else self.memory.index_select(0, rows)
        x, x0, tokens, positions = (part.index_select(0, rows) for part in (self.x, self.x0, self.tokens, self.positions))
        return NativeStream(x, x0, tokens, positions, memory)


def can_take(config: ModelConfig, device: str) -> bool:
    """Whether native code can run models of this shape there: built, switched on, on a CPU, at most 16 heads a group."""
    fits = config.num_heads // config.num_kv_heads <= MOST_QUERIES
    return fits and kernels.is_native() and torch.device(device).type == "cpu"


def can_run(model: LatentRecurrentTransformer) -> bool:
    """Whether native code can take this model: of such a shape, in float32 or bfloat16."""
    return can_take(model.config, model.device.type) and model.dtype in (torch.float32, torch.bfloat16)


class NativeModel:
    """Weights packed for native code, taken from `model`, which may be dropped afterwards. max_len bounds positions.

    quantize: which weights are int8 with a scale per output. `int8` takes in the memory projections: without them it gains less
    than 1.4 times at one client, and with them a ten-thousandth of the bits per byte is lost. `int8-memory` is those alone: it
    halves what layerwise recurrence costs.
    """

    def __init__(self, model: LatentRecurrentTransformer, max_len: int, quantize: Quantization = "none") -> None:
        assert can_run(model)
        self.config: ModelConfig = model.config
        self.dtype, self.device = model.dtype, model.device
        self._library = kernels.library()
        self._quantize = quantize == "int8"
        self._quantize_memory = quantize != "none"
        self._kept: list[Tensor] = []
        self._matrices: list[PackedMatrix] = []
        self._layers = (LayerStruct * self.config.num_layers)(*self._pack_layers(model))
        rope = make_rope(self.config, torch.arange(max_len))
        cos, sin = (self._keep(part.reshape(max_len, -1)) for part in rope)
        self._head = PackedMatrix(model.head.weight.detach()[: self.config.vocab_size], self._quantize)
        self._matrices.append(self._head)
        self._struct = ModelStruct(
            num_layers=self.config.num_layers,
            hidden_size=self.config.hidden_size,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            intermediate_size=self.config.intermediate_size,
            vocab_size=self.config.vocab_size,
            embedding=pointer(self._keep(model.embedding.weight)),
            embedding_kind=KINDS[self.dtype],
            shares_memory=int(self._shares_memory(model)),
            memory=self._pack_memory(model, 0) if self._shares_memory(model) else MatrixStruct(),
            head=self._head.struct,
            layers=self._layers,
            cos=pointer(cos),
            sin=pointer(sin),
            softcap=self.config.logit_softcap,
            eps=EPS,
        )
        self._num_rows = self._num_threads = 0
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._partial = torch.empty(PARTIAL_SIZE)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads, embedding rows apart."""
        return sum(matrix.nbytes for matrix in self._matrices)

    def begin(self, tokens: Tensor, positions: Tensor, memory: Tensor | None) -> NativeStream:
        """The residual stream before layer 0; int64 tokens and positions [T], memory float32 [T, D] or None."""
        assert (memory is None) == (self.config.recurrence is None)
        x, x0 = torch.empty(2, len(tokens), padded(self.config.hidden_size)).unbind()
        stream = NativeStream(x, x0, tokens.contiguous(), positions.contiguous(), memory)
        step = self._step(stream)
        self._library.lrt_embed(self._struct, step, torch.get_num_threads())
        return stream

    def run_to_source(self, stream: NativeStream, kv: NativeKV) -> Tensor:
        """Run the layers up to the source, changing `stream.x`; returns the latents [T, D]."""
        return self._run(stream, kv, 0, self.config.source_layer + 1)

    def run_from_source(self, stream: NativeStream, latents: Tensor, kv: NativeKV) -> Tensor:
        """Run the layers above the source, if any; returns the hidden states [T, D]."""
        if self.config.latents_are_hidden:
            return latents
        return self._run(stream, kv, self.config.source_layer + 1, self.config.num_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, D] -> float32 logits [R, V]."""
        return apply(self._head, hidden, self.config.logit_softcap)

    def _run(self, stream: NativeStream, kv: NativeKV, first: int, end: int) -> Tensor:
        step, num_threads = self._step(stream), torch.get_num_threads()
        step.slots, step.num_sequences = pointer(kv.slots), len(kv.context_lens)
        for name in ("row_starts", "context_lens", "table_starts", "tables"):
            setattr(step, name, getattr(kv, name).ctypes.data)
        step.partial, step.partial_size = pointer(self._partial), PARTIAL_SIZE
        pool = kv.pool
        layer_stride = pool.keys.stride(0)
        pool_struct = PoolStruct(
            pool.keys.data_ptr(), pool.values.data_ptr(), KINDS[pool.keys.dtype], kv.block_size, layer_stride
        )
        self._make_room(len(stream.tokens), num_threads)
        out = torch.empty(len(stream.tokens), self.config.hidden_size)
        self._library.lrt_layers(
            *(self._struct, pool_struct, step, first, end, self._workspace.data_ptr(), out.data_ptr(), num_threads)
        )
        return out

    def _step(self, stream: NativeStream) -> StepStruct:
        step = StepStruct(len(stream.tokens), 0)
        for name in ("tokens", "positions", "memory", "x", "x0"):
            setattr(step, name, pointer(getattr(stream, name)))
        return step

    def _make_room(self, num_rows: int, num_threads: int) -> None:
        """A zeroed workspace for that many rows; its layout depends on the number, so each number starts from zeros."""
        if (num_rows, num_threads) != (self._num_rows, self._num_threads):
            size = self._library.lrt_workspace_size(self._struct, num_rows, num_threads)
            if size > self._workspace.nbytes:
                self._workspace = torch.zeros(size, dtype=torch.uint8)
            else:
                self._workspace[:size].zero_()
            self._num_rows, self._num_threads = num_rows, num_threads

    # Packing.

    def _pack_layers(self, model: LatentRecurrentTransformer) -> list[LayerStruct]:
        structs = []
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            attention, mlp = layer.attention, layer.mlp
            assert isinstance(attention.input, InputProjections), "already fused"
            embedding = attention.value_embedding
            own_memory = self.config.kv_projection and not self._shares_memory(model)
            structs.append(
                LayerStruct(
                    input=self._pack(_weight(FusedInputProjections(attention.input).linear)),
                    memory=self._pack_memory(model, index) if own_memory else MatrixStruct(),
                    output=self._pack(attention.output.weight),
                    up=self._pack(mlp.up.weight),
                    down=self._pack(mlp.down.weight),
                    value_embedding=None if embedding is None else pointer(self._keep(embedding.weight)),
                    residual_scale=_scale(model.residual_scale, index, 1.0),
                    embedding_scale=_scale(model.embedding_scale, index, 0.0),
                    memory_scale=_scale(model.memory_scale, index, 0.0),
                    num_gates=self.config.num_gates(index),
                    window=self.config.window(index),
                )
            )
        return structs

    def _shares_memory(self, model: LatentRecurrentTransformer) -> bool:
        projection = model.memory_projection
        return isinstance(projection, MemoryProjection) and len(projection.key) == 1 and self.config.num_layers > 1

    def _pack_memory(self, model: LatentRecurrentTransformer, pair: int) -> MatrixStruct:
        projection = model.memory_projection
        assert isinstance(projection, MemoryProjection)
        weight = torch.cat([_weight(projection.key[pair]), _weight(projection.value[pair])])
        return self._pack(weight, self._quantize_memory)

    def _pack(self, weight: Tensor, quantize: bool | None = None) -> MatrixStruct:
        matrix = PackedMatrix(weight.detach(), self._quantize if quantize is None else quantize)
        self._matrices.append(matrix)
        return matrix.struct

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1]


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _scale(scales: Tensor | None, layer: int, neutral: float) -> ctypes.c_float:
    return ctypes.c_float(neutral if scales is None else float(scales[layer].detach()))
