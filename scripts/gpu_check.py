"""A few minutes on a CUDA machine, in three calls that each stand alone: is it right, how fast, what would be faster.

    python scripts/gpu_check.py --call 1 --out DIR       240 s: compiles, tests, first numbers, what mends a failure
    python scripts/gpu_check.py --call 2 --out DIR       240 s: beside its peers, and the main job
    python scripts/gpu_check.py --call 3 --out DIR       150 s: other launch settings, profiler, race check
    ... --switches '{"bulk": false}'                     all of it with that switch of the engine
    ... --rehearse                                       the same without a GPU, with tiny models and planted faults

Every step has a time limit and processes of its own. DIR/callN.jsonl gets each result as it comes, DIR/callN.log what
the processes said, DIR/callN.md one page that is renewed meanwhile: a call may be cut off at any time. Exit code 0: all
passed, or in a rehearsal all that was not planted; 1: something did not, the page says what; 2: there is no GPU, or an
argument is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import comparison, correctness, device, planted_tests, report, tuning  # noqa: E402 (line above)
from benchmarks.gpu.jobs import Flight  # noqa: E402
from benchmarks.gpu.planted import FAULTS  # noqa: E402
from fastmono.engines import has_gpu  # noqa: E402
from fastmono.engines.switches import Switches  # noqa: E402
from fastmono.files import write_bytes  # noqa: E402

SECONDS = {1: 240.0, 2: 240.0, 3: 150.0}


def stop(signal_number: int, frame: FrameType | None) -> None:
    """End the call in order: what is known is written."""
    raise KeyboardInterrupt


def check_switches(switches: dict[str, Any]) -> None:
    """Raise `ValueError` or `TypeError` for what the engine would not take."""
    Switches.of(**{"regime": "auto", "bulk": True, "graphs": True, "launch": None, **switches})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--call", type=int, choices=tuple(SECONDS), required=True)
    found.add_argument("--out", type=Path, required=True, help="folder for callN.jsonl, callN.log and callN.md")
    found.add_argument("--seconds", type=float, help="for the whole call (default 240, 240, 150)")
    found.add_argument("--rehearse", action="store_true", help="without a GPU, in Triton's interpreter; a few minutes")
    found.add_argument(
        "--switches", type=json.loads, default={}, metavar="JSON", help="of our engine: what call 1 says mends a fault"
    )
    found.add_argument("--ptxas", default="", metavar="PATH", help="another assembler, to run failed tests again with")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one call."""
    arguments = parser().parse_args(argv)
    if not arguments.rehearse and not has_gpu():
        print("error: there is no CUDA GPU with Triton here; --rehearse goes without one", file=sys.stderr)
        return 2
    if arguments.ptxas and not os.access(arguments.ptxas, os.X_OK):
        print(f"error: --ptxas {arguments.ptxas}: is no program that can be run", file=sys.stderr)
        return 2
    if importlib.util.find_spec("fastmono.kernels") is None:
        print("error: the kernels are not installed; pip install -e . --no-deps --no-build-isolation", file=sys.stderr)
        return 2
    try:
        check_switches(arguments.switches)
    except (TypeError, ValueError) as error:
        print(f"error: --switches {json.dumps(arguments.switches)}: {error}", file=sys.stderr)
        return 2
    call, out = arguments.call, arguments.out.resolve()
    flight = Flight(out, call, arguments.seconds or SECONDS[call], arguments.rehearse, arguments.switches)
    if (watching := device.watch()) and not arguments.rehearse:
        flight.start("nvidia-smi", watching)

    def write_page() -> None:
        text = report.page(call, flight.records, time.monotonic() - flight.begun, arguments.rehearse)
        write_bytes(out / f"call{call}.md", text.encode())

    flight.on_record = write_page
    signal.signal(signal.SIGTERM, stop)
    try:
        flight.record("switches", **arguments.switches)
        if call == 1:
            tests, groups = ROOT / "tests" / "test_gpu.py", correctness.GROUPS
            if arguments.rehearse:
                tests, groups = Path(planted_tests.__file__), planted_tests.GROUPS
            correctness.fly(flight, tests, groups, arguments.ptxas)
        elif call == 2:
            comparison.fly(flight)
        else:
            tuning.fly(flight)
    except KeyboardInterrupt:
        flight.record("call", status="stopped")
    except Exception as error:  # of our own: what was found before it is written all the same
        flight.note(f"\n==== call\n{traceback.format_exc()}\n")
        flight.record("call", job="call", status="failed", tail=f"{type(error).__name__}: {error}")
    finally:
        write_page()
        flight.close()
        write_page()
    print(f"\n{(out / f'call{call}.md').read_text()}\n{out / f'call{call}.md'}")
    planted = {*FAULTS, *(["device"] if call == 1 else [])} if arguments.rehearse else set()
    return 0 if set(report.troubles(flight.records)) == planted else 1


if __name__ == "__main__":
    sys.exit(main())
