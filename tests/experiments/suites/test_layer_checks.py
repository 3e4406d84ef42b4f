"""The checks that a GPU will be put to: right kernels pass them, wrong ones do not."""

import subprocess
import sys
import types

import pytest
import torch

from experiments.suites import kernel_checks, layer_checks, timing
from experiments.suites.cases import Absent, LeftOut, Rows, run
from experiments.suites.shapes import Shape
from kernels.quantized import FORMATS
from tests import fake_cuda
from tests.experiments.suites.small_checks import CPU, CUDA, SHAPE, small_settings

pytestmark = fake_cuda.interpreted


def test_every_kind_of_check_passes_on_what_looks_like_a_gpu(monkeypatch, tmp_path):
    with fake_cuda.install(monkeypatch):
        settings = layer_checks.settings(CUDA, full=False)
        settings.interpreted = True
        every = [*kernel_checks.cases(settings), *layer_checks.cases(settings)]
        # One of a kind, the last; and compiling asks the real torch.cuda.
        kinds = {tuple(case.key.get(name) for name in ("check", "op", "load")): case for case in every}
        cases = [case for case in kinds.values() if case.key["check"] != "compiled whole"]
        found = run(cases, Rows(tmp_path / "r.jsonl", {}, resume=False), CUDA)
    status = {f"{row['check']} {row.get('op', '')}": row["status"] for row in found}
    assert [layer_checks.cells(row) for row in found if row["status"] in ("failed", "wrong")] == []
    assert status.pop("D past 2^31 elements ") == status.pop("F past 2^31 elements ") == "left out"
    assert status.pop("compute-sanitizer memcheck ") == status.pop("compute-sanitizer racecheck ") == "absent"
    assert set(status.values()) == {"measured"}
    assert {"matmuls", "plan", "combine"} <= {row.get("op") for row in found}


def test_all_of_it_covers_every_type_load_activation_and_number_of_choices():
    settings = layer_checks.settings(CUDA, full=True)
    keys = [case.key for case in layer_checks.cases(settings)]
    layers = [key for key in keys if key["check"] == "layer"]
    assert {key["dtype"] for key in layers} == set(layer_checks.DTYPES)
    assert {key["load"] for key in layers} == set(layer_checks.LOADS)
    assert {key["activation"] for key in layers} == {*layer_checks.ACTIVATIONS, layer_checks.IN_FP8}
    assert {key["K"] for key in layers} >= set(range(1, 10))
    assert {0, 1} <= {key["T"] for key in layers}
    assert any(key["D"] * 2 % 16 for key in layers)  # rows that the copy engine does not take
    assert settings.reruns == 20
    assert len({str(key) for key in keys}) == len(keys)
    more = [case.key for case in kernel_checks.cases(settings)]
    assert len(set(map(str, more))) == len(more)
    assert {f"stored in {name}" for name in FORMATS} <= {key["op"] for key in more}


def _layer(**changes):
    return layer_checks.check_layer(small_settings(**changes), SHAPE, "fp32", "dropped", "swiglu")


def test_a_layer_of_zeros_a_scaled_one_and_one_that_leaves_an_element_are_wrong(monkeypatch):
    assert "status" not in _layer()
    right = layer_checks.by_triton

    def unwritten(layer):
        y = right(layer)
        return torch.cat((y[:-1], y.new_empty(1, y.shape[1]) + 0 * y[-1:]))

    wrong = {
        "zeros": lambda layer: right(layer) * 0,
        "scaled": lambda layer: right(layer) * 1.001,
        "unwritten": unwritten,
    }
    for function in wrong.values():
        monkeypatch.setattr(layer_checks, "by_triton", function)
        found = _layer()
        assert found["status"] == "wrong"
        assert "errors exceed bounds: y" in found["error"]
        assert found["errors"].keys() == set(layer_checks.NAMES)


def test_new_tensors_are_poisoned_inside_only():
    with layer_checks.poisoned():
        assert torch.empty(5).isnan().all()
        assert torch.ones(2, dtype=torch.bfloat16).new_empty(5).isnan().all()
        assert (torch.empty(5, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_tf32_is_torchs_inside_only():
    with layer_checks.multiplying(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_no_rows_at_all_are_an_output_and_gradients_of_zero():
    layer = layer_checks.draw(SHAPE._replace(T=0), CPU, "fp32")
    for results in (layer.results(layer_checks.by_triton), layer.of(torch.float64).results(layer_checks.by_reference)):
        assert [each.numel() for each in results] == [0, 0, 4 * 32 * 16, 4 * 16 * 16, 0]
        assert not any(each.any() for each in results)


@pytest.mark.parametrize("load", layer_checks.LOADS)
def test_loads_are_what_they_are_called(load):
    expert, token_N = layer_checks.routed(Shape(40, 1, 1, 5, 2), load, CPU)
    assert (token_N is not None) == (load == "ragged")
    assert ((expert >= -1) & (expert < 5)).all()
    used = set(expert.flatten().tolist())
    match load:
        case "one expert":
            assert used == {4}
        case "two experts":
            assert used == {0, 4}
        case "all dropped":
            assert used == {-1}
        case "dropped":
            assert -1 in used
        case "ragged":
            assert (token_N.diff() >= 0).all()
            assert len(token_N) == expert.numel() == 80
            assert len(token_N.unique()) < 40  # some tokens have no row


def test_other_bits_on_a_rerun_are_wrong(monkeypatch):
    right, noise = layer_checks.by_triton, iter((0.0, 1e-7))
    monkeypatch.setattr(layer_checks, "by_triton", lambda layer: right(layer) + next(noise))
    found = layer_checks.check_reruns(small_settings(), "fp32")
    assert found["error"] == "y differ between runs"


@pytest.mark.parametrize("name", ["check_graph", "check_whole_graph"])
def test_a_graph_that_keeps_the_old_plan_is_wrong(name, monkeypatch):
    check = getattr(layer_checks, name)
    with pytest.raises(Absent, match="need a GPU"):
        check(small_settings())
    with fake_cuda.install(monkeypatch):
        assert check(small_settings(CUDA)) == {}
        monkeypatch.setattr(timing, "captured", lambda function, device: timing.Captured(lambda: None, function()))
        assert check(small_settings(CUDA))["status"] == "wrong"


def test_a_compiled_layer_equals_the_eager_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph, backend: module if fullgraph else None)
    found = layer_checks.check_compiled(small_settings())
    assert set(found["errors"].values()) == {0.0}
    half = lambda module, fullgraph, backend: lambda *given: (module(*given)[0] / 2, module(*given)[1])
    monkeypatch.setattr(torch, "compile", half)
    assert layer_checks.check_compiled(small_settings())["status"] == "wrong"


@pytest.mark.parametrize("wide", ["D", "F"])
def test_offsets_past_2_to_the_31_are_sampled_where_they_are(wide, monkeypatch):
    """At a size that fits here: the sampling, not the offsets."""
    shapes = []
    real = layer_checks.draw

    def small(shape, device, kind):
        shapes.append(shape)
        return real(Shape(40, 16, 16, 4, 2), CPU, kind)

    with pytest.raises(LeftOut, match="and a GPU"):
        layer_checks.check_far(small_settings(), wide)
    with fake_cuda.install(monkeypatch):
        with pytest.raises(LeftOut, match="0 are free"):
            layer_checks.check_far(small_settings(CUDA), wide)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**40, 2**40))
        monkeypatch.setattr(layer_checks, "draw", small)
        monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.arange(*size) % 40)
        found = layer_checks.check_far(small_settings(CUDA), wide)
    assert found["errors"].keys() == {"y", "dx", "dweight"}
    assert "status" not in found
    (shape,) = shapes
    assert shape.T * shape.K * (shape.D if wide == "D" else 2 * shape.F) > 2**31


def test_the_sanitizer_runs_a_small_layer_and_what_it_says_is_kept(monkeypatch):
    with pytest.raises(Absent):
        layer_checks.check_sanitizer(small_settings(), "memcheck")
    settings = small_settings(CUDA)
    monkeypatch.setattr(layer_checks.shutil, "which", lambda name, path=None: None)
    with pytest.raises(Absent, match="not on the PATH"):
        layer_checks.check_sanitizer(settings, "memcheck")
    monkeypatch.setattr(layer_checks.shutil, "which", lambda name, path=None: f"/bin/{name}")
    ran = []

    def answer(command, env, **options):
        ran.append(command)
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return types.SimpleNamespace(
            returncode=9 * (len(ran) - 1), stdout="= Invalid write\n= ERROR SUMMARY: 1", stderr=""
        )

    monkeypatch.setattr(layer_checks.subprocess, "run", answer)
    assert layer_checks.check_sanitizer(settings, "memcheck") == {}
    assert ran[0][1:] == [
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "experiments.suites.layer_checks",
    ]
    assert "Invalid write" in layer_checks.check_sanitizer(settings, "memcheck")["error"]

    def slow(command, **options):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(layer_checks.subprocess, "run", slow)
    with pytest.raises(LeftOut, match="not done after"):
        layer_checks.check_sanitizer(settings, "memcheck")


def test_the_sanitizers_command_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["checks", "--device", "cpu"])
    layer_checks.main()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--device", "cuda:99"], "--device=cuda:99 is not here"),
        (["--devise", "cpu"], "--devise is no option; did you mean --device."),
        (["--device"], "--device needs a value."),
    ],
)
def test_the_sanitizers_command_refuses_in_a_sentence(given, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checks", *given])
    with pytest.raises(SystemExit, match="2"):
        layer_checks.main()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1
