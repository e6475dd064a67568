"""Hostile files for every loader. Run as a script: loads each of them and reports what came of it; `test_hostile_files.py` starts it."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HUGE = 2**63


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts(valid: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = struct.unpack("<Q", valid[:8])[0]
    return json.loads(valid[8 : 8 + size]), valid[8 + size :]


def containers(valid: bytes, canary: Path) -> Iterator[tuple[str, bytes]]:
    """Files that are no sound safetensors files."""
    header, data = parts(valid)
    first = next(name for name in header if name != "__metadata__")

    def changed(**entry: Any) -> bytes:
        return joined({**header, first: {**header[first], **entry}}, data)

    yield "empty", b""
    yield "seven bytes", valid[:7]
    yield "header only", joined(header, b"")
    yield "truncated", valid[:-1]
    yield "trailing bytes", valid + b"\0" * 64
    yield "header of 2^63 bytes", joined(header, data, HUGE)
    yield "header of 1 GB declared", joined(header, data, 10**9)
    yield "header that is no JSON", joined(b"{" * 1000, data)
    yield "header that is a list", joined([1, 2], data)
    yield "header nested 100,000 deep", joined(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, data)
    yield "header with a number of 100,000 digits", joined(b'{"a":' + b"9" * 100_000 + b"}", data)
    if len(header) > 2:
        yield "overlapping tensors", changed(data_offsets=[0, len(data)])
    yield "offsets beyond the end", changed(data_offsets=[0, 10**9], shape=[10**9 // 8])
    yield "1 GB declared in 1 kB", joined({first: {"dtype": "F64", "shape": [10**9 // 8], "data_offsets": [0, 10**9]}}, b"\0" * 1000)
    yield "negative offsets", changed(data_offsets=[-8, 0])
    yield "offsets backwards", changed(data_offsets=[8, 0])
    yield "a shape that overflows", changed(shape=[2**40, 2**40])
    yield "a negative shape", changed(shape=[-1, 8])
    yield "an unknown dtype", changed(dtype="X9")
    yield "a shape that is text", changed(shape="many")
    yield "a pickle", pickle.dumps(Canary(canary))
    yield "a zip archive", b"PK\x03\x04" + b"\0" * 200


def labels(valid: bytes) -> Iterator[tuple[str, bytes]]:
    """Files whose metadata are no sound JSON."""
    header, data = parts(valid)
    yield "metadata nested 50,000 deep", remetadata(header, data, '{"schema":1,"kind":' + "[" * 50_000 + "]" * 50_000 + "}")
    yield "metadata with a number of 100,000 digits", remetadata(header, data, '{"schema":' + "9" * 100_000 + "}")
    yield "metadata that are no JSON", remetadata(header, data, "{")
    yield "metadata that are a list", remetadata(header, data, "[]")
    yield "no metadata", joined({name: entry for name, entry in header.items() if name != "__metadata__"}, data)


def remetadata(header: dict[str, Any], data: bytes, text: str) -> bytes:
    """The same file with other metadata of nnato."""
    return joined({**header, "__metadata__": {"nnato": text}}, data)


STRANGE: tuple[Any, ...] = (None, True, -1, 10**30, 1e308, "", "../../etc/passwd", "\0", [], [[]], [["a", "b"]], {}, {"a": 1}, [None] * 3)
"""Values put in the place of every entry of the metadata."""


def contents(valid: bytes) -> Iterator[tuple[str, bytes]]:
    """Sound safetensors files that hold something else than they should."""
    header, data = parts(valid)
    metadata = json.loads(header["__metadata__"]["nnato"])
    for key in metadata:
        without = {name: value for name, value in metadata.items() if name != key}
        yield f"{key} missing", remetadata(header, data, json.dumps(without))
        for value in STRANGE:
            if value != metadata[key] and value not in harmless(key):
                yield f"{key} = {str(value)[:20]!r}", remetadata(header, data, json.dumps({**metadata, key: value}))
    yield "a newer schema", remetadata(header, data, json.dumps({**metadata, "schema": 10**6}))
    for name in (name for name in header if name != "__metadata__"):
        start, end = header[name]["data_offsets"]
        for value in (float("nan"), float("inf")):
            if end > start:
                yield f"{value} in {name}", joined(header, data[:start] + struct.pack("<d", value) + data[start + 8 :])
        fewer = copy.deepcopy(header)
        fewer[f"{name}x"] = fewer.pop(name)
        yield f"{name} has another name", joined(fewer, data)
        flat = copy.deepcopy(header)
        flat[name]["shape"] = [(end - start) // 8]
        if flat != header:
            yield f"{name} has another shape", joined(flat, data)
        half = copy.deepcopy(header)
        half[name] |= {"dtype": "I64"}
        yield f"{name} is of integers", joined(half, data)


def harmless(key: str) -> tuple[Any, ...]:
    """Values that an entry may well have: free text, and numbers and records that are only shown."""
    records = dict.fromkeys(("provenance", "details", "model", "text", "request", "medians", "excluded"), ({}, {"a": 1}))
    return (records | {"name": ("", "../../etc/passwd", "\0"), "target": (10**30,), "sinks": ([],)}).get(key, ())


# ---- the script ----------------------------------------------------------------------------------------------------------


def loader_of(name: str, folder: Path) -> tuple[Path, Callable[[], object]]:
    """Write a sound artefact into a folder; its file and what loads it."""
    from nnato.accumulation import load_moments
    from nnato.edits import read_directions
    from nnato.operators import TransportOperator
    from nnato.sites import ResidualSite

    if name == "operator":
        eye, zero = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        file = TransportOperator(ResidualSite(1), ResidualSite(2), eye, zero, zero + 1, details={"a": 1}).save(folder / "o.safetensors")
        return file, lambda: TransportOperator.load(file)
    if name == "directions":
        file = folder / "d.safetensors"
        save_file({"directions": torch.eye(4, dtype=torch.float64)}, file, {"nnato": "{}"})
        return file, lambda: read_directions(file)
    file = folder / {"moments": "moments.safetensors", "part": "train.ordinary.0.safetensors"}[name]

    def load() -> object:
        moments = load_moments(folder).moments
        return [moments.of(split) for split in ("train", "validation", "test")], moments.shuffled

    return file, load


def main() -> None:
    """Load every hostile file of one kind; print a JSON object per file: what was raised, CPU seconds, growth of memory."""
    from nnato.errors import NnatoError

    name, folder = sys.argv[1], Path(sys.argv[2])
    file, load = loader_of(name, folder)
    load()
    valid, canary = file.read_bytes(), folder / "canary"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = [*containers(valid, canary), *([*labels(valid), *contents(valid)] if name != "directions" else [])]
    for case, data in cases:
        file.write_bytes(data)
        start, raised = time.process_time(), "nothing"
        try:
            load()
        except NnatoError as error:
            raised = "NnatoError"
            message = str(error)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is reported
            raised, message = type(error).__name__, str(error)
        else:
            message = ""
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        record = {
            "case": case,
            "raised": raised,
            "message": message[:300],
            "seconds": seconds,
            "grown_mb": grown,
            "canary": canary.exists(),
        }
        print(json.dumps(record))
    file.unlink()
    for what in ("a folder", "a dangling link", "a link to a device"):
        file.mkdir() if what == "a folder" else file.symlink_to("/dev/zero" if what == "a link to a device" else folder / "nowhere")
        try:
            load()
            raised = "nothing"
        except NnatoError:
            raised = "NnatoError"
        print(json.dumps({"case": what, "raised": raised, "message": "", "seconds": 0.0, "grown_mb": 0.0, "canary": False}))
        shutil.rmtree(file) if what == "a folder" else file.unlink()


if __name__ == "__main__":
    main()
