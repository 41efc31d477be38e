"""`python -m tests.proofs.echo_memory`: how much memory an echo of 2000 tokens with logprobs takes at a vocabulary of 50304.

A process of its own, because a process knows only the largest size it ever had. Prints the bytes as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from lrt_core.config import ModelConfig, RecurrenceConfig
from server.engine.engine import Engine
from tests.engines import make_engine, request, run
from tests.helpers import tiny_model

NUM_TOKENS, VOCAB_SIZE = 2000, 50304
BOUND = 128 * 2**20
"""Of what the request may add; all its logits at once would be 402 MB, and what is made of them a few times as much."""


def measure() -> int:
    """Bytes that the echo added at its peak.

    glibc raises the size from which a tensor gets pages of its own whenever one that has them is freed; chunks of logits then
    come from the heap, where they leave holes of 30 MiB or not by how small objects lie, which Python's hash seed decides (50
    or 87 MiB here, the same for the same seed). Held at 1 MiB, what is freed is given back, and the peak is what was held.
    """
    command = [sys.executable, "-m", "tests.proofs.echo_memory"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[2], env=environment, text=True)
    return int(json.loads(done.stdout))


def _status(name: str) -> int:
    """A size of this process in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _echo(engine: Engine, num_tokens: int) -> None:
    ids = [(7919 * i) % VOCAB_SIZE for i in range(num_tokens)]
    outcome = run(engine, [request(ids, 1, logprobs=20, prompt_logprobs=20)]).outcomes[0][0]
    assert outcome.prompt_logprobs is not None and len(outcome.prompt_logprobs) == num_tokens


def main() -> None:
    """Measure in this process."""
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        sequence_len=2048,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        hidden_size=64,
        recurrence=RecurrenceConfig(1),
    )
    # A tolerance that every pass keeps: how often a token is computed changes nothing in what is held at once.
    engine = make_engine(
        tiny_model(config), max_model_len=2048, num_blocks=600, window=512, max_num_batched_tokens=512, tolerance=1e9
    )
    _echo(engine, 20)
    before = _status("VmRSS")
    _echo(engine, NUM_TOKENS)
    print(json.dumps(_status("VmHWM") - before))


if __name__ == "__main__":
    main()
