"""Processes that must not outlive each other, or not meet: helpers end with their parent, a folder has one worker at a time.

Neighbours: `__main__.py` and `study/` lock their folders; `study/worker.py` and `data/sharding.py` have helpers.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"


class BusyError(ValueError):
    """Another process works on the folder that the message names."""


def end_with_parent() -> None:
    """In a process that multiprocessing started: end at once when the one that started it ends, however that ends."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def exclusively(folder: Path) -> Iterator[None]:
    """Work on a folder, made if it is not there, that no other process works on; BusyError where one does.

    The lock belongs to this process and goes with it, however it ends; the file that stays behind means nothing. A folder in
    which nothing else came to lie is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{folder}: another process is training here") from None
        if os.fstat(file.fileno()).st_nlink == 0:
            raise BusyError(f"{folder}: another process has just removed it; start again")
        try:
            yield
        finally:
            if folder.exists() and [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
                folder.rmdir()
