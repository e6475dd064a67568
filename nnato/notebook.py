"""How results look in a notebook: small HTML tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> str:
    """A table in HTML, everything in it escaped.

    Args:
        title: Caption.
        columns: Heads.
        rows: Cells; what is not text is shown by `cell`.
        note: A line below.
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell(value))}</td>" for value in row) + "</tr>" for row in rows)
    below = f"<p><small>{escape(note)}</small></p>" if note else ""
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def cell(value: Any) -> str:
    """A cell in words: intervals as `0.92 [0.91, 0.93]`, floats with three decimals, counts with separators, NaN as a dash."""
    if hasattr(value, "low"):
        ends = f" [{cell(value.low)}, {cell(value.high)}]" if value.low == value.low else ""
        return cell(value.value) + ends
    if isinstance(value, float):
        return f"{value:.3f}" if value == value else "–"
    return f"{value:,}" if isinstance(value, int) else str(value)
