"""All runs of a study, some at a time, each in a process of its own; what is done stays done.

Layout of a study's folder:
    study.json       what all cells share: settings, and the data's fingerprint
    tokenizer/       the tokenizer that all cells share
    shards/          the tokenised data, unless they lie elsewhere
    results.jsonl    a line per finished cell, in the order in which they ended
    timing.json      by device, seconds of each variant's steps, measured alone
    cells/           the state of cells that are under way
    checkpoints/     finished models, where they are to be kept
    report.md, results.csv, *.png   the report

Neighbours: `worker.py` is the other side of the processes, `cells.py` trains one cell, `report.py` writes the report.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lrt_core.files import read_json, write_json, write_text
from training.config import completed
from training.study import worker
from training.study.cells import Surroundings
from training.study.plan import Cell, Plan, StudyError

PLAN_FILE, RESULTS_FILE, TIMING_FILE = "study.json", "results.jsonl", "timing.json"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Results of the finished cells; StudyError for a line that is none. A last line cut off by a crash counts as not there."""
    path = folder / RESULTS_FILE
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise StudyError(f"{path}: line {number} is no result: {error}") from None
    return results


def claim(folder: Path, plan: Plan, fingerprint: str) -> Plan:
    """Make the folder this study's; StudyError when it holds one with other runs' settings or other data.

    Returns the plan, whose runs are evaluated on the rows that those before were evaluated on.
    """
    path = folder / PLAN_FILE
    before = read_json(path) if path.exists() else None
    stored = completed(before["base"]) if before is not None and isinstance(before.get("base"), dict) else None
    if stored is not None:
        # How kernels are launched changes no result.
        fill, stored["cuda_graphs"] = bool(stored["fill_eval_rows"]), plan.base.cuda_graphs
        plan = replace(plan, base=replace(plan.base, fill_eval_rows=fill))
    base = json.loads(json.dumps({**plan.base.to_dict(), "shards": None}))
    if before is not None and (stored != base or before.get("data") != fingerprint):
        what = "settings" if stored != base else "data"
        raise StudyError(f"{folder}: holds a study with other {what}; choose another folder, or remove this one")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"base": base, "data": fingerprint})
    results = folder / RESULTS_FILE
    if results.exists() and not (text := results.read_text("utf-8")).endswith("\n"):
        write_text(results, text[: text.rfind("\n") + 1])  # what a crash cut off
    return plan


class Runner:
    """Runs what is missing."""

    def __init__(self, plan: Plan, around: Surroundings, jobs: int) -> None:
        self.plan, self.around, self.jobs = plan, around, jobs
        self.failures: dict[str, str] = {}
        self._stopped = False

    def missing(self) -> list[Cell]:
        """Cells without a result."""
        done = {result["cell"] for result in read_results(self.around.folder)}
        return [cell for cell in self.plan.cells() if cell.name not in done]

    def time(self) -> None:
        """Measure the steps of variants that have no time yet on this device, with nothing else running."""
        with self._pool(1) as pool:
            self._time(pool)

    def run(self) -> None:
        """Time the steps, then train what is missing; `failures` then says what failed.

        Ctrl-C and SIGTERM end it with a KeyboardInterrupt, after the state of what runs has been saved.
        """
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._pool(self.jobs) as pool:
                self._time(pool)
                if not self._stopped:
                    self._train(pool, self.missing())
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopped:
            raise KeyboardInterrupt

    def _stop(self, number: int, frame: object) -> None:
        """Pass it on to the workers."""
        self._stopped = True
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
        return ProcessPoolExecutor(workers, context, initializer=worker.begin, initargs=(self.around,))

    def _time(self, pool: ProcessPoolExecutor) -> None:
        path = self.around.folder / TIMING_FILE
        table: dict[str, Any] = read_json(path) if path.exists() else {}
        device = pool.submit(worker.device_name).result()
        known = table.setdefault(device, {})
        if all(variant.name in known for variant in self.plan.variants):
            return
        known |= pool.submit(worker.time_steps, self.plan).result()  # all anew: only what took turns can be compared
        write_json(path, table)
        medians = ", ".join(f"{name} {1000 * statistics.median(own):.1f} ms" for name, own in known.items())
        print(f"a step alone on {device}: {medians}", file=sys.stderr, flush=True)

    def _train(self, pool: ProcessPoolExecutor, cells: Iterable[Cell]) -> None:
        waiting = {pool.submit(worker.run, self.plan, cell): cell for cell in cells}
        with tqdm(total=len(waiting), unit="run", disable=None) as bar:
            for future in as_completed(waiting):
                self._take(future, waiting.pop(future))
                bar.update()
                if self._stopped:
                    break
        pool.shutdown(wait=True, cancel_futures=True)
        for future, cell in waiting.items():  # who was measuring when the others stopped has a result all the same
            if not future.cancelled():
                self._take(future, cell)

    def _take(self, future: Future[dict[str, Any] | None], cell: Cell) -> None:
        try:
            result = future.result()
        except BrokenProcessPool:
            raise StudyError(f"{cell.name}: its process died; what was done is kept, start the study again") from None
        except (ValueError, OSError, RuntimeError) as error:
            self.failures[cell.name] = str(error)
            print(f"lrt-train study: {cell.name} failed: {error}", file=sys.stderr, flush=True)
            return
        if result is None:
            self._stopped = True
            return
        with (self.around.folder / RESULTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())
        tqdm.write(f"{cell.name}: sequential {result['sequential_bpb']:.4f}, parallel {result['merged_bpb']:.4f}")
