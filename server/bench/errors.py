"""What a user can do something about: told in one line, without a traceback. No torch, so that every file may use it."""

from __future__ import annotations


class BenchError(Exception):
    """The measurement cannot be made; the message says why."""
