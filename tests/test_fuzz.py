"""Damaged files of every kind, made at random from sound ones: each is read, or named in one printable line.

`fuzz_loaders.py` is the coverage-guided fuzzer over the same readers.
"""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import HASHES, KINDS, TENSOR_FILES, Sample

NASTY = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**3000, 0.5, -0.0, 1e308, float("nan"), float("-inf"), "", "x", "\x1b[2J",
    "\ud800", "../../x", "/etc/passwd", "=1+1", "W_in", "F64", HASHES[0], "0" * 32, [], {}, [[]], [0], {"a": []},
]  # fmt: skip


HARMLESS = ("lock", "telemetry.csv", "events.jsonl", "status.json")
"""What is passed over where it cannot be read."""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return Sample(tmp_path_factory.mktemp("fuzz") / "run")


def places(value, path=()):
    """The path to everything in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


@st.composite
def edited_json(draw, text):
    """Something in a JSON text replaced, left out, or repeated."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(value) if path] or [(0,)]))
        holder = value
        for key in path:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "take another"]))
        if how == "leave out":
            del holder[last]
        else:
            holder[last] = copy.deepcopy(
                draw(st.sampled_from(NASTY)) if how == "replace" else draw(st.sampled_from(list(flat(value))))
            )
        if not value:
            break
    return json.dumps(value).encode()


def flat(value):
    """Everything in a JSON value, by itself."""
    yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from flat(inner)


@st.composite
def edited_table(draw, text):
    """A cell of a table replaced, or a line left out or repeated."""
    lines = [line.split(",") for line in text.decode().splitlines()]
    row = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(["replace", "replace", "leave out", "repeat"]))
    if how == "replace":
        lines[row][draw(st.integers(0, len(lines[row]) - 1))] = str(draw(st.sampled_from(NASTY)))
    elif how == "leave out":
        del lines[row]
    else:
        lines.append(lines[row])
    return "\n".join(map(",".join, lines)).encode(errors="replace")


@st.composite
def edited_lines(draw, text):
    """One line of several, each a JSON value, edited."""
    lines = text.splitlines()
    row = draw(st.integers(0, len(lines) - 1))
    return b"\n".join([*lines[:row], draw(edited_json(lines[row])), *lines[row + 1 :]])


@st.composite
def damaged(draw, data):
    """Bits changed, an end cut off, a part put elsewhere or repeated, bytes put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        how, at = draw(st.sampled_from(["change", "cut", "splice", "insert"])), draw(st.integers(0, len(data)))
        if how == "change" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del data[at:]
        elif how == "splice":
            start = draw(st.integers(0, len(data)))
            data[at:at] = data[start : start + draw(st.integers(1, 200))]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=20))
    return bytes(data)


def edits(kind, data):
    if kind[0].endswith(".csv"):
        return damaged(data) | edited_table(data)
    if kind[0].endswith(".jsonl"):
        return damaged(data) | edited_lines(data)
    return damaged(data) if kind[0] in TENSOR_FILES and kind[2] == "whole" else damaged(data) | edited_json(data)


def check(sample, kind, examples):
    data, said = sample.part(kind), set()

    @settings(max_examples=examples)
    @given(edits(kind, data))
    def read(changed):
        said.add(bool(sample.read(kind, changed)))

    read()
    assert True in said or kind[0] in HARMLESS  # most of the others are refused


def name_of(kind):
    return f"{kind[0]} {kind[1].__name__} {kind[2]}"


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_damaged_file_is_read_or_named_in_a_line_and_nothing_else(kind, sample):
    check(sample, kind, 25)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_thousand_damaged_files_are_read_or_named_in_a_line_and_nothing_else(kind, sample):
    check(sample, kind, 1000)
