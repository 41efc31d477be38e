"""Likelihoods and greedy continuations as `lrt_core` computes them, token by token, for comparison with what clients get.

`python -m tests.clients.direct` reads JSON objects, a line each, until its input ends: `checkpoint` (a directory; the bundled
one without it), `loglikelihoods` ([context, continuation] pairs of text; an empty context stands for the document's start),
`greedy` ([prompt, max_tokens, stops] triples; `bos` says whether the document's start goes before the prompts). For each it
prints a line with the answers under the same names: [sum of logprobs, whether every token was the likeliest] and texts.
Neighbour: `live/`, which has no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lrt_core.checkpoint import load_generation_config, load_model, load_tokenizer
from lrt_core.generate import generate, read
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.text import TextDecoder
from lrt_core.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "lrt_core" / "bundled"


class Direct:
    """One checkpoint in float32."""

    def __init__(self, checkpoint: Path) -> None:
        self.model: LatentRecurrentTransformer = load_model(checkpoint, dtype=torch.float32, device="cpu")
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint)
        self.eos_ids = frozenset(load_generation_config(checkpoint).eos_token_ids)

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of the continuation's tokens after the context's, split as evaluation harnesses do: white space between the two
        belongs to the continuation, whose tokens are what the whole has beyond as many tokens as the context has alone."""
        trimmed = context.rstrip()
        continuation = context[len(trimmed) :] + continuation
        start = self.tokenizer.encode(trimmed, add_bos=not trimmed)
        ids = start + self.tokenizer.encode(trimmed + continuation, add_bos=not trimmed)[len(start) :]
        num_context = len(start)
        logprobs = torch.log_softmax(read(self.model, ids).logits[num_context - 1 : -1].double(), dim=-1)
        wanted = torch.tensor(ids[num_context:])
        own = logprobs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        return own.sum().item(), bool((logprobs.argmax(-1) == wanted).all())

    def greedy(self, prompt: str, max_tokens: int, stops: Sequence[str], bos: bool) -> str:
        """The likeliest continuation up to the first of the stop strings."""
        decoder, text = TextDecoder(self.tokenizer), ""
        ids = self.tokenizer.encode(prompt, add_bos=bos)
        for token in generate(self.model, ids, max_tokens, eos_ids=self.eos_ids):
            text += decoder.add(token)
        text += decoder.finish()
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@cache
def load(checkpoint: Path) -> Direct:
    """A checkpoint, once."""
    return Direct(checkpoint)


def answers(questions: dict[str, Any]) -> dict[str, Any]:
    """To one line's questions."""
    direct, bos = load(Path(questions.get("checkpoint", BUNDLED))), questions.get("bos", True)
    return {
        "loglikelihoods": [direct.loglikelihood(*pair) for pair in questions.get("loglikelihoods", [])],
        "greedy": [direct.greedy(*item, bos=bos) for item in questions.get("greedy", [])],
    }


def main() -> None:
    """Answer the questions on standard input."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answers(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
