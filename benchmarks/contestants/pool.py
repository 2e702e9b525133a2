"""A contestant in one single-threaded process a core, each with a share of the models.

The processes start once, serve all such contestants, and wait for orders; a turn is timed from the order to the last
answer.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant, Unavailable
from benchmarks.state import TENSORS, State


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


FACTS = ("ours", "precision", "most_models", "warm_steps")
"""What a pool takes over from the contestants in its processes."""


def obey(made: dict[str, Contestant], name: str, order: str, argument: Any) -> Any:
    """Carry out one order for one contestant of this process."""
    from benchmarks.contestants import make  # the registry imports this module

    if order == "make":
        made[name] = make(name, torch.device("cpu"), in_pool=False)
        return {fact: getattr(made[name], fact) for fact in FACTS}
    if order == "load":
        return made[name].load(decode(argument))
    if order == "advance":
        return made[name].advance(argument).numpy()
    if order == "read":
        return encode(made[name].read())
    return made[name].unload()


def serve(connection: Connection) -> None:
    """A worker: obeys orders, each answered by a result or an exception, until its driver is gone."""
    torch.set_num_threads(1)
    made: dict[str, Contestant] = {}
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        try:
            answer = obey(made, *order)
        except Unavailable as error:
            answer = error
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)


class Workers:
    """One process a core, each waiting for orders; they serve every pool, one order at a time."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def order(self, name: str, order: str, arguments: list[Any]) -> list[Any]:
        """Give the first of them an order each, and wait for all. Raises what one of them raised."""
        pipes = self.pipes[: len(arguments)]
        for pipe, argument in zip(pipes, arguments, strict=True):
            pipe.send((name, order, argument))
        answers = [pipe.recv() for pipe in pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


@functools.cache
def shared_workers() -> Workers:
    """The workers of this process. They end with it."""
    return Workers(cores())


PARTS = ("parameters", "first_moment", "second_moment")


def encode(state: State) -> dict[str, Any]:
    """A state with arrays instead of tensors: PyTorch would send those as shared memory, to be kept open."""
    parts = {part: {name: getattr(state, part)[name].numpy() for name in TENSORS} for part in PARTS}
    return {"specs": state.specs, "step": state.step, "P": state.P.numpy(), **parts}


def decode(message: dict[str, Any]) -> State:
    """Inverse of `encode`."""
    parts = {part: {name: torch.from_numpy(array) for name, array in message[part].items()} for part in PARTS}
    return State(message["specs"], message["step"], P=torch.from_numpy(message["P"]), **parts)


def shares(state: State, workers: int) -> list[list[int]]:
    """Models of each worker: whole streams where they divide evenly, else every so-manyth model of every stream.

    Neighbours in a stream are alike (learning rates of one bias), and what they cost differs by how sparse they are.
    A worker may have a model of each stream, or a stream, more than another.
    """
    S, G = state.n_streams, state.group
    if S % workers == 0 or (workers > G and S >= G):
        return [[s * G + g for s in range(i, S, workers) for g in range(G)] for i in range(min(workers, S))]
    used = min(workers, G)
    return [[s * G + g for s in range(S) for g in range(i, G, used)] for i in range(used)]


class Pool(Contestant):
    """The contestant of that name on every core. Raises `Unavailable` as it does."""

    def __init__(self, name: str) -> None:
        self.name, self.workers = name, shared_workers()
        self.models: list[list[int]] = []
        self.state: State | None = None
        for fact, value in self._order("make", [None] * cores())[0].items():
            setattr(self, fact, value)

    def _order(self, order: str, arguments: list[Any]) -> list[Any]:
        return self.workers.order(self.name, order, arguments)

    def load(self, state: State) -> None:
        self.state, self.models = state, shares(state, cores())
        self._order("load", [encode(state.select(models)) for models in self.models])

    def advance(self, n_steps: int) -> Tensor:
        assert self.state is not None
        losses = torch.empty(len(self.state.specs), n_steps)
        for models, part in zip(self.models, self._order("advance", [n_steps] * len(self.models)), strict=True):
            losses[models] = torch.from_numpy(part)
        return losses

    def read(self) -> State:
        assert self.state is not None
        states = [decode(answer) for answer in self._order("read", [None] * len(self.models))]
        order = torch.tensor([model for models in self.models for model in models]).argsort()
        parts = {
            part: {name: torch.cat([getattr(s, part)[name] for s in states])[order] for name in TENSORS}
            for part in PARTS
        }
        return replace(self.state, step=states[0].step, **parts)

    def unload(self) -> None:
        self._order("unload", [None] * len(self.models))
