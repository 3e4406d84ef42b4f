"""The shape of the repository: who imports whom, what stands in which file, and what no file may say."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "moe", "experiments")
SOURCES = sorted(itertools.chain.from_iterable((ROOT / name).rglob("*.py") for name in PACKAGES))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# The rooms of moe, top to bottom: a file imports from its own room and from those before it, never from one behind.
LADDER = ("config", "data", "parallel", "routing", "model", "run", "convert", "analysis", "eval", "train")
# What a room leaves alone although it comes before it.
STRANGERS = {"model": ("data",), "routing": ("data",), "parallel": ("data",)}
# What may touch the kernels: the rooms and files that decide where a token goes and what its experts make of it.
TOUCH_KERNELS = ("moe.routing.", "moe.model.dispatch", "moe.model.experts", "moe.model.layer", "moe.model.memory")
TOUCH_KERNELS += ("moe.model.quantized",)
# What each room of experiments may read of the others.
READS: dict[str, tuple[str, ...]] = {
    "study": (),
    "stats": ("study",),
    "pages": ("stats", "study"),
    "suites": ("pages",),
}
SHARED = {"experiments.cli", "experiments.refusals", "experiments.sweeps"}  # beside the commands: what they share
# Sources without a test file of their own, each with its reason.
UNTESTED: dict[str, str] = {}
ALONE = ("moe.parallel",)  # a room of one file, until placement on several devices moves in
LONGEST = 450  # lines of a file that is read in one sitting


def _name(path):
    return str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")


def _tree(path):
    return ast.parse(path.read_text())


def _imports(path):
    """Every module that a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


MODULES = {_name(path): path for path in SOURCES}
ROOMS = {_name(path) for path in SOURCES if path.name == "__init__.py"}
EDGES = {name: {other for other in _imports(path) if other in MODULES} - ROOMS for name, path in MODULES.items()}


def _packages(path):
    return {name.split(".")[0] for name in _imports(path)}


def test_imports_go_one_way_from_experiments_to_moe_to_kernels():
    order = {name: level for level, name in enumerate(PACKAGES)}
    for name, others in EDGES.items():
        for other in others:
            assert order[other.split(".")[0]] <= order[name.split(".")[0]], f"{name} imports {other}"


def test_no_import_is_part_of_a_cycle():
    left = {name: set(others) for name, others in EDGES.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a cycle among {sorted(left)}"


def _room(name):
    """The room of a module of moe, or None for one that lies outside of them."""
    parts = name.split(".")
    return parts[1] if parts[0] == "moe" and len(parts) == 3 else None


def test_moe_is_rooms_in_the_order_of_the_ladder():
    assert [room for room in LADDER if f"moe.{room}" not in ROOMS] == []
    assert {name for name in MODULES if name.count(".") == 1 and name.startswith("moe.")} - ROOMS == {"moe.errors"}
    mapped = re.findall(r"^(\w+)  ", ast.get_docstring(_tree(MODULES["moe"])), re.MULTILINE)
    assert mapped == ["errors", *LADDER]


def test_a_room_imports_only_from_rooms_above_it():
    for name, others in EDGES.items():
        if room := _room(name):
            for other in others:
                if theirs := _room(other):
                    assert LADDER.index(theirs) <= LADDER.index(room), f"{name} imports {other}"
                    assert theirs not in STRANGERS.get(room, ()), f"{name} imports {other}"


def test_nothing_imports_the_training_loop_but_the_commands():
    users = {name for name, others in EDGES.items() if "moe.train.loop" in others}
    assert all(name.startswith("experiments.") for name in users), users


def test_the_settings_stand_on_the_standard_library_alone():
    for name in MODULES:
        if _room(name) == "config" or name == "moe.errors":
            assert _packages(MODULES[name]) <= {*sys.stdlib_module_names, "moe"}
            assert all(_room(other) == "config" or other == "moe.errors" for other in EDGES[name]), name


def test_only_routing_and_the_experts_layers_touch_kernels():
    users = {name for name, path in MODULES.items() if _room(name) and "kernels" in _packages(path)}
    assert all(name.startswith(TOUCH_KERNELS) for name in users), users
    assert {other for other in EDGES["moe.model.experts"] if other.startswith("kernels")} == {
        "kernels.form",
        "kernels.reference",
    }


COMMANDS = {name for name in MODULES if re.fullmatch(r"experiments\.\w+", name)} - ROOMS - SHARED


def test_a_command_is_imported_by_nothing():
    for name, others in EDGES.items():
        assert not others & COMMANDS, f"{name} imports a command"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_file_beside_the_rooms_of_experiments_is_a_command(name):
    """It runs with `python -m` and begins with what to type; __main__ is `python -m experiments` itself."""
    assert re.search(r"^if __name__ == .__main__.:$", MODULES[name].read_text(), re.MULTILINE)
    assert f"python -m {name.removesuffix('.__main__')}" in ast.get_docstring(_tree(MODULES[name]))


def test_the_rooms_of_experiments_read_only_what_they_may():
    assert {f"experiments.{room}" for room in READS} == {room for room in ROOMS if room.startswith("experiments.")}
    for name, others in EDGES.items():
        for room, readable in READS.items():
            if name.startswith(f"experiments.{room}."):
                theirs = {other.split(".")[1] for other in others if other.count(".") == 2} & READS.keys() - {room}
                assert theirs <= set(readable), f"{name} imports from {sorted(theirs - set(readable))}"


def test_no_command_or_room_has_the_name_of_another_or_of_the_standard_library():
    assert [path for path in SOURCES if path.with_suffix("").is_dir()] == []
    names = {name.rpartition(".")[2] for name in COMMANDS | SHARED | ROOMS} - {"__main__"}
    assert names & sys.stdlib_module_names == {"trace"}  # the word for it, everywhere; run with python -m like all


@pytest.mark.parametrize("path", [path for path in SOURCES if _name(path).startswith("kernels")], ids=_name)
def test_kernels_import_torch_triton_and_the_standard_library_only(path):
    assert _packages(path) <= {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [path for path in SOURCES if _name(path).startswith("moe")], ids=_name)
def test_moe_never_imports_hydra_omegaconf_or_triton(path):
    assert not _packages(path) & {"hydra", "omegaconf", "triton"}


WITHOUT = """
import importlib, pkgutil, sys
for name in ("hydra", "omegaconf", "triton"):
    sys.modules[name] = None  # importing it raises ImportError
import kernels, moe
for package in (kernels, moe):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.ispkg and module.name not in sys.argv[1:]:
            importlib.import_module(module.name)
            print(module.name)
"""


def _need_triton():
    """The modules of kernels that are written in Triton, or stand on one that is."""
    need = {name for name, path in MODULES.items() if name.startswith("kernels.") and "triton" in _packages(path)}
    while more := {name for name, others in EDGES.items() if name.startswith("kernels.") and others & need} - need:
        need |= more
    return need


def test_moe_and_kernels_import_where_triton_hydra_and_omegaconf_are_absent():
    need = _need_triton()
    assert not need & {"kernels.reference", "kernels.grouped", "kernels.tuning"}
    done = subprocess.run([sys.executable, "-c", WITHOUT, *need], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected = {name for name in MODULES if not name.startswith("experiments") and name not in ROOMS}
    assert set(done.stdout.split()) == expected - need


@pytest.mark.parametrize("room", sorted(ROOMS - {"experiments"}))
def test_a_package_opens_with_a_docstring_and_nothing_else(room):
    tree = _tree(MODULES[room])
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize("room", sorted(ROOMS - {"experiments"}))
def test_a_rooms_docstring_maps_its_files(room):
    docstring = ast.get_docstring(_tree(MODULES[room]))
    inside = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == room}
    assert {name for name in inside if not re.search(rf"^ *{name}\b|  {name}  ", docstring, re.MULTILINE)} == set()
    assert len(inside) > 1 or room in ALONE, "a room of one file is none"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=_name)
def test_every_file_opens_with_what_it_is_for(path):
    assert ast.get_docstring(_tree(path))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_stay_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= (600 if _name(path) == "moe.train.loop" else LONGEST)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_public_function_and_class_says_what_it_does(path):
    public = [
        node.name
        for node in _tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and not any("dataclass" in ast.unparse(each) for each in node.decorator_list)
    ]
    assert not public


def _functions(path):
    """Every function with its body, the docstring left out."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                yield node, body


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_long_function_is_told_in_stages(path):
    """Above 25 lines of several statements there is a comment at least: what a stage does, and why."""
    lines = path.read_text().splitlines()
    untold = []
    for function, body in _functions(path):
        start = node.end_lineno if (node := function.body[0]) is not body[0] else body[0].lineno - 1
        length = body[-1].end_lineno - body[0].lineno + 1
        if length > 25 and len(body) > 1 and not any("# " in line for line in lines[start : body[-1].end_lineno]):
            untold.append(function.name)
    assert not untold


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_locals_are_nouns_of_the_field_and_not_grammar(path):
    names = {node.id for node in ast.walk(_tree(path)) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(_tree(path)) if isinstance(node, ast.arg)}
    assert not names & {"each", "found", "own"}


SIDE_EFFECTS = (ast.Expr, ast.For, ast.While, ast.With, ast.Try, ast.Delete)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_happens_at_import(path):
    """Definitions and constants only; the exceptions are torch.library's registrations, a command's last lines, and
    what Ctrl-C does to a command whose imports are not done (experiments/__init__.py)."""
    importing = r"if sys\.argv\[:1\] == \['-m'\] and"
    allowed = re.compile(rf"[_\w]+\.register_(autograd|fake)\(|if __name__ == '__main__':|{importing}")
    for node in _tree(path).body[1:]:
        if isinstance(node, (*SIDE_EFFECTS, ast.If)):
            assert allowed.match(ast.unparse(node)), f"{path.name}:{node.lineno}"


def _tracked():
    """Every file that git keeps or would keep."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


# Spelt apart, so that this file does not hold what it looks for.
FORBIDDEN = re.compile(
    "|".join(
        [
            "/" + r"work/",  # where one machine keeps the repository
            "/" + r"tmp/\w",  # what one run left behind
            "/" + r"(home|Users)/\w+/",
            r"https?://(?!huggingface\.co|arxiv\.org|github\.com|pypi\.org)[\w.-]*(pypi|artifact|mirror|registry|nexus)",
            "index" + r"-url",
        ]
    )
)


def test_no_file_names_a_machines_paths_or_a_registrys_host():
    found = []
    for path in _tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in FORBIDDEN.finditer(text)]
    assert not found


def test_the_packages_that_are_installed_are_the_ones_there_are():
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert set(find_packages(str(ROOT), **find)) == ROOMS
    folders = {_name(path.parent) for path in SOURCES}
    assert folders == ROOMS, "a folder without __init__.py is no package"


def test_the_tests_are_a_package_so_that_no_folder_of_theirs_hides_one_of_ours():
    assert {path.parent for path in TESTS} == {path.parent for path in TESTS if path.name == "__init__.py"}


def _test_file(path):
    """Where the tests of a source file stand: moe/routing/soft.py -> tests/moe/routing/test_soft.py."""
    inside = path.relative_to(ROOT)
    return ROOT / "tests" / inside.with_name(f"test_{inside.stem.strip('_')}.py")


def test_every_source_has_its_test_file_in_the_same_place():
    sources = [path for path in SOURCES if path.name != "__init__.py"]
    missing = {str(path.relative_to(ROOT)) for path in sources if not _test_file(path).is_file()}
    assert missing == set(UNTESTED)


def test_every_test_file_below_a_package_is_of_a_source_there():
    """A second file adds a word to the name: test_checkpoint_faults.py. What concerns no one file stays on top."""
    tested = {_test_file(path).with_suffix("") for path in SOURCES if path.name != "__init__.py"}
    for path in TESTS:
        if path.name.startswith("test_") and path.parent != ROOT / "tests":
            stem = path.with_suffix("")
            assert any(stem == other or str(stem).startswith(f"{other}_") for other in tested), f"{path} tests no file"
