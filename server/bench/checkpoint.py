"""`lrt-bench checkpoint d12 DIR`: the bench model as a complete checkpoint directory, for `lrt-server DIR`.

Its tokenizer is made up, the same every time: single bytes, then strings of letters, so that random ids are readable text and
every text comes back as it went in.
"""

from __future__ import annotations

import itertools
import string
from argparse import Namespace
from pathlib import Path

from lrt_core.checkpoint import save_checkpoint
from lrt_core.official_tokenizer import ASSISTANT_END, BOS, CHAT_TEMPLATE, CHAT_TOKENS
from lrt_core.tokenizer import Tokenizer
from server.bench import shapes
from server.bench.model import bench_model, resolve_dtype
from server.bench.report import Report

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"


def run(args: Namespace, report: Report) -> None:
    """Write the checkpoint that the arguments describe. Raises CheckpointError."""
    write(args, args.directory, report)
    report.say(f"wrote {args.directory}: lrt-server {args.directory}")


def write(args: Namespace, directory: Path, report: Report) -> None:
    """Write the bench model into `directory`. Raises CheckpointError."""
    variant, dtype = args.variant[0], resolve_dtype(args, shapes.D12)
    model, factor = bench_model(variant, dtype, shapes.D12)
    about = contraction_line(factor)
    if about:
        report.say(about)
    card = f"# Bench model, {variant}\n\nRandom weights, for measurements alone. {about}".rstrip() + "\n"
    save_checkpoint(directory, model, bench_tokenizer(shapes.D12.vocab_size), dtype=dtype, model_card=card)


def contraction_line(factor: float | None) -> str:
    """What there is to say about the recurrence of random weights."""
    return "" if factor is None else f"random weights; a refinement pass shrinks the error {factor:.2f} times"


def bench_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly vocab_size ids: 256 bytes, words of two to four letters with and without a space before them,
    and the chat tokens last. ValueError when the bytes and the chat tokens alone are more."""
    special = (BOS, *CHAT_TOKENS)
    num_words = vocab_size - 256 - len(special)
    if num_words < 0:
        raise ValueError(f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(special)} special tokens")
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += itertools.islice(_words(), num_words)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    names = {name: len(ranks) + index for index, name in enumerate(special)}
    return Tokenizer(PATTERN, ranks, names, BOS, [ASSISTANT_END, BOS], True, CHAT_TEMPLATE)


def _words() -> itertools.chain[bytes]:
    """Each word is a known token with one letter more, so that merging pairs reaches all of them."""

    def of(length: int) -> itertools.chain[bytes]:
        letters = ("".join(word) for word in itertools.product(string.ascii_lowercase, repeat=length))
        plain, spaced = itertools.tee(letters)
        return itertools.chain((word.encode() for word in plain), (f" {word}".encode() for word in spaced))

    return itertools.chain.from_iterable(map(of, itertools.count(2)))
