"""`nnato info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnato.cli import common
from nnato.cli.tables import documents_of

MOST_PAIRS = 12
"""Pairs that are named, at most."""


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
    from nnato.accumulation import FILE, KIND
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
    if path is not None and record.get("kind") == KIND:
        _show_moments(record, path)
        return
    from rich.pretty import Pretty

    common.console().print(Pretty(record, max_length=24))


def _show_moments(record: dict[str, Any], file: Path) -> None:
    """Moments in a few lines."""
    from nnato.storage import require_entries

    require_entries(record, file, pairs=list, files=dict, cursor=int, batches=int, model=dict, text=dict, provenance=dict)
    require_entries(record["model"], file, name=str, blocks=int, d_model=int, dtype=str)
    require_entries(record["text"], file, source=str, context=int, documents=int, split_tokens=dict, folds=int)
    model, text, pairs = record["model"], record["text"], record["pairs"]
    tokens = ", ".join(f"{count:,} {split}" for split, count in text["split_tokens"].items())
    some = ", ".join(f"{source}:{target}" for source, target in pairs[:MOST_PAIRS]) + ", …" * (len(pairs) > MOST_PAIRS)
    parts = [part for part in (file.with_name(f"{name}.safetensors") for name in record["files"]) if part.exists()]
    size = sum(path.stat().st_size for path in (file, *parts))
    common.say(f"moments in {file.parent}, {size / 1e6:,.1f} MB on disk")
    if record["cursor"] < record["batches"]:
        common.say(f"not finished: {record['cursor']} of {record['batches']} forward passes; the command that began it resumes it")
    if "shard" in record:
        common.say("one shard of a text: nnato merge puts all its shards together")
    common.say(f"model:   {model['name']}, {model['blocks']} blocks, width {model['d_model']}, {model['dtype']}")
    common.say(f"text:    {text['source']}, {documents_of(text)}, sequences of {text['context']} tokens")
    common.say(f"tokens:  {tokens}, special ones included")
    common.say(f"pairs:   {len(pairs)}: {some}")
    common.say(f"folds:   {text['folds']} of the train and of the test documents")
    common.say(f"made by: {record['provenance'].get('command', 'unknown')}")
    common.say("everything else: --json")


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
