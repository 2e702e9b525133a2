"""How a run is doing: one live line in a terminal; a line every ten seconds elsewhere, and in the log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastmono.events import EventLog
from fastmono.trainer import Event

LINE_SECONDS = 10.0
WINDOW_SECONDS = 20.0
"""Rates are averaged over this long."""


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds != seconds:
        return "not known"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Counts what the workers report, and shows it while used as a context manager.

    Args:
        model_steps, flops, shards: what is left to do.
        log: where every line goes too.
        console: where the line is shown; None shows nothing.
        more: gives the end of the line (what a GPU reports of itself).
    """

    def __init__(
        self,
        model_steps: int,
        flops: int,
        log: EventLog,
        console: Console | None,
        more: Callable[[], str] = lambda: "",
        shards: int = 1,
    ) -> None:
        self.more, self.shards = more, shards
        self.total_steps, self.total_flops = model_steps, flops
        self.console = console
        self.events = log
        self.done_steps = self.done_flops = 0
        self.step: dict[str, int] = {}
        self.loss: dict[str, float | None] = {}
        self.mono: dict[str, float | None] = {}
        self.started = self.last_line = time.monotonic()
        self.window: deque[tuple[float, int, int]] = deque([(self.started, 0, 0)])
        self.live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console is not None and self.console.is_terminal:
            self.live = Live(Text("starting"), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        self.log("progress", self.line())
        self.events.close()

    def log(self, kind: str, text: str, show: bool = False, **fields: Any) -> None:
        """Write an event, and show its text above the line if asked."""
        self.events.write(kind, text, **fields)
        if show:
            self.show(text)

    def show(self, text: str) -> None:
        """Show a text above the line."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def expect(self, model_steps: int, flops: int) -> None:
        """So much is left from now on."""
        self.total_steps, self.total_flops = self.done_steps + model_steps, self.done_flops + flops

    def update(self, event: Event) -> None:
        """Count an event of a worker, and show the line when it is time to."""
        now = time.monotonic()
        if event["kind"] == "progress":
            if not self.done_steps:
                self.log("first step", f"first step after {now - self.started:.1f} s")
            block = event["models"][0]
            self.done_steps += event["model_steps"]
            self.done_flops += event["flops"]
            self.step[block], self.loss[block], self.mono[block] = event["step"], event["best_loss"], event["mono"]
            self.window.append((now, self.done_steps, self.done_flops))
            while now - self.window[0][0] > WINDOW_SECONDS and len(self.window) > 2:
                self.window.popleft()
        elif event["kind"] == "retry":  # what was not saved is to be done again
            self.total_steps += event["model_steps"]
            self.total_flops += event["flops"]
        elif event["kind"] == "idle":
            self.shards = event["shards"]
        if self.live is not None:
            self.live.update(Text(self.line(self.live.console.width), no_wrap=True, overflow="fold"))
        if now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            self.log("progress", self.line(), show=self.live is None)

    def rates(self) -> tuple[float, float]:
        """Model-steps and operations a second, of late."""
        (then, steps, flops), now = self.window[0], self.window[-1][0]
        if now <= then:
            return 0.0, 0.0
        return (self.done_steps - steps) / (now - then), (self.done_flops - flops) / (now - then)

    def line(self, width: int | None = None) -> str:
        """Share done, steps, rates, time left, best loss and largest monosemantic fraction; broken between two of
        them where `width` columns do not hold it."""
        steps, flops = self.rates()
        left = duration((self.total_flops - self.done_flops) / flops) + " left" if flops else "time left unknown"
        parts = [f"{self.done_flops / self.total_flops if self.total_flops else 1:4.0%}"]
        if self.shards > 1:
            parts.append(f"{self.shards:,} shards")
        if self.step:
            low, high = min(self.step.values()), max(self.step.values())
            parts.append(f"step {low:,}" if low == high else f"steps {low:,} to {high:,}")
        parts += [f"{steps:,.0f} model-steps/s", f"{flops / 1e9:,.1f} GFLOP/s", left]
        losses = [loss for loss in self.loss.values() if loss is not None]
        shares = [share for share in self.mono.values() if share is not None]
        if losses:
            parts.append(f"best loss {min(losses):.4g}")
        if shares:
            parts.append(f"monosemantic/N up to {max(shares):.2f}")
        lines = [""]
        for part in filter(None, (*parts, self.more())):
            longer = f"{lines[-1]}  {part}" if lines[-1] else part
            if lines[-1] and width is not None and len(longer) > width:
                lines.append(f"      {part}")
            else:
                lines[-1] = longer
        return "\n".join(lines)
