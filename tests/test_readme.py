"""The README: every command in it runs, at a small size, and every table in it comes from experiments/results."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from experiments import readme

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
EXPERIMENTS = [line for line in COMMANDS if line.startswith("python -m experiments.")]
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
DEMO = next(line.strip() for line in (ROOT / "Makefile").read_text().splitlines() if "experiments.compare" in line)

TRAINING = (
    "train.steps=2 train.batch_size=2 train.eval_every=0 train.eval_tokens=128 optim.warmup=1 data.val_fraction=0.3 "
    "tokenizer.name=byte model.context=32 model.n_layers=2 model.d_model=32 model.n_heads=2 model.d_ff=32 "
    "model.moe.n_experts=4 model.moe.k=2 model.moe.d_expert=32"
)
BENCH = (
    "rounds=1 steps=1 batch_size=2 sizes=smoke out=rows.jsonl "
    "model.context=16 model.n_layers=1 model.d_model=32 model.n_heads=2 model.vocab_size=64 "
    "model.moe.n_experts=4 model.moe.k=2 model.moe.d_expert=32"
)
SMALLER = {
    "train": TRAINING,
    "compare": TRAINING,
    "bench": BENCH,
    "generate": "max_new=3",
    "gpu_evidence": "--stage kernels",
    "presets": "",
    "routers": "",
    "tokenizers": "vocab_size=300",
    "upcycle": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: a small text in place of the blend and of the folder that one of them reads."""
    folder = tmp_path_factory.mktemp("readme")
    paragraphs = [each for each in TEXT.split("\n\n") if len(each) > 150]
    for i, paragraph in enumerate(paragraphs * 3):
        domain = folder / "texts" / ("even", "odd")[i % 2]
        domain.mkdir(parents=True, exist_ok=True)
        (domain / f"{i}.txt").write_text(f"{i} {paragraph}")
    (folder / ".venv").symlink_to(folder / "texts")
    (folder / "my_router.py").write_text(EXAMPLE)
    return folder


def run(command: str, folder: Path, monkeypatch) -> None:
    """Run a command line of the README in this process, made small by settings appended to it."""
    _, _, module, *given = shlex.split(command)
    name = module.partition(".")[2]
    goes_on = name == "train" and "resume=true" in given and any(each.startswith("run=") for each in given)
    extra = [] if goes_on else shlex.split(SMALLER[name])  # a run that goes on has its settings already
    if not goes_on and name in ("train", "compare", "tokenizers"):
        extra += [f"data.cache={folder / 'cache'}", "data.clean.near=0", "data.clean.max_repetition=1"]
        if not any(each.startswith("data=") for each in given):
            extra += ["data=text", f"data.path={folder / 'texts'}"]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # as `python -m` does
    monkeypatch.setattr(sys, "argv", [name, *given, *extra])
    import_module(module).main()


@pytest.fixture(scope="module")
def demo(folder):
    """What `make demo` runs."""
    with pytest.MonkeyPatch.context() as patch:
        run(DEMO.replace("$(PY)", "python"), folder, patch)


def test_the_first_screen_has_both_commands_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)
    assert TEXT.index("make test") < 1200


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_a_command_runs_as_pasted(command, folder, demo, monkeypatch, capsys):
    run(command, folder, monkeypatch)
    assert capsys.readouterr().out


def test_the_demo_leaves_a_page_and_two_models(folder, demo):
    assert (folder / "runs" / "demo" / "index.html").is_file()
    for kind in ("moe", "dense"):
        assert any((folder / "runs" / "demo" / f"{kind}-seed0" / "checkpoints").iterdir())


def test_the_tables_are_what_the_results_say():
    assert readme.filled(TEXT) == TEXT


def test_the_router_of_ones_own_is_short_and_passes_what_every_router_must(folder):
    """In a process of its own, by the README's own command, without Triton's slow interpreter."""
    assert len(EXAMPLE.splitlines()) < 40
    command = shlex.split(next(line for line in COMMANDS if "--router" in line))[1:]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *command, "-k", "not triton"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "passed" in done.stdout


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!http)([^)]+)\)", TEXT)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
