"""Promises that the repository makes about itself: what it says is so, what it pins is complete, what it forbids is absent."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from server.api.schemas import NOT_BUILT, REFUSED, CompletionRequest, StreamOptions
from server.config import make_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = (ROOT / "README.md").read_text("utf-8")
PACKAGE_FILES = sorted(path for package in ("lrt_core", "training", "server") for path in (ROOT / package).rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# In two halves, so that this file does not hold what it forbids.
FORBIDDEN = [
    re.compile(first + second)
    for first, second in (
        (r"pypi\.", r"org"),
        (r"pythonhosted\.", r"org"),
        (r"download\.pytorch\.", r"org"),
        (r"\b(docker|quay|ghcr)\.", r"io"),
        (r"deb\.debian\.", r"org"),
        (r"(?<![\w.}])/(work|root|opt)", r"/"),
        (r"(?<![\w.])/home/(?!lrt\b)", r"\w+"),
        (r"(?<![\w.])/Users/", r"\w+"),
    )
]


def committed_files() -> list[Path]:
    """Every file that git tracks; skips the test where the source is not a git checkout."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def forbidden_words(text: str) -> list[str]:
    """What in the text names a package registry or somebody's machine."""
    return [found.group() for pattern in FORBIDDEN for found in pattern.finditer(text)]


def requirements() -> list[Requirement]:
    """Direct dependencies, those of the extras included."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]


def pins(path: str = "constraints.txt") -> dict[str, list[Requirement]]:
    """Entries of a file of pins by package."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / path).read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(requirement.name, []).append(requirement)
    return found


def test_no_registry_and_no_machine_is_named() -> None:
    found = {}
    for path in committed_files():
        try:
            words = forbidden_words(path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue  # weights and other binary data
        if words:
            found[str(path.relative_to(ROOT))] = words
    assert found == {}


@pytest.mark.parametrize("text", ["see https://py" + "pi.org/x", "/ro" + "ot/x", "cd /wo" + "rk/main", "/home" + "/someone/x"])
def test_forbidden_words_are_seen(text: str) -> None:
    assert forbidden_words(text)


@pytest.mark.parametrize("text", ["runs/work/x", "${x}/root/", "WORKDIR /home" + "/lrt", "an opt/in"])
def test_innocent_words_are_not(text: str) -> None:
    assert forbidden_words(text) == []


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_console_commands_exist(command: str) -> None:
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_version_is_written_once() -> None:
    literals = {
        str(path.relative_to(ROOT)): node.value
        for path in PACKAGE_FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value == PROJECT["version"]
    }
    assert literals == {}
    assert version(PROJECT["name"]) == PROJECT["version"]


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = pins()
    for requirement in requirements():
        if requirement.name == PROJECT["name"]:
            continue  # an extra that includes another
        entries = pinned.get(requirement.name, [])
        assert entries, f"{requirement.name} is not in constraints.txt"
        for entry in entries:
            (pin,) = entry.specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), f"{entry} does not satisfy {requirement}"


def test_constraints_give_one_version_per_python() -> None:
    for minor in range(10, 15):
        python = {"python_version": f"3.{minor}"}
        for name, entries in pins().items():
            valid = [entry for entry in entries if entry.marker is None or entry.marker.evaluate(python)]
            assert len(valid) <= 1, f"{name} has two pins for Python 3.{minor}"


def test_clients_have_the_versions_of_constraints() -> None:
    common = pins()
    for minor in range(10, 15):
        python = {"python_version": f"3.{minor}"}
        for name, entries in pins("tests/clients/requirements.txt").items():
            valid = [entry for entry in entries if entry.marker is None or entry.marker.evaluate(python)]
            others = [entry for entry in common.get(name, []) if entry.marker is None or entry.marker.evaluate(python)]
            assert len(valid) <= 1, f"{name} has two pins for Python 3.{minor}"
            if valid and others:
                assert valid[0].specifier == others[0].specifier, f"{name} for Python 3.{minor}"


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in PACKAGE_FILES:
        source = path.read_text("utf-8")
        name = path.relative_to(ROOT)
        if (num_lines := source.count("\n")) > MAX_FILE_LINES:
            long.append(f"{name}: {num_lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name}: {num_lines} lines")
    assert long == []


def test_readme_names_real_targets_and_files() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`| {4,})make ([a-z]+)", README))
    assert {"serve", "test"} <= named <= targets
    paths = re.findall(r"`((?:lrt_core|training|server|docker|tests)/[\w/.]*)`", README)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def flag_row(action: argparse.Action) -> str:
    """How the README's table shows a flag of the server."""
    if not action.option_strings:
        shown = str(action.metavar)
    elif action.nargs == 0:
        shown = action.option_strings[0]
    else:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        value = choices or action.metavar or action.dest.upper()
        shown = f"{action.option_strings[0]} {value}{' ...' if action.nargs == '+' else ''}"
    return f"| `{shown}` | {action.help} |"


def test_readme_lists_the_flags() -> None:
    table = README.partition("| flag | what |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [flag_row(action) for action in make_parser()._actions if action.dest != "help"]


def test_readme_lists_the_fields() -> None:
    table = README.partition("| fields of a completion | |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = {row.split("|")[1].strip(): set(re.findall(r"`([\w.]+)`", row)) for row in table.splitlines()}
    assert rows.pop("refused by name") == {*NOT_BUILT, *REFUSED}
    assert set().union(*rows.values()) == {*CompletionRequest.model_fields, *StreamOptions.model_fields}
