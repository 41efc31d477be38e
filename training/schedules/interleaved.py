"""`interleaved`: a full forward, then one forward per subset of positions against buffered keys and values (paper section 4).

Cost: about two forwards of the sequence. Nothing is detached: gradients flow through the buffers and the memories.

Shapes: B batch, T tokens, D hidden size, S subsets; subset i holds the positions i, i+S, ...
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from lrt_core.kernels import rope_norm
from lrt_core.kv import BufferedKV, CausalKV, Heads
from lrt_core.memory import ZERO_MEMORY, shift
from lrt_core.model import LatentRecurrentTransformer, make_rope, stream_dtype
from training.schedules.losses import Losses, PassLosses, mean_of_passes, token_losses
from training.schedules.registry import check_model, schedule


@schedule(recurrent=True, fixed=True, cost=lambda num_subsets, kv_refresh: 2.0)
def interleaved(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    targets: Tensor,
    *,
    num_subsets: Annotated[int, "S, the subsets of positions"] = 2,
    kv_refresh: Annotated[bool, "re-project keys and values of positions not visited yet"] = False,
    latents: Tensor | None = None,
) -> Losses:
    """Losses of the S+1 forwards, the first with zero memory and over all positions, the others over their subset.

    Subset i reads the latest latents shifted by one; its fresh keys and values replace the buffered ones, its latents the
    earlier ones. `kv_refresh` re-projects the keys and values of positions not visited yet from the latest latents.

    latents [B, T, D], in place of the zero memory: those of a rollout, as reinforcement learning has them. The first forward's
    memory is then shift(latents), so position t reads the latent of t-1 as it did when the text was sampled, and the buffers'
    keys, values and latents come from this forward, not from the latents given. With the latents of exact decoding by the same
    weights every forward has the sequential losses. No gradient flows into them; the forwards' own latents carry
    gradients as ever.

    A server's `/v1/completions` gives them for `"latents": "all"`, together with the ids: one row for every token of prompt and
    output but the last, which are the positions that have a target. To weigh a rollout's tokens, weigh every forward's losses::

        ids = [*prompt_ids, *output_ids]
        data = base64.b64decode(choice["latents"]["data"])
        rows = torch.frombuffer(bytearray(data), dtype=torch.float32).view(1, *choice["latents"]["shape"])
        tokens, targets = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
        weights = torch.zeros(1, len(ids) - 1)
        weights[:, len(prompt_ids) - 1 :] = advantage        # of the targets that were sampled
        losses = interleaved(model, tokens, targets, latents=rows)
        means = [(weights[:, one.positions] * one.token_losses).mean() for one in losses.passes]
        torch.stack(means).mean().backward()

    ValueError for a model without recurrence, a sequence shorter than S, or latents of another shape or that are not finite.
    """
    _check(model, tokens, num_subsets, latents)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    first = CausalKV(model.config, record=True, recompute=model.recompute)
    given = None if latents is None else shift(latents.detach().to(model.device, stream_dtype(model.dtype)))
    hidden, new = model(tokens, positions, ZERO_MEMORY if given is None else given, first)
    assert first.recorded is not None
    buffer = BufferedKV(model.config, first.recorded, num_subsets, recompute=model.recompute)
    if kv_refresh:
        refresh(model, buffer, first.recorded, shift(new), given)
    passes = [PassLosses(positions, token_losses(model, hidden, targets))]
    latest, token_parts, target_parts = buffer.split(new), buffer.split(tokens), buffer.split(targets)
    for subset in range(num_subsets):
        positions = buffer.begin(subset)
        memory = _memory_of(subset, latest)
        hidden, latest[subset] = model(token_parts[subset], positions, memory, buffer)
        passes.append(PassLosses(positions, token_losses(model, hidden, target_parts[subset])))
    return mean_of_passes(passes, targets)


def _check(model: LatentRecurrentTransformer, tokens: Tensor, num_subsets: int, latents: Tensor | None) -> None:
    check_model(model, "interleaved")
    if not 1 <= num_subsets <= tokens.shape[1]:
        raise ValueError(f"num_subsets must lie in 1..{tokens.shape[1]} (the sequence), got {num_subsets}")
    wanted = (*tokens.shape, model.config.hidden_size)
    if latents is not None and latents.shape != wanted:
        raise ValueError(f"latents must have the shape {list(wanted)}, got {list(latents.shape)}")
    if latents is not None and not bool(latents.isfinite().all()):
        raise ValueError("latents must be finite")


def _memory_of(subset: int, latest: list[Tensor]) -> Tensor:
    """Memories [B, T_i, D] of a subset: the subset before it has the latents; before subset 0, the last, one group on."""
    if subset > 0:
        return latest[subset - 1][:, : latest[subset].shape[1]]
    if len(latest) == 1:
        return shift(latest[0])
    zeros = torch.zeros_like(latest[0][:, :1])
    return torch.cat([zeros, latest[-1][:, : latest[0].shape[1] - 1]], dim=1)


def refresh(
    model: LatentRecurrentTransformer, buffer: BufferedKV, recorded: list[Heads], memory: Tensor, before: Tensor | None = None
) -> None:
    """Re-project buffered keys and values from `memory` [B, T, D] with the gates of the first forward.

    before: the first forward's own memory, None for zeros. Subset 0 is left out: its own forward comes next and replaces it.
    For the same reason once is enough: a subset's new latents change only the memories of the subset after it, which is
    computed afresh next; all others keep theirs.
    """
    if model.memory_projection is None:
        return
    # The projections are linear: the change projected is the projections' change.
    changes = buffer.split(memory if before is None else memory - before)
    for subset in range(1, buffer.num_subsets):
        rope = make_rope(model.config, buffer.positions[subset])
        for layer, (heads, projected) in enumerate(zip(recorded, model.memory_projection(changes[subset]), strict=True)):
            assert heads.memory_gate is not None
            gate = buffer.split(heads.memory_gate)[subset]
            raw_key = buffer.split(heads.raw_key)[subset] + gate * projected.key
            buffer.keys[layer][subset] = rope_norm(raw_key, *rope)
            buffer.values[layer][subset] = buffer.values[layer][subset] + gate * projected.value
