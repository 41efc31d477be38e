"""`lrt-bench`: the engine alone, measured as ratios within one run. `offline` decodes, `prefill` reads a prompt.

Every figure is the median of several repetitions with the spread beside it, and stands under the read bandwidth and the matrix
rate measured in the same run, because machines (and hours on shared machines) differ. The bench model `d12` has random
weights; its recurrence is scaled until a refinement pass shrinks the error as trained models do, and the factor is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lrt_core.checkpoint import BUNDLED, CheckpointError, load_config, load_model
from lrt_core.config import ModelConfig, RecurrenceConfig
from lrt_core.hardware import has_fast_bf16
from lrt_core.kernels import is_native
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.refine import refine
from lrt_core.sampling_params import SamplingParams
from server.engine.config import EngineConfig, PrefillMode
from server.engine.engine import Engine
from server.engine.loader import DEFAULT_TOLERANCE, DTYPES, serving_model
from server.engine.model_runner import ModelRunner, ServingModel
from server.engine.request import GenerationRequest, StoppingParams

CONTRACTION = 3.3
"""How much a refinement pass shrinks the error in trained models; the bench model is scaled to it."""
BENCH_SHAPE = ModelConfig(
    vocab_size=32768, sequence_len=2048, num_layers=12, num_heads=6, num_kv_heads=6, hidden_size=768, gate_channels=32
)


@dataclass(frozen=True)
class Figure:
    """One measured rate in tokens per second: median, and the slowest and fastest repetition."""

    name: str
    median: float
    slowest: float
    fastest: float

    def row(self) -> str:
        """A line of the table."""
        return f"{self.name:<44} {self.median:>10.1f} tok/s   ({self.slowest:.1f} to {self.fastest:.1f})"


def bench_model(recurrent: bool, dtype: torch.dtype) -> tuple[LatentRecurrentTransformer, float | None]:
    """The d12 model with random weights, and the contraction factor of its recurrence (None without one)."""
    recurrence = RecurrenceConfig(BENCH_SHAPE.num_layers - 1) if recurrent else None
    model = LatentRecurrentTransformer(replace(BENCH_SHAPE, recurrence=recurrence)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, weight in model.named_parameters():
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            weight.normal_(0.0, weight.shape[1] ** -0.5 / BENCH_SHAPE.num_layers, generator=generator)
    factor = _scale_recurrence(model, generator) if recurrent else None
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data = weight.data.to(dtype)
    return model.eval(), factor


def _scale_recurrence(model: LatentRecurrentTransformer, generator: torch.Generator) -> float:
    """Scale gamma and the memory projections by bisection until a pass contracts by about CONTRACTION; returns the factor."""
    tokens = torch.randint(0, model.config.vocab_size, (1, 64), generator=generator)
    parts = [weight for name, weight in model.named_parameters() if name.startswith("memory_")]
    originals = [part.clone() for part in parts]
    low, high, factor = 0.0, 4.0, 1.0
    for _ in range(12):
        scale = (low + high) / 2
        for part, original in zip(parts, originals, strict=True):
            part.copy_(original * scale)
        factor = contraction(model, tokens)
        low, high = (scale, high) if factor > CONTRACTION else (low, scale)
    return factor


def contraction(model: LatentRecurrentTransformer, tokens: torch.Tensor) -> float:
    """Geometric mean of the factors by which passes 2 to 5 shrink the largest change of a memory; tokens [1, T]."""
    residuals = refine(model, tokens, tolerance=0.0, max_passes=5).residuals
    return float((residuals[1] / max(residuals[4], 1e-12)) ** (1 / 3))


def measure_limits() -> tuple[float, float]:
    """Read bandwidth in GB/s and bfloat16 matrix rate in GFLOP/s of this machine, now."""
    big = torch.ones(64 * 2**20)
    bandwidth = big.nbytes / _fastest(big.sum) / 1e9
    a, b = torch.ones(1024, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024, dtype=torch.bfloat16)
    return bandwidth, 2 * 1024**3 / _fastest(lambda: a @ b) / 1e9


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _max_len(args: argparse.Namespace) -> int:
    return int(args.prompt_len + args.new_tokens)


def make_engine(model: ServingModel, prefill: PrefillMode, max_num_seqs: int, max_len: int) -> Engine:
    """An engine with room for max_num_seqs sequences of max_len tokens."""
    num_blocks = max_num_seqs * -(-max_len // 16)
    tolerance = DEFAULT_TOLERANCE[model.dtype]
    # Repetitions send the same prompts; the prefix cache would answer for them.
    config = EngineConfig(max_len, num_blocks, prefill=prefill, tolerance=tolerance, prefix_caching=False)
    return Engine(ModelRunner(model, config), eos_ids=(), seed=0)


def decode_rate(engine: Engine, clients: int, prompt_len: int, new_tokens: int) -> float:
    """Tokens per second of all clients together, from the moment every prompt is read."""
    for client in range(clients):
        engine.add(_request(client, engine.runner.model.config.vocab_size, prompt_len, new_tokens))
    while any(sequence.num_output_tokens == 0 for sequence in (*engine.scheduler.waiting, *engine.scheduler.running)):
        engine.step()
    started, tokens = time.perf_counter(), 0
    while engine.has_work():
        tokens += sum(output.token is not None for output in engine.step().outputs)
    return tokens / (time.perf_counter() - started)


def prefill_rate(engine: Engine, prompt_len: int) -> float:
    """Prompt tokens per second of one client on an otherwise idle engine."""
    engine.add(_request(0, engine.runner.model.config.vocab_size, prompt_len, 1))
    started = time.perf_counter()
    while engine.has_work():
        engine.step()
    return prompt_len / (time.perf_counter() - started)


def _request(index: int, vocab_size: int, prompt_len: int, new_tokens: int) -> GenerationRequest:
    generator = torch.Generator().manual_seed(index)
    ids = tuple(torch.randint(0, vocab_size, (prompt_len,), generator=generator).tolist())
    return GenerationRequest(str(index), ids, SamplingParams(temperature=0), StoppingParams(new_tokens, ignore_eos=True))


def repeat(name: str, repetitions: int, rate: Callable[[], float]) -> Figure:
    """Median and spread of a rate, after one run to warm up."""
    rate()
    rates = sorted(rate() for _ in range(repetitions))
    figure = Figure(name, statistics.median(rates), rates[0], rates[-1])
    print(figure.row(), flush=True)
    return figure


def _run_offline(args: argparse.Namespace, model: ServingModel, label: str) -> list[Figure]:
    figures = []
    for clients in args.clients:
        engine = make_engine(model, "window", clients, args.prompt_len + args.new_tokens)
        name = f"{label}: decode, {clients} client(s)"
        work = (engine, clients, args.prompt_len, args.new_tokens)
        figures.append(repeat(name, args.repetitions, lambda work=work: decode_rate(*work)))  # type: ignore[misc]
    return figures


def _run_prefill(args: argparse.Namespace, model: ServingModel, label: str) -> list[Figure]:
    modes: list[PrefillMode] = ["window", "sequential"] if model.config.recurrence is not None else ["window"]
    figures = []
    for mode in modes:
        engine = make_engine(model, mode, 1, args.prompt_len + 1)
        name = f"{label}: read {args.prompt_len} tokens, {mode}"
        figures.append(repeat(name, args.repetitions, lambda engine=engine: prefill_rate(engine, args.prompt_len)))  # type: ignore[misc]
    return figures


def _models(args: argparse.Namespace, dtype: torch.dtype) -> list[tuple[str, LatentRecurrentTransformer]]:
    if args.model != "d12":
        return [(args.model.name, load_model(args.model, dtype=dtype))]
    recurrent, factor = bench_model(True, dtype)
    print(f"d12: random weights, a refinement pass shrinks the error {factor:.2f} times")
    return [("d12 recurrent", recurrent), ("d12 plain", bench_model(False, dtype)[0])]


def _model_argument(text: str) -> str | Path:
    if text == "d12":
        return text
    try:
        load_config(Path(text))
    except CheckpointError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrt-bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mode", choices=("offline", "prefill"))
    parser.add_argument("--model", type=_model_argument, default=BUNDLED, help="d12 or a checkpoint (default: the bundled one)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--clients", type=_count, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-len", type=_count, help="tokens (default: 32 offline, 256 prefill)")
    parser.add_argument("--new-tokens", type=_count, default=128)
    parser.add_argument("--repetitions", type=_count, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when done."""
    args = _parser().parse_args(argv)
    args.prompt_len = args.prompt_len or (32 if args.mode == "offline" else 256)
    dtype = DTYPES.get(args.dtype) or (torch.bfloat16 if has_fast_bf16("cpu") or is_native() else torch.float32)
    bandwidth, rate = measure_limits()
    print(f"{torch.get_num_threads()} threads, {dtype}, read bandwidth {bandwidth:.1f} GB/s, bf16 products {rate:.0f} GFLOP/s")
    run = _run_offline if args.mode == "offline" else _run_prefill
    figures = [
        figure for label, model in _models(args, dtype) for figure in run(args, serving_model(model, _max_len(args)), label)
    ]
    if args.json is not None:
        limits = {"read_bandwidth_gb_s": bandwidth, "bf16_gflop_s": rate, "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({**limits, "figures": [asdict(figure) for figure in figures]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
