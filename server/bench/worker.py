"""An engine without a server, in a process of its own, beside the server of the same run: `serve` asks it for rates.

Reads a line of JSON from stdin for every measurement, the fields of `work.Load`, and answers with one. Says {"ready": true}
first. Neighbours: `processes.py` starts it.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from server.bench.model import set_threads, subjects
from server.bench.work import Load, closed_loop_rate, make_engine


def main(argv: Sequence[str] | None = None) -> int:
    """Answer until stdin ends."""
    args = _parse(argv)
    (subject,) = subjects(args)
    set_threads(args, subject.model.config)
    engine = make_engine(subject.model, args.max_num_seqs, args.max_len, prefix_caching=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"tokens_per_second": closed_loop_rate(engine, Load(**json.loads(line)))}), flush=True)
    return 0


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="python -m server.bench.worker", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
