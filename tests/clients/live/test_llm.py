"""The `llm` command with this server among its models. It runs in this process: importing it takes longer than all it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from llm.cli import cli

from .conftest import MODEL, Direct

MODELS = """
- model_id: here
  model_name: {model}
  api_base: {v1}
  completion: true
  api_key_name: openai
- model_id: here-chat
  model_name: {model}
  api_base: {v1}
  api_key_name: openai
"""


class Llm:
    """The command, its files in a folder of its own."""

    def __init__(self, v1: str, folder: Path) -> None:
        (folder / "extra-openai-models.yaml").write_text(MODELS.format(model=MODEL, v1=v1))
        self._runner = CliRunner(env={"LLM_USER_PATH": str(folder)})

    def run(self, *arguments: str) -> str:
        """What the command says; it must succeed."""
        done = self._runner.invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        return done.stdout


@pytest.fixture
def llm(v1: str, tmp_path: Path) -> Llm:
    return Llm(v1, tmp_path)


def test_it_lists_the_model(llm: Llm) -> None:
    assert "OpenAI Completion: here" in llm.run("models")


@pytest.mark.parametrize("stream", [True, False])
def test_completion(llm: Llm, direct: Direct, stream: bool) -> None:
    options = ["-m", "here", "-o", "temperature", "0", "-o", "max_tokens", "12", *([] if stream else ["--no-stream"])]
    text = llm.run(*options, "def main(")
    assert text.rstrip("\n") == direct.ask(greedy=[["def main(", 12, []]])["greedy"][0].rstrip("\n")
    assert "def main(" in llm.run("logs", "list", "-n", "1")


def test_chat(llm: Llm, chat: str) -> None:
    options = ["-m", "here-chat", "-o", "temperature", "0", "-o", "max_tokens", "12"]
    assert llm.run(*options, "print(") == llm.run(*options, "--no-stream", "print(")
