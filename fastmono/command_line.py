"""What the scripts share: arguments, errors of one or two lines, exit codes, and how amounts are written."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NoReturn

from rich.console import Console


class UsageError(Exception):
    """Something on the command line that cannot be meant."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, raised instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")


def real(text: str) -> float:
    """A number, also as a fraction: 0.03125, 1e-3, 1/32."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except ArithmeticError as error:
        raise ValueError(text) from error


def reader(kind: Callable[[str], Any], allowed: str) -> Callable[[str], Any]:
    """Reads one value of a flag; what cannot be read is an error that says what is allowed."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            shown = text if len(text) <= 80 else text[:77] + "..."
            raise argparse.ArgumentTypeError(f"{shown!r}: must be {allowed}") from None

    return read


def workers_from(text: str) -> int | str:
    """The value of --workers. `UsageError` for what is neither auto nor a whole number."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"workers={text!r}: must be auto or a whole number from 1 to 4096") from None


def gib(count: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def operations(count: float) -> str:
    """Floating-point operations as PFLOP, TFLOP, GFLOP or MFLOP."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e6:,.2f} MFLOP"


def plain_console(stderr: bool = False) -> Console:
    """A console that prints what it is given: no markup, no highlighting, no wrapping."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def warnings_shown(console: Console) -> Iterator[list[str]]:
    """Warnings as lines of the console, each once; those that models failed are collected instead."""
    failures: list[str] = []
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        text = str(message)
        if category is RuntimeWarning:
            failures.append(text)
        elif text not in shown:
            shown.add(text)
            console.print(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield failures


def run_main(
    command: Callable[[list[str], Console], int],
    argv: list[str] | None,
    stopped: str = "stopped: the state is saved, and the same command continues from it",
) -> int:
    """Run `command(argv, errors)`, and return its exit code: 2 for bad arguments, 1 for anything else that ends it.

    `stopped` is what is said after Ctrl-C.
    """
    errors = plain_console(stderr=True)
    try:
        return command(sys.argv[1:] if argv is None else argv, errors)
    except (UsageError, ValueError) as error:
        errors.print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        errors.print(stopped)
        return 1
    except (OSError, MemoryError) as error:
        errors.print(f"error: {error or 'out of memory'}")
        return 1
