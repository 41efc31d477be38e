"""Who may import whom, read from the source: training -> lrt_core <- server, and the order inside the server.

Imports inside functions and under TYPE_CHECKING count like any other: a rule that they could evade would be none.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lrt_core", "training", "server")
WEB = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client")
TORCH_FREE = (
    *("server.engine.sequence", "server.engine.block_manager", "server.engine.scheduler"),
    *("server.engine.request", "server.engine.grammar_probe"),
)
LEAN = ("server.bench.load", "server.bench.api_probe", "server.bench.processes", "server.bench.report")
"""Parts of the bench that run beside a server under test, and must not take its memory or its cores."""

Graph = Mapping[str, frozenset[str]]
"""Module name -> names of the modules that it imports."""


class Rule(NamedTuple):
    """Modules within `who` import nothing within `forbidden`, but for what lies within `allowed`."""

    who: str
    forbidden: tuple[str, ...]
    allowed: tuple[str, ...] = ()


SEAM = ("request", "stats", "config", "stream")
BELOW_THE_ENGINE = (
    *SEAM,
    "sequence",
    "block_manager",
    "scheduler",
    "batch",
    "model_runner",
    "detokenizer",
    "grammars",
    "grammar_probe",
)
ABOVE_THE_ENGINE = ("server.engine.async_engine", "server.engine.sample", "server.engine.worker")

RULES = (
    Rule("lrt_core", ("training", "server", *WEB)),
    Rule("training", ("server", *WEB)),
    Rule("server", ("training",)),
    Rule("server.engine", ("server", *WEB), allowed=("server.engine",)),
    Rule("server.engine.engine", ABOVE_THE_ENGINE),
    *(Rule(f"server.engine.{name}", ("server.engine.engine", *ABOVE_THE_ENGINE)) for name in BELOW_THE_ENGINE),
    Rule(
        "server.api",
        ("server.engine", "server.__main__"),
        allowed=tuple(f"server.engine.{name}" for name in ("async_engine", *SEAM)),
    ),
    Rule("server.metrics", ("pydantic",)),
    Rule("server.bench", ("pydantic",)),
    Rule("server.__main__", ("pydantic",)),
)


def within(module: str, package: str) -> bool:
    """Whether the module is the package or lies in it."""
    return module == package or module.startswith(package + ".")


def module_name(path: Path) -> str:
    """Dotted name of a file, relative to the root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(module: str, is_package: bool, source: str, known: frozenset[str]) -> frozenset[str]:
    """Every module that the source imports; `from a import b` is a.b where that is a known module, else a."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names)
    return frozenset(names)


def source_graph() -> Graph:
    """The imports of the three packages."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    known = frozenset(module_name(path) for path in paths)
    return {
        module_name(path): imported(module_name(path), path.stem == "__init__", path.read_text("utf-8"), known)
        for path in paths
    }


def violations(graph: Graph) -> list[str]:
    """Each import that breaks a rule, as `importer -> imported`."""
    return sorted(
        {
            f"{module} -> {name}"
            for rule in RULES
            for module in graph
            if within(module, rule.who)
            for name in graph[module]
            if any(within(name, bad) for bad in rule.forbidden) and not any(within(name, good) for good in rule.allowed)
        }
    )


def reachable(graph: Graph, start: str, with_packages: bool) -> set[str]:
    """What importing `start` imports in the end, itself included; `with_packages` adds the packages above each module."""
    seen: set[str] = set()
    queue = [start]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += graph.get(name, ())
            if with_packages and "." in name:
                queue.append(name.rpartition(".")[0])
    return seen


def cycles(graph: Graph) -> list[str]:
    """Modules that import themselves by way of others."""
    return sorted(m for m in graph if any(m in reachable(graph, name, with_packages=False) for name in graph[m]))


def test_imports_keep_the_rules() -> None:
    assert violations(source_graph()) == []


def test_no_import_cycles() -> None:
    assert cycles(source_graph()) == []


@pytest.mark.parametrize("module", [*TORCH_FREE, *LEAN])
def test_scheduling_and_load_need_no_torch(module: str) -> None:
    graph = source_graph()
    assert module in graph
    assert "torch" not in {name.split(".")[0] for name in reachable(graph, module, with_packages=True)}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("lrt_core.model", "import server.engine.batch", "lrt_core.model -> server.engine.batch"),
        ("lrt_core.model", "def f():\n    from training import config", "lrt_core.model -> training"),
        ("lrt_core.files", "import pydantic", "lrt_core.files -> pydantic"),
        ("training.trainer", "from server.engine.batch import build", "training.trainer -> server.engine.batch"),
        ("server.bench.work", "import training.config as c", "server.bench.work -> training.config"),
        ("server.engine.batch", "from .engine import Engine", "server.engine.batch -> server.engine.engine"),
        ("server.engine.batch", "from ..api import app", "server.engine.batch -> server.api"),
        (
            "server.engine.engine",
            "from server.engine import async_engine",
            "server.engine.engine -> server.engine.async_engine",
        ),
        ("server.engine.stats", "from pydantic import BaseModel", "server.engine.stats -> pydantic"),
        ("server.api.routes", "from server.engine.scheduler import Scheduler", "server.api.routes -> server.engine.scheduler"),
        ("server.metrics", "if TYPE_CHECKING:\n    from pydantic import BaseModel", "server.metrics -> pydantic"),
    ],
)
def test_a_broken_rule_is_seen(module: str, source: str, expected: str) -> None:
    known = frozenset({"server.engine.batch", "server.engine.engine", "server.engine.async_engine", "server.engine.scheduler"})
    assert violations({module: imported(module, False, source, known)}) == [expected]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("server.api.routes", "from server.engine.async_engine import AsyncEngine\nfrom pydantic import BaseModel"),
        ("server.config", "from pydantic import BaseModel\nfrom server.engine.config import EngineConfig"),
        ("server.engine.async_engine", "from server.engine.engine import Engine"),
        ("training.trainer", "from lrt_core.model import LatentRecurrentTransformer\nimport torch"),
    ],
)
def test_a_kept_rule_is_silent(module: str, source: str) -> None:
    known = frozenset({"server.engine.async_engine", "server.engine.engine", "server.engine.config"})
    assert violations({module: imported(module, False, source, known)}) == []


def test_torch_and_cycles_are_found_behind_other_modules() -> None:
    graph = {"a.x": frozenset({"b"}), "a": frozenset({"c"}), "b": frozenset({"a.x"}), "c": frozenset({"torch.nn"})}
    assert "torch.nn" in reachable(graph, "a.x", with_packages=True)
    assert cycles(graph) == ["a.x", "b"]
