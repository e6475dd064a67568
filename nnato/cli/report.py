"""`nnato report`."""

from __future__ import annotations

from pathlib import Path

import click

from nnato.cli import common


@common.command("report", keep=False)
@click.argument("folder", required=False, type=click.Path(path_type=Path), default=Path("nnato-demo"))
@common.json_option
def command(folder: Path, as_json: bool) -> None:
    """One HTML page of the results in FOLDER (by default nnato-demo): tables, figures, search, and the commands that redo them.

    It is written into the folder, needs no network, and each of its numbers names its place in the JSON files beside it.

    \b
    Examples:
      nnato report
      nnato report results/
    """
    from nnato.report import write_report

    path = write_report(folder.expanduser())
    if as_json:
        common.print_json({}, None, {"path": str(path), "bytes": path.stat().st_size})
        return
    common.say(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")
