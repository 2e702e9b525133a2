"""The switches of the Triton engine: each does what it says, and without one nothing changes."""

import contextlib
import dataclasses
import json

import pytest
import torch
from test_kernels import BASE, HAS_TRITON, SMALL, check_against_the_reference, interpreted, trained

from fastmono.engines.launch import choose_launch
from fastmono.engines.switches import Switches

if HAS_TRITON:
    from fastmono.engines import triton as engine_module

SPECS = [BASE.replace(lr=0.01), BASE.replace(lr=0.02, n_neurons=7, seed=1)]


def engine(**switches):
    return engine_module.TritonEngine("fp32", **switches)


def settings(packed):
    return {launch for launch, _, _ in packed.groups}


def agree(one, other):
    """Two trainings of the same models by other tiles: as close as float32 sums in another order come."""
    for a, b in zip(one[0].models, other[0].models, strict=True):
        assert (a.parameters - b.parameters).norm() <= 2.0**-16 * a.parameters.norm()
    assert torch.allclose(one[1], other[1], rtol=2.0**-16, atol=0)


@interpreted
@pytest.mark.parametrize("regime", ["resident", "streamed"])
def test_a_regime_is_forced_whatever_the_size(regime, monkeypatch):
    e = engine(regime=regime)
    found = trained(SPECS, 3, engine=e)
    assert {launch.regime for launch in settings(e._packed)} == {regime}
    agree(trained(SPECS, 3), found)
    monkeypatch.setattr("fastmono.engines.launch.RESIDENT_BYTES", 0)  # a layer that is large, by size alone
    large = engine(regime="resident")
    agree(found, trained(SPECS, 3, engine=large))
    assert {launch.regime for launch in settings(large._packed)} == {"resident"}


@interpreted
def test_tiles_go_by_addresses_where_the_copy_engine_is_off():
    with_copies, without = engine(regime="streamed"), engine(regime="streamed", bulk=False)
    one, other = trained(SPECS, 3, engine=with_copies), trained(SPECS, 3, engine=without)
    assert {launch.bulk for launch in settings(with_copies._packed)} == {True}
    assert {launch.bulk for launch in settings(without._packed)} == {False}
    for a, b in zip(one[0].models, other[0].models, strict=True):  # the same tiles, so the same sums
        assert torch.equal(a.parameters, b.parameters)
    assert torch.equal(one[1], other[1])


@interpreted
def test_settings_are_replaced_by_name_and_from_a_file(tmp_path):
    other = {"BR": 16, "BK": 16, "BO": 16, "BB": 32, "rows": 32, "num_warps": 4}
    e = engine(regime="streamed", launch=other)
    found = trained(SPECS, 3, engine=e)
    for launch in settings(e._packed):
        assert {name: getattr(launch, name) for name in other} == other
    agree(trained(SPECS, 3, engine=engine(regime="streamed")), found)
    (tmp_path / "launch.json").write_text(json.dumps(other))
    again = engine(regime="streamed", launch=tmp_path / "launch.json")
    assert again.switches == e.switches
    assert torch.equal(trained(SPECS, 3, engine=again)[1], found[1])


@interpreted
def test_settings_that_are_replaced_agree_with_float64(monkeypatch):
    switched = lambda precision: engine_class(precision, regime="streamed", bulk=False, launch={"BB": 16, "rows": 32})  # noqa: E731
    engine_class = engine_module.TritonEngine
    monkeypatch.setattr(engine_module, "TritonEngine", switched)
    check_against_the_reference(SPECS, "fp32", 3)


@interpreted
def test_without_graphs_no_step_is_captured_and_the_bits_are_the_same(monkeypatch):
    """A graph, here, is a list of launches that are made when it is replayed."""
    step, captures, capturing = engine_module.launch_step, [], []

    class Graph(list):
        def replay(self):
            for arguments in self:
                step(*arguments)

    @contextlib.contextmanager
    def capture(graph):
        captures.append(graph)
        capturing.append(graph)
        yield
        capturing.pop()

    def launch_step(*arguments):
        capturing[-1].append(arguments) if capturing else step(*arguments)

    monkeypatch.setattr(engine_module, "launch_step", launch_step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(engine_module, "GRAPH_STEPS", 2)
    found = {}
    for graphs in (True, False):
        e = engine(regime="streamed", graphs=graphs)
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "is_interpreting", lambda: False)
            found[graphs] = trained(SPECS, 6, engine=e)
        assert len(captures) == 1  # by the first alone
    assert torch.equal(found[True][1], found[False][1])
    assert torch.equal(found[True][0].models[1].parameters, found[False][0].models[1].parameters)


@interpreted
def test_the_memory_that_is_planned_knows_the_switches():
    switches = Switches("streamed", launch=(("rows", 32),))
    spec, bytes_of = SMALL.replace(batch_size=64), engine_module.TritonEngine.device_bytes
    o, k, M = spec.d_output, spec.n_neurons, 16
    more = 4 * k * (32 * -(-o // 32) + M + 1)  # a second part of each gradient
    assert bytes_of([spec], "fp32", 0, switches) == bytes_of([spec], "fp32", 0, Switches("streamed")) + more


def test_switches_that_are_set_are_recorded_and_the_others_are_not():
    assert Switches().to_dict() == {}
    found = Switches.of("streamed", False, True, {"BK": 32, "BB": 16})
    assert found.to_dict() == {"regime": "streamed", "bulk": False, "launch": {"BB": 16, "BK": 32}}
    launch = choose_launch(90, 64, 16, 128, 64, 256, "bf16", regime="streamed")
    assert found.apply(launch) == dataclasses.replace(launch, bulk=False, BK=32, BB=16)


@pytest.mark.parametrize(("name", "value", "said"), [
    ("BX", 16, "'BX' is no setting; there are BN, BS"), ("regime", "streamed", "is no setting"),
    ("M", 32, "is no setting"), ("BK", 24, "must be a power of two"), ("BK", True, "must be a whole number"),
    ("BK", 8, "must be a power of two, 16 to 1024"), ("num_warps", 3, "must be one of"),
    ("num_stages", 0, "must be 1 to 8"), ("rows", 100, "a multiple of 32"), ("fused", 1, "must be true or false"),
    ("BO", "128", "must be a whole number"),
])  # fmt: skip
def test_a_setting_that_no_kernel_can_have_is_refused(name, value, said):
    with pytest.raises(ValueError, match=said):
        Switches.of("auto", True, True, {name: value})


def test_a_wrong_regime_or_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="regime='large': must be one of auto, resident, streamed"):
        Switches.of("large", True, True, None)
    for text, said in (("{", "is not JSON"), ("[1]", "must be an object")):
        (tmp_path / "launch.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            Switches.of("auto", True, True, tmp_path / "launch.json")
    with pytest.raises(OSError, match=r"none\.json"):
        Switches.of("auto", True, True, str(tmp_path / "none.json"))


@interpreted
def test_of_a_refusal_by_the_assembler_its_reason_is_kept_and_not_how_to_repeat_it():
    said = "PTXASError\n`ptxas` stderr:\nptxas fatal   : too much shared data\n\nRepro command: ptxas -v x.ptx -o x.o\n"
    assert engine_module.last_line(RuntimeError(said)) == "ptxas fatal   : too much shared data"
