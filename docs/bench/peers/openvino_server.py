"""A small OpenAI-compatible server over OpenVINO GenAI's continuous batching: GET /v1/models and POST /v1/completions.

Usage: openvino_server.py MODEL_DIR --port P [--threads N]; MODEL_DIR is what `optimum-cli export openvino` wrote. Greedy only.
One event loop does everything in turns: a step of the model, then the answers and what arrived meanwhile. Threads would gain
nothing, because the pipeline's `step` holds Python's lock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

TURNS = 4
"""Turns of the event loop between two steps: enough to accept a connection, read a request and submit it."""
FINISH_REASONS = {genai.GenerationFinishReason.LENGTH: "length", genai.GenerationFinishReason.STOP: "stop"}


@dataclass(eq=False)
class Sequence:
    """A request in progress. shown: ids whose text was sent last; hidden: those after them; parts: texts to be sent, each with
    its number of tokens; finish_reason: set along with the last part."""

    handle: Any
    prompt_len: int
    shown: list[int]
    hidden: list[int] = field(default_factory=list)
    parts: asyncio.Queue[tuple[str, int]] = field(default_factory=asyncio.Queue)
    finish_reason: str | None = None


class Engine:
    """The pipeline, the requests in it and the loop that drives them."""

    def __init__(self, model_dir: Path, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 64, 512
        scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
        self._pipeline = genai.ContinuousBatchingPipeline(model_dir, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self._tokenizer = self._pipeline.get_tokenizer()
        self._active: list[Sequence] = []
        self._num_requests = 0
        self._wake = asyncio.Event()

    def submit(self, body: dict[str, Any]) -> Sequence:
        """Queue what a request's body asks for, decoded greedily. Raises ValueError, TypeError or RuntimeError."""
        prompt = body.get("prompt")
        if not prompt:
            raise ValueError("prompt must be a text or a list of token ids, and not empty")
        ids = self._tokenizer.encode(prompt).input_ids.data.ravel().tolist() if isinstance(prompt, str) else prompt
        config = genai.GenerationConfig()
        config.max_new_tokens = body.get("max_tokens", 16)
        config.ignore_eos = body.get("ignore_eos", False)
        config.set_eos_token_id(self._tokenizer.get_eos_token_id())
        self._num_requests += 1
        handle = self._pipeline.add_request(self._num_requests, ov.Tensor(np.array([ids], dtype=np.int64)), config)
        self._active.append(Sequence(handle, len(ids), shown=ids[-4:]))
        self._wake.set()
        return self._active[-1]

    async def run(self) -> None:
        """Step as long as there are requests, else wait for some."""
        while True:
            if not self._active:
                self._wake.clear()
                await self._wake.wait()
            self._pipeline.step()
            self._deliver()
            for _ in range(TURNS):
                await asyncio.sleep(0)

    def _deliver(self) -> None:
        """Give every sequence the text that the step brought. One call decodes all: a call for each would cost much more."""
        changed = [sequence for sequence in self._active if not sequence.finish_reason and sequence.handle.can_read()]
        counts = [self._read(sequence) for sequence in changed]
        rows = [row for sequence in changed for row in (sequence.shown, sequence.shown + sequence.hidden)]
        texts = self._tokenizer.decode(rows) if rows else []
        for sequence, count, before, after in zip(changed, counts, texts[::2], texts[1::2], strict=True):
            text = after[len(before) :]
            if text.endswith("\ufffd") and not sequence.finish_reason:
                text = ""  # only some bytes of a character: wait for the others
            else:
                sequence.shown, sequence.hidden = sequence.hidden, []
            sequence.parts.put_nowait((text, count))
        self._active = [sequence for sequence in self._active if not sequence.finish_reason]

    @staticmethod
    def _read(sequence: Sequence) -> int:
        """Take a sequence's new ids from its handle; returns how many."""
        (output,) = sequence.handle.read().values()
        sequence.hidden += output.generated_ids
        sequence.finish_reason = FINISH_REASONS.get(output.finish_reason)
        return len(output.generated_ids)


async def complete(engine: Engine, model: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Answer POST /v1/completions."""
    sequence = engine.submit(body)
    head = {"id": f"cmpl-{id(sequence)}", "object": "text_completion", "created": int(time.time()), "model": model}
    whole, num_tokens = "", 0
    if body.get("stream"):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    while not sequence.finish_reason or not sequence.parts.empty():
        text, count = await sequence.parts.get()
        if writer.is_closing():
            sequence.handle.cancel()
            sequence.finish_reason = "abort"
            raise ConnectionError("the client has gone")
        whole, num_tokens = whole + text, num_tokens + count
        if body.get("stream"):
            reason = sequence.finish_reason if sequence.parts.empty() else None
            write_event(writer, json.dumps({**head, "choices": [{"index": 0, "text": text, "finish_reason": reason}]}))
    total = sequence.prompt_len + num_tokens
    usage = {"prompt_tokens": sequence.prompt_len, "completion_tokens": num_tokens, "total_tokens": total}
    if body.get("stream"):
        if (body.get("stream_options") or {}).get("include_usage"):
            write_event(writer, json.dumps({**head, "choices": [], "usage": usage}))
        write_event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
    else:
        choice = {"index": 0, "text": whole, "finish_reason": sequence.finish_reason}
        write_answer(writer, 200, {**head, "choices": [choice], "usage": usage})


def write_event(writer: asyncio.StreamWriter, data: str) -> None:
    """Send a server-sent event as an HTTP chunk."""
    content = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%b\r\n" % (len(content), content))


def write_answer(writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
    """Send a whole answer."""
    content = json.dumps(answer).encode()
    head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)


async def serve_connection(engine: Engine, model: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer a connection's requests, one after the other, until the client closes it."""
    try:
        while True:
            request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(":") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            try:
                if request.startswith("GET /v1/models "):
                    write_answer(writer, 200, {"object": "list", "data": [{"id": model, "object": "model"}]})
                elif request.startswith("POST /v1/completions "):
                    await complete(engine, model, json.loads(body), writer)
                else:
                    write_answer(writer, 404, {"error": {"message": "no such path"}})
            except (ValueError, TypeError, RuntimeError) as error:
                write_answer(writer, 400, {"error": {"message": str(error)}})
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve(model_dir: Path, port: int, threads: int) -> None:
    """Load the model and serve it until interrupted; an error of the pipeline ends the server."""
    engine = Engine(model_dir, threads)
    server = await asyncio.start_server(partial(serve_connection, engine, model_dir.name), "127.0.0.1", port)
    await asyncio.gather(server.serve_forever(), engine.run())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    asyncio.run(serve(**vars(parser.parse_args())))
