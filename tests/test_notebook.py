"""Results as HTML tables in notebooks: every number of a result, nothing of it as code."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest

from nnato import accumulate, fit, scaling_study, transport_efficiency
from nnato.intervals import Interval
from nnato.notebook import cell, html_table
from nnato.perplexity import ablate


class Cells(HTMLParser):
    """Texts of a table's cells, row by row."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, _):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def accumulated(model, corpus):
    return accumulate(model, corpus, [(0, 3), (1, 3)])


def test_every_result_shows_its_numbers(model, corpus, accumulated):
    fits = fit(accumulated)
    shown = Cells(fits[0]._repr_html_()).rows
    assert shown[0] == ["map", "variance_weighted", "uniform", "whitened"]
    assert shown[1] == ["operator", *(cell(interval) for interval in fits[0].r2_intervals.values())]
    assert ["identity", *(f"{value:.3f}" for value in fits[0].baselines["identity"].values())] in shown
    assert ["train", f"{accumulated.tokens['train']:,}"] in Cells(accumulated._repr_html_()).rows
    operator = Cells(fits[0].operator._repr_html_()).rows
    assert ["shape of W", "16 × 16"] in operator
    assert ["R² on test, uniform", f"{fits[0].r2['uniform']:.3f}"] in operator
    (result,) = ablate(model, [fits[0].operator], corpus, sequences=4)
    rows = {row[0]: row for row in Cells(result._repr_html_()).rows}
    assert set(rows) == {"put in", "(unedited)", *result.effects}
    assert rows["mean"][2] == cell(result.effects["mean"].delta_loss_at_edit)
    (efficiency,) = transport_efficiency(accumulated, [(0, 3)], force=True)
    assert len(Cells(efficiency._repr_html_()).rows) == 1 + len(efficiency.points)
    (scaling,) = scaling_study(accumulated, [(0, 3)])
    assert Cells(scaling._repr_html_()).rows[1][0] == f"{scaling.points[0].tokens:,}"


def test_nothing_of_a_result_becomes_code(accumulated):
    evil = dataclasses.replace(accumulated, text={**accumulated.text, "source": "<script>alert(1)</script>"})
    assert "<script" not in evil._repr_html_()
    assert "<b" not in html_table("<b>", ("<b>",), [("<b>",)], "<b>")


def test_cells_in_words():
    nan = float("nan")
    values = [Interval(0.5, 0.25, 0.75), Interval(0.5), 1.23456, nan, 12345, "x", ""]
    assert [cell(value) for value in values] == ["0.500 [0.250, 0.750]", "0.500", "1.235", "–", "12,345", "x", ""]
