"""One page of Markdown from a call's lines, to be read in a minute and quoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.comparison import medians
from benchmarks.gpu.tuning import PUBLISHED, SMALL

Lines = Sequence[dict[str, Any]]
GATES = {True: "passed", False: "failed", None: "not run"}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table, or nothing where there are no rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines), ""]


def of_part(lines: Lines, part: str) -> list[dict[str, Any]]:
    """The lines of one part."""
    return [line for line in lines if line["part"] == part]


def first(lines: Lines, key: str) -> dict[str, Any]:
    """The first line that has this field."""
    return next((line for line in lines if key in line), {})


def about(lines: Lines) -> list[str]:
    """The machine, its software and its rates."""
    found = first(of_part(lines, "device"), "versions")
    device, versions = found.get("device", {}), found.get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    assemblers = ", ".join(f"{name} {version}" for name, version in found.get("ptxas", {}).items())
    rates = {key: value for line in lines for key, value in line.items() if key.endswith(("_TFLOPs", "_GBs"))
             and key != "useful_TFLOPs"}  # fmt: skip
    return [
        f"Device: {device.get('name', 'unknown')}; {named}; ptxas: {assemblers or 'none'}; "
        f"driver and clocks: {found.get('nvidia_smi') or 'none'}; commit {found.get('commit', 'unknown')}.",
        "", f"Measured rates: {', '.join(f'{key} {value}' for key, value in rates.items()) or 'none'}.",
    ]  # fmt: skip


def compiled(lines: Lines) -> list[str]:
    """How long the kernels took to compile, and those that did not."""
    own = of_part(lines, "compile")
    took = [line["compiled_in"] for line in own if "compiled_in" in line]
    bad = [(line["kernel"], line["precision"], line["compiler"][:200]) for line in own if "compiler" in line]
    if not took and not bad:
        return []
    said = f"{len(took)} kernels compiled, {sum(took):.0f} s of one core, the slowest {max(took, default=0):.1f} s."
    return ["", said, *table(("kernel", "precision", "the compiler says"), bad)]


def groups(lines: Lines) -> list[str]:
    """Each group of tests: how it ended, and how many of its tests passed."""
    rows = []
    ends = [line for line in of_part(lines, "tests") if "status" in line]
    for end in ends:
        own = [line for line in of_part(lines, "tests") if line.get("job") == end["job"] and "test" in line]
        passed = sum(line["outcome"] == "passed" for line in own)
        begun = sum(line["outcome"] == "begun" for line in own)
        kinds = sorted({line["kind"] for line in own if "kind" in line})
        rows.append(
            (end["job"], end["status"], f"{passed} of {begun}", ", ".join(kinds) or "-", end.get("seconds", "-"))
        )
    return table(("tests", "ended", "passed", "kind of fault", "seconds"), rows)


def mended(lines: Lines) -> list[str]:
    """Which switch mends a group that failed: all of its failed tests passed with it."""
    by_group: dict[str, list[str]] = {}
    own = of_part(lines, "suspects")
    for line in own:
        if "status" in line:
            group, suspect = line["job"].split(" | ")
            ended = line["status"]
            if ended != "passed":
                tests = [other for other in own if other.get("job") == line["job"] and "test" in other]
                passed, begun = (sum(other["outcome"] == what for other in tests) for what in ("passed", "begun"))
                said = next((other["message"][:60] for other in tests if "message" in other), "")
                ended += f", {passed} of {begun} passed" * (begun > 0) + f" ({said})" * bool(said)
            by_group.setdefault(group, []).append(
                f"**{suspect}: mended**" if ended == "passed" else f"{suspect}: {ended}"
            )
    return table(("failed tests of", "run again with"), [(group, "; ".join(said)) for group, said in by_group.items()])


def failures(lines: Lines) -> list[str]:
    """The first words of what failed."""
    rows = [
        (line["test"].split("::")[-1], line.get("kind", ""), line.get("message", ""))
        for line in of_part(lines, "tests") if line.get("outcome") == "failed"
    ]  # fmt: skip
    return table(("failed test", "kind", "message"), rows[:30])


def apart(lines: Lines) -> list[str]:
    """How far the first step's gradients are from float64, beside what the precision alone explains."""
    rows = [
        (line["case"], line["precision"],
         *(f"{line[name]:.3g}" for name in ("loss", "W_in", "b", "W_outT", "plain", "not_finite")))
        for line in of_part(lines, "apart") if "not_finite" in line
    ]  # fmt: skip
    head = ("off float64 by", "precision", "loss", "W_in", "b", "W_outT", "emulated: W_in", "not finite")
    return table(head, rows)


def floors(lines: Lines) -> list[str]:
    """Rates of the paper's grid, and its kernels."""
    own = of_part(lines, "floors")
    rates = [
        (line["state"], line["at_step"],
         line["us_a_model_step"], line["useful_TFLOPs"], line["of_the_product_rate"])
        for line in own if "of_the_product_rate" in line
    ]  # fmt: skip
    found = table(("state", "step", "us a model-step", "useful TFLOP/s", "of the product rate"), rates)
    for line in own:
        if "kernels" in line:
            rows = [(name, k["ms"], k.get("floor_ms", "-"), k.get("bound", "-"), k.get("share", "-"))
                    for name, k in line["kernels"].items()]  # fmt: skip
            found += [f"Kernels, {line['state']}:", *table(("kernel", "ms a step", "floor", "bound by", "share"), rows)]
    return found


def turns(lines: Lines) -> list[str]:
    """Every contestant's time, and how many times as long it takes as the fastest of ours."""
    found: list[str] = []
    for (match, state), own in medians(lines).items():
        ours = [ms for name, ms in own.items() if name.startswith(("ours", "today"))]
        base = min(ours) if ours else None
        rows = [(name, f"{1e3 * ms:.2f}", f"{ms / base:.2f}" if base else "-", expected(name))
                for name, ms in sorted(own.items(), key=lambda item: item[1])]  # fmt: skip
        found += ["", f"{match}, {state}:", *table(("contestant", "us a model-step", "times ours", "expected"), rows)]
    return found


def profiles(lines: Lines) -> list[str]:
    """Each kernel's microseconds a step, contestant by contestant: which kernel an alternative changes."""
    found: list[str] = []
    own = of_part(lines, "profile")
    for match, state in dict.fromkeys((line["match"], line["state"]) for line in own):
        here = [line for line in own if (line["match"], line["state"]) == (match, state)]
        kernels = sorted({name for line in here for name in line["kernels"]})
        rows = [
            (line["partner"], *(f"{1e3 * line['kernels'].get(name, 0.0):.1f}" for name in kernels)) for line in here
        ]
        head = ("us a step", *(name.removesuffix("_kernel") for name in kernels))
        found += ["", f"{match}, {state}:", *table(head, rows)]
    return found


def expected(name: str) -> str:
    """What an alternative was expected to change."""
    other = PUBLISHED.get(name) or SMALL.get(name)
    return other.expected if other else "-"


def out(lines: Lines) -> list[str]:
    """Contestants that failed, and why."""
    rows = [(line["partner"], line["status"], line.get("tail", "").strip().splitlines()[-1:] or "-")
            for line in of_part(lines, "partner")]  # fmt: skip
    gates = [(line["match"], line["partner"], GATES[line.get("passed")], line.get("worst", "-"), line["where"])
             for line in of_part(lines, "prepared") if "where" in line]  # fmt: skip
    agreed = [(line["match"], line["partner"], line["off_by"]) for line in of_part(lines, "agreement")]
    return [*table(("match", "settings", "apart from today's, of the way gone"), agreed),
            *table(("match", "contestant", "gate", "worst over bound", "where"), gates),
            *table(("out", "why", "its last words"), rows)]  # fmt: skip


def rest(lines: Lines) -> list[str]:
    """How every other job ended."""
    known = ("tests", "suspects", "partner", "compile")
    rows = [(line["job"], line["status"], line.get("seconds", "-"))
            for line in lines if "job" in line and "status" in line and line["part"] not in known]  # fmt: skip
    return table(("job", "ended", "seconds"), rows)


def verdict(lines: Lines) -> str:
    """The call in one sentence."""
    bad = troubles(lines)
    return f"{len(bad)} of its parts failed: {', '.join(bad)}." if bad else "Every part of it passed."


def troubles(lines: Lines) -> list[str]:
    """Names of what did not pass: jobs, contestants. Tests that are run again with a switch do not count."""
    jobs = [line["job"] for line in lines if line.get("status", "passed") != "passed" and "job" in line
            and line["part"] != "suspects"]  # fmt: skip
    partners = [line["partner"] for line in of_part(lines, "partner")]
    return list(dict.fromkeys(jobs + partners))


def page(call: int, lines: Lines, seconds: float, rehearse: bool) -> str:
    """The page of a call."""
    title = {1: "correctness and first numbers", 2: "comparison", 3: "tuning"}[call]
    text = [f"# GPU check, call {call}: {title}", ""]
    if rehearse:
        text += ["**A rehearsal on a CPU: no number of it means anything, and some faults are planted.**", ""]
    parts = (about, compiled, groups, mended, failures, apart, floors, out, turns, profiles, rest)
    text += [f"{verdict(lines)} It took {seconds:.0f} s.", ""]
    for part in parts:
        text += part(lines)
    return "\n".join(text).replace("\n\n\n", "\n\n") + "\n"
