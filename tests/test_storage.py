from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nnato.errors import FileFormatError, OutputError, UnwritableError
from nnato.storage import (
    SCHEMA,
    atomic,
    atomic_folder,
    cache_dir,
    prepare_cache,
    prepare_folder,
    read_artifact,
    read_metadata,
    write_artifact,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.zeros(0, dtype=torch.float64)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_artifact(path, "thing", TENSORS, {"n": 3, "name": "é"})
    return path


def test_round_trip(file):
    tensors, metadata = read_artifact(file, "thing")
    assert all(torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert metadata == {"schema": SCHEMA, "kind": "thing", "n": 3, "name": "é"}
    assert read_metadata(file) == metadata
    assert os.listdir(file.parent) == ["x.safetensors"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, mask, mode):
    """safetensors alone makes files of mode 0600, which nobody else can read in a shared folder."""
    before = os.umask(mask)
    try:
        write_artifact(tmp_path / "x.safetensors", "thing", TENSORS, {})
        with atomic_folder(tmp_path, "last.json") as folder:
            save_file({"a": torch.zeros(1)}, folder / "weights.safetensors")
            (folder / "last.json").write_text("{}")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("x.safetensors", "weights.safetensors", "last.json"), mode
    )


def test_missing_files(tmp_path):
    with pytest.raises(FileFormatError, match=r"nothing\.safetensors does not exist"):
        read_metadata(tmp_path / "nothing.safetensors")
    with pytest.raises(FileFormatError, match="is not a file"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 30, -1])
def test_truncated_files(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match="is damaged or not a safetensors file"):
        read_artifact(file, "thing")


@pytest.mark.parametrize("contents", [b"hello, world, this is no tensor file", b"\x80\x04\x95pickle?", struct.pack("<Q", 2**60) + b"{}"])
def test_other_files(file, contents):
    file.write_bytes(contents)
    with pytest.raises(FileFormatError, match="is damaged or not a safetensors file"):
        read_metadata(file)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"nnato": "[]"}, {"nnato": '{"schema": "1", "kind": "x"}'}, {"nnato": "{}"}])
def test_foreign_files(file, metadata):
    save_file(TENSORS | {"a": TENSORS["a"].contiguous()}, file, metadata)
    with pytest.raises(FileFormatError, match="is a safetensors file, but not one of nnato's"):
        read_metadata(file)


def test_metadata_that_is_no_json(file):
    save_file({}, file, {"nnato": "{"})
    with pytest.raises(FileFormatError, match="is damaged"):
        read_metadata(file)


def test_future_schemas(file):
    save_file({}, file, {"nnato": json.dumps({"schema": SCHEMA + 1, "kind": "thing"})})
    with pytest.raises(FileFormatError, match=f"has schema {SCHEMA + 1}, this nnato reads up to {SCHEMA}; upgrade nnato"):
        read_artifact(file, "thing")


def test_other_kinds(file):
    with pytest.raises(FileFormatError, match="holds thing, not operator"):
        read_artifact(file, "operator")


def test_a_failed_write_replaces_nothing_and_leaves_nothing(file):
    before = file.read_bytes()

    def fail():
        with atomic(file) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device; nothing was replaced"):
        fail()
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_orphans_of_killed_processes_are_removed(file):
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    orphan = file.with_name(f".{file.name}.{process}.tmp")
    orphan.mkdir()
    (orphan / ".tmpXYZ").write_bytes(b"half")  # safetensors writes to a temporary of its own
    mine = file.with_name(f".{file.name}.{os.getppid()}.tmp")
    mine.mkdir()
    write_artifact(file, "thing", TENSORS, {})
    assert not orphan.exists()
    assert mine.exists()


def test_files_that_belong_together_are_replaced_together(tmp_path):
    for name in ("a", "b", "last", "other"):
        (tmp_path / name).write_text("old")
    with atomic_folder(tmp_path, "last") as scratch:
        for name in ("a", "b", "last"):
            (scratch / name).write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new", "last": "new", "other": "old"}
    with pytest.raises(OutputError, match="nothing was replaced"), atomic_folder(tmp_path, "last") as scratch:
        (scratch / "a").write_text("newer")
        raise OSError(28, "No space left on device")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new", "old"}


@pytest.mark.parametrize("failing", range(4))
def test_whoever_finds_the_last_file_finds_what_belongs_to_it(tmp_path, monkeypatch, failing):
    """Whatever step of the replacement is the first that does not happen."""
    for name in ("a", "b", "last"):
        (tmp_path / name).write_text("old")
    left, replace = [failing], os.replace

    def counted(*arguments):
        if not left[0]:
            raise OSError("stopped")
        left[0] -= 1
        replace(*arguments)

    monkeypatch.setattr(os, "replace", counted)
    with contextlib.suppress(OutputError), atomic_folder(tmp_path, "last") as scratch:
        for name in ("a", "b", "last"):
            (scratch / name).write_text("new")
    if (tmp_path / "last").exists():
        assert len({path.read_text() for path in tmp_path.iterdir()}) == 1


def test_folders_that_cannot_be_written_to(tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(OutputError, match="cannot write to .*; choose another folder with --out"):
        prepare_folder(blocker / "below")
    with pytest.raises(UnwritableError, match="cannot write to /proc"):
        prepare_folder(Path("/proc/nnato"))


def test_a_cache_that_cannot_be_written_to_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NNATO_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set NNATO_CACHE to a folder"):
        prepare_cache("models")


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("NNATO_CACHE", "/a/b")
    assert cache_dir() == Path("/a/b")
    monkeypatch.delenv("NNATO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_dir() == Path("/c/nnato")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "nnato"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    """A real file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        file = disk / "a.safetensors"
        write_artifact(file, "thing", TENSORS, {"n": 1})
        with pytest.raises(OutputError, match=r"cannot write .*; nothing was replaced"):
            write_artifact(file, "thing", {"large": torch.zeros(10**5, dtype=torch.float64)}, {"n": 2})
        assert read_artifact(file, "thing")[1]["n"] == 1
        assert sorted(os.listdir(disk)) == ["a.safetensors"]
        write_artifact(file, "thing", TENSORS, {"n": 3})
        assert read_artifact(file, "thing")[1]["n"] == 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_lock_leaves_nothing_and_is_held_by_one_process_at_a_time(tmp_path):
    """Processes that fight for it, each reading and writing a number while it holds it: no increment is lost."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from nnato.errors import OutputError\n"
        "from nnato.storage import exclusive\n"
        "folder, done = Path(sys.argv[1]), 0\n"
        "while done < 100:\n"
        "    try:\n"
        "        with exclusive(folder):\n"
        "            number = int((folder / 'number').read_text())\n"
        "            (folder / 'number').write_text(str(number + 1))\n"
        "            done += 1\n"
        "    except OutputError:\n"
        "        time.sleep(0.001)\n"
    )
    (tmp_path / "number").write_text("0")
    rivals = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [rival.wait(60) for rival in rivals] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["number"]
    assert (tmp_path / "number").read_text() == "300"
