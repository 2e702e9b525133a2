"""The Triton engine: packs a block's models, has `kernels/` launched, and brings back what the trainer asks for.

Models of different widths stand one after another as rows of the packed tensors; those with the same launch settings
share a launch. Without a GPU, `TRITON_INTERPRET=1` runs the same kernels on the CPU.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from fastmono.block import PRECISIONS, Block, EngineError, Model, views
from fastmono.engines.device_memory import N_NORMS, block_bytes
from fastmono.engines.launch import (
    LARGEST_GRID,
    ROWS_A_SURVEY,
    Launch,
    choose_launch,
    last_survey,
    note_on,
    rows_of,
    scratch_parts,
    tiles_of,
    whole_rows,
)
from fastmono.engines.switches import Switches
from fastmono.engines.triton_launch import STEPS_A_CALL, launch_resident, launch_step
from fastmono.frequencies import presence_probabilities, scales, thresholds
from fastmono.optim import adam_corrections, bias_factor, decay_strength, rate_table
from fastmono.philox import stream_key
from fastmono.spec import ModelSpec

PARTS = ("parameters", "first_moment", "second_moment")
GRAPH_STEPS = 32
OLDEST_TRITON = (3, 4)
"""Older ones have no descriptors of tiles in memory."""
LINEAR_ROWS = {"L_in": "W_in", "L_outT": "W_outT"}
"""Tensors of the linear path, and behind whose rows they are packed."""
NO_SWITCHES = Switches()
NUMBERS_A_COPY = 2**18
"""Numbers of small models that are copied together between host and device: what stays in cache, 1 MiB."""
OPERAND = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_available() -> bool:
    """Whether the engine can run here."""
    return torch.cuda.is_available() or is_interpreting()


def numbered(keys: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """Each key's number, by first appearance, and where each number appears first."""
    numbers: dict[Hashable, int] = {}
    found, firsts = [], []
    for i, key in enumerate(keys):
        if key not in numbers:
            numbers[key] = len(numbers)
            firsts.append(i)
        found.append(numbers[key])
    return found, firsts


def last_line(error: BaseException) -> str:
    """What an error says in the end: compilers print pages before, and the assembler how to repeat it after."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Repro command")]
    return lines[-1][:300] if lines else ""


def launches_of(
    specs: Sequence[ModelSpec], precision: str, architecture: int, switches: Switches = NO_SWITCHES
) -> list[Launch]:
    """The launch settings of each model of a block: chosen once for all of a shape."""
    shapes = [
        (
            architecture, s.n_features, s.d_embed, rows_of(s), s.d_output, s.batch_size, precision, s.activation,
            s.linear_path > 0, s.bias_decay_mode if s.bias_decay else "global", switches.regime,
        )
        for s in specs
    ]  # fmt: skip
    chosen = {shape: switches.apply(choose_launch(*shape)) for shape in dict.fromkeys(shapes)}
    return [chosen[shape] for shape in shapes]


class Packed:
    """A block's models on the device, and the scratch of their kernels."""

    def __init__(
        self, block: Block, precision: str, device: torch.device, architecture: int, switches: Switches = NO_SWITCHES
    ) -> None:
        specs = block.specs
        spec = specs[0]
        self.spec, self.precision, self.device = spec, precision, device
        self.operand = OPERAND[precision]
        o, B = spec.d_output, spec.batch_size
        launches = launches_of(specs, precision, architecture, switches)
        names = {launch: repr(launch) for launch in dict.fromkeys(launches)}
        # Models that leave nothing out take longest: begun first, they do not end last. Otherwise the order is kept, in
        # which those that share a batch stand side by side.
        order = sorted(range(len(launches)), key=lambda i: (names[launches[i]], last_survey(specs[i]) >= 0))
        self.order = order
        self.models: list[Model] = [block.models[i] for i in order]
        self.groups: list[tuple[Launch, int, int]] = []  # settings, first model, how many
        for position, i in enumerate(order):
            if self.groups and self.groups[-1][0] == launches[i] and self.groups[-1][2] < LARGEST_GRID:
                launch, first, count = self.groups[-1]
                self.groups[-1] = launch, first, count + 1
            else:
                self.groups.append((launches[i], position, 1))
        self.M = launches[0].M
        self.LO, self.LB = whole_rows(o), whole_rows(B)
        self._pack_parameters()
        self._pack_streams()
        self._make_scratch(len(order), B, o)
        self.graphs: dict[bool, Any] = {}
        """Many steps captured, with surveys and without."""

    def _pack_parameters(self) -> None:
        ends = list(itertools.accumulate(rows_of(model.spec) for model in self.models))
        starts, self.rows = [0, *ends[:-1]], ends[-1]
        self.slices = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        self.neurons = np.array([model.spec.n_neurons for model in self.models])
        self.ranks = np.array([model.spec.linear_path for model in self.models])

        self.parameters, self.first_moment, self.second_moment = (self._packed(part) for part in PARTS)
        # Of a model that is surveyed only the active neurons, one after another, renewed at each step.
        self.operands = {
            name: tensor.clone() if name == "b" or self.precision == "fp32" else self.round(tensor)
            for name, tensor in self.parameters.items()
        }
        self.place = torch.from_numpy(self._places()).to(device=self.device, dtype=torch.int32)
        self.used = torch.from_numpy(self.neurons).to(device=self.device, dtype=torch.int32)
        self.last_surveys = [last_survey(model.spec) for model in self.models]

    def _places(self) -> np.ndarray:
        """int64 [rows]: each neuron's number in its model, and in the rows of a linear path theirs."""
        counts = np.stack([self.neurons, self.ranks], 1).flatten()
        return np.arange(self.rows) - np.repeat(np.cumsum(counts) - counts, counts)

    def _packed(self, part: str) -> dict[str, Tensor]:
        """One part of every model's state, zero where there is none: put together on the host, and copied at once."""
        packed: dict[str, Tensor] = {}
        for name, shape in {"W_in": (self.rows, self.M), "b": (self.rows,), "W_outT": (self.rows, self.LO)}.items():
            packed[name] = torch.zeros(shape)
        for _, _, pairs in self._runs(packed, part):
            for own, view in pairs:
                own.copy_(view)
        return {name: host.to(self.device) for name, host in packed.items()}

    def _runs(
        self, packed: dict[str, Tensor], part: str, diverged: bool = True
    ) -> Iterator[tuple[list[Tensor], Tensor, list[tuple[Tensor, Tensor]]]]:
        """That part of models of equal shape that stand one after another: their buffers; these stacked; and for each
        tensor in the stack where it stands in `packed`, and itself. One copy then serves many small models."""

        def kind(i: int) -> tuple[int, int, bool]:
            spec = self.models[i].spec
            return spec.n_neurons, spec.linear_path, diverged or self.models[i].diverged_step is None

        for (k, r, wanted), run in itertools.groupby(range(len(self.models)), kind):
            places = list(run)
            size = len(getattr(self.models[places[0]], part))
            if size == 0 or not wanted:
                continue
            count = max(1, NUMBERS_A_COPY // size)
            for some in (places[i : i + count] for i in range(0, len(places), count)):
                flats = [getattr(self.models[i], part) for i in some]
                stacked = torch.stack(flats) if len(flats) > 1 else flats[0][None]
                rows, pairs = slice(self.slices[some[0]].start, self.slices[some[-1]].stop), []
                for name, view in views(self.models[some[0]].spec, stacked).items():
                    own = packed[LINEAR_ROWS.get(name, name)][rows].unflatten(0, (len(flats), k + r))
                    own = own[:, k:] if name in LINEAR_ROWS else own[:, :k]
                    pairs.append((own[..., : view.shape[-1]], view))  # what is not padding
                yield flats, stacked, pairs

    def round(self, tensor: Tensor) -> Tensor:
        """A float32 tensor as an operand: the same memory where nothing is rounded."""
        return tensor if self.precision == "fp32" else (
            PRECISIONS["tf32"](tensor) if self.precision == "tf32" else tensor.to(self.operand)
        )  # fmt: skip

    def _pack_streams(self) -> None:
        keys = [(stream_key(model.spec), id(model.P)) for model in self.models]
        streams, first = numbered(keys)
        firsts = [self.models[i] for i in first]
        N, M = self.spec.n_features, self.M

        def transposed(projections: list[Tensor]) -> Tensor:
            stacked = torch.zeros(len(projections), N, M)
            for own, P in zip(stacked, projections, strict=True):
                own[:, : P.shape[0]] = P.T
            return self.round(stacked.to(self.device))

        share = 0.5 if self.spec.task == "abs" else 1.0
        skews = [(m.spec.feature_prob, m.spec.frequency) for m in firsts]
        found = {skew: presence_probabilities(N, share * skew[0], skew[1]) for skew in dict.fromkeys(skews)}
        p = np.stack([found[skew] for skew in skews])
        self.last = torch.from_numpy(thresholds(p) - 1).to(self.device)
        self.scale = torch.from_numpy(scales(p)).to(self.device)
        self.seeds = torch.tensor([m.spec.seed for m in firsts], dtype=torch.int64, device=self.device)
        self.P = transposed([m.P for m in firsts])
        self.P2 = transposed([m.P2 for m in firsts if m.P2 is not None]) if firsts[0].P2 is not None else self.P
        table = [
            [model.spec.n_neurons, rows.start, stream, model.spec.steps, model.spec.linear_path, last]
            for model, rows, stream, last in zip(self.models, self.slices, streams, self.last_surveys, strict=True)
        ]
        specs = [model.spec for model in self.models]
        factors = [[spec.l1 / 2, bias_factor(spec, 0), decay_strength(spec, 0)] for spec in specs]
        self.table = torch.tensor(table, dtype=torch.int64, device=self.device)
        self.factors = torch.tensor(factors, dtype=torch.float64).float().to(self.device)
        self.diverged = torch.tensor([m.diverged_step or 0 for m in self.models], device=self.device)

    def _make_scratch(self, A: int, B: int, o: int) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=self.device)

        resident = any(launch.regime == "resident" for launch, _, _ in self.groups)
        batches = max(A, len(self.seeds)) if resident else len(self.seeds)
        self.x = empty(batches, B, self.M, dtype=self.operand)
        self.tau = empty(batches, B, self.LO)
        launches = [launch for launch, _, _ in self.groups]
        stored = not all(launch.fused for launch in launches)
        self.h = empty(self.rows if stored else 0, self.LB, dtype=self.operand)
        self.e = empty(A if stored else 0, B, self.LO, dtype=self.operand)
        row_parts, parts, self.loss_parts = scratch_parts(launches, B, o)
        self.dW_out = empty(row_parts, self.rows, self.LO)
        self.dW_in = empty(parts, self.rows, self.M)
        self.db = empty(parts, self.rows)
        self.flags = empty(-(-B // ROWS_A_SURVEY), self.rows, dtype=torch.int8)
        self.chunks = max(tiles_of(model.spec, launches[0].BA) for model in self.models)
        self.loss = empty(A, self.loss_parts)
        self.bad = empty(A, self.chunks, dtype=torch.int32)
        self.changes = empty(A, self.chunks, 2)
        self.norms = empty(A, self.chunks, N_NORMS)
        self.step = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.rates = torch.zeros(A, STEPS_A_CALL, device=self.device)
        numbers, firsts = numbered([(m.spec.schedule, m.spec.steps, m.spec.lr) for m in self.models])
        self.scheduled = [self.models[i].spec for i in firsts]
        """A model for each course that a learning rate takes; `course` has its number for every model."""
        self.course = torch.tensor(numbers, device=self.device)
        self.corrections = torch.ones(STEPS_A_CALL, 2, device=self.device)
        self.losses = empty(A, STEPS_A_CALL)

    def describe(self) -> str:
        """Shape and settings in a line, for an error."""
        spec, launches = self.spec, ", ".join(dict.fromkeys(str(launch) for launch, _, _ in self.groups))
        shape = (
            f"N {spec.n_features}, m {spec.d_embed}, o {spec.d_output}, B {spec.batch_size}, {len(self.models)} models"
        )
        return f"the triton engine failed at {shape}, {spec.task}, {self.precision}, {launches}"

    def fetch(self) -> None:
        """Bring parameters and moments back to the models that have not diverged."""
        for part in PARTS:
            host = {name: tensor.cpu() for name, tensor in getattr(self, part).items()}
            for flats, stacked, pairs in self._runs(host, part, diverged=False):
                for own, view in pairs:
                    view.copy_(own)
                if len(flats) > 1:
                    for flat, values in zip(flats, stacked, strict=True):
                        flat.copy_(values)


class TritonEngine:
    """Trains with the kernels of `kernels/`, on a CUDA device or in Triton's interpreter.

    Args:
        precision: fp32, tf32 or bf16.
        regime, bulk, graphs, launch: switches that separate one cause from another (fastmono/engines/switches.py);
            the defaults are what trains.

    Raises:
        ValueError: no GPU and no interpreter; bf16 in the interpreter, which computes it wrongly; a wrong switch.
    """

    name = "triton"

    def __init__(
        self, precision: str = "fp32", *, regime: str = "auto", bulk: bool = True, graphs: bool = True,
        launch: Mapping[str, int] | str | Path | None = None,
    ) -> None:  # fmt: skip
        if not is_available():
            raise ValueError("engine='triton': needs a CUDA GPU (or TRITON_INTERPRET=1, for very small grids)")
        if is_interpreting() and precision == "bf16":
            raise ValueError("precision='bf16': Triton's interpreter computes it wrongly; use fp32 or tf32")
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
            raise ValueError(
                f"engine='triton': Triton {triton.__version__} is too old; use 3.4 (PyTorch 2.8) or engine='cpu'"
            )
        self.precision = precision
        self.switches = Switches.of(regime, bulk, graphs, launch)
        self.device = torch.device("cpu" if is_interpreting() else "cuda")
        self.architecture = 0
        if not is_interpreting():
            major, minor = torch.cuda.get_device_capability()
            self.architecture = 10 * major + minor
        self.note = note_on(self.architecture)
        self._block: Block | None = None
        self._packed: Packed | None = None

    def _pack(self, block: Block) -> Packed:
        if self._packed is None or self._block is not block:
            self._packed = None  # free its memory before the next takes any
            self._packed = Packed(block, self.precision, self.device, self.architecture, self.switches)
            self._block = block
        return self._packed

    def advance(self, block: Block, n_steps: int) -> Tensor:
        """Train every model for n steps, on the device; `fetch` brings the parameters back. Returns float32 [A, n]."""
        packed, parts = self._pack(block), []
        while n_steps > 0:
            n = min(n_steps, STEPS_A_CALL)
            rates = torch.from_numpy(rate_table(packed.scheduled, block.step, n)).to(self.device)
            torch.index_select(rates, 0, packed.course, out=packed.rates[:, :n])
            if packed.spec.optimizer == "adamw":
                steps = range(block.step, block.step + n)
                packed.corrections[:n] = torch.tensor([adam_corrections(t) for t in steps])
            packed.step.copy_(torch.tensor([block.step, block.step]))
            packed.losses.fill_(torch.nan)
            try:
                self._run(packed, block.step, n)
                found = packed.losses[:, :n].cpu()  # waits for the device, whose errors come out here
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if "out of memory" in str(error):  # Triton's own, or of a graph: the block is halved all the same
                    raise torch.OutOfMemoryError(last_line(error)) from error
                raise EngineError(f"{packed.describe()}: {type(error).__name__}: {last_line(error)}") from error
            losses = torch.empty(len(packed.order), n)
            losses[packed.order] = found
            parts.append(losses)
            for model, step in zip(packed.models, packed.diverged.tolist(), strict=True):
                model.diverged_step = step or None
            block.step += n
            n_steps -= n
        return torch.cat(parts, 1) if parts else torch.empty(len(packed.order), 0)

    def fetch(self, block: Block) -> None:
        """Bring the block's parameters and moments to the host."""
        if self._packed is not None and self._block is block:
            self._packed.fetch()

    def _run(self, packed: Packed, step: int, n: int) -> None:
        if not is_interpreting():  # descriptors of tiles are made on the device, in memory that Triton asks us for
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        for launch, first, count in packed.groups:
            if launch.regime == "resident":
                launch_resident(packed, launch, first, count, n)
        streamed = [group for group in packed.groups if group[0].regime == "streamed"]
        if not streamed:
            return
        end, last = step + n, max(packed.last_surveys)
        while step < end:
            surveys, left = step <= last, end - step
            if surveys in packed.graphs and left >= GRAPH_STEPS:
                packed.graphs[surveys].replay()
                step += GRAPH_STEPS
                continue
            launch_step(packed, streamed, surveys)
            step += 1
            capture = self.switches.graphs and not is_interpreting()
            if capture and left > GRAPH_STEPS and surveys == (step <= last):  # it is compiled now
                torch.cuda.synchronize()
                packed.graphs[surveys] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(packed.graphs[surveys]):
                    for _ in range(GRAPH_STEPS):
                        launch_step(packed, streamed, surveys)

    @staticmethod
    def device_bytes(
        specs: Sequence[ModelSpec], precision: str, architecture: int, switches: Switches = NO_SWITCHES
    ) -> int:
        """Memory that a block takes on the device: what `Packed` allocates, and what Triton asks for at launches."""
        launches = launches_of(specs, precision, architecture, switches)
        return block_bytes(specs, launches, OPERAND[precision].itemsize, compiled=architecture > 0)

    @staticmethod
    def workspace_bytes(spec: ModelSpec, n_streams: int) -> int:
        """Memory beyond the models' own state, on the host: what is packed before it goes to the device."""
        return 8 * spec.n_features * max(spec.d_embed, 16) * n_streams
