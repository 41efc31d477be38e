"""A model for serving on a CPU whose layers run in native code: one call takes all rows of a step through them.

Every output of a product is summed in one order whatever the number of rows, so a row's result is bit-equal alone and in any
batch. Neighbours: `kernels/step.cpp` does the work, `step.py` is its twin in torch, the server's model runner calls it.

Shapes: T rows, R settled rows, S sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Literal

import torch
from torch import Tensor, nn

from lrt_core import kernels
from lrt_core.config import ModelConfig
from lrt_core.fused import FusedInputProjections
from lrt_core.kernels.packing import PackedMatrix
from lrt_core.kernels.plan import (
    KINDS,
    MOST_QUERIES,
    PARTIAL_SIZE,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    OutcomeStruct,
    PoolStruct,
    StepStruct,
    pointer,
)
from lrt_core.kernels.products import apply
from lrt_core.memory import MemoryProjection
from lrt_core.model import InputProjections, LatentRecurrentTransformer, Layer, make_rope
from lrt_core.paged import PagedPool
from lrt_core.step import PagedStep, StepResult

EPS = torch.finfo(torch.float32).eps
Quantization = Literal["none", "int8", "int8-memory"]
"""Which products have int8 weights: none, all of them, the memory projections alone."""


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
    at one client, and with them a ten-thousandth of the bits per byte is lost. `int8-memory` is those alone: layerwise
    recurrence then costs a third less.
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
        self._capacity, self._cut_for = 0, (0, 0)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._partial = torch.empty(PARTIAL_SIZE)
        self._logits = torch.empty(0, self.config.vocab_size)
        self._numbers, self._ids = array("i"), array("q")

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads, embedding rows apart."""
        return sum(matrix.nbytes for matrix in self._matrices)

    def run_step(self, step: PagedStep, pool: PagedPool, tolerance: float) -> StepResult:
        """Compute the step; as `lrt_core.step.run_step`, with its draws."""
        num_rows, num_sequences, num_threads = step.num_rows, step.num_sequences, torch.get_num_threads()
        self._make_room(num_rows, num_sequences, num_threads, step.draws is not None)
        hidden, numbers = torch.empty(num_rows, self.config.hidden_size), self._numbers
        start = numbers.buffer_info()[0]
        parts = (start + 4 * num_sequences * part for part in range(3))
        outcome = OutcomeStruct(*parts, hidden.data_ptr(), self._ids.buffer_info()[0], self._logits.data_ptr())
        structs = self._struct, self._pool_struct(pool, step.block_size), self._step_struct(step, pool, tolerance)
        end_of_source, workspace = self.config.source_layer + 1, self._workspace.data_ptr()
        self._library.lrt_forward(*structs, end_of_source, workspace, outcome, num_threads)
        num_settled = numbers[:num_sequences].tolist()
        residuals: list[float | None] = [None] * num_sequences
        if num_sequences < num_rows:
            hidden = hidden[: sum(num_settled)]
            changes = array("f", numbers[num_sequences : 2 * num_sequences].tobytes())
            residuals = [None if value == -1 else value for value in changes]
        is_finite = [value == 1 for value in numbers[2 * num_sequences : 3 * num_sequences]]
        ids = None if step.draws is None else self._ids[:num_sequences].tolist()
        return StepResult(num_settled, residuals, is_finite, hidden, ids)

    def _step_struct(self, step: PagedStep, pool: PagedPool, tolerance: float) -> StepStruct:
        return StepStruct(
            *(step.num_rows, step.num_sequences, self._capacity),
            *(part.buffer_info()[0] for part in (step.tokens, step.sequences, step.tables)),
            None if step.draws is None else ctypes.addressof(ctypes.c_char.from_buffer(step.draws)),
            -1 if self.config.recurrence is None else pool.zero_row,
            *(self._partial.data_ptr(), PARTIAL_SIZE, tolerance),
        )

    def _pool_struct(self, pool: PagedPool, block_size: int) -> PoolStruct:
        keys, values = pool.keys, pool.values
        address = pool.latents.data_ptr()
        return PoolStruct(keys.data_ptr(), values.data_ptr(), KINDS[keys.dtype], block_size, keys.stride(0), address)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, D] -> float32 logits [R, V]."""
        return apply(self._head, hidden, self.config.logit_softcap)

    def _make_room(self, num_rows: int, num_sequences: int, num_threads: int, draws: bool) -> None:
        """A zeroed workspace for at least that many rows, and places for what comes of that many sequences."""
        if num_rows > self._capacity or (num_threads, kernels.num_switches) != self._cut_for:
            self._capacity, self._cut_for = max(num_rows, self._capacity), (num_threads, kernels.num_switches)
            size = self._library.lrt_workspace_size(self._struct, self._capacity, num_threads)
            self._workspace = torch.zeros(size, dtype=torch.uint8)
        if num_sequences > len(self._ids):
            self._numbers, self._ids = array("i", bytes(12 * num_sequences)), array("q", bytes(8 * num_sequences))
        if draws and num_sequences > self._logits.shape[0]:
            self._logits = torch.empty(num_sequences, self.config.vocab_size)

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
