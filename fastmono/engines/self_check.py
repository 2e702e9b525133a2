"""The Triton engine's self-check: what a run is about to launch, judged on small problems before its first result.

A compiler that makes wrong machine code says nothing. Sizes are no constants of the kernels, so a small problem with
the launch settings of a run's models launches the very binaries of the run: two models, several tiles each way, ragged
ends. Their first steps are compared with float64, within a bound that follows from the precision, and then repeated:
the bits have to be the same each time.

    after one step from zero moments m = (1 - beta1) g: the gradient; of SGD it is the change of the parameters
    g          beside float64 at the engine's own state, no further from it than TIMES what the emulated precision is
    m, v, p    beside float64 updated with the engine's own g, so to float32's rounding

It runs in a process of its own: after an illegal access a process cannot use the device any more, and a kernel that
does not end has to be killed.

    python -m fastmono.engines.self_check < TASK      what `attempt` starts; a reported line for each problem
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmono.block import PRECISIONS, Block, Model, single_thread, views
from fastmono.engines.launch import LEAST_BIAS, Launch, last_survey
from fastmono.engines.reference import loss_and_gradients, update
from fastmono.engines.switches import Switches
from fastmono.engines.triton import TritonEngine, is_interpreting, last_line, launches_of
from fastmono.optim import BETA1, learning_rates
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec

STEPS, REPEATS, INTERPRETED_REPEATS = 2, 50, 2
"""Steps that are compared; how often they are repeated; and in the interpreter, where a step takes seconds."""
TIMES, TIMES_LARGEST, FLOOR = 4.0, 8.0, 2.0**-18
"""A gradient may be off by so many times what the emulated precision is off, in its norm and in its largest element
(sums in another order round elsewhere), and by so much of itself: float32's sums over a batch."""
CHANGE, ROUNDING = 2.0**-10, 2.0**-21
"""A parameter may be off by so much of the largest change, and of the largest parameter. A trust ratio that leaves out
a tile, or a row that is not updated, is off by a part of the change itself."""
SILENT_SECONDS = 300.0
"""How long compiling and judging one problem may take."""
UNABLE = ("out of memory", "busy or unavailable")
"""What a device says that has no room for another process, or lets none in: that is no fault of the kernels."""


@dataclass(frozen=True)
class Forced(Switches):
    """Launch settings that are those of other models."""

    forced: Launch | None = None

    def apply(self, launch: Launch) -> Launch:
        """The forced settings."""
        return self.forced or launch


@dataclass(frozen=True)
class Problem:
    """Two small models, and the settings that they are launched with."""

    specs: tuple[ModelSpec, ModelSpec]
    launch: Launch


def beyond_two(tile: int) -> int:
    """Two whole tiles and a ragged end."""
    return 2 * tile + tile // 4 + 1


def small_problem(spec: ModelSpec, launch: Launch, surveys: bool) -> Problem:
    """The problem that launches what a model with these settings launches."""
    wide = (launch.BK, launch.BL, launch.BV) if surveys else (launch.BK, launch.BL)
    neurons = launch.BL - 1 if launch.fused else beyond_two(max(wide))  # a narrow layer has no second tile of neurons
    features = max(beyond_two(max(launch.BO, launch.BP, launch.BN)), spec.d_embed + 1)
    batch, unit = beyond_two(max(launch.BR, launch.BB, launch.BS)), max(launch.BB, 32)
    rows = batch if launch.regime == "resident" else -(-batch // (2 * unit)) * unit  # two parts of a gradient
    base = spec.replace(
        n_features=features, n_neurons=neurons, batch_size=batch, feature_prob=max(spec.feature_prob, 8 / features),
        linear_path=min(spec.linear_path, beyond_two(launch.BL)), steps=64, lr=0.01, schedule="constant",
        bias_decay=0.5, bias_decay_mode=launch.decay, l1=0.01, frequency="uniform", seed=1,
    )  # fmt: skip
    negative = -LEAST_BIAS - 0.1 if surveys else -LEAST_BIAS / 2
    specs = base.replace(init_bias=0.0), base.replace(init_bias=negative, seed=2)
    return Problem(specs, dataclasses.replace(launch, rows=rows))


def problems(
    specs: Sequence[ModelSpec], precision: str, architecture: int, switches: Switches
) -> dict[Problem, ModelSpec]:
    """One problem for each kind of machine code that a run needs, and a model of the run that needs it."""
    kinds: dict[object, tuple[ModelSpec, Launch, bool]] = {}
    for spec, launch in zip(specs, launches_of(specs, precision, architecture, switches), strict=True):
        key = dataclasses.replace(launch, rows=32), spec.task, spec.activation, spec.optimizer, spec.d_embed
        surveys = last_survey(spec) >= 0
        if key not in kinds or (surveys and not kinds[key][2]):
            kinds[key] = spec, launch, surveys
    return {small_problem(*kind): kind[0] for kind in kinds.values()}


@dataclass
class State:
    """A model's parameters and moments at one time."""

    parameters: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, model: Model) -> State:
        """A copy."""
        return cls(model.parameters.clone(), model.first_moment.clone(), model.second_moment.clone())

    def same_bits(self, other: State) -> bool:
        """Whether nothing differs; NaN differs from everything."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def model_at(like: Model, state: State, dtype: torch.dtype) -> Model:
    """A model of that precision in that state."""
    P2 = None if like.P2 is None else like.P2.to(dtype)
    model = Model(like.spec, dtype, (like.P.to(dtype), P2))
    model.parameters.copy_(state.parameters)
    model.first_moment.copy_(state.first)
    model.second_moment.copy_(state.second)
    return model


def beyond(found: Tensor, truth: Tensor, plain: Tensor) -> float:
    """How many times the allowed error a gradient has; NaN counts as infinitely many."""
    error, allowed = found - truth, plain - truth
    norm = error.norm() / (TIMES * allowed.norm() + FLOOR * truth.norm()).clamp(min=1e-30)
    largest = error.abs().max() / (TIMES_LARGEST * allowed.abs().max() + FLOOR * truth.abs().max()).clamp(min=1e-30)
    return float(torch.stack([norm, largest]).nan_to_num(torch.inf).max())


def wrong_in(model: Model, before: State, after: State, loss: float, step: int, precision: str) -> str:
    """What is wrong with one step of a model, in a few words; empty where nothing is."""
    spec = model.spec
    f = FeatureSampler(spec).batch(step, 0, spec.batch_size)
    exact, plain = (model_at(model, before, dtype) for dtype in (torch.float64, torch.float32))
    truth, gradients = loss_and_gradients(exact, f.double())
    emulated, rounded = loss_and_gradients(plain, f, PRECISIONS[precision])
    allowed = TIMES * abs(float(emulated - truth)) + FLOOR * float(truth)
    if not abs(loss - float(truth)) <= allowed:
        return f"the loss of step {step + 1} is {loss:.6g}, and {float(truth):.6g} in float64"
    lr = learning_rates(spec, step, 1)[0]
    if spec.optimizer == "sgd":  # its change is the gradient, and what the bias decays by
        update(exact, gradients, lr, step)
        update(plain, rounded, lr, step)
        moved = {name: tensor - old for (name, tensor), old in
                 zip(exact.tensors.items(), views(spec, before.parameters.double()).values(), strict=True)}  # fmt: skip
        for name, found in views(spec, after.parameters.double()).items():
            old = views(spec, before.parameters.double())[name]
            rounding = ROUNDING * old.abs().max() / moved[name].abs().max().clamp(min=1e-30)
            if beyond(found - old, moved[name], plain.tensors[name].double() - old) > 1 + float(rounding) / FLOOR:
                return f"the gradient of {name} in step {step + 1}"
        return ""
    own = (after.first.double() - BETA1 * before.first.double()) / (1 - BETA1)
    for name, found in views(spec, own).items():
        if (times := beyond(found, gradients[name], rounded[name].double())) > 1:
            return f"the gradient of {name} in step {step + 1}: off by {times:.3g} times the bound of {precision}"
    mine = model_at(model, before, torch.float64)
    update(mine, {name: g.clone() for name, g in views(spec, own).items()}, lr, step)
    for name, found in views(spec, after.second.double()).items():
        expected = views(spec, mine.second_moment)[name]
        if not (found - expected).abs().max() <= CHANGE * expected.abs().max():
            return f"the second moment of {name} in step {step + 1}"
    for name, found in views(spec, after.parameters.double()).items():
        expected, old = mine.tensors[name], views(spec, before.parameters.double())[name]
        bound = CHANGE * (expected - old).abs().max() + ROUNDING * expected.abs().max()
        if not (found - expected).abs().max() <= bound:
            return f"the update of {name} in step {step + 1}"
    return ""


def judge(problem: Problem, precision: str, engine: TritonEngine, repeats: int) -> str:
    """What is wrong with the kernels that a problem launches, in a line; empty where nothing is."""
    engine.switches = Forced(graphs=False, forced=problem.launch)
    models = [Model(spec) for spec in problem.specs]
    start = [State.of(model) for model in models]

    def again() -> Block:
        return Block([model_at(model, state, torch.float32) for model, state in zip(models, start, strict=True)])

    block, states, losses = again(), [start], list[Tensor]()
    for step in range(STEPS):
        losses.append(engine.advance(block, 1))
        engine.fetch(block)
        states.append([State.of(model) for model in block.models])
        for i, model in enumerate(block.models):
            if model.diverged_step is not None:
                return f"a model that does not diverge did, in step {step + 1}"
            wrong = wrong_in(model, states[-2][i], states[-1][i], float(losses[-1][i]), step, precision)
            if wrong:
                return f"wrong result: {wrong}"
    for repeat in range(repeats):
        block = again()
        found = engine.advance(block, STEPS)
        engine.fetch(block)
        same = torch.equal(found, torch.cat(losses, 1))
        if not (same and all(State.of(m).same_bits(s) for m, s in zip(block.models, states[-1], strict=True))):
            return f"other bits when it is repeated (time {repeat + 1} of {repeats})"
    return ""


# In a process of its own


def tell(**fields: Any) -> None:
    """One line for whoever started this process."""
    print(json.dumps(fields), flush=True)


def this_architecture() -> int:
    """That of the device in use, 90 for sm_90; 0 in the interpreter."""
    if is_interpreting():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def judge_all(task: Mapping[str, Any]) -> None:
    """Judge every problem of a task, until one fails; each is told of when it begins, and what is wrong."""
    specs, precision = [ModelSpec.from_dict(spec) for spec in task["specs"]], task["precision"]
    repeats = INTERPRETED_REPEATS if is_interpreting() else REPEATS
    try:
        engine = TritonEngine(precision)
        found = problems(specs, precision, engine.architecture, Switches.from_dict(task["switches"]))
        for i, problem in enumerate(found):
            tell(begun=i, of=len(found))
            with single_thread():
                wrong = judge(problem, precision, engine, repeats)
            if wrong:
                tell(wrong=wrong)
                return
    except Exception as error:
        text = f"{type(error).__name__}: {last_line(error.__cause__ or error)}"
        tell(**{"unable" if any(said in str(error) for said in UNABLE) else "wrong": text})
        return
    tell(passed=len(found))


@dataclass(frozen=True)
class Verdict:
    """What came of one try: the problems that passed, or what was wrong, or why there is no verdict."""

    passed: int = 0
    wrong: str = ""
    unable: str = ""


def attempt(
    specs: Sequence[ModelSpec], precision: str, switches: Switches, silent: float = SILENT_SECONDS,
    command: Sequence[str] = (sys.executable, "-m", "fastmono.engines.self_check"),
) -> Verdict:  # fmt: skip
    """Judge these models' kernels in a process of its own. Whatever that does, this one gets a verdict."""
    task = {"specs": [spec.to_dict() for spec in specs], "precision": precision, "switches": switches.to_dict()}
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as given:
        json.dump(task, given)
        given.seek(0)
        process = subprocess.Popen(list(command), stdin=given, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        last, heard, late = dict[str, Any](), [time.monotonic()], threading.Event()

        def watch() -> None:
            while process.poll() is None:
                if time.monotonic() - heard[0] > silent:
                    late.set()
                    process.kill()
                    return
                time.sleep(0.05)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            for line in process.stdout:
                heard[0] = time.monotonic()
                last = json.loads(line) if line.startswith("{") else last
        finally:
            process.kill()
            process.wait()
            watcher.join()
            process.stdout.close()
        if late.is_set():
            return Verdict(wrong=f"does not end: nothing came for {silent:g} s")
        if {"passed", "wrong", "unable"}.isdisjoint(last):
            errors.seek(0)
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
            return Verdict(wrong=f"its process ended with code {process.returncode}: {said[-1][:200] if said else ''}")
        return Verdict(**last)


if __name__ == "__main__":
    judge_all(json.load(sys.stdin))
