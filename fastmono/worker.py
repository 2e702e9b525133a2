"""A worker process, `python -m fastmono.worker`: trains shards for the driver that started it (see processes.py)."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import NoReturn

from fastmono.executor import Stop, train_shard
from fastmono.trainer import Event


def main() -> NoReturn:
    """Read shards from standard input, train them, report on standard output. Ends with its driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not stand among the events
    stop = Stop()
    shards: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "stop":
                stop.requested = True
            else:
                shards.put(line)
        os._exit(1)  # the driver is gone: what was saved is saved, and nobody reads the rest

    threading.Thread(target=listen, daemon=True).start()

    def report(event: Event) -> None:
        try:
            print(json.dumps(event), file=channel, flush=True)
        except OSError:
            os._exit(1)

    while True:
        train_shard(shards.get(), report, stop)


if __name__ == "__main__":
    main()
