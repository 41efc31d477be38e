"""`lrt-generate` as a user runs it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from lrt_core.__main__ import main
from lrt_core.checkpoint import GenerationConfig, load_model, load_tokenizer, save_checkpoint
from lrt_core.generate import generate
from lrt_core.sampling_params import SamplingParams
from lrt_core.text import TextDecoder
from tests.helpers import tiny_model, tiny_tokenizer

PROMPT = "def import"


def expected_text(checkpoint: Path, max_tokens: int, params: SamplingParams | None = None, prompt: str = PROMPT) -> str:
    tokenizer = load_tokenizer(checkpoint)
    decoder = TextDecoder(tokenizer)
    ids = generate(load_model(checkpoint), tokenizer.encode(prompt), max_tokens, params)
    return prompt + "".join(decoder.add(token) for token in ids) + decoder.finish() + "\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    return status, *capsys.readouterr()


def test_greedy_text_is_the_oracles(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = run(capsys, str(checkpoint), PROMPT, "--temperature", "0", "--max-tokens", "12", "--ignore-eos")
    assert (status, error) == (0, "")
    assert out == expected_text(checkpoint, 12)


def test_a_seed_repeats_a_sample(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(checkpoint), PROMPT, "--max-tokens", "12", "--ignore-eos", "--temperature", "0.9", "--top-p", "0.9")
    outputs = [run(capsys, *arguments, "--top-k", "40", "--seed", seed)[1] for seed in ("7", "7", "8")]
    params = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=7)
    assert outputs[0] == outputs[1] == expected_text(checkpoint, 12, params)
    assert outputs[2] != outputs[0]


def test_without_a_seed_samples_differ(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {run(capsys, str(checkpoint), PROMPT, "--max-tokens", "30", "--ignore-eos")[1] for _ in range(3)}
    assert len(outputs) > 1


def test_defaults_are_the_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation = GenerationConfig((), temperature=0.0, max_new_tokens=5)
    save_checkpoint(tmp_path / "c", tiny_model(), tiny_tokenizer(), generation=generation)
    assert run(capsys, str(tmp_path / "c"), PROMPT)[1] == expected_text(tmp_path / "c", 5)


def test_an_end_of_sequence_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    ids = list(generate(tiny_model(), tokenizer.encode(PROMPT), 8))
    save_checkpoint(tmp_path / "c", tiny_model(), tokenizer, generation=GenerationConfig((ids[2],), temperature=0.0))
    arguments = (str(tmp_path / "c"), PROMPT, "--max-tokens", "8")
    num_tokens = ids.index(ids[2]) + 1
    assert run(capsys, *arguments)[1] == expected_text(tmp_path / "c", num_tokens)
    assert run(capsys, *arguments, "--ignore-eos")[1] == expected_text(tmp_path / "c", 8)


def test_prompt_from_standard_input(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("import self"))
    out = run(capsys, str(checkpoint), "-", "--temperature", "0", "--max-tokens", "3", "--ignore-eos")[1]
    assert out == expected_text(checkpoint, 3, prompt="import self")


def test_bfloat16(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, str(checkpoint), PROMPT, "--dtype", "bfloat16", "--max-tokens", "3", "--seed", "1")
    assert status == 0
    assert out.startswith(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "-5"], "top_k"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_bad_values_are_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, error = run(capsys, str(checkpoint), PROMPT, *arguments)
    assert (status, out) == (1, "")
    assert error.startswith("lrt-generate: ")
    assert message in error


def test_a_device_that_is_not_there(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, error = run(capsys, str(checkpoint), PROMPT, "--device", "cuda")
    assert status == 1
    assert "CUDA" in error


def test_no_checkpoint_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, str(tmp_path / "missing"), PROMPT)
    assert status == 1
    assert "missing" in error


def test_damaged_weights(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    status, _, error = run(capsys, str(checkpoint), PROMPT)
    assert status == 1
    assert "model.safetensors" in error


def test_as_a_module(checkpoint: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lrt_core",
        str(checkpoint),
        PROMPT,
        "--temperature",
        "0",
        "--max-tokens",
        "4",
        "--ignore-eos",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == expected_text(checkpoint, 4)
