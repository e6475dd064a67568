"""`nnato mlsae serve`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato.cli import common
from nnato.cli.opening import Opened, sae_options
from nnato.cli.tables import new_table

if TYPE_CHECKING:
    from nnato.serving import Explorer
    from nnato.statistics import Progress


@common.command("serve")
@sae_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; any other than this machine's own is open to all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0: any that is free.")
@click.option(
    "--examples", type=click.Path(path_type=Path), help="Folder of nnato mlsae examples --out.  [default: SAE, if there are some]"
)
@click.option("--prompt", help="The prompt that the page opens with.  [default: that of the paper's figures]")
@click.option("--dry-run", is_flag=True, help="Answer every route once, without a server, and end.")
@common.json_option
def serve(as_json: bool, host: str, port: int, examples: Path | None, prompt: str | None, dry_run: bool, **options: Any) -> None:
    """A page in the browser to type prompts in: the latents of SAE by layer, where one is active, and what adding it does.

    The model stays loaded, requests are answered one at a time, and nothing is kept of a prompt. It listens on this machine only, and there
    is no password: whoever has an account there can use it. Top examples are shown if nnato mlsae examples SAE --out SAE was run before.
    Behind a lens, the way back to the residual stream is fitted to the text first.

    \b
    Examples:
      nnato mlsae serve mlsae/
      nnato mlsae serve mlsae/ --port 8080 --examples examples/
    """
    from nnato.serving import PageServer, rehearse

    if dry_run:
        with common.progress_bar() as progress:
            opened, explorer = _open(options, examples, prompt, progress)
        rows = [{"route": route, "status": answer.status, "bytes": len(answer.packed())} for route, answer in rehearse(explorer)]
        _show(opened, rows, as_json)
        return
    with PageServer(host, port) as server:
        if not server.address.loopback:
            click.echo(f"Warning: {host} can be reached from other machines, and there is no password", err=True)
        with common.progress_bar() as progress:
            opened, explorer = _open(options, examples, prompt, progress)
        if as_json:
            opened.print_json(None, {"url": server.address.url})
        else:
            common.say(f"open {server.address.url} in a browser; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
            server.answer(explorer)


def _open(options: dict[str, Any], examples: Path | None, prompt: str | None, progress: Progress) -> tuple[Opened, Explorer]:
    from nnato.fidelity import backward_maps
    from nnato.prompts import EXAMPLE
    from nnato.serving import Explorer
    from nnato.top_examples import FILE, read_examples

    opened = Opened(options, progress)
    beside = Path(options["sae"].removeprefix("mlsae:")).expanduser()
    if examples is None and (beside / FILE).is_file():
        examples = beside
    known = None if examples is None else read_examples(examples, opened.sae)
    back = None
    if opened.sae.lens is not None:
        maps = backward_maps(opened.model, opened.sae, opened.blocks(), progress=progress)
        back = {site: one.map for site, one in maps.items()}
    opening = EXAMPLE if prompt is None else prompt
    return opened, Explorer(opened.model, opened.sae, back=back, examples=known, opening=opening)


def _show(opened: Opened, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        opened.print_json(None, rows)
    else:
        table = new_table("Every route, answered once", ("route", "status", "bytes"))
        for row in rows:
            table.add_row(row["route"], str(row["status"]), f"{row['bytes']:,}")
        common.console().print(table)
    if any(row["status"] != 200 for row in rows):
        click.get_current_context().exit(1)
