"""Coverage-guided fuzzing of the loaders with atheris: whatever the bytes, only `NnatoError` may come out.

    pip install atheris
    python tests/fuzz/files.py tests/fuzz/corpus -max_total_time=600

The first byte of an input chooses the loader, the rest is the file. The mutator keeps the container sound most of the time and mutates
nnato's own JSON in it, half of the time entry by entry, which random bytes would hardly ever reach. So it does with JSON files.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["nnato"]):
    from nnato.accumulation import load_moments
    from nnato.edits import EditRecord, read_directions
    from nnato.errors import NnatoError
    from nnato.operators import TransportOperator

from hostile import KINDS

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
FILE = FOLDER / "moments.safetensors"


def _moments() -> None:
    moments = load_moments(FILE).moments
    for split in ("train", "validation", "test"):
        moments.of(split)


def _edit() -> None:
    try:
        record = json.loads(FILE.read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict):
        EditRecord.from_json(record)


LOADERS: list[tuple[Path, Callable[[], object]]] = [
    (FILE, lambda: TransportOperator.load(FILE)),
    (FILE, _moments),
    (FILE, lambda: read_directions(FILE)),
    (FILE, _edit),
]
for kind, (make, _) in KINDS.items():
    if kind not in ("operator", "moments", "part", "directions"):
        (FOLDER / kind).mkdir()
        with atheris.instrument_imports(include=["nnato"]):
            LOADERS.append(make(kind, FOLDER / kind))


def one_input(data: bytes) -> None:
    """Load one file; anything but an `NnatoError` is a crash."""
    if not data:
        return
    path, load = LOADERS[data[0] % len(LOADERS)]
    path.write_bytes(data[1:])
    with contextlib.suppress(NnatoError):
        load()


STRANGE = (None, True, False, -1, 0, 1, 10**30, 0.5, 1e308, "", "embed", "../x", "\0", [], [[]], [0], [[0, 1]], [[1, 0]], {}, {"a": 1})


def altered(value: Any, rng: random.Random) -> Any:
    """The same JSON with one entry replaced, removed, repeated or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        rest = {name: item for name, item in value.items() if name != key}
        way = rng.randrange(8)
        if way == 0:
            return rest
        if way == 1:
            return rest | {key + rng.choice("x.0"): value[key]}
        return rest | {key: altered(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        way = rng.randrange(8)
        if way == 0:
            return value[:at] + value[at + 1 :]
        if way == 1:
            return [*value, value[at]]
        return [*value[:at], altered(value[at], rng), *value[at + 1 :]]
    return rng.choice(STRANGE)


def mutate(data: bytes, largest: int, seed: int) -> bytes:
    """Mutate the bytes, or only the JSON of nnato within a sound container."""
    rng = random.Random(seed)
    try:
        size = struct.unpack("<Q", data[1:9])[0]
        header = json.loads(data[9 : 9 + size])
        text = header["__metadata__"]["nnato"].encode()
        record = json.loads(text) if rng.random() < 0.5 else None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _mutate_json(data, largest, rng)
    if rng.random() < 0.2:
        return atheris.Mutate(data, largest)
    if record is not None:
        header["__metadata__"]["nnato"] = json.dumps(altered(record, rng))
    elif rng.random() < 0.5:
        header = altered(header, rng)
    else:
        header["__metadata__"]["nnato"] = atheris.Mutate(text, len(text) + 64).decode(errors="replace")
    packed = json.dumps(header).encode()
    return (data[:1] + struct.pack("<Q", len(packed)) + packed + data[9 + size :])[:largest]


def _mutate_json(data: bytes, largest: int, rng: random.Random) -> bytes:
    """Mutate a JSON file entry by entry half of the time, all others byte by byte."""
    try:
        record = json.loads(data[1:]) if rng.random() < 0.5 else None
    except (ValueError, RecursionError):
        record = None
    return atheris.Mutate(data, largest) if record is None else (data[:1] + json.dumps(altered(record, rng)).encode())[:largest]


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
    atheris.Fuzz()
