"""README.md, CONTRIBUTING.md and docs/: every command in them runs, at a small size, every table comes from
experiments/results, and every name is of something that exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from experiments import readme
from experiments.suites import diversity

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*readme.pages(), ROOT / "CONTRIBUTING.md", readme.ROUTERS]
TEXT = "\n\n".join(page.read_text() for page in PAGES)
LONGEST = 130  # lines of the README


def commands_of(text: str) -> list[str]:
    """The lines of its shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]


COMMANDS = list(dict.fromkeys(commands_of(TEXT)))  # what stands on two pages is run once
EXPERIMENTS = [line for line in COMMANDS if line.startswith("python -m experiments")]
RANKS = [line for line in COMMANDS if line.startswith("torchrun ")]
EXAMPLE, LIBRARY = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
DEMO = next(line.strip() for line in (ROOT / "Makefile").read_text().splitlines() if "experiments.compare" in line)

TRAINING = (
    "train.steps=2 train.batch_size=2 train.eval_every=0 train.eval_tokens=128 optim.warmup=1 data.val_fraction=0.3 "
    "tokenizer.name=byte model.context=32 model.n_layers=2 model.d_model=32 model.n_heads=2 model.d_ff=32 "
    "model.moe.n_experts=4 model.moe.k=2 model.moe.d_expert=32"
)
# Runs that go on from another's weights with answers: enough of them that one earns something.
ALIGNING = "train.steps=1 train.eval_tokens=128 data.val_fraction=0.3 train.batch_size=64 objective.max_new=12"
BENCH = (
    "rounds=1 steps=1 batch_size=2 sizes=smoke out=rows.jsonl "
    "model.context=16 model.n_layers=1 model.d_model=32 model.n_heads=2 model.vocab_size=64 "
    "model.moe.n_experts=4 model.moe.k=2 model.moe.d_expert=32"
)
BRANCHES = (
    "seeds=[0] copy_steps=1 mix_steps=1 train.steps=1 train.batch_size=2 train.eval_tokens=4096 data.val_fraction=0.3 "
    "tokenizer.name=byte model.context=32 model.d_model=32 model.d_ff=32"
)
# Runs of questions, which need a context that is longer than they are: experiment=demo makes what they go on from.
QUESTIONS = (
    "train.steps=2 train.batch_size=2 train.eval_every=0 train.eval_tokens=128 optim.warmup=1 data.val_fraction=0.3"
)
LONG = "model.context=160"
SMALLER = {
    "": "",
    "answers": "max_new=4",
    "diversity": "seeds=[0] steps=1 base_steps=1 out=rows.jsonl",
    "instructions": "n=80 held_out=3",
    "align": "seeds=[0] arms=[anywhere,dpo-summed] steps=1 start_steps=40 out=rows.jsonl",
    "task": "n=400",
    "train": TRAINING,
    "compare": TRAINING,
    "convert": "",
    "coverage": "studies=20 out=rows.jsonl",
    "bench": BENCH,
    "branch_train_mix": BRANCHES,
    "evaluate": "",
    "export": "",
    "generate": "max_new=3",
    "gpu_evidence": "--stage kernels",
    "alarms": "seeds=[0] steps=3 out=rows.jsonl",
    "inspector": "tokens=64",
    "intervene": "tokens=64",
    "plan": "model.context=32 model.n_layers=2 train.batch_size=2",
    "presets": "",
    "quantize": "tokens=256",
    "report": "",
    "rerouting": "tokens=64",
    "scaling": f"page=laws.md picture=laws.png records={ROOT / 'experiments' / 'results' / 'scaling.jsonl'}",
    "routers": "",
    "simulate": "model.moe.n_experts=4 model.moe.k=2 gpus=[4] sample=8 tokens=64 out=rows.jsonl",
    "status": "",
    "submit": "executor=local nodes=1 tasks=2 gpus=0 cpus=1 folder=jobs",
    "sweep": TRAINING,
    "trace": "tokens=64",
    "trust": "draws=1 out=rows.jsonl",
    "tokenizers": "vocab_size=300",
    "track": "",
    "upcycle": "",
    "watch": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: a small text in place of the blend and of the folder that one of them reads."""
    folder = tmp_path_factory.mktemp("readme")
    paragraphs = [paragraph for paragraph in TEXT.split("\n\n") if len(paragraph) > 150]
    for i, paragraph in enumerate(paragraphs * 3):
        domain = folder / "texts" / ("even", "odd")[i % 2]
        domain.mkdir(parents=True, exist_ok=True)
        (domain / f"{i}.txt").write_text(f"{i} {paragraph}")
    (folder / ".venv").symlink_to(folder / "texts")
    (folder / "my_router.py").write_text(EXAMPLE)
    shutil.copy(README, folder)
    return folder


def run(command: str, folder: Path, monkeypatch) -> None:
    """Run a command line of the pages in this process, made small by settings appended to it."""
    _, _, module, *given = shlex.split(command)
    name = module.partition(".")[2]
    module = module if name else f"{module}.__main__"
    if name == "rerouting":  # the blend would have to be fetched
        given = [word for word in given if not word.startswith(("data=", "data."))]
    goes_on = name == "train" and "resume=true" in given and any(each.startswith("run=") for each in given)
    goes_on |= name == "sweep" and not any(each.startswith(("experiment=", "study.")) for each in given)
    extra = [] if goes_on else shlex.split(SMALLER[name])  # a run that goes on has its settings already
    if name == "submit":
        many = " ".join([*small_text(folder), "model.n_kv_heads=2", "train.device=cpu", "train.precision=fp32"])
        given = [f"{word} {many}" if word.startswith("command=") else word for word in given]
    asked = name == "evaluate" and any(each.startswith("tasks=") for each in given)
    extra += ["limit=4"] * asked
    of_text = name in ("train", "compare", "sweep", "tokenizers", "branch_train_mix")
    of_text |= any(each.startswith("hf=") for each in given) and not asked
    if any(word.startswith("data.path=sums/") for word in given):
        extra = shlex.split(TRAINING if "experiment=sums" in given else ALIGNING)
        extra += [f"data.cache={folder / 'cache'}"]
        extra += ["objective.reward=contains"] if "run=runs/exact" in given else []
    elif any("/questions/" in word for word in given if word.startswith("data.path=")):
        extra = [*shlex.split(QUESTIONS), f"data.cache={folder / 'cache'}"]
    elif "source=runs/text" in given:
        extra = [
            *shlex.split(QUESTIONS),
            f"data.cache={folder / 'cache'}",
            "data.clean.near=0",
            "data.clean.max_repetition=1",
        ]
        extra += [f"data.path={folder / 'texts'}"]
    elif not goes_on and of_text:
        extra += [f"data.cache={folder / 'cache'}", "data.clean.near=0", "data.clean.max_repetition=1"]
        if any(each.startswith("study.trials=") for each in given):
            extra += ["study.trials=2"]
        if not any(each.startswith("data=") for each in given):
            extra += ["data=text", f"data.path={folder / 'texts'}"]
            extra += ["data.domains=[]"] if any(each.startswith("data.domains=") for each in given) else []
    if "experiment=demo" in given and name == "train":
        extra += [LONG]
    monkeypatch.chdir(folder)
    if name in ("trace", "convert"):  # another command may have needed it before
        places = [word.partition("=")[2] for word in given if word.startswith(("out=", "to="))]
        shutil.rmtree(places[0], ignore_errors=True)
    monkeypatch.syspath_prepend(folder)  # as `python -m` does
    monkeypatch.setattr(sys, "argv", [name, *given, *extra])
    for constant in ("N", "ASKED"):  # questions
        monkeypatch.setattr(diversity, constant, 320)
    import_module(module).main()


@pytest.fixture(scope="module")
def demo(folder):
    """What `make demo` runs."""
    with pytest.MonkeyPatch.context() as patch:
        run(DEMO.replace("$(PY)", "python"), folder, patch)


def test_the_first_screen_has_both_commands_of_the_makefile():
    text = README.read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [line.split()[1] for line in commands_of(text) if line.startswith("make ")]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)
    assert text.index("make test") < 1200


def test_the_readme_is_a_tour():
    assert len(README.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_a_command_runs_as_pasted(command, folder, demo, monkeypatch, capsys):
    """After the first ones of the pages that make its folders, wherever the tests begin."""
    make_folders(command, folder, monkeypatch)
    run(command, folder, monkeypatch)
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", RANKS)
def test_a_command_for_several_processes_runs_as_pasted(command, folder):
    shutil.rmtree(folder / re.search(r"\brun=(\S+)", command)[1], ignore_errors=True)
    said = run_ranks(command, folder)
    assert "2 ranks" in said
    assert "is finished" in said


def run_ranks(command: str, folder: Path) -> str:
    """Run a command of torchrun's, made small; what it printed."""
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)[1:], *small_text(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def small_text(folder: Path) -> list[str]:
    """Settings that make a training small, on the text of `folder`."""
    text = ["data=text", f"data.path={folder / 'texts'}", f"data.cache={folder / 'cache'}", "data.clean.near=0"]
    return [*TRAINING.split(), *text, "data.clean.max_repetition=1"]


def make_folders(command: str, folder: Path, monkeypatch) -> None:
    """Run what has to come before a command: for every folder it reads, the first of the pages that names it as its
    own."""
    for place in re.findall(
        r"\b(?:run|source|hf|records|replay|trace|beside|judge|before|after|questions|data\.path)=\[?([\w/-]+?)(?:/[\w-]+\.(?:npz|jsonl))?(?![\w/-])",
        command,
    ):
        makers = [line for line in EXPERIMENTS if re.search(rf"\b(?:run|to|out)={place}(?![\w/-])", line)]
        of_ranks = [line for line in RANKS if re.search(rf"\brun={place}(?![\w/-])", line)]
        if of_ranks and not (folder / place).exists():
            run_ranks(of_ranks[0], folder)
        elif makers and makers[0] != command and not (folder / place).exists():
            make_folders(makers[0], folder, monkeypatch)
            run(makers[0], folder, monkeypatch)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc is not on the path")
def test_the_two_files_become_a_program_as_their_page_says(folder, demo, monkeypatch, capfd):
    lines = commands_of((ROOT / "docs" / "two-files.md").read_text())
    if not (folder / "two").exists():
        run(lines[0], folder, monkeypatch)
    said = [line for line in capfd.readouterr().out.splitlines() if "compile:" in line or "run:" in line]
    monkeypatch.chdir(folder)
    for line in [*lines[1:4], *(line.partition(":")[2] for line in said)]:
        done = subprocess.run(line, shell=True, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stderr
    assert re.search(r"^token 0 id 84 layer 0: \d=", done.stderr, re.MULTILINE) or said


def test_the_demo_leaves_a_page_and_two_models(folder, demo):
    assert (folder / "runs" / "demo" / "index.html").is_file()
    for kind in ("moe", "dense"):
        assert any((folder / "runs" / "demo" / f"{kind}-seed0" / "checkpoints").iterdir())


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_the_tables_are_what_the_results_say(page):
    assert readme.filled(page.read_text()) == page.read_text()


def test_every_section_that_can_be_made_stands_on_a_page():
    named = {name for page in readme.pages() for _, name, _ in readme.SECTION.findall(page.read_text())}
    assert named == readme.sections().keys()


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


def test_the_kernels_are_a_library_as_the_page_says():
    """The example ends with gradients, and holds a backend to the definition on its way; torch is all it needs."""
    code = "import sys\nsys.modules['moe'] = sys.modules['triton'] = None\n"
    code += f"{LIBRARY}\nfor t in (x_TD, w_router_ED):\n    assert t.grad.isfinite().all() and t.grad.abs().sum() > 0\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "assert_close" in LIBRARY


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", page.read_text()):
        assert (page.parent / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor


def test_every_page_is_linked_from_the_readme():
    text = README.read_text()
    assert [page for page in PAGES[1:] if f"]({page.relative_to(ROOT)})" not in text] == []


CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))
FOLDERS = "moe|kernels|experiments|tests|conf|docs"


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_module_that_is_named_exists(page):
    text = page.read_text()
    paths = re.findall(rf"(?<![\w./<-])((?:{FOLDERS})(?:/[\w.-]*\w)+)", text)
    modules = re.findall(r"(?<![\w./])((?:moe|kernels|experiments|tests)(?:\.[a-z_]\w*)+)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [name for name in modules if not name.endswith(".md") and not _resolves(name)] == []


def test_every_name_that_contributing_speaks_of_is_in_its_file():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`(\w+)` of\s+`([\w/]+\.py)`", text)
    assert len(named) >= 15
    define = r"^\s*(?:def|class) {0}\b|^{0}\b.*=|^    {0}: "
    assert [
        (name, path)
        for name, path in named
        if not re.search(define.format(name), (ROOT / path).read_text(), re.MULTILINE)
    ] == []


def _resolves(name: str) -> bool:
    """Whether a dotted name is a module here, or what one defines."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    return path.parent.with_suffix(".py").is_file() and hasattr(import_module(name.rpartition(".")[0]), path.name)
