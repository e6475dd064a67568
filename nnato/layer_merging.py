"""Layer statistics of a text that several jobs shared, put together: what one pass over the whole text gives."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nnato.errors import DictionaryError, FileFormatError, SiteError
from nnato.layer_stats import LayerStats, Reconstruction
from nnato.merging import destination, is_merged, joined, read_shards
from nnato.multilayer import FILE, KIND, check_layer_file, stored_sums, sums_to_store
from nnato.sites import ResidualSite
from nnato.statistics import Progress
from nnato.storage import exclusive, read_artifact, write_artifact


def merge_layer_shards(folders: Iterable[str | Path], out: str | Path, progress: Progress | None = None) -> Path:
    """Put all shards together, up to the order of addition; neither model nor SAE is needed.

    Args:
        folders: What `layer_activity(…, shard=…)` or `nnato mlsae layers --shard` wrote: every shard once, in any order.
        out: A folder for the result. If it holds this result already, that stays. `layer_activity` with this folder finds the text read.
        progress: Told of shards done.

    Returns:
        The file.

    Raises:
        MomentsError: A shard is missing, there twice, not finished, or of another run; or `out` holds other statistics.
        FileFormatError: A file is missing or damaged.
        OutputError: `out` cannot be written, or another process is writing it.
    """
    shards = read_shards(folders, FILE, KIND, check_layer_file)
    file = destination(shards, out) / FILE
    with exclusive(file):
        if is_merged(file, KIND, shards):
            return file
        folds: dict[int, LayerStats] = {}
        errors: dict[int, Reconstruction] = {}
        for number, (folder, _) in enumerate(shards):
            if progress is not None:
                progress("merging", number, len(shards))
            found = _sums_of(folder / FILE)
            for fold, stats in found[0].items():
                folds[fold] = folds[fold].merge(stats) if fold in folds else stats
                errors[fold] = errors[fold].merge(found[1][fold]) if fold in errors else found[1][fold]
        tensors, tokens = sums_to_store(folds, errors)
        write_artifact(file, KIND, tensors, joined([metadata for _, metadata in shards]) | {"tokens": tokens})
        if progress is not None:
            progress("merging", len(shards), len(shards))
    return file


def _sums_of(file: Path) -> tuple[dict[int, LayerStats], dict[int, Reconstruction]]:
    tensors, metadata = read_artifact(file, KIND)
    try:
        sites = [ResidualSite.parse(site) for site in metadata["sae"]["sites"]]
        return stored_sums(tensors, metadata, sites, metadata["sae"]["dictionary"]["latents"])
    except (KeyError, TypeError, ValueError, AttributeError, SiteError, DictionaryError) as error:
        raise FileFormatError(f"{file} is inconsistent ({type(error).__name__}: {error}); make it again") from None
