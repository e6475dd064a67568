"""Shards of one text put together again: the moments of a run that several jobs shared."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnato.accumulation import FILE, KIND, Accumulated, check_finished, load_moments
from nnato.errors import FileFormatError, MomentsError, SiteError
from nnato.moments import Moments
from nnato.shards import Shard
from nnato.sites import make_pair
from nnato.statistics import Progress
from nnato.storage import Metadata, check_space, exclusive, prepare_folder, provenance, read_metadata, require, write_artifact
from nnato.transport_moments import TransportMoments, total_of

MEDIAN_TOLERANCE = 1e-3
"""Relative difference of two shards' median norms up to which their residuals may be the same: devices of other kinds round differently."""

Job = tuple[tuple[str, ...], str, str]
"""Folders of all shards, the name of a part, and the folder it goes to."""
Run = Callable[[list[Job]], Iterable[int]]
"""Maps `merge_part` over jobs, in their order."""


def merge_shards(folders: Iterable[str | Path], out: str | Path, run: Run | None = None, progress: Progress | None = None) -> Accumulated:
    """Put all shards of a text together: what one run over the whole text gives, up to the order of addition.

    Sums are added part by part, and within a part as a binary tree of shards, so few parts are in memory at a time.

    Args:
        folders: What `accumulate(…, shard=…)` or `nnato accumulate --shard` wrote: every shard once, in any order.
        out: A folder for the result. If it holds this result already, that is read.
        run: Where parts are added up, e.g. on a cluster; by default one after the other, here.
        progress: Told of parts done.

    Returns:
        The moments of the whole text.

    Raises:
        MomentsError: A shard is missing, there twice, not finished, or of another run; or `out` holds other moments.
        FileFormatError: A file is missing or damaged.
        OutputError: `out` cannot be written, or another process is writing it.
    """
    shards = read_shards(folders, FILE, KIND, check_finished)
    folder = destination(shards, out)
    with exclusive(folder / FILE):
        return _put_together(shards, folder, run, progress)


def merge_locked(folders: Iterable[Path], folder: Path, run: Run, progress: Progress | None) -> Accumulated:
    """As `merge_shards`, by a process that holds the lock of the result already."""
    return _put_together(read_shards(folders, FILE, KIND, check_finished), folder, run, progress)


def merge_part(job: Job) -> int:
    """Add up one part of all shards and put it into its file; the number of its rows.

    Args:
        job: What to do, as plain data, so that it can be done anywhere.
    """
    folders, part, folder = job
    opened = [_opened(Path(one), read_metadata(Path(one) / FILE, KIND)) for one in folders]
    total = _added_up(opened, part)
    TransportMoments(opened[0].pairs, opened[0].d_model, folder=Path(folder)).put(part, total)
    return total.n


def _put_together(shards: Sequence[tuple[Path, Metadata]], folder: Path, run: Run | None, progress: Progress | None) -> Accumulated:
    file = folder / FILE
    if is_merged(file, KIND, shards):
        return load_moments(file)
    opened = [_opened(*shard) for shard in shards]
    files = {(shard, key): shard / f"{key}.safetensors" for shard, metadata in shards for key in metadata["files"]}
    parts = sorted({total_of(key) for _, key in files})
    largest = {part: max(path.stat().st_size for (_, key), path in files.items() if total_of(key) == part) for part in parts}
    check_space(folder, sum(largest.values()), "choose another --out")
    # The null's sums stay with the checkpoint, as in a run that was not shared out; all others get their files first.
    jobs = [(tuple(str(shard) for shard, _ in shards), part, str(folder)) for part in parts if part != "shuffled"]
    rows: dict[str, int] = {}
    for (_, part, _), n in zip(jobs, (run or _here)(jobs), strict=True):
        rows[part] = n
        if progress is not None:
            progress("merging", len(rows), len(jobs))
    shuffled = _added_up(opened, "shuffled") if "shuffled" in parts else None
    tensors = {} if shuffled is None else {"shuffled.mean": shuffled.mean, "shuffled.scatter": shuffled.scatter}
    inside = {} if shuffled is None else {"shuffled": shuffled.n}
    write_artifact(file, KIND, tensors, joined([metadata for _, metadata in shards]) | {"rows": inside, "files": rows})
    return load_moments(file)


def _here(jobs: list[Job]) -> Iterable[int]:
    return map(merge_part, jobs)


def _opened(folder: Path, shard: Metadata) -> TransportMoments:
    """The moments of a shard, all of them in their files."""
    try:
        moments = TransportMoments((make_pair(*pair) for pair in shard["pairs"]), shard["d_model"], folder=folder)
        moments.restore({}, shard)
    except (KeyError, TypeError, ValueError, SiteError) as error:
        raise FileFormatError(f"{folder / FILE} is inconsistent ({type(error).__name__}: {error}); make it again") from None
    return moments


def _added_up(shards: Sequence[TransportMoments], part: str) -> Moments:
    """The sum of everything that belongs to a part. Sums of equally many shards meet, so the logarithm of their number is in memory."""
    tree: list[tuple[int, Moments]] = []
    for shard in shards:
        for key in sorted(key for key in shard.rows if total_of(key) == part):
            tree.append((1, shard.whole_part(key)))
            while len(tree) > 1 and tree[-2][0] == tree[-1][0]:
                (leaves, left), (_, right) = tree[-2:]
                tree[-2:] = [(2 * leaves, left.merge(right))]
    return functools.reduce(Moments.merge, [moments for _, moments in tree])


# ---- do they belong together? ------------------------------------------------------------------------------------------


def read_shards(
    folders: Iterable[str | Path], name: str, kind: str, check: Callable[[Path, Metadata], None]
) -> list[tuple[Path, Metadata]]:
    """Folder and metadata of every shard of one run, in their order.

    Args:
        folders: Every shard once, in any order.
        name: The file in each of them.
        kind: What it holds.
        check: Refuses metadata that lack something, or of a run that has not ended.

    Raises:
        MomentsError: A shard is missing, there twice, not finished, or of another run.
        FileFormatError: A file is missing or damaged.
    """
    found: dict[Shard, tuple[Path, Metadata]] = {}
    for given in folders:
        folder = Path(given).expanduser()
        file = folder / name
        metadata = read_metadata(file, kind)
        check(file, metadata)
        shard = _shard_of(file, metadata)
        if shard in found:
            raise MomentsError(f"shard {shard} is there twice, in {found[shard][0]} and {folder}: give each once")
        found[shard] = folder, metadata
    if not found:
        raise MomentsError("no shards to merge: give the folders that --shard wrote")
    (first, (one, wanted)), *others = found.items()
    for shard, (folder, metadata) in others:
        for part in ("request", "model", "text"):
            if metadata[part] != wanted[part]:
                raise MomentsError(
                    f"{folder} is a shard of another run than {one}: the {part} differs ({_difference(metadata, wanted, part)})"
                )
        if shard.count != first.count:
            raise MomentsError(f"{folder} is shard {shard}, {one} is shard {first}: they share out a text differently")
        _check_medians(folder, metadata["medians"], one, wanted["medians"])
    if missing := [str(Shard(number, first.count)) for number in range(1, first.count + 1) if Shard(number, first.count) not in found]:
        raise MomentsError(f"{len(missing)} of {first.count} shards are missing: {', '.join(missing[:8])}; the others are no whole text")
    return [found[Shard(number, first.count)] for number in range(1, first.count + 1)]


def destination(shards: Sequence[tuple[Path, Metadata]], out: str | Path) -> Path:
    """The folder for what is merged.

    Raises:
        MomentsError: It holds one of the shards.
        OutputError: It cannot be written.
    """
    folder = prepare_folder(Path(out).expanduser())
    if folder.resolve() in [shard.resolve() for shard, _ in shards]:
        raise MomentsError(f"{folder} holds one of the shards: choose another --out")
    return folder


def is_merged(file: Path, kind: str, shards: Sequence[tuple[Path, Metadata]]) -> bool:
    """Whether a file holds the shards put together already.

    Raises:
        MomentsError: It holds something else.
    """
    if not file.exists():
        return False
    there = read_metadata(file, kind)
    if there.get("request") != shards[0][1]["request"] or "shard" in there:
        raise MomentsError(f"{file} holds {kind} of another model, text or request; choose another --out, or delete it")
    return True


def _shard_of(file: Path, metadata: Metadata) -> Shard:
    if "shard" not in metadata:
        raise MomentsError(f"{file} holds a whole text, not a shard of one")
    label = metadata["shard"]
    require(isinstance(label, list) and len(label) == 2 and all(type(part) is int for part in label), file, "shard is not two numbers")
    require(not metadata.get("rows"), file, "its sums are not in files of their own; the command that began it puts them there")
    return Shard(*label)


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    """The first entry in which two records differ, in words."""
    mine, theirs = one[name], other[name]
    key = next(key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key))
    return f"{key}: {str(mine.get(key))[:80]}, not {str(theirs.get(key))[:80]}"


def _check_medians(folder: Path, mine: Mapping[str, float], one: Path, wanted: Mapping[str, float]) -> None:
    if set(mine) != set(wanted) or not all(math.isclose(mine[site], wanted[site], rel_tol=MEDIAN_TOLERANCE) for site in wanted):
        raise MomentsError(
            f"{folder} and {one} measured other norms of the same first batch, so other sinks: run the shards on devices that compute alike"
        )


def joined(shards: Sequence[Metadata]) -> Metadata:
    """Metadata of the whole run, from those of all shards in their order."""
    excluded: Counter[str] = Counter()
    counts: Counter[int] = Counter()
    texts: dict[int, str] = {}
    for shard in shards:
        excluded.update(shard["excluded"])
        for token, count, text in shard["sinks"]:
            counts[token] += count
            texts[token] = text
    last = {key: value for key, value in shards[-1].items() if key not in ("shard", "schema", "kind")}
    return last | {
        "medians": shards[0]["medians"],
        "excluded": dict(excluded),
        "sinks": [[token, count, texts[token]] for token, count in counts.most_common()],
        "provenance": provenance() | {"shards": len(shards)},
    }
