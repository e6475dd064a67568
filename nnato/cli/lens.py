"""`nnato lens`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnato.cli import common
from nnato.cli.running import Group
from nnato.cli.tables import new_table


@click.group("lens", cls=Group)
def command() -> None:
    """The tuned lens: residuals of every layer in the coordinates of the last one (arXiv 2303.08112)."""


@common.command("fit")
@click.argument("moments", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="The model.  [default: that of the moments, else the embedded one]")
@common.text_options
@common.batch_option
@common.model_options
@click.option("--kl-steps", type=int, default=0, show_default=True, help="Then train by KL for so many steps.")
@click.option("--lr", type=float, default=1e-4, show_default=True, help="Rate of that training.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("lens"), show_default=True, help="Folder for the result.")
@common.json_option
def _fit(
    moments: Path | None,
    model: str | None,
    batch_size: int,
    device: str | None,
    dtype: str,
    kl_steps: int,
    lr: float,
    out: Path,
    as_json: bool,
    **text: Any,
) -> None:
    """Fit a lens in closed form: the transport operator from each site to the last block, by ridge that shrinks to the identity.

    MOMENTS is a folder of nnato accumulate with pairs that lead to the last block; without it, text is streamed through the model once.

    \b
    Examples:
      nnato lens fit
      nnato lens fit --model smollm2 --kl-steps 200 --out lens-smollm2/
    """
    from nnato.accumulation import accumulate_cached, default_corpus, load_moments
    from nnato.lens import fit_lens, lens_pairs
    from nnato.lens_training import train_lens
    from nnato.models import describe

    common.new_folder(out)
    with common.progress_bar() as progress:
        accumulated = None if moments is None else load_moments(moments)
        loaded = None
        if accumulated is None or kl_steps:
            loaded = common.load(model or (accumulated.model["name"] if accumulated else None), device, dtype, progress)
            info = describe(loaded)
            corpus = common.make_corpus(default_corpus(info), **text)
            if accumulated is None:
                pairs = lens_pairs(info.blocks)
                accumulated = accumulate_cached(loaded, corpus, pairs, batch_size=batch_size, progress=progress)
        lens, fits = fit_lens(accumulated, progress=progress)
        if kl_steps and loaded is not None:
            lens = train_lens(loaded, lens, corpus, steps=kl_steps, lr=lr, progress=progress)
    path = lens.save(out)
    record = {
        "path": str(path),
        "sites": [site.key for site in lens.sites],
        "r2": {str(one.operator.source): one.r2["variance_weighted"] for one in fits},
        "kl_improved": lens.details.get("kl_improved"),
    }
    if as_json:
        common.print_json(accumulated.model, accumulated.text, record)
        return
    table = new_table("R² of the last block's residual on test documents (variance-weighted)", ("from", "R²"))
    for one in fits:
        interval = one.r2_intervals["variance_weighted"]
        table.add_row(str(one.operator.source), f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
    common.console().print(table)
    if kl_steps:
        better = len(lens.details["kl_improved"])
        common.say(f"training by KL did better on validation documents at {better} of {len(fits)} sites; the best state of each is kept")
    common.say(f"{path}. Next: nnato lens evaluate {out}")


@common.command("load")
@click.argument("reference")
@click.option("--model", help="The model it is for.  [default: the embedded one]")
@common.model_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("lens"), show_default=True, help="Folder for the result.")
@common.json_option
def _load(reference: str, model: str | None, device: str | None, dtype: str, out: Path, as_json: bool) -> None:
    """Take over a lens in the format of the tuned-lens package: a folder with params.pt and config.json.

    Nothing in it is executed. Its translator i is for the input of block i.

    \b
    Example:
      nnato lens load my-lens/ --model gpt2 --out lens-gpt2/
    """
    from nnato.lens import import_lens
    from nnato.models import describe

    common.new_folder(out)
    with common.progress_bar() as progress:
        info = describe(common.load(model, device, dtype, progress))
    lens = import_lens(reference, info.blocks, info.d_model)
    path = lens.save(out)
    if as_json:
        common.print_json(info.fingerprint(), None, {"path": str(path), "sites": [site.key for site in lens.sites]})
        return
    common.say(f"{path}. Next: nnato lens evaluate {out}")


@common.command("evaluate")
@click.argument("lens", type=click.Path(path_type=Path))
@click.option("--model", help="The model.  [default: the one it was fitted on]")
@click.option("--sites", help="Where, such as 3,9,15.  [default: everywhere]")
@click.option("--sequences", type=int, default=8, show_default=True, help="Test sequences to read.")
@common.text_options
@common.model_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder for numbers and a figure.")
@common.json_option
def _evaluate(
    lens: Path,
    model: str | None,
    sites: str | None,
    sequences: int,
    device: str | None,
    dtype: str,
    out: Path | None,
    as_json: bool,
    **text: Any,
) -> None:
    """KL from the model's predictions to those of LENS and of the logit lens, site by site, on test documents.

    \b
    Example:
      nnato lens evaluate lens/ --sequences 16 --out lens-scores/
    """
    from nnato.accumulation import default_corpus, tokenize
    from nnato.lens import Lens, logit_lens
    from nnato.lens_training import evaluate_lens
    from nnato.models import describe
    from nnato.sites import parse_sites

    folder = common.output_folder(out)
    loaded_lens = Lens.load(lens)
    with common.progress_bar() as progress:
        loaded = common.load(model or loaded_lens.model.get("name"), device, dtype, progress)
        info = describe(loaded)
        blocks = tokenize(loaded, common.make_corpus(default_corpus(info), **text), progress)
        lenses = {"lens": loaded_lens, "logit lens": logit_lens(info.blocks, info.d_model)}
        chosen = None if sites is None else parse_sites(sites, info.blocks)
        scores = evaluate_lens(loaded, lenses, blocks, sites=chosen, sequences=sequences, progress=progress)
    record = {
        name: [{"site": one.site.key, "kl": one.kl.to_json(), "agreement": one.agreement} for one in found]
        for name, found in scores.items()
    }
    if folder is not None:
        from nnato.layer_plots import lens_figure

        common.write_json(folder / "lens.json", record)
        lens_figure(scores, folder / "lens.png", info.name)
    if as_json:
        common.print_json(info.fingerprint(), blocks.fingerprint, record)
        return
    columns = ("site", "logit lens", "lens", "logit lens agrees", "lens agrees")
    table = new_table("KL(model ‖ lens), nats per token; same most likely token", columns)
    for one, plain in zip(scores["lens"], scores["logit lens"], strict=True):
        interval = f"{one.kl.value:.3f} [{one.kl.low:.3f}, {one.kl.high:.3f}]"
        table.add_row(str(one.site), f"{plain.kl.value:.3f}", interval, f"{plain.agreement:.0%}", f"{one.agreement:.0%}")
    common.console().print(table)


@common.command("export")
@click.argument("lens", type=click.Path(path_type=Path))
@click.option("--model", help="The model.  [default: the one it was fitted on]")
@common.model_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("tuned-lens"), show_default=True, help="Folder for the result.")
@common.json_option
def _export(lens: Path, model: str | None, device: str | None, dtype: str, out: Path, as_json: bool) -> None:
    """Write LENS in the format of the tuned-lens package.

    \b
    Example:
      nnato lens export lens/ --out tuned-lens/
    """
    from nnato.lens import Lens, export_lens
    from nnato.models import describe

    loaded_lens = Lens.load(lens)
    with common.progress_bar() as progress:
        loaded = common.load(model or loaded_lens.model.get("name"), device, dtype, progress)
    info = describe(loaded)
    loaded_lens.check_fits(info, loaded_lens.sites)
    folder = export_lens(loaded_lens, out, loaded)
    if as_json:
        common.print_json(info.fingerprint(), None, {"path": str(folder)})
        return
    common.say(f"params.pt and config.json in {folder}")


for one in (_fit, _load, _evaluate, _export):
    command.add_command(one)
