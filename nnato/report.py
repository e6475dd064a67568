"""One HTML page of the results in a folder: every JSON file as tables, the figures, and how to redo it all.

Nothing is computed here. Each number of the page is one number of one JSON file, and says which: its path stands in `data-path`, its
full value in `data-value`. The page needs no network and loads nothing.
"""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnato.errors import FileFormatError, NnatoError
from nnato.pages import write
from nnato.storage import provenance, read_metadata

FILE = "report.html"
MOST_ROWS = 3000
"""Rows of a table that are shown; a page with more is slow on a phone."""
MOST_BYTES = 32_000_000
"""Size of a file that is read."""
INTERVAL = {"value", "low", "high"}
NAMES = ("source", "target", "positions", "layer", "feature", "rank", "name")
"""What tells the rows of a table apart, and is repeated in tables within them."""


@dataclass(frozen=True)
class Cell:
    """One number or text of a table.

    Attributes:
        text: As shown.
        path: Where it is from, for example `fit.json[0].r2.uniform`; empty for what names a row.
        value: In full, as JSON.
        order: What a column is sorted by.
    """

    text: str
    path: str
    value: str
    order: float | str


@dataclass
class Table:
    """Records of one JSON file.

    Attributes:
        title: What they are.
        file: The JSON file, relative to the folder.
        columns: Heads, in order.
        rows: Cells by head, for each record.
        left_out: What the records hold besides, by name, with its size.
        more: How many rows are not shown.
    """

    title: str
    file: str
    columns: dict[str, None] = field(default_factory=dict)
    rows: list[dict[str, Cell]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    more: int = 0


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        tables: Of all JSON files.
        figures: Names and `data:` addresses of pictures.
        runs: Command, file and provenance of each file that redoes a run.
        artefacts: Name, kind, model and text of each of nnato's files.
        unread: Files that could not be read, with the reason.
    """

    tables: list[Table]
    figures: list[tuple[str, str]]
    runs: list[dict[str, Any]]
    artefacts: list[dict[str, Any]]
    unread: dict[str, str]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a folder of results.

    Args:
        folder: What `--out` of some commands named; folders in it are read, too.

    Returns:
        The page.

    Raises:
        FileFormatError: There is no such folder, or it holds no results.
        OutputError: The page cannot be written.
    """
    contents = collect(folder)
    if not contents.tables and not contents.figures:
        raise FileFormatError(f"{folder} holds no results (JSON files or figures): give the --out folder of a command")
    return write(folder / FILE, "report.html", name=folder.resolve().name, contents=contents, made=provenance())


def collect(folder: Path) -> Contents:
    """Read what a folder holds.

    Raises:
        FileFormatError: There is no such folder.
    """
    if not folder.is_dir():
        raise FileFormatError(f"{folder} is no folder: give the --out folder of a command")
    found = Contents([], [], [], [], {})
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = path.relative_to(folder).as_posix()
        try:
            _take(path, name, found)
        except (NnatoError, ValueError, OSError, RecursionError) as error:  # what readers of JSON, TOML and text raise
            found.unread[name] = str(error)
    return found


def _take(path: Path, name: str, found: Contents) -> None:
    suffix = path.suffix
    if suffix in (".json", ".toml", ".png", ".svg") and path.stat().st_size > MOST_BYTES:
        raise FileFormatError(f"larger than {MOST_BYTES // 1_000_000} MB")
    if suffix == ".json":
        found.tables.extend(tables_of(name, json.loads(path.read_text())))
    elif suffix in (".png", ".svg"):
        kind = {".png": "image/png", ".svg": "image/svg+xml"}[suffix]
        found.figures.append((name, f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"))
    elif suffix == ".toml":
        values = tomllib.loads(path.read_text())
        if isinstance(values.get("command"), str):
            found.runs.append({"file": name, "command": values["command"], "provenance": dict(values.get("provenance", {}))})
    elif suffix == ".safetensors":
        about = read_metadata(path)
        details = about.get("details") or {}
        model, text = (about.get(key) or details.get(key) or {} for key in ("model", "text"))
        found.artefacts.append({"file": name, "kind": about["kind"], "model": model, "text": text})


def tables_of(name: str, value: Any) -> list[Table]:
    """The tables in a JSON file.

    Lists of records become tables, and so do records by name; an interval is one cell; single values share a row.

    Args:
        name: The file.
        value: What it holds.
    """
    tables: dict[str, Table] = {}
    if isinstance(value, list):
        _add_records(tables, name, "", enumerate(value), name, {})
    elif isinstance(value, dict):
        flat = {key: one for key, one in value.items() if not _is_records(one)}
        if flat:
            _add_records(tables, name, "", [(None, flat)], name, {})
        for key, one in value.items():
            if _is_records(one):
                _add_records(tables, name, key, _entries(one), f"{name}.{key}", {})
    return [table for table in tables.values() if table.rows]


def _is_records(value: Any) -> bool:
    """Whether a value is a list of records, or records by name."""
    members = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    return bool(members) and all(isinstance(one, dict) and not _is_interval(one) for one in members)


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == INTERVAL


def _entries(value: Any) -> Iterator[tuple[int | str, Any]]:
    return enumerate(value) if isinstance(value, list) else iter(value.items())


def _add_records(tables: dict[str, Table], file: str, title: str, entries: Any, path: str, above: Mapping[str, Cell]) -> None:
    table = tables.setdefault(title, Table(title, file))
    for key, record in entries:
        if not isinstance(record, dict):
            continue
        where = path if key is None else f"{path}[{json.dumps(key)}]"
        row = dict(above)
        if isinstance(key, str):
            row[title.split(" · ")[-1]] = Cell(key, "", json.dumps(key), key)
        within: list[tuple[str, Any, str]] = []
        for head, value, place in _leaves(record, "", where):
            if _is_records(value):
                within.append((head, value, place))
            elif (cell := _cell(value, place)) is not None:
                row[head] = cell
            else:
                table.left_out[head] = _size(value)
        if len(table.rows) < MOST_ROWS:
            table.rows.append(row)
            table.columns |= dict.fromkeys(row)
        else:
            table.more += 1
        names = {**above, **{head: cell for head, cell in row.items() if head in NAMES or not cell.path}}
        for head, value, place in within:
            _add_records(tables, file, f"{title} · {head}" if title else head, _entries(value), place, names)


def _leaves(record: Mapping[str, Any], head: str, path: str) -> Iterator[tuple[str, Any, str]]:
    for key, value in record.items():
        name = f"{head} · {key}" if head else key
        place = f"{path}.{key}" if key.isidentifier() else f"{path}[{json.dumps(key)}]"
        if isinstance(value, dict) and not _is_interval(value) and not _is_records(value):
            yield from _leaves(value, name, place)
        else:
            yield name, value, place


def _cell(value: Any, path: str) -> Cell | None:
    """A value as a cell; None for lists that are no part of a table."""
    if _is_interval(value):
        text = _number(value["value"])
        if value["low"] is not None and value["high"] is not None:
            text += f" [{_number(value['low'])}, {_number(value['high'])}]"
        return Cell(text, path, json.dumps(value), _order(value["value"]))
    if isinstance(value, list):
        if len(value) > 8 or any(isinstance(one, dict | list) for one in value):
            return None
        return Cell(", ".join(map(_number, value)), path, json.dumps(value), str(value))
    return Cell(_number(value), path, json.dumps(value), _order(value))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _order(value: Any) -> float | str:
    if isinstance(value, bool | int | float):
        return float(value)
    return "" if value is None else str(value)


def _size(value: Any) -> str:
    parts = []
    while isinstance(value, list):
        parts.append(str(len(value)))
        value = value[0] if value else None
    return " × ".join(parts)
