"""Residual sites: places in the residual stream, by the names researchers use for them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nnato.errors import SiteError

_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


class ResidualSite(int):
    """A place in the residual stream: the output of block `0 … L-1`, or `embed`, the input of block 0.

    Sites are ordered as the forward pass reaches them, so `source < target` means what it says. `embed` is -1 inside, but
    plain negative integers are refused, since in Python they would count from the end.
    """

    EMBED: ResidualSite

    @staticmethod
    def parse(value: int | str | ResidualSite, blocks: int | None = None) -> ResidualSite:
        """Read a site from a block index, `"embed"`, or a SAELens / TransformerLens hook name.

        Args:
            value: `5`, `"5"`, `"embed"`, `"blocks.5.hook_resid_post"` or `"blocks.6.hook_resid_pre"` (which is site 5).
            blocks: Number of blocks of the model, to check the range.

        Raises:
            SiteError: The value names no site, or none of this model.
        """
        site = value if isinstance(value, ResidualSite) else _parse(value)
        if blocks is not None and site >= blocks:
            raise SiteError(f"site {site} does not exist: the model has blocks 0 … {blocks - 1} (and 'embed')")
        return site

    @property
    def key(self) -> int | str:
        """The site as it appears in JSON: the block index, or `"embed"`."""
        return "embed" if self == -1 else int(self)

    def __str__(self) -> str:
        return str(self.key)

    def __repr__(self) -> str:
        return f"ResidualSite({self})"


ResidualSite.EMBED = ResidualSite(-1)


def _parse(value: int | str) -> ResidualSite:
    if isinstance(value, str):
        text = value.strip()
        if text == "embed":
            return ResidualSite.EMBED
        if match := _HOOK.fullmatch(text):
            return ResidualSite(int(match[1]) - (match[2] == "pre"))
        if text.isascii() and text.isdigit():
            return ResidualSite(text)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return ResidualSite(value)
    raise SiteError(f"{value!r} is not a residual site: use a block index from 0, 'embed', or blocks.N.hook_resid_post")


def parse_sites(text: str, blocks: int) -> tuple[ResidualSite, ...]:
    """Read `"all"` (every block, without `embed`) or a comma-separated list of sites, sorted and without repetition."""
    if text.strip() == "all":
        return tuple(ResidualSite(block) for block in range(blocks))
    return tuple(sorted({ResidualSite.parse(part, blocks) for part in text.split(",")}))


Pair = tuple[ResidualSite, ResidualSite]


def make_pair(source: int | str, target: int | str, blocks: int | None = None) -> Pair:
    """A checked (source, target) pair.

    Raises:
        SiteError: A site does not exist, or the source is not before the target.
    """
    pair = ResidualSite.parse(source, blocks), ResidualSite.parse(target, blocks)
    if pair[0] >= pair[1]:
        raise SiteError(f"pair {pair[0]}:{pair[1]}: the source must come before the target")
    return pair


def parse_pairs(text: str, blocks: int) -> tuple[Pair, ...]:
    """Read a comma-separated list of `source:target`, e.g. `"5:10,embed:3"`."""
    pairs = []
    for part in text.split(","):
        source, colon, target = part.partition(":")
        if not colon:
            raise SiteError(f"{part!r} is not a pair: write source:target, for example 5:10")
        pairs.append(make_pair(source, target, blocks))
    return tuple(sorted(set(pairs)))


def parse_leaps(text: str) -> tuple[int, ...]:
    """Read leaps such as `"1-8"` or `"1,3,7"` (leap = target - source)."""
    leaps: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not all(piece.isascii() and piece.isdigit() and len(piece) < 5 for piece in ([first, last] if dash else [first])):
            raise SiteError(f"{part!r} is not a leap: write for example 1-8 or 1,3,7")
        leaps.update(range(int(first), int(last if dash else first) + 1))
    if not leaps or min(leaps) < 1:
        raise SiteError(f"leaps {text!r}: a leap is at least 1, since the source must come before the target")
    return tuple(sorted(leaps))


def pairs_from_leaps(source: ResidualSite, leaps: Iterable[int], blocks: int) -> tuple[Pair, ...]:
    """The pairs (source, source + leap) that exist in a model of so many blocks.

    Raises:
        SiteError: No such pair exists.
    """
    pairs = tuple((source, ResidualSite(source + leap)) for leap in leaps if source + leap < blocks)
    if not pairs:
        raise SiteError(f"no block lies behind site {source} at these leaps: the model has {blocks} blocks")
    return pairs


def grid(sites: Iterable[ResidualSite]) -> tuple[Pair, ...]:
    """All pairs source < target among sites."""
    ordered = sorted(set(sites))
    return tuple((source, target) for i, source in enumerate(ordered) for target in ordered[i + 1 :])


def default_sites(blocks: int) -> tuple[ResidualSite, ...]:
    """About seven sites spread over the depth, the last block included: what the demo and commands without --sites use."""
    return tuple(ResidualSite(block) for block in sorted({i * blocks // 6 for i in range(6)} | {blocks - 1}))


def default_pairs(blocks: int) -> tuple[Pair, ...]:
    """One pair across the middle of the model and one from there to its end (9:12 and 12:17 of 18 blocks)."""
    middle, late, last = ResidualSite(blocks // 2), ResidualSite(2 * blocks // 3), ResidualSite(blocks - 1)
    pairs = tuple((source, target) for source, target in ((middle, late), (late, last)) if source < target)
    return pairs or ((ResidualSite.EMBED, last),)
