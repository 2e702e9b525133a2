"""`--status`: a run seen from outside, running, ended or dead; and the log of events."""

import json
import os
import signal
import subprocess
import time

import pytest
from fault_cases import command, job, wait_for

import fastmono as fm
from fastmono import status
from fastmono.events import EventLog, read_events
from fastmono.status import Heartbeat, is_alive, status_lines


def listing(path):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


@pytest.fixture
def running(tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "run", "--workers", "2", "--save-every", "0.2", steps=10**7),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: len(list(tmp_path.glob("run/checkpoints/state-*-0000000*[1-9]*"))) >= 2)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_run_is_seen_running_with_its_workers_then_dead_when_it_is_killed(running, tmp_path):
    wait_for(lambda: all(f"worker {i}: 1 models, step " in "".join(status_lines(tmp_path / "run")) for i in (0, 1)))
    text = "\n".join(status_lines(tmp_path / "run"))
    assert "8 models, 2 begun, 6 not begun" in text and f"process {running.pid} on" in text and ": running, " in text
    assert "8 shards" in text and "model-steps/s" in text
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert ": dead: the same command continues the run, " in "\n".join(status_lines(tmp_path / "run"))


def test_a_run_that_ended_is_described_without_a_lock_and_without_changing_anything(tmp_path, monkeypatch, capsys):
    done = job(tmp_path / "run", "--workers", "1")
    assert done.returncode == 0, done.stderr
    before = listing(tmp_path)
    text = "\n".join(status_lines(tmp_path / "run"))
    assert "8 models, 8 done; engine cpu, fp32" in text and ": ended, " in text
    assert listing(tmp_path) == before


def test_from_another_machine_a_run_is_alive_when_its_count_grows_whatever_the_clocks_say(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(status, "PATIENCE_SECONDS", 0.5)
    beat = Heartbeat(tmp_path / "status.json")
    beat.place = {"host": "elsewhere", "pid": os.getpid(), "boot": "another machine's"}
    with beat:
        os.utime(beat.path, (0, 0))
        assert is_alive(beat.path, json.loads(beat.path.read_text()))
    assert not is_alive(beat.path, json.loads(beat.path.read_text()))  # nobody writes any more


def test_a_process_number_that_was_given_out_again_is_not_taken_for_the_run(tmp_path):
    with Heartbeat(tmp_path / "status.json") as beat:
        said = json.loads(beat.path.read_text())
        assert is_alive(beat.path, said)
        assert not is_alive(beat.path, said | {"born": "1"})


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"state": 3, "pid": [], "workers": 7, "line": {}}', b"\xff"])
def test_a_damaged_status_is_said_and_is_no_error(content, tmp_path):
    run = fm.train(fm.ModelSpec(n_features=8, d_embed=3, n_neurons=4, batch_size=4, steps=2), tmp_path, quiet=True)
    (run.path / "status.json").write_bytes(content)
    assert "1 models, 1 done" in "\n".join(status_lines(run.path))


def test_the_status_of_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"grid\.json: there is no such file"):
        list(status_lines(tmp_path))


def test_every_event_is_a_json_line_with_its_time_kind_and_text(tmp_path):
    spec = fm.ModelSpec(
        n_features=8, d_embed=3, n_neurons=6, batch_size=8, steps=20, feature_prob=0.25, optimizer="sgd"
    )
    fm.train(fm.Grid(spec, lr=[0.01, 1e6]), tmp_path, quiet=True)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {"plan", "shard", "start", "checkpoint", "diverged", "finished", "ended"} <= {e["kind"] for e in events}
    assert all({"time", "kind", "text"} <= event.keys() for event in events)
    assert [e["models"] for e in events if e["kind"] == "diverged"] == [[1]]
    assert {e["step"] for e in events if e["kind"] == "checkpoint"} == {0, 1, 2, 4, 8, 16, 20}


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, monkeypatch):
    said, real = [], os.write
    log = EventLog(tmp_path / "events.jsonl", said.append)
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "write", lambda descriptor, data: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        for _ in range(3):
            log.write("note", "lost")
    assert said == ["events.jsonl cannot be written (No space left on device); the run goes on"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:9]))
        log.write("note", "cut short")
    log.write("note", "whole")
    assert [event["text"] for event in read_events(log.path, 9)] == ["whole"]


def test_the_last_events_are_read_although_one_is_cut_short(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", print)
    for i in range(30):
        log.write("note", str(i))
    with log.path.open("a") as file:
        file.write('{"time": "now", "kind": "no')
    assert [event["text"] for event in read_events(log.path, 3)] == ["27", "28", "29"]
    started = time.monotonic()
    log.path.write_text("[" * 10**6)
    assert read_events(log.path, 3) == [] and time.monotonic() - started < 5


def test_what_a_foreign_directory_says_reaches_no_terminal_unescaped(tmp_path):
    run = fm.train(fm.ModelSpec(n_features=8, d_embed=3, n_neurons=4, batch_size=4, steps=2), tmp_path, quiet=True)
    evil = "\x1b]0;owned\x07" + "x" * 10_000
    said = {"state": "ended", "host": evil, "pid": evil, "line": evil, "seconds": evil}
    (run.path / "status.json").write_text(json.dumps(said))
    with (run.path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": evil, "kind": "failed", "text": evil}) + "\n")
    (run.path / "status-x.json").symlink_to("/dev/zero")
    lines = list(status_lines(run.path))
    assert all(line.isprintable() and len(line) < 2000 for line in lines), lines
    assert "is a symbolic link" in "".join(lines) and "owned" in "".join(lines)
