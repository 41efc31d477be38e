"""lm-evaluation-harness, `local-completions`: three tasks of our own, whose every number is what `lrt_core` computes directly.

The harness asks the server for its tokenizer and sends ids; it never puts the document's start before a prompt, so neither
does the direct computation. A whole text's likelihood starts from the document's start, whose id the harness asks for by name.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import AUTHORIZED, KEY, MODEL, Direct

HERE = Path(__file__).resolve().parent
TASKS = ("lrt_choice", "lrt_writing", "lrt_likelihood")
TOLERANCE = 1e-3


class Evaluation:
    """Results and per-item samples of one run of the command."""

    def __init__(self, folder: Path) -> None:
        (results,) = folder.rglob("results_*.json")
        self.results: dict[str, Any] = json.loads(results.read_text())["results"]
        self._samples = {path.name.removeprefix("samples_").rsplit("_", 1)[0]: path for path in folder.rglob("samples_*.jsonl")}

    def samples(self, task: str) -> list[dict[str, Any]]:
        """A task's items in order, as the harness logged them."""
        lines = self._samples[task].read_text().splitlines()
        return sorted(map(json.loads, lines), key=lambda sample: int(sample["doc_id"]))


SCRIPT = """
import functools, json, sys
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
"""
"""The command, as often as asked, for its imports take longer than an evaluation; and without its own tasks, thousands of files
that it reads to find ours."""
RUNS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "in batches": {"num_concurrent": 4, "batch_size": 3},
    "as text": {"tokenizer_backend": "none", "tasks": ("lrt_writing",)},
}


def command_line(v1: str, folder: Path, tasks: tuple[str, ...] = TASKS, batch_size: int = 1, **more: Any) -> list[str]:
    """What a user would say."""
    arguments = {"model": MODEL, "base_url": v1 + "/completions", "max_length": 512, "auth_token": KEY, **more}
    command = ["--model", "local-completions", "--tasks", ",".join(tasks)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(HERE / "tasks"), "--output_path", str(folder), "--log_samples"]
    return [*command, "--batch_size", str(batch_size)]


@pytest.fixture(scope="module")
def has_tokenizer(url: str) -> bool:
    """Whether the server has the routes by which the harness finds the tokenizer."""
    if httpx.get(url + "/tokenizer_info", headers=AUTHORIZED).status_code == 404:
        pytest.skip("this server has no tokenizer routes")
    return True


@pytest.fixture(scope="module")
def evaluations(v1: str, has_tokenizer: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evaluation]:
    folder = tmp_path_factory.mktemp("lm_eval")
    runs = {name: command_line(v1, folder / name, **arguments) for name, arguments in RUNS.items()}
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(runs.values()))]
    environment = {**os.environ, "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: Evaluation(folder / name) for name in runs}


@pytest.fixture(params=["one by one", "in batches"])
def evaluation(evaluations: dict[str, Evaluation], request: pytest.FixtureRequest) -> Evaluation:
    return evaluations[request.param]


def likelihoods(direct: Direct, samples: list[dict[str, Any]]) -> list[list[tuple[float, bool]]]:
    """Directly computed, per item and choice."""
    pairs = [(sample["doc"]["code"], choice) for sample in samples for choice in sample["doc"]["choices"]]
    answers = iter(direct.ask(loglikelihoods=pairs)["loglikelihoods"])
    return [[tuple(next(answers)) for _ in sample["doc"]["choices"]] for sample in samples]


def check_choices(evaluation: Evaluation, direct: Direct) -> None:
    samples = evaluation.samples("lrt_choice")
    assert len(samples) == 12
    correct = 0
    for sample, wanted in zip(samples, likelihoods(direct, samples), strict=True):
        found = [(float(likelihood), str(is_greedy) == "True") for ((likelihood, is_greedy),) in sample["resps"]]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=TOLERANCE)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
        best = max(range(len(wanted)), key=lambda index: wanted[index][0])
        assert sample["acc"] == (best == sample["doc"]["answer"])
        correct += best == sample["doc"]["answer"]
    assert evaluation.results["lrt_choice"]["acc,none"] == pytest.approx(correct / len(samples))
    assert correct > len(samples) / 4, "the model knows more Python than chance"


def test_likelihoods_of_choices_and_accuracy(evaluation: Evaluation, direct: Direct) -> None:
    check_choices(evaluation, direct)


def test_generated_lines_and_accuracy(evaluation: Evaluation, direct: Direct) -> None:
    samples = evaluation.samples("lrt_writing")
    stops = ["\n", "#", ";", '"""', "zzz"]
    wanted = direct.ask(greedy=[[sample["doc"]["code"], 16, stops] for sample in samples], bos=False)["greedy"]
    assert [sample["resps"][0][0] for sample in samples] == wanted
    correct = sum(text == sample["doc"]["rest"] for text, sample in zip(wanted, samples, strict=True))
    assert evaluation.results["lrt_writing"]["exact_match,none"] == pytest.approx(correct / len(samples))
    assert len(samples) == 8 and 0 < correct < 8


def test_likelihoods_of_whole_texts(evaluation: Evaluation, direct: Direct) -> None:
    samples = evaluation.samples("lrt_likelihood")
    texts = [sample["doc"]["code"] for sample in samples]
    wanted = [likelihood for likelihood, _ in direct.ask(loglikelihoods=[["", text] for text in texts])["loglikelihoods"]]
    assert [float(sample["resps"][0][0]) for sample in samples] == pytest.approx(wanted, abs=TOLERANCE)
    num_bits = -sum(wanted) / math.log(2)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert evaluation.results["lrt_likelihood"]["bits_per_byte,none"] == pytest.approx(num_bits / num_bytes, abs=TOLERANCE)


def test_without_a_tokenizer_text_is_generated(evaluations: dict[str, Evaluation], direct: Direct) -> None:
    """Prompts go as text then, so the server puts the document's start before them."""
    samples = evaluations["as text"].samples("lrt_writing")
    stops = ["\n", "#", ";", '"""', "zzz"]
    wanted = direct.ask(greedy=[[sample["doc"]["code"], 16, stops] for sample in samples])["greedy"]
    assert [sample["resps"][0][0] for sample in samples] == wanted
