from __future__ import annotations

import pytest

from nnato.errors import SiteError
from nnato.sites import ResidualSite, default_pairs, default_sites, grid, make_pair, pairs_from_leaps, parse_leaps, parse_pairs, parse_sites


@pytest.mark.parametrize(
    ("value", "site"),
    [(5, 5), ("5", 5), ("embed", -1), ("blocks.5.hook_resid_post", 5), ("blocks.5.hook_resid_pre", 4), ("blocks.0.hook_resid_pre", -1)],
)
def test_parse_reads_indices_embed_and_hook_names(value, site):
    assert ResidualSite.parse(value, 6) == site


@pytest.mark.parametrize("value", [-1, "-1", "x", "", "1.5", "blocks.5.hook_mlp_out", True, 1.0, "٣"])
def test_parse_refuses_what_is_no_site(value):
    with pytest.raises(SiteError, match="is not a residual site"):
        ResidualSite.parse(value)


def test_parse_refuses_sites_of_other_models():
    with pytest.raises(SiteError, match=r"site 18 does not exist: the model has blocks 0 … 17"):
        ResidualSite.parse(18, 18)


def test_sites_print_and_sort():
    assert str(ResidualSite.EMBED) == "embed"
    assert ResidualSite.EMBED.key == "embed"
    assert ResidualSite(3).key == 3
    assert sorted([ResidualSite(0), ResidualSite.EMBED]) == [-1, 0]


def test_lists():
    assert parse_sites("all", 3) == (0, 1, 2)
    assert parse_sites("2,embed,2", 3) == (-1, 2)
    assert parse_pairs("1:2, embed:1", 3) == ((-1, 1), (1, 2))
    assert parse_leaps("1-3,8") == (1, 2, 3, 8)
    assert pairs_from_leaps(ResidualSite(1), (1, 2, 9), 4) == ((1, 2), (1, 3))
    assert grid([ResidualSite(2), ResidualSite(0), ResidualSite(1)]) == ((0, 1), (0, 2), (1, 2))


@pytest.mark.parametrize(("source", "target"), [(5, 5), (6, 5), ("0", "embed")])
def test_pairs_must_go_forward(source, target):
    with pytest.raises(SiteError, match="the source must come before the target"):
        make_pair(source, target, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_pairs("5", 8), "is not a pair: write source:target"),
        (lambda: parse_leaps("a-b"), "is not a leap"),
        (lambda: parse_leaps("²"), "is not a leap"),
        (lambda: parse_leaps("1-99999"), "is not a leap"),
        (lambda: parse_leaps("0"), "a leap is at least 1"),
        (lambda: parse_leaps("5-2"), "a leap is at least 1"),
        (lambda: pairs_from_leaps(ResidualSite(3), (1,), 4), "no block lies behind site 3"),
    ],
)
def test_bad_lists_say_what_is_wrong(call, message):
    with pytest.raises(SiteError, match=message):
        call()


@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 12, 18, 26, 30])
def test_defaults_exist_in_every_model_and_share_sites(blocks):
    sites, pairs = default_sites(blocks), default_pairs(blocks)
    assert sites[-1] == blocks - 1
    assert all(-1 <= source < target < blocks for source, target in pairs)
    assert pairs
    if blocks >= 6:
        assert {site for pair in pairs for site in pair} <= set(sites)


def test_defaults_of_the_embedded_model():
    assert default_pairs(18) == ((9, 12), (12, 17))
