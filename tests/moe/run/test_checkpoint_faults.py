"""What survives a kill, an error or an interruption at any point of a save, damage on disk, and malice.

The seam is `sys.setprofile`: the interpreter reports every call of a C function before it runs. Each report about a
function in `OPERATIONS` is a point at which a save can be killed (in a forked child) or made to fail, so the code under
test is not altered, and a file operation added to it is covered without a change here."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moe.data.owner import temporary
from moe.errors import BadInput
from moe.run import checkpoint
from moe.run.checkpoint import Snapshot

OPERATIONS = {"mkdir", "open", "write", "serialize_file", "chmod", "fsync", "close", "rename", "unlink", "rmdir"}
MARKER = "executed"
Profiler = Callable[[FrameType, str, Any], None]


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        step=step,
        model={"w": torch.randn(8, 4, generator=generator), "half": torch.randn(5, generator=generator).bfloat16()},
        optimizer={"exp_avg/w": torch.randn(8, 4, generator=generator), "step/w": torch.tensor(float(step))},
        meta={"config": {"seed": 0}, "loader": {"epoch": 0, "position": step}},
        rng={"cpu": generator.get_state()},
    )


def digest(state: Snapshot) -> str:
    total = hashlib.sha256(json.dumps([state.step, state.meta], sort_keys=True).encode())
    for part in (state.model, state.optimizer, state.rng):
        for name in sorted(part):
            total.update(f"{name} {part[name].dtype} {tuple(part[name].shape)}".encode())
            total.update(part[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def at_operation(n: int, action: Callable[[], None]) -> Profiler:
    """A profiler that runs `action` at the n-th point of a save (from 0)."""
    seen = -1

    def profiler(frame: FrameType, event: str, function: Any) -> None:
        nonlocal seen
        if event == "c_call" and function.__name__ in OPERATIONS:
            seen += 1
            if seen == n:
                action()

    return profiler


def profiled(profiler: Profiler, work: Callable[[], object]) -> None:
    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        work()
    finally:
        sys.setprofile(before)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a fork of this process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def before_a_first_save(root: Path) -> None:
    root.mkdir()


def before_a_save_that_deletes_an_old_one(root: Path) -> None:
    for step in (1, 2):
        checkpoint.save(root, snapshot(step), keep=2)


def before_a_save_over_a_damaged_one(root: Path) -> None:
    for step in (1, 2, 3):
        path = checkpoint.save(root, snapshot(step), keep=3)
    os.truncate(path / "model.safetensors", 10)


SITUATIONS = [before_a_first_save, before_a_save_that_deletes_an_old_one, before_a_save_over_a_damaged_one]


def save_three(root: Path) -> Path:
    return checkpoint.save(root, snapshot(3), keep=2, warn=lambda message: None)


def count_points(template: Path, root: Path) -> int:
    """How many points a save into a copy of `template` has."""
    shutil.copytree(template, root)
    points = 0

    def count(frame: FrameType, event: str, function: Any) -> None:
        nonlocal points
        points += event == "c_call" and function.__name__ in OPERATIONS

    profiled(count, partial(save_three, root))
    return points


def assert_whole(root: Path, earlier: set[str]) -> str:
    """`latest` is the earlier checkpoint or the new one, whole; returns its digest or "none"."""
    path = checkpoint.latest(root, lambda message: None) if list(root.glob("step-????????")) else None
    found = "none" if path is None else digest(checkpoint.load(path))
    assert found in earlier | {digest(snapshot(3))}
    return found


def assert_recovers(root: Path) -> None:
    """The next save works and leaves nothing half written or half deleted behind."""
    path = checkpoint.save(root, snapshot(4), keep=2)
    assert digest(checkpoint.load(path)) == digest(snapshot(4))
    assert not list(root.glob("*.tmp-*"))
    for step in (1, 2):
        if (root / f"step-0000000{step}").exists():
            checkpoint.verify(root / f"step-0000000{step}")


@pytest.mark.parametrize("prepare", SITUATIONS, ids=lambda prepare: prepare.__name__)
def test_a_kill_at_any_point_of_a_save_leaves_the_earlier_or_the_new_checkpoint_whole(tmp_path, prepare):
    prepare(template := tmp_path / "template")
    earlier = {"none"} if prepare is before_a_first_save else {digest(snapshot(2))}
    points = count_points(template, tmp_path / "counted")
    assert points >= 20
    found = []
    for n in range(points):
        shutil.copytree(template, root := tmp_path / str(n))
        kill = at_operation(n, lambda: os.kill(os.getpid(), signal.SIGKILL))
        status = in_child(partial(profiled, kill, partial(save_three, root)))
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        found.append(assert_whole(root, earlier))
        assert_recovers(root)
    assert found == sorted(found, key=lambda each: each == digest(snapshot(3)))  # once there, it stays
    assert set(found) == earlier | {digest(snapshot(3))}


@pytest.mark.parametrize(
    ("prepare", "kind"),
    list(zip(SITUATIONS, (errno.ENOSPC, errno.EDQUOT, errno.EACCES), strict=True)),
    ids=["disk full", "quota exceeded", "not permitted"],
)
def test_an_error_at_any_point_of_a_save_is_one_sentence_and_loses_nothing(tmp_path, prepare, kind):
    def fail() -> None:
        raise OSError(kind, os.strerror(kind))

    prepare(template := tmp_path / "template")
    earlier = {"none"} if prepare is before_a_first_save else {digest(snapshot(2))}
    refusals = []
    for n in range(count_points(template, tmp_path / "counted")):
        shutil.copytree(template, root := tmp_path / str(n))
        try:
            profiled(at_operation(n, fail), partial(save_three, root))
        except BadInput as error:
            refusals.append(error)
            assert_one_sentence(error, root / "step-00000003", os.strerror(kind), "free")
            assert not list(root.glob("*.tmp-*"))
        assert_whole(root, earlier)
        assert_recovers(root)
    assert len(refusals) >= 20


def test_an_interruption_at_any_point_of_a_save_loses_nothing(tmp_path):
    def interrupt() -> None:
        raise KeyboardInterrupt

    before_a_save_that_deletes_an_old_one(template := tmp_path / "template")
    for n in range(count_points(template, tmp_path / "counted")):
        shutil.copytree(template, root := tmp_path / str(n))
        with contextlib.suppress(KeyboardInterrupt):
            profiled(at_operation(n, interrupt), partial(save_three, root))
        assert_whole(root, {digest(snapshot(2))})
        assert_recovers(root)


def test_everything_is_synced_before_the_rename_and_the_root_after_it(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def recorded_rename(source: Path, target: Path) -> None:
        rename(source, target)
        done.append("renamed")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    checkpoint.save(tmp_path / "root", snapshot(1), keep=1)
    files = ["meta.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors"]
    folder = temporary(Path("step-00000001")).name
    assert set(done[:4]) == set(files)
    assert done[4:] == ["manifest.json", folder, "renamed", "root", tmp_path.name]


# Disk full


def test_a_disk_too_full_is_refused_before_writing_with_path_needed_and_free_bytes(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, snapshot(1), keep=1)
    before = digest(checkpoint.load(path))
    big = snapshot(2)
    big.model["big"] = torch.zeros(25_000_000, dtype=torch.uint8)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12_345_678))
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: pytest.fail("wrote to a disk that is too full"))
    with pytest.raises(BadInput) as caught:
        checkpoint.save(tmp_path, big, keep=1)
    assert_one_sentence(caught.value, tmp_path / "step-00000002", "No space left on device", "12,345,678 are free")
    needed = int(str(caught.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert 25_000_000 < needed < 27_000_000
    assert str(caught.value).endswith(f"are free; the last good checkpoint is {path}.")
    assert list(tmp_path.iterdir()) == [path]
    assert digest(checkpoint.load(path)) == before


def test_a_disk_too_full_does_not_call_a_damaged_checkpoint_good(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, snapshot(1), keep=1)
    (path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    with pytest.raises(BadInput, match=r"bytes and 0 are free; no checkpoint is good\.$"):
        checkpoint.save(tmp_path, snapshot(2), keep=1)


@pytest.mark.parametrize("file", ["meta.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors"])
def test_a_file_that_the_kernel_cuts_short_is_an_error_and_the_earlier_checkpoint_stays(tmp_path, file):
    """The limit on a file's size stops the write part-way, inside safetensors too, as a full disk does."""
    path = checkpoint.save(tmp_path / "root", snapshot(1), keep=1)
    state = snapshot(2)
    if file == "meta.json":
        state.meta["large"] = "x" * 50_000
    else:
        getattr(state, file.removesuffix(".safetensors"))["large"] = torch.zeros(50_000, dtype=torch.uint8)

    def limited_save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(BadInput) as caught:
            checkpoint.save(tmp_path / "root", state, keep=1)
        (tmp_path / "message").write_text(str(caught.value))

    assert in_child(limited_save) == 0
    message = (tmp_path / "message").read_text()
    assert "step-00000002" in message
    assert os.strerror(errno.EFBIG) in message
    assert "bytes" in message
    assert list((tmp_path / "root").iterdir()) == [path]
    assert digest(checkpoint.load(path)) == digest(snapshot(1))


def test_a_disk_that_fills_up_inside_safetensors_is_an_error_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch):
    def cut_short(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if file.name == "optimizer.safetensors":
            file.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, file)

    path = checkpoint.save(tmp_path, snapshot(1), keep=1)
    monkeypatch.setattr(checkpoint, "save_file", cut_short)
    with pytest.raises(BadInput, match="No space left on device") as caught:
        checkpoint.save(tmp_path, snapshot(2), keep=1)
    assert_one_sentence(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    assert digest(checkpoint.load(path)) == digest(snapshot(1))


# Damage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "root", snapshot(1), keep=1, score=1.25)


def assert_one_sentence(error: BaseException, *parts: object) -> None:
    """The message is one sentence that has each of `parts` in it."""
    message = str(error)
    assert [str(part) for part in parts if str(part) not in message] == [], message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 600


def assert_refused(path: Path, file: Path) -> None:
    """`verify`, `load` and `latest` all refuse, and name `file`."""
    for refusing in (checkpoint.verify, checkpoint.load, lambda p: checkpoint.latest(p.parent, pytest.fail)):
        with pytest.raises(BadInput) as caught:
            refusing(path)
        assert_one_sentence(caught.value, file)


def flip(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def test_a_hundred_random_bit_flips_are_all_detected_and_the_file_named(path):
    chance = random.Random(0)
    files = sorted(path.iterdir())
    hit = set()
    for _ in range(100):
        file = chance.choice(files)
        bit = chance.randrange(8 * file.stat().st_size)
        flip(file, bit)
        assert_refused(path, file)
        flip(file, bit)
        hit.add(file.name)
    checkpoint.verify(path)
    assert len(hit) == 5


def test_a_flip_in_any_byte_of_the_manifest_is_detected(path):
    file = path / "manifest.json"
    for byte in range(file.stat().st_size):
        flip(file, bit := 8 * byte + byte % 8)
        with pytest.raises(BadInput, match=r"manifest\.json"):
            checkpoint.verify(path)
        flip(file, bit)
    checkpoint.verify(path)


ALL_FILES = ["meta.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "manifest.json"]


@pytest.mark.parametrize("file", ALL_FILES)
def test_a_truncated_empty_missing_or_replaced_file_is_named(path, file):
    whole = (path / file).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 1, 0):
        os.truncate(path / file, size)
        assert_refused(path, path / file)
    (path / file).write_bytes(whole + b"\0")
    assert_refused(path, path / file)
    (path / file).unlink()
    assert_refused(path, path / file)
    (path / file).mkdir()
    assert_refused(path, path / file)


def test_a_truncated_file_says_how_long_it_is_and_should_be(path):
    os.truncate(path / "model.safetensors", 100)
    whole = json.loads((path / "manifest.json").read_text())["files"]["model.safetensors"]["size"]
    with pytest.raises(BadInput, match=rf"model\.safetensors: 100 bytes, but the manifest says {whole}"):
        checkpoint.verify(path)


@pytest.mark.parametrize("file", ALL_FILES)
def test_a_file_of_another_checkpoint_is_not_accepted(tmp_path, file):
    """Same names, shapes and size, so only the checksums can tell."""
    one, two = (checkpoint.save(tmp_path, snapshot(step), keep=2) for step in (1, 2))
    assert (one / file).stat().st_size == (two / file).stat().st_size
    shutil.copy(one / file, two / file)
    warnings: list[str] = []
    assert checkpoint.latest(tmp_path, warnings.append) == one
    assert len(warnings) == 1
    # The manifest is whole in itself: with another's manifest it is the folder's name that disagrees.
    assert str(two / file) in warnings[0]


def test_a_checkpoint_under_the_name_of_another_step_is_not_accepted(path):
    other = path.rename(path.with_name("step-00000002"))
    assert_refused(other, other / "manifest.json")


def test_a_read_error_at_any_point_of_a_load_is_one_sentence(path):
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for n in range(5):  # each of the Python side's openings: manifest, four files
        with pytest.raises(BadInput) as caught:
            profiled(at_operation(n, fail), partial(checkpoint.load, path))
        assert_one_sentence(caught.value, path, os.strerror(errno.EIO))


def test_an_unexpected_file_is_named(path):
    (path / "optimizer.pt").write_bytes(b"")
    assert_refused(path, path / "optimizer.pt")


# Malice: every file below is under a manifest that agrees with it, so the checksums do not protect the reader


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def reseal(path: Path, **changes: Any) -> None:
    """Write the manifest that a forger would: true to what the folder holds, but for `changes`."""
    files = {
        name: {"sha256": hashlib.sha256((path / name).read_bytes()).hexdigest(), "size": (path / name).stat().st_size}
        for name in ALL_FILES[:-1]
    }
    body = {"format": 1, "step": 1, "score": None, "files": files} | changes
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(body | {"sha256": own}, indent=1, sort_keys=True) + "\n")


def safetensors_bytes(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}


def pickle_as_tensors(path: Path, marker: Path) -> None:
    (path / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    reseal(path)


def torch_archive_as_tensors(path: Path, marker: Path) -> None:
    torch.save({"w": torch.zeros(2), "x": Payload(marker)}, path / "optimizer.safetensors")
    reseal(path)


def pickle_as_random_state(path: Path, marker: Path) -> None:
    (path / "rng.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    reseal(path)


def pickle_as_metadata(path: Path, marker: Path) -> None:
    (path / "meta.json").write_bytes(pickle.dumps(Payload(marker)))
    reseal(path)


def pickle_as_manifest(path: Path, marker: Path) -> None:
    (path / "manifest.json").write_bytes(pickle.dumps(Payload(marker)))


def absurd_header_length(path: Path, marker: Path) -> None:
    (path / "model.safetensors").write_bytes(safetensors_bytes({}, length=2**63 - 1))
    reseal(path)


def offsets_out_of_range(path: Path, marker: Path) -> None:
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensor([4096], 0, 16384)))
    reseal(path)


def offsets_backwards(path: Path, marker: Path) -> None:
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensor([4], 16, 0)))
    reseal(path)


def shape_that_overflows(path: Path, marker: Path) -> None:
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensor([2**62, 4, 4], 0, 16)))
    reseal(path)


def deep_header(path: Path, marker: Path) -> None:
    text = b"[" * 100_000
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    reseal(path)


def deep_metadata(path: Path, marker: Path) -> None:
    (path / "meta.json").write_text('{"a":' + "[" * 1_000_000 + "]" * 1_000_000 + "}")
    reseal(path)


def deep_manifest(path: Path, marker: Path) -> None:
    (path / "manifest.json").write_text('{"files":' + "[" * 600 + "]" * 600 + "}")


def metadata_that_is_no_object(path: Path, marker: Path) -> None:
    (path / "meta.json").write_text("[1, 2]")
    reseal(path)


def metadata_with_nan(path: Path, marker: Path) -> None:
    (path / "meta.json").write_text('{"scores": [NaN]}')
    reseal(path)


def metadata_with_a_giant_number(path: Path, marker: Path) -> None:
    (path / "meta.json").write_text('{"position": ' + "9" * 1_000_000 + "}")
    reseal(path)


def manifest_that_leads_outside(path: Path, marker: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_bytes(b"secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size": 6}
    files = json.loads((path / "manifest.json").read_text())["files"]
    reseal(path, files=files | {"../../outside": entry})


def manifest_with_an_absolute_path(path: Path, marker: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_bytes(b"secret")
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[str(outside)] = files.pop("meta.json")
    reseal(path, files=files)


def manifest_with_wrong_types(path: Path, marker: Path) -> None:
    reseal(path, files={name: {"sha256": None, "size": "12"} for name in ALL_FILES[:-1]})


def manifest_of_a_later_format(path: Path, marker: Path) -> None:
    reseal(path, format=2)


def link_to_outside(path: Path, marker: Path) -> None:
    outside = (path / "meta.json").rename(path.parent.parent / "outside")
    (path / "meta.json").symlink_to(outside)
    reseal(path)


def linked_manifest(path: Path, marker: Path) -> None:
    outside = (path / "manifest.json").rename(path.parent.parent / "outside")
    (path / "manifest.json").symlink_to(outside)


def pipe_that_never_ends(path: Path, marker: Path) -> None:
    (path / "rng.safetensors").unlink()
    os.mkfifo(path / "rng.safetensors")


FORGERIES = [
    (pickle_as_tensors, "model.safetensors"),
    (torch_archive_as_tensors, "optimizer.safetensors"),
    (pickle_as_random_state, "rng.safetensors"),
    (pickle_as_metadata, "meta.json"),
    (pickle_as_manifest, "manifest.json"),
    (absurd_header_length, "model.safetensors"),
    (offsets_out_of_range, "model.safetensors"),
    (offsets_backwards, "model.safetensors"),
    (shape_that_overflows, "model.safetensors"),
    (deep_header, "model.safetensors"),
    (deep_metadata, "meta.json"),
    (deep_manifest, "manifest.json"),
    (metadata_that_is_no_object, "meta.json"),
    (metadata_with_nan, "meta.json"),
    (metadata_with_a_giant_number, "meta.json"),
    (manifest_that_leads_outside, "manifest.json"),
    (manifest_with_an_absolute_path, "manifest.json"),
    (manifest_with_wrong_types, "manifest.json"),
    (manifest_of_a_later_format, "manifest.json"),
    (link_to_outside, "meta.json"),
    (linked_manifest, "manifest.json"),
    (pipe_that_never_ends, "rng.safetensors"),
]


@pytest.mark.parametrize(("forge", "file"), FORGERIES, ids=[forge.__name__ for forge, _ in FORGERIES])
def test_a_forged_checkpoint_is_refused_and_runs_no_code(tmp_path, path, forge, file):
    forge(path, tmp_path / MARKER)
    with pytest.raises(BadInput) as caught:
        checkpoint.load(path)
    assert_one_sentence(caught.value, path / file)
    assert not (tmp_path / MARKER).exists()


def test_the_forger_can_seal_a_manifest_and_the_payload_is_live(tmp_path, path):
    """Without both, the refusals above would prove nothing."""
    reseal(path)
    checkpoint.load(path)
    pickle.loads(pickle.dumps(Payload(tmp_path / MARKER)))
    assert (tmp_path / MARKER).exists()
