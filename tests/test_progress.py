"""The progress line."""

import io
from contextlib import contextmanager

from rich.console import Console

from fastmono.events import EventLog
from fastmono.progress import Progress

PARTS = ("steps 4,471 to 4,936", "model-steps/s", "GFLOP/s", "left", "best loss 0.3211", "monosemantic/N up to 0.70")


@contextmanager
def progress(tmp_path, **settings):
    made = Progress(98_304, 10**13, EventLog(tmp_path / "events.jsonl", print), **{"console": None, **settings})
    for block, step, loss, mono in (("a", 4471, 0.35, 0.1), ("b", 4936, 0.3211, 0.7)):
        event = {"kind": "progress", "models": [block], "step": step, "model_steps": 4000, "flops": 10**12}
        made.update({**event, "seconds": 1.0, "best_loss": loss, "mono": mono})
    with made:
        yield made


def test_the_line_names_steps_rates_time_left_best_loss_and_largest_monosemantic_fraction(tmp_path):
    with progress(tmp_path) as made:
        line = made.line()
    assert "\n" not in line and all(part in line for part in PARTS)


def test_a_narrow_terminal_gets_the_whole_line_in_pieces_that_fit(tmp_path):
    with progress(tmp_path) as made:
        for width in (40, 60, 80, 100):
            lines = made.line(width).split("\n")
            assert all(len(line) <= width for line in lines)
            assert " ".join(made.line(width).split()) == " ".join(made.line().split())


def test_the_live_line_of_a_narrow_terminal_shows_every_part(tmp_path):
    text = io.StringIO()
    with progress(tmp_path, console=Console(file=text, force_terminal=True, width=60)) as made:
        event = {"kind": "progress", "models": ["a"], "step": 4471, "model_steps": 1, "flops": 1, "seconds": 1.0}
        made.update({**event, "best_loss": 0.35, "mono": 0.1})
        made.live.refresh()
        assert all(part in text.getvalue() for part in PARTS)
