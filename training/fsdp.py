"""A model that no device could hold, each rank holding a part of it: torch's fully_shard (FSDP2), layer by layer.

A layer's weights are whole while it runs. What belongs to no layer, embedding, head, scales and memory projections, is whole
from the first call of the model until `reshard`, so schedules may use it as they like. Importing this takes seconds: only
runs that are sharded do. Neighbours: `distributed.py`, `muon.py`, which needs whole matrices.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lrt_core.model import LatentRecurrentTransformer
from training.distributed import Ranks


def shard(model: LatentRecurrentTransformer, ranks: Ranks, device: torch.device) -> None:
    """Leave every rank its part of a model that lies on the CPU; gradients will be sums over the ranks."""
    if ranks.control is None:
        raise ValueError("a sharded model needs ranks: start with torchrun --nproc-per-node N -m training")
    mesh = init_device_mesh(device.type, (ranks.size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    assert isinstance(model, FSDPModule)
    # After the backward of one of a step's forwards the losses of those before it still need the head: `reshard` ends it.
    model.set_reshard_after_backward(False, recurse=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are parts of the batch's, not means to be averaged; gloo and NCCL alike can sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: LatentRecurrentTransformer) -> None:
    """Let go of the weights that are whole from the first call of the model on."""
    assert isinstance(model, FSDPModule)
    model.reshard()
