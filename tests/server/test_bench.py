"""The bench's modes on tiny models: what they print and write. No figure is judged here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt_core import kernels
from lrt_core.attention import visible
from lrt_core.checkpoint import load_config, load_model, load_tokenizer
from lrt_core.config import ModelConfig, RecurrenceConfig
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.native_model import NativeModel
from server.bench import kernels as bench_kernels
from server.bench import limits, offline, plots, repeat, scheduler, shapes
from server.bench.__main__ import main
from server.bench.checkpoint import bench_tokenizer
from server.bench.cost import cost_of
from server.bench.kernel_cases import Case, Operation, cases
from server.bench.limits import Limits
from server.bench.model import CONTRACTION, bench_model, contraction
from server.bench.repeat import Work, interleave
from server.bench.report import Figure, Report, percentiles, ratios
from server.engine.loader import serving_model
from tests.helpers import contracting_model, tiny_config, tiny_model

TINY_SHAPE = ModelConfig(vocab_size=320, sequence_len=64, num_layers=3, num_heads=4, num_kv_heads=4, hidden_size=32)
SMALL_CASES = [case for case in cases((torch.float32,)) if "C=2048" not in case.name]
LIMITS = Limits(read_bandwidth=1e9, gemm_float32=1e10, gemm_bfloat16=1e8, threads=1)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits are measured on less memory, and d12 is tiny."""
    monkeypatch.setattr(limits, "READ_BYTES", 2**21)
    monkeypatch.setattr(shapes, "D12", TINY_SHAPE)


def run(tmp_path: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    """The JSON of a run."""
    out = tmp_path / "deep" / "figures.json"
    assert main([*arguments, "--json", str(out)]) == status
    data: dict[str, Any] = json.loads(out.read_text())
    return data


def names(data: dict[str, Any]) -> list[str]:
    return [figure["name"] for figure in data["figures"]]


def test_offline_on_a_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(checkpoint), "--clients", "1", "3", "--new-tokens", "4", "--prompt-len", "12"]
    data = run(tmp_path, "offline", *arguments, "--dtype", "float32")
    assert data["mode"] == "offline" and data["interrupted"] is False
    assert data["limits"]["threads"] == torch.get_num_threads()
    assert all(value > 0 for value in data["limits"].values())
    assert names(data) == ["checkpoint: decode, 1 client(s)", "checkpoint: decode, 3 client(s)"]
    weight_bytes = cost_of(tiny_model()).weight_bytes
    served = serving_model(tiny_model(), 64)
    if isinstance(served, NativeModel):
        assert 1 <= served.step_bytes / weight_bytes < 1.02  # padded
        weight_bytes = served.step_bytes
    for figure in data["figures"]:
        assert 0 < figure["low"] <= figure["median"] <= figure["high"] and len(figure["samples"]) == 3
        assert figure["weight_bytes_per_step"] == weight_bytes
        steps_per_second = figure["median"] / figure["clients"]
        bandwidth = data["limits"]["read_bandwidth_gb_s"] * 1e9
        assert figure["bandwidth_fraction"] == pytest.approx(
            steps_per_second * figure["weight_bytes_per_step"] / bandwidth, rel=1e-6
        )
    printed = capsys.readouterr().out
    assert "read bandwidth" in printed and "decode, 3 client(s)" in printed and "of the read bandwidth" in printed


def test_offline_on_the_bench_model_tells_what_recurrence_costs(tmp_path: Path) -> None:
    data = run(tmp_path, "offline", "--model", "d12", "--clients", "2", "--new-tokens", "3", "--prompt-len", "4")
    assert names(data) == [
        *(f"d12 {variant}: decode, 2 client(s)" for variant in ("layerwise", "shared", "plain")),
        *(f"d12 {variant}: recurrence costs, 2 client(s)" for variant in ("layerwise", "shared")),
    ]
    layerwise, _, plain, cost, _ = data["figures"]
    expected = [100 * (b / a - 1) for a, b in zip(layerwise["samples"], plain["samples"], strict=True)]
    assert cost["samples"] == pytest.approx(expected) and cost["unit"] == "%"
    assert sum("shrinks the error" in note for note in data["notes"]) == 2


@pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")
def test_offline_compares_both_forms_of_the_weights(tmp_path: Path) -> None:
    shape = ["--variant", "layerwise", "plain", "--clients", "2", "--new-tokens", "3", "--prompt-len", "4"]
    data = run(tmp_path, "offline", "--model", "d12", "--quantize", "both", *shape)
    assert names(data) == [
        *(f"{label}: decode, 2 client(s)" for label in ("d12 layerwise", "d12 layerwise int8", "d12 plain", "d12 plain int8")),
        *(f"d12 layerwise{form}: recurrence costs, 2 client(s)" for form in ("", " int8")),
        *(f"d12 {variant} int8 over full weights, 2 client(s)" for variant in ("layerwise", "plain")),
    ]
    full, quantized, plain, plain_quantized, _, cost, gain, _ = data["figures"]
    assert gain["samples"] == pytest.approx(ratios(quantized["samples"], full["samples"]))
    expected = [100 * (ratio - 1) for ratio in ratios(plain_quantized["samples"], quantized["samples"])]
    assert cost["samples"] == pytest.approx(expected)
    assert quantized["weight_bytes_per_step"] < full["weight_bytes_per_step"] and plain["unit"] == "tok/s"


@pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")
def test_offline_compares_memory_projections_in_8_bits_with_a_full_plain_model(tmp_path: Path) -> None:
    shape = ["--variant", "layerwise", "plain", "--clients", "2", "--new-tokens", "3", "--prompt-len", "4"]
    data = run(tmp_path, "offline", "--model", "d12", "--quantize", "int8-memory", *shape)
    assert names(data) == [
        "d12 layerwise int8-memory: decode, 2 client(s)",
        "d12 plain: decode, 2 client(s)",
        "d12 layerwise int8-memory: recurrence costs, 2 client(s)",
    ]
    every = run(tmp_path, "offline", "--model", "d12", "--quantize", "all", *shape)
    costs = [name.partition(":")[0] for name in names(every) if "recurrence costs" in name]
    assert costs == ["d12 layerwise", "d12 layerwise int8-memory", "d12 layerwise int8"]


def test_prefill_reads_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(tmp_path, "prefill", "--model", "d12", "--variant", "layerwise", "plain", "--prompt-len", "40")
    assert names(data) == [
        "d12 layerwise: read 40 tokens, window",
        "d12 layerwise: read 40 tokens, sequential",
        "d12 plain: read 40 tokens",
        "d12 layerwise: read 32 tokens, naive oracle",
        "d12 plain: read 32 tokens, naive oracle",
        "d12 layerwise: window over sequential",
    ]
    window, sequential, plain, *_, gain = data["figures"]
    assert window["passes_per_token"] > 1 and sequential["passes_per_token"] == plain["passes_per_token"] == 1
    assert gain["identical_continuations"] is True and gain["identical_tokens"] == 16
    assert gain["samples"] == pytest.approx(ratios(window["samples"], sequential["samples"]))
    assert "identical greedy continuations" in capsys.readouterr().out


@pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")
def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "SECONDS", 0.0)
    monkeypatch.setattr(bench_kernels, "COLD_BYTES", 2**20)
    data = run(tmp_path, "kernels", "--only", "rope_norm [4,", "S=1 ", "--dtype", "float32", "--repetitions", "3")
    rope, rope_ratio, attention, attention_ratio = data["figures"]
    assert rope["limit"] == "" and attention["limit"] in ("read bandwidth", "matrix rate")
    for figure, ratio in ((rope, rope_ratio), (attention, attention_ratio)):
        assert figure["median"] > 0 and figure["limit_fraction"] > 0 and ratio["case"] == figure["name"]
        assert ratio["unit"] == "x" and ratio["torch_us"] > 0
    assert run(tmp_path, "kernels", "--only", "no such kernel", status=1)["figures"] == []


@pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
@torch.inference_mode()
def test_a_kernel_s_case_gives_both_the_same_work(case: Case) -> None:
    operation = case.make()
    native, twin = operation.native(), operation.twin()
    assert isinstance(native, torch.Tensor) and isinstance(twin, torch.Tensor)
    tolerance = 1e-3 if "int8" in case.name else 1e-4  # activations in 16 bits where the processor multiplies bytes
    assert (native - twin).abs().max() < tolerance and operation.bytes > native.nbytes


def test_without_tqdm_a_terminal_sees_a_count(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(repeat, "tqdm", None)
    for is_terminal, expected in ((True, "\rturns: 1/2\rturns: 2/2\r\x1b[K"), (False, "")):
        monkeypatch.setattr(repeat.sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        with repeat.progress(2, "turns") as advance:
            advance(), advance()
        assert capsys.readouterr().err == expected


def test_cold_cases_walk_through_more_than_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "SECONDS", 0.0)
    monkeypatch.setattr(bench_kernels, "COLD_BYTES", 5000)
    runs: list[int] = []

    def make() -> Operation:
        number = len(runs)
        runs.append(0)

        def work() -> None:
            runs[number] += 1

        return Operation(work, work, bytes=1000, flops=4000)

    kernel, ratio = bench_kernels.measure(Case("k", "", torch.float32, make, is_cold=True), 3, LIMITS)
    assert len(runs) == 6 and len(set(runs)) == 1 and runs[0] >= 8, "one copy and five more, each as often as the others"
    assert kernel.details["limit"] == "read bandwidth" and kernel.details["limit_fraction"] * kernel.median == pytest.approx(
        1.0
    )
    assert len(ratio.samples) == 3


def test_growth_draws_what_it_measures(tmp_path: Path) -> None:
    sizes = ["--batches", "1", "20", "--contexts", "8", "100", "--prompt-lens", "4", "90", "--plots", str(tmp_path / "plots")]
    data = run(tmp_path, "growth", "--model", "d12", "--variant", "layerwise", "plain", *sizes)
    decode = [figure for figure in data["figures"] if figure["kind"] == "decode"]
    prompts = [figure for figure in data["figures"] if figure["kind"] == "prompt"]
    points = [(figure["model"], figure["batch"], figure["context"]) for figure in decode]
    assert points == [(f"d12 {v}", b, c) for v in ("layerwise", "plain") for c in (8, 100) for b in (1, 20)]
    assert [(figure["model"], figure["prompt_len"]) for figure in prompts] == [
        (f"d12 {v}", n) for v in ("layerwise", "plain") for n in (4, 90)
    ]
    for figure in data["figures"]:
        low, high = figure["expected_ms"]
        assert 0 < low <= high
    for name in ("decode.png", "prompts.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_growth_leaves_out_what_memory_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.growth.available_memory", lambda device: 200_000)
    sizes = ["--batches", "1", "50", "--contexts", "16", "--prompt-lens", "4"]
    data = run(tmp_path, "growth", "--model", "d12", "--variant", "plain", *sizes)
    assert [figure.get("batch") for figure in data["figures"]] == [1, None]
    assert any("no memory for batch 50 at context 16" in note for note in data["notes"])


def test_growth_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, "growth", "--plots", str(tmp_path), status=1)["figures"] == []
    assert "plots need matplotlib: pip install 'lrt-server[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("variant", shapes.VARIANTS)
def test_checkpoint_is_whole(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "d12"
    assert main(["checkpoint", "d12", str(directory), "--variant", variant]) == 0
    kind = shapes.VARIANTS[variant]
    assert load_config(directory) == replace(TINY_SHAPE, recurrence=kind and RecurrenceConfig(2, kind))
    assert load_model(directory).dtype == torch.bfloat16
    assert load_tokenizer(directory).vocab_size == TINY_SHAPE.vocab_size
    assert f"lrt-server {directory}" in capsys.readouterr().out


def test_checkpoint_never_replaces_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("x")
    assert main(["checkpoint", "d12", str(tmp_path)]) == 1
    assert "will not replace" in capsys.readouterr().err


@pytest.mark.parametrize("vocab_size", [320, 2000, 32768])
def test_bench_tokenizer(vocab_size: int) -> None:
    tokenizer = bench_tokenizer(vocab_size)
    assert tokenizer.vocab_size == vocab_size
    text = "def f(x):\n\treturn 'Größe 😀' + str(1234)  # the end\x00"
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text
    for id in range(256, vocab_size - 5, 97):
        assert tokenizer.encode(tokenizer.token_bytes(id).decode(), add_bos=False) == [id], "every word can be reached"
    assert bench_tokenizer(vocab_size).ranks == tokenizer.ranks


def test_bench_tokenizer_has_a_smallest_size() -> None:
    with pytest.raises(ValueError, match="no room"):
        bench_tokenizer(200)


def test_bench_models_contract() -> None:
    for variant in ("layerwise", "shared"):
        model, factor = bench_model(variant, torch.float32, TINY_SHAPE)
        assert factor is not None and abs(factor - CONTRACTION) < 0.5
        assert model.config.recurrence is not None and model.config.recurrence.variant == variant
    assert bench_model("plain", torch.float32, TINY_SHAPE)[1] is None


def test_contraction_of_a_contracting_recurrence() -> None:
    model = contracting_model()
    tokens = torch.arange(48).remainder(model.config.vocab_size).unsqueeze(0)
    assert contraction(model, tokens) > 1.5


def test_cost_counts_what_a_step_reads() -> None:
    config = tiny_config(num_layers=1, value_embeddings="none", recurrence=None)
    cost = cost_of(tiny_model(config))
    layers, head = 2 * 32 * 32 + 2 * 32 * 16 + 8 * 32 * 32, config.padded_vocab_size * 32
    assert (cost.layer_numbers, cost.head_numbers, cost.weight_bytes) == (layers, head, 4 * (layers + head))
    assert cost.decode_bytes(3, 10) == cost.weight_bytes + 3 * 10 * 2 * 16 * 4
    assert cost.flops(2, 10, 1) == 2 * (2 * layers + 10 * 4 * 32) + 2 * head
    low, high = cost.decode_seconds(LIMITS, 3, 10)
    read, compute = cost.decode_bytes(3, 10) / 1e9, cost.flops(3, 10, 3) / 1e10
    assert (low, high) == (max(read, compute), read + compute)


def test_cost_of_a_prompt_leaves_out_what_passes_leave_out() -> None:
    """Of three layers the one above the source is computed once, its memory projections with it."""
    last, upper = (cost_of(tiny_model(tiny_config(num_layers=3, recurrence=RecurrenceConfig(source)))) for source in (2, 1))
    assert last.above_source == 0 and upper.above_source == pytest.approx(1 / 3, abs=0.02)
    keys = last.mean_keys_seen(10)
    assert last.prompt_flops(10, 4) == last.flops(40, keys, 0)
    assert upper.prompt_flops(10, 4) == pytest.approx(upper.flops(30, keys, 0), rel=0.02)
    assert upper.prompt_flops(10, 1) == upper.flops(10, keys, 0)


def test_cost_knows_how_far_a_layer_sees() -> None:
    """A short layer's query sees half of 64 tokens and itself; counted as the mask of attention counts."""
    config = tiny_config(num_layers=3, sequence_len=64, window_pattern="SL", recurrence=None)
    cost = cost_of(tiny_model(config))
    for length in (1, 20, 33, 34, 64, 65, 200):
        positions = torch.arange(length)
        masks = [visible(positions, positions, config.window(layer)) for layer in range(3)]
        assert cost.keys_seen(length) == sum(int(mask[-1].sum()) for mask in masks)
        assert cost.mean_keys_seen(length) == pytest.approx(sum(float(mask.sum()) for mask in masks) / length)


def test_cost_of_d12() -> None:
    """What docs say of the bench model, from its real parameters."""
    with torch.device("meta"):
        shape = replace(TINY_SHAPE, vocab_size=32768, num_layers=12, num_heads=6, num_kv_heads=6, hidden_size=768)
        sizes = {
            name: cost_of(
                LatentRecurrentTransformer(replace(shape, recurrence=kind and RecurrenceConfig(11, kind))).bfloat16()
            ).weight_bytes
            for name, kind in shapes.VARIANTS.items()
        }
    assert [round(size / 1e6) for size in sizes.values()] == [249, 223, 220]


def test_bfloat16_products_are_no_slower_than_widened_ones() -> None:
    assert LIMITS.gemm(torch.bfloat16) == LIMITS.gemm(torch.float32) == 1e10


def test_repetitions_take_turns() -> None:
    order: list[str] = []

    def work(name: str) -> Work:
        return Work(name, lambda: order.append(name) or float(len(order)))

    warm = Work("c", work("c").run, lambda: order.append("warm"))
    samples = interleave([work("a"), work("b"), warm], 2, "label")
    assert order == ["a", "b", "warm", "a", "b", "c", "a", "b", "c"]
    assert samples == [[4.0, 7.0], [5.0, 8.0], [6.0, 9.0]]


def test_figures_and_percentiles() -> None:
    figure = Figure("rate", "tok/s", [3.0, 1.0, 2.0], {"clients": 4}, "half of it\n    more")
    assert (figure.low, figure.median, figure.high) == (1.0, 2.0, 3.0)
    assert figure.to_dict()["samples"] == [3.0, 1.0, 2.0] and figure.to_dict()["clients"] == 4
    assert figure.row().splitlines()[1] == "    more"
    assert percentiles([]) is None
    assert percentiles([5.0]) == {"p50": 5.0, "p95": 5.0, "p99": 5.0}
    assert percentiles([float(i) for i in range(100, 0, -1)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_an_interrupted_run_writes_what_it_has(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def interrupted(works: list[Work], repetitions: int, label: str) -> list[list[float]]:
        done.append(label)
        if len(done) > 1:
            raise KeyboardInterrupt
        return interleave(works, repetitions, label)

    monkeypatch.setattr(offline, "interleave", interrupted)
    arguments = ["--model", str(checkpoint), "--clients", "1", "2", "--new-tokens", "2", "--prompt-len", "2"]
    data = run(tmp_path, "offline", *arguments, status=130)
    assert data["interrupted"] is True and names(data) == ["checkpoint: decode, 1 client(s)"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.bench", "offline", "--model", str(checkpoint), "--repetitions", "1000000"]
    out = tmp_path / "out.json"
    # What a shell starts in the background ignores Ctrl-C, and its children with it.
    heard, pipe = partial(signal.signal, signal.SIGINT, signal.SIG_DFL), subprocess.PIPE
    with subprocess.Popen([*command, "--json", str(out)], stdout=pipe, stderr=pipe, text=True, preexec_fn=heard) as process:
        try:
            assert process.stdout is not None
            assert "read bandwidth" in process.stdout.readline() and "weights" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130 and err == "lrt-bench: interrupted\n"
    assert json.loads(out.read_text())["interrupted"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["dance"], "invalid choice"),
        (["offline", "--model", "no/such/place"], "no/such/place: no such directory, and not d12"),
        (["offline", "--clients", "0"], "must be an integer of at least 1, got '0'"),
        (["offline", "--repetitions", "2"], "must be an integer of at least 3"),
        (["offline", "--variant", "plain"], "--variant is for --model d12"),
        (["serve", "--rate", "nan"], "must be a positive number"),
        (["serve", "--url", "127.0.0.1:80"], "is not a URL"),
        (["serve", "--url", "http://[bad"], "is not a URL"),
        (["serve", "--url", "http://h:99999"], "is not a URL"),
        (["serve", "--url", "http://h", "--model", "d12"], "--url measures a running server"),
        (["serve", "--model-name", "x"], "--model-name is for --url"),
        (["serve", "--compare-model", "x"], "--compare-model is for --compare"),
        (["checkpoint", "d13", "x"], "invalid choice"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_need_no_torch() -> None:
    script = "import sys, server.bench.arguments, server.bench.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_cannot_be_written_or_read_is_told(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--model", str(checkpoint), "--clients", "1", "--new-tokens", "2", "--prompt-len", "2"]
    assert main(["offline", *arguments, "--json", str(tmp_path / "file" / "x.json")]) == 1
    assert "cannot write" in capsys.readouterr().err
    (checkpoint / "config.json").unlink()
    assert main(["offline", *arguments]) == 1
    assert "config.json: file not found" in capsys.readouterr().err


def test_a_report_keeps_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({"mode": "x"})
    report.say("a word")
    report.add(Figure("f", "s", [1.0]))
    report.write(tmp_path / "r.json", interrupted=False)
    assert json.loads((tmp_path / "r.json").read_text())["notes"] == ["a word"]
    assert capsys.readouterr().out.startswith("a word\nf ")


def test_scheduler_at_two_loads(tmp_path: Path) -> None:
    data = run(tmp_path, "scheduler", "--sequences", "1", "6", "--context", "40", "--new-tokens", "5", "--steps", "7")
    assert names(data) == ["1 sequences at context 40", "6 sequences at context 40"]
    for figure in data["figures"]:
        assert set(figure["parts_ms"]) == set(scheduler.PARTS)
        assert 0 < max(figure["parts_ms"].values()) < 2 * figure["median"]


def test_the_schedulers_load_stays_and_renews_itself() -> None:
    bench = scheduler.Bench(num_sequences=6, context=40, new_tokens=5)
    for _ in range(30):
        bench.step()
        bench.scheduler.check_invariants()
        assert len(bench.scheduler.running) + len(bench.scheduler.waiting) == 6
    assert bench.numbers > 12, "sequences end and others come"
