"""A worker process, `python -m fastmono.worker`: trains one shard, for the driver that started it (see executor.py)."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings

from fastmono.block import single_thread
from fastmono.executor import Stop, decode_job
from fastmono.trainer import Event, describe_failure, train_blocks


def main() -> int:
    """Read a job from standard input, train it, report on standard output. Ends with its driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not stand among the events
    line = sys.stdin.readline()
    if not line:
        return 1
    stop = Stop()

    def watch_driver() -> None:
        for word in sys.stdin:
            if word.strip() == "stop":
                stop.requested = True
        os._exit(1)  # the driver is gone: what was saved is saved, and nobody reads the rest

    threading.Thread(target=watch_driver, daemon=True).start()

    def report(event: Event) -> None:
        try:
            print(json.dumps(event), file=channel, flush=True)
        except OSError:
            os._exit(1)

    def warn(message: Warning | str, *_: object, **__: object) -> None:
        report({"kind": "warning", "text": str(message)})

    warnings.showwarning = warn
    try:
        with single_thread():
            whole = train_blocks(*decode_job(line), report, stop)
        report({"kind": "finished", "whole": whole})
    except BaseException as error:
        report({"kind": "failed", "text": describe_failure(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
