"""Files: tensors and JSON metadata in safetensors, written atomically and durably; never pickle.

One artefact is one file. Its safetensors metadata has a single key, `nnato`, holding JSON: `schema` (int), `kind` (what it is)
and whatever the owner needs. Loading executes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nnato.errors import FileFormatError, OutputError, UnwritableError

SCHEMA = 1
"""Version of every file format and cache key of this package; readers refuse newer ones."""

MOST_JSON = 16 << 20
"""Bytes of a configuration in JSON, at most."""
MOST_UNPACKED = 20
"""How many times its own size an archive of tensors may unpack to: weights hardly shrink."""

Metadata = dict[str, Any]


def cache_dir() -> Path:
    """The user's cache folder for nnato: `$NNATO_CACHE`, else `$XDG_CACHE_HOME/nnato`, else `~/.cache/nnato`."""
    if own := os.environ.get("NNATO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nnato"


def provenance() -> Metadata:
    """Versions that produced an artefact: nnato, torch, transformers, nnsight, Python."""
    versions = {name: packages.version(name) for name in ("nnato", "torch", "transformers", "nnsight")}
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {**versions, "python": platform.python_version(), "command": command}


def prepare_cache(*parts: str) -> Path:
    """A folder in the user's cache, made and checked.

    Raises:
        OutputError: It cannot be written to.
    """
    return prepare_folder(cache_dir().joinpath(*parts), "set NNATO_CACHE to a folder that can be written to")


def prepare_folder(folder: Path, remedy: str = "choose another folder with --out") -> Path:
    """Make a folder and check that it can be written to, before any work starts.

    Args:
        folder: The folder.
        remedy: What to do if it cannot be written to.

    Raises:
        UnwritableError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # which has no name where the system can do that: a kill leaves nothing behind
            pass
    except OSError as error:
        raise UnwritableError(f"cannot write to {folder}: {error.strerror}; {remedy}") from None
    return folder


def check_space(folder: Path, needed: int, remedy: str) -> None:
    """Refuse to begin what will not fit on a disk.

    Args:
        folder: Where it will be written.
        needed: Bytes.
        remedy: What to do otherwise.

    Raises:
        OutputError: There is too little space.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"{folder} has {free / 1e9:.1f} GB left, and {needed / 1e9:.1f} GB will be written: {remedy}")


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keep other processes away from an output while the block runs. The system gives it free when the process ends, however it does.

    Args:
        path: A file that is written over and over, or a folder. The lock is a hidden file beside the file, or in the folder.

    Raises:
        OutputError: Another process works on it, or the folder cannot be written to.
    """
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    try:
        file = _locked(lock)
    except BlockingIOError:
        raise OutputError(f"another process is working on {path}; wait for it to end, or choose another folder with --out") from None
    except OSError as error:
        raise UnwritableError(f"cannot write to {lock.parent}: {error.strerror}; choose another folder with --out") from None
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(lock: Path) -> IO[str]:
    """Open and lock a file that whoever holds the lock removes before letting go."""
    while True:
        file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    return file
            file.close()  # whoever held it removed it between our opening and locking it
        except OSError:
            file.close()
            raise


@contextlib.contextmanager
def atomic(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; on success it replaces `path` durably (fsync, rename, fsync of the folder).

    The temporary lies in a folder of its own beside `path`: what writes there may leave temporaries of its own when it is killed, as
    safetensors does, and they are found again with the folder.

    Args:
        path: The file.
        keep: Where to move what was at `path` before.

    Raises:
        OutputError: The file could not be written; what was at `path` is untouched.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = scratch / path.name
    try:
        remove_orphans(path)
        scratch.mkdir(exist_ok=True)
        yield temporary
        _share(temporary, scratch)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; nothing was replaced") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder; on success its files replace those of the same names in `folder`, each durably, one of them at the end.

    For files that other libraries write. The last one is taken away before another is replaced: whoever finds it finds what belongs to it.

    Args:
        folder: Where the files go.
        last: Name of the file that comes last.

    Raises:
        OutputError: A file could not be written.
    """
    with atomic(folder / last) as temporary:
        yield temporary.parent
        others = [path for path in sorted(temporary.parent.iterdir()) if path != temporary]
        for path in others:
            _share(path, temporary.parent)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        try:
            (folder / last).unlink(missing_ok=True)
            for path in others:
                os.replace(path, folder / path.name)
        except OSError as error:
            raise OutputError(f"cannot replace the files of {folder}: {error.strerror or error}; run the command again") from None


def _share(path: Path, folder: Path) -> None:
    """Let others read a file as the user's umask says. safetensors makes files that only their owner can read, whatever that is.

    Args:
        path: The file.
        folder: A folder that was made just now: its mode shows the umask, which cannot be asked for without changing it for all threads.
    """
    path.chmod(folder.stat().st_mode & 0o666)


def remove_orphans(path: Path) -> None:
    """Remove temporaries of this file whose process was killed while writing them."""
    for orphan in path.parent.glob(f".{path.name}.*.tmp"):
        match = re.fullmatch(r".*\.(\d+)\.tmp", orphan.name)
        if match and not Path("/proc", match[1]).exists():
            shutil.rmtree(orphan, ignore_errors=True)


def write_artifact(path: Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: Metadata, keep: Path | None = None) -> None:
    """Write tensors and metadata to one file, atomically and durably.

    Args:
        path: The file.
        kind: What it is.
        tensors: The tensors, on any device.
        metadata: What else there is to say, in JSON.
        keep: Where to move what was at `path` before.

    Raises:
        OutputError: The file could not be written; what was there before is untouched.
    """
    header = {"nnato": json.dumps({"schema": SCHEMA, "kind": kind, **metadata})}
    contiguous: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        shared = any(plain.data_ptr() == other.data_ptr() for other in contiguous.values())
        contiguous[name] = plain.clone() if shared else plain  # safetensors refuses tensors that share memory
    with atomic(path, keep) as temporary:
        try:
            save_file(contiguous, temporary, header)
        except SafetensorError as error:  # how safetensors reports a failed write
            raise OSError(str(error)) from None


def read_metadata(path: Path, kind: str | None = None) -> Metadata:
    """The metadata of an artefact, without its tensors.

    Raises:
        FileFormatError: No such file, not one of nnato's, truncated, of another kind, or of a future schema.
    """
    return _read(path, kind, tensors=False)[1]


def read_artifact(path: Path, kind: str, rows: Mapping[str, Sequence[int]] | None = None) -> tuple[dict[str, torch.Tensor], Metadata]:
    """Read an artefact of the given kind.

    Args:
        path: The file.
        kind: What it must be.
        rows: Of these tensors, only these entries of the first dimension are read.

    Raises:
        FileFormatError: As in `read_metadata`.
    """
    return _read(path, kind, tensors=True, rows=rows or {})


def _read(
    path: Path, kind: str | None, tensors: bool, rows: Mapping[str, Sequence[int]] | None = None
) -> tuple[dict[str, torch.Tensor], Metadata]:
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("nnato", "null"))
            found = {}
            for name in file.keys() if tensors else ():
                if rows and name in rows:
                    entries = file.get_slice(name)
                    found[name] = torch.cat([entries[row : row + 1] for row in rows[name]])
                else:
                    found[name] = file.get_tensor(name)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged or not a safetensors file ({error}); make it again") from None
    if not isinstance(header, dict) or type(header.get("schema")) is not int or header["schema"] < 1 or "kind" not in header:
        raise FileFormatError(f"{path} is a safetensors file, but not one of nnato's")
    if header["schema"] > SCHEMA:
        raise FileFormatError(f"{path} has schema {header['schema']}, this nnato reads up to {SCHEMA}; upgrade nnato")
    if kind is not None and header["kind"] != kind:
        raise FileFormatError(f"{path} holds {header['kind']}, not {kind}")
    return found, header


def read_json(path: Path) -> Metadata:
    """Read a JSON file that holds an object, as configurations do.

    Raises:
        FileFormatError: It is no file of at most 16 MB, or holds something else.
    """
    found = read_any_json(path)
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} holds something else than a JSON object")
    return found


def read_any_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileFormatError: It is no file of at most 16 MB, or no JSON.
    """
    if not path.is_file():  # which a link to a device is not: there is no end to that
        raise FileFormatError(f"{path} does not exist or is not a file")
    if path.stat().st_size > MOST_JSON:
        raise FileFormatError(f"{path} has more than {MOST_JSON >> 20} MB, which none of these files needs")
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged or no JSON file ({type(error).__name__}: {error})") from None


def check_weights(path: Path) -> None:
    """Refuse a safetensors file, which another library will read, whose tensors are not all floating-point numbers.

    Raises:
        FileFormatError: With the reason.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{path} is damaged or not a safetensors file ({error})") from None
    for name, kind in kinds.items():
        require(kind in ("F64", "F32", "F16", "BF16"), path, f"{name} holds {kind}, not floating-point numbers")


def check_zip(path: Path) -> None:
    """Refuse a zip archive, which other libraries will read, that is none or unpacks to far more than it holds.

    Raises:
        FileFormatError: With the reason.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise FileFormatError(f"{path} is damaged or no archive of tensors ({error})") from None
    if unpacked > MOST_UNPACKED * path.stat().st_size:
        raise FileFormatError(f"{path} unpacks to {unpacked / 1e6:.0f} MB, more than {MOST_UNPACKED} times its size: it holds no weights")


def require(condition: bool, path: Path, what: str) -> None:
    """Refuse a readable file whose contents do not fit together.

    Raises:
        FileFormatError: The condition does not hold.
    """
    if not condition:
        raise FileFormatError(f"{path} is inconsistent: {what}; make it again")


def require_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse a readable file with a tensor that is not float64, or not finite.

    Raises:
        FileFormatError: With its name.
    """
    for name, tensor in tensors.items():
        require(tensor.dtype == torch.float64, path, f"{name} is not float64")
        require(bool(torch.isfinite(tensor).all()), path, f"{name} holds values that are not finite")


def require_entries(metadata: Mapping[str, Any], path: Path, **types: type) -> None:
    """Refuse a readable file whose metadata lack an entry, or have one of another type.

    Raises:
        FileFormatError: With its name.
    """
    for name, wanted in types.items():
        require(name in metadata, path, f"{name} is missing")
        require(type(metadata[name]) is wanted, path, f"{name} is not a {wanted.__name__}")
