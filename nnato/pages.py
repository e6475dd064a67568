"""HTML pages from the templates of this package; each is one file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnato.storage import atomic


def render(template: str, filters: Mapping[str, Callable[[Any], str]] | None = None, **values: Any) -> str:
    """Fill in a template. Values are escaped.

    Args:
        template: File in `nnato/templates`.
        filters: By the name under which the template knows them.
        values: By the names under which the template knows them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nnato"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)


def write(path: str | Path, template: str, filters: Mapping[str, Callable[[Any], str]] | None = None, **values: Any) -> Path:
    """Fill in a template and write the page; arguments as of `render`.

    Args:
        path: Where to write.
        template: As of `render`.
        filters: As of `render`.
        values: As of `render`.

    Returns:
        The path.

    Raises:
        OutputError: It cannot be written.
    """
    path = Path(path).expanduser()
    page = render(template, filters, **values)
    with atomic(path) as temporary:
        temporary.write_text(page)
    return path
