"""The benchmarks time what they say, and refuse what they do not know."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import bench
from experiments.suites import cases, train_step
from experiments.suites.train_step import preset
from moe.errors import BadInput
from tests import fake_cuda
from tests.experiments.bench_command import command

TINY = [
    "model.vocab_size=64", "model.context=16", "model.n_layers=2", "model.d_model=32", "model.n_heads=2",
    "model.d_ff=64", "model.moe.n_experts=4", "model.moe.k=2", "model.moe.d_expert=32", "batch_size=2", "rounds=1",
    "steps=2",
]  # fmt: skip
SUITES = (
    "train_step, routing, host, memory, tracing, watching, page, families, generation, equalities, survival, ranks, "
    "kernels, layer, tune"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def train(monkeypatch, *overrides):
    command(monkeypatch, *TINY, *overrides)


def test_every_contestant_has_a_row_per_precision_with_where_it_ran(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    train(monkeypatch, "peers=[transformers]", f"out={out}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["switchyard MoE", "switchyard dense twin", "transformers OLMoE", "transformers Llama (dense)"]
    assert [(row["precision"], row["model"]) for row in rows] == [(p, name) for p in ("fp32", "bf16") for name in names]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["steps"] == 2
        assert row["versions"]["torch"] == torch.__version__
        assert row["shape"] == {"batch": 2, "context": 16, "D": 32, "L": 2, "E": 4, "K": 2, "F": 32, "V": 64}
        assert {"commit", "dirty", "device", "threads", "command"} <= row.keys()
        assert f"{row['tokens_per_s']:,.0f}" in printed


def test_peers_have_the_parameters_of_what_they_are_compared_with(monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    train(monkeypatch, "peers=[transformers]", "precisions=[fp32]", f"out={out}")
    total = {row["model"]: row["parameters"] for row in map(json.loads, out.read_text().splitlines())}
    assert total["switchyard MoE"] == total["transformers OLMoE"]
    qk_norms = 2 * 2 * 32  # two layers, queries and keys, D: Llama has none
    assert total["switchyard dense twin"] == total["transformers Llama (dense)"] + qk_norms


def test_a_ratio_is_the_median_times_over_the_moes(monkeypatch, tmp_path):
    clock = iter([0.0, 1.0, 0.0, 3.0, 0.0, 2.0, 0.0, 2.0, 0.0, 10.0, 0.0, 4.0])
    monkeypatch.setattr(train_step, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    out = tmp_path / "rows.jsonl"
    train(monkeypatch, "precisions=[fp32]", "steps=3", f"out={out}")
    moe, twin = (json.loads(line) for line in out.read_text().splitlines())
    assert moe["tokens_per_s"] == 2 * 16 / 2.0
    assert twin["tokens_per_s"] == 2 * 16 / 4.0
    assert (moe["moe_speed_over_this"], twin["moe_speed_over_this"]) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "suite=kernel",
            f"suite=kernel is not one of {SUITES}",
        ),
        ("peers=[megatron]", "peers has 'megatron'; accepted are transformers"),
        ("precisions=[fp8]", "precisions has 'fp8'; accepted are fp32, bf16"),
        ("model.moe=null", "model.moe=null"),
        ("backends=[cuda]", "backends has 'cuda'; accepted are auto, reference, torch, triton"),
        ("model.vocab_size=0", "model.vocab_size=0 leaves it to a tokenizer"),
        ("model=olmoe", "model=olmoe does not exist; did you mean olmoe-1b-7b"),
        ("sizes=tiny", "sizes=tiny is not one of full, smoke"),
        ("rounds=0", "rounds=0 is out of range: accepted is at least 1"),
        ("budget=-1", "budget=-1 is out of range"),
        ("device=tpu", "device=tpu is no device"),
        ("device=cuda", "CUDA devices are visible"),
        ("rounds=-3", "rounds=-3 is out of range: accepted is at least 1"),
        (
            "suite=trainstep",
            f"suite=trainstep is not one of {SUITES}",
        ),
        ("precisions=[]", "precisions=[] leaves nothing to measure; accepted are fp32, bf16"),
        ("model.d_model=-8", "model.d_model=-8 is out of range"),
        ("out=.", "out=. is a folder: name a file in it"),
        ("rouds=2", "did you mean rounds"),
    ],
)
def test_what_it_does_not_know_is_refused(override, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    arguments = [override] if override.startswith(("model.moe=null", "model=")) else [*TINY, override]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["suite=routing,kernel"],
            f"suite=kernel is not one of {SUITES}",
        ),
        (["suite=routing", "rounds=1,-1"], "rounds=-1 is out of range: accepted is at least 1"),
        (["suite=routing", "peers=[transformers],[]"], "peers=['transformers'] means nothing to suite=routing"),
        (["suite=routing,train_step", "compiled=true", "compiler=gcc"], "compiler=gcc is not one of "),
    ],
)
def test_a_job_that_cannot_be_done_is_refused_before_the_first(given, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "by_rows", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(bench, "train_step", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(sys, "argv", ["bench", "-m", "sizes=smoke", *given])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {words}")
    assert "(in the sweep's job " in printed.err
    assert printed.err.count("\n") == 1


def test_a_load_that_was_recorded_nowhere_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "suite=layer", "sizes=smoke", "counts=nowhere.jsonl")
    assert "counts=nowhere.jsonl is no file: accepted is the routing/counts.jsonl of a run." in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_said_to_be_missing(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench", "peers=[transformers]"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "not installed: pip install" in capsys.readouterr().err


def test_our_model_on_several_backends_and_compiled_beside_its_twin(monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    backends = ("backends=[reference,torch]", "compiled=true", "compiler=eager", "model.n_layers=1")
    train(monkeypatch, *backends, "precisions=[fp32]", "steps=1", f"out={out}")
    names = [row["model"] for row in cases.read(out)]
    assert names == [
        "switchyard MoE (reference)", "switchyard MoE (torch)", "switchyard dense twin",
        "switchyard MoE (reference, compiled)", "switchyard MoE (torch, compiled)", "switchyard dense twin (compiled)",
    ]  # fmt: skip
    assert all("mfu" not in row for row in cases.read(out))


def test_a_preset_is_chosen_by_name(monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    small = ["model=cpu-nano", "model.vocab_size=64", "model.context=8", "batch_size=1", "rounds=1", "steps=1"]
    command(monkeypatch, *small, "precisions=[fp32]", f"out={out}")
    preset_ = preset("cpu-nano", 64)
    assert cases.read(out)[0]["shape"]["D"] == preset_.d_model
    assert (preset_.vocab_size, preset("olmoe-1b-7b", 64).vocab_size) == (64, 50304)
    with pytest.raises(BadInput, match="model=cpu-nan is not in conf/model; did you mean cpu-nano"):
        preset("cpu-nan", 64)


@fake_cuda.interpreted
@pytest.mark.parametrize("suite", ["kernels", "layer", "tune"])
def test_suites_for_a_gpu_are_refused_without_one_naming_what_works(suite, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, f"suite={suite}")
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for word in (
        f"suite={suite} cannot run here",
        "suite=routing, host, memory, tracing, watching, page, families, generation, equalities, survival, ranks and ",
        "sizes=smoke",
        "interpreter",
    ):
        assert word in error


@fake_cuda.interpreted
def test_suites_for_a_gpu_are_refused_in_the_interpreter_at_full_size(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "suite=kernels")
    assert "would take days" in capsys.readouterr().err


@fake_cuda.interpreted
def test_what_a_layers_benchmark_does_not_know_is_refused(monkeypatch, capsys):
    for override, words in (
        ("peers=[megatron]", "peers has 'megatron'; accepted are triton"),
        ("loads=[even]", "loads"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, "suite=layer", override)
        assert words in capsys.readouterr().err


def test_rows_go_below_runs_and_never_by_themselves_into_the_tracked_results(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for width in (8, 16):
        command(monkeypatch, "suite=routing", "sizes=smoke", "rounds=1", f"width={width}")
    names = sorted((tmp_path / "runs" / "bench").iterdir())
    assert len(names) == 2  # other settings leave the rows that are there alone
    assert all(path.name.startswith("routing-") and cases.read(path) for path in names)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    said = [line.removeprefix("rows: ") for line in capsys.readouterr().out.splitlines() if line.startswith("rows: ")]
    assert sorted(said) == [str(path.relative_to(tmp_path)) for path in names]


def test_a_sweep_of_benchmarks_has_a_file_for_each_and_none_is_overwritten(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["-m", "suite=routing", "sizes=smoke", "rounds=1", "width=8,16"]
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, *given, "out=rows.jsonl")
    assert "would both write to rows.jsonl" in capsys.readouterr().err
    command(monkeypatch, *given)
    assert len(list((tmp_path / "runs" / "bench").iterdir())) == 2
