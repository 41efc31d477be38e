"""What an OpenAI-compatible server understands, asked before anything is measured. No torch."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.bench.errors import BenchError
from server.bench.http_client import Address, HttpError, fetch
from server.bench.load import PATH, Job, error_text, request_body

TOGGLES = ("include_usage", "ignore_eos", "prompts_are_ids")
"""What a server may refuse with a 400 or 422 and be measured without."""
REFUSALS = (400, 422)


def model_name(url: str, timeout: float, key: str = "") -> str:
    """Name of the first model that the server lists. Raises BenchError."""
    status, body = _fetch(Address.parse(url, key), url, "GET", "/v1/models", b"", timeout)
    try:
        data: Any = json.loads(body)
        return str(data["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise BenchError(f"{url} lists no models ({error_text(status, body)}); name one") from None


def adapt(job: Job) -> tuple[Job, list[str]]:
    """The job as the server takes it, and the names of what had to be left out. Raises BenchError.

    Sends small requests, at first with everything, then with ever less of what a server may not know.
    """
    refusal = ""
    for number in range(len(TOGGLES) + 1):
        for left_out in itertools.combinations(TOGGLES, number):
            candidate = _without(job, left_out)
            small = replace(candidate, prompt_len=4, new_tokens=2)
            content = request_body(small, random.Random(job.seed))
            status, body = _fetch(job.address, job.url, "POST", PATH, content, job.request_timeout)
            if status == 200:
                return candidate, list(left_out)
            refusal = refusal or error_text(status, body)
            if status not in REFUSALS:
                raise BenchError(f"{job.url}{PATH} answers {error_text(status, body)}")
    raise BenchError(f"{job.url}{PATH} answers {refusal}")


def _without(job: Job, left_out: Sequence[str]) -> Job:
    return replace(
        job,
        include_usage=job.include_usage and "include_usage" not in left_out,
        ignore_eos=job.ignore_eos and "ignore_eos" not in left_out,
        prompts_are_ids=job.prompts_are_ids and "prompts_are_ids" not in left_out,
    )


def _fetch(address: Address, url: str, method: str, path: str, body: bytes, timeout: float) -> tuple[int, bytes]:
    try:
        return asyncio.run(fetch(address, method, path, body, timeout))
    except HttpError as error:
        raise BenchError(f"{url}: {error}") from None
