"""`nnato info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnato.cli import common


@common.command("info")
@click.argument("what", required=False)
@common.json_option
def command(what: str | None, as_json: bool) -> None:
    """Say what WHAT is: a file of nnato, a folder of moments, or a model (by default the embedded one).

    \b
    Examples:
      nnato info moments/
      nnato info operators/5-10.safetensors
      nnato info google/gemma-2-2b
    """
    from nnato.accumulation import FILE
    from nnato.errors import FileFormatError
    from nnato.storage import read_metadata

    path = Path(what).expanduser() if what else None
    if path is not None and path.is_dir() and (path / FILE).exists():
        path = path / FILE
    if path is not None and path.is_dir() and not (path / "config.json").exists():
        inside = min(path.glob("*.safetensors"), default=path / "FILE.safetensors")
        raise FileFormatError(f"{path} holds neither moments nor a model (config.json): name one of its files, for example {inside}")
    record: dict[str, Any]
    if path is not None and path.is_file() and path.suffix == ".safetensors":
        record = read_metadata(path)
        record["bytes"] = path.stat().st_size
        model, text = (
            record.get("model") or record.get("details", {}).get("model"),
            record.get("text") or record.get("details", {}).get("text"),
        )
    else:
        record, text = _model(what), None
        model = record
    if as_json:
        common.print_json(model or {}, text, record)
        return
    from rich.pretty import Pretty

    common.console().print(Pretty(record, max_length=24))


def _model(name: str | None) -> dict[str, Any]:
    from nnato.models import describe
    from nnato.sites import default_pairs, default_sites

    with common.progress_bar() as progress:
        info = describe(common.load(name, "cpu", "float32", progress))
    defaults = {
        "default_sites": [site.key for site in default_sites(info.blocks)],
        "default_pairs": [f"{source}:{target}" for source, target in default_pairs(info.blocks)],
    }
    return info.fingerprint() | defaults
