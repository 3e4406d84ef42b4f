"""Claims about what a manifest lets through: two forms of a folder, and no third."""

import pytest

from moe.errors import BadInput
from moe.run.manifest import FILES, MANIFEST, META, RNG, SHARDED, WHOLE, entry_of, format_of, read_manifest, seal

SHARDS = {f"shard-{i:05d}-model-00001-of-00001.safetensors" for i in (1, 2)}


def folder(tmp_path, files, version):
    entries = {}
    for name in files:
        (tmp_path / name).write_bytes(name.encode())
        entries[name] = entry_of(tmp_path / name)
    (tmp_path / MANIFEST).write_bytes(seal({"format": version, "step": 1, "score": None, "files": entries}))
    return tmp_path


@pytest.mark.parametrize(("files", "version"), [(FILES, WHOLE), ({META, RNG, *SHARDS}, SHARDED)])
def test_a_folder_of_one_process_and_one_of_ranks_are_read(tmp_path, files, version):
    assert set(read_manifest(folder(tmp_path, files, version))["files"]) == set(files)
    assert format_of(files) == version


@pytest.mark.parametrize(
    "files",
    [
        {META, RNG},
        FILES | SHARDS,
        {META, *SHARDS},
        {META, RNG, "model.bin"},
        {META, RNG, *SHARDS, "../shard.safetensors"},
    ],
)
def test_any_other_set_of_files_is_no_checkpoint(tmp_path, files):
    (tmp_path / "root").mkdir()
    with pytest.raises(BadInput, match=r"manifest.json: not a manifest"):
        read_manifest(folder(tmp_path / "root", files, SHARDED))


def test_files_of_one_form_are_not_taken_for_the_other(tmp_path):
    with pytest.raises(BadInput, match=r"format 1; this version reads formats 1 and 2"):
        read_manifest(folder(tmp_path, {META, RNG, *SHARDS}, WHOLE))
