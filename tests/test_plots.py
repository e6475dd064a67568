"""Figures: that the numbers drawn are those of the results."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from nnato import plots
from nnato.accumulation import accumulate
from nnato.fitting import fit
from nnato.perplexity import ablate
from nnato.plots import ablation_bars, r2_heat_maps


@pytest.fixture
def figures(monkeypatch):
    drawn: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.append(figure), save(figure, path))[1])
    return drawn


def test_heat_maps_show_every_pair(model, corpus, tmp_path, figures):
    fits = fit(accumulate(model, corpus, [(0, 1), (0, 3), (2, 3)]))
    path = r2_heat_maps(fits, tmp_path / "r2.png", "uniform", "a model")
    assert path.stat().st_size > 1000
    left, right = figures[0].axes[:2]
    want = sorted(f"{result.r2['uniform']:.2f}" for result in fits)
    assert sorted(text.get_text() for text in left.texts) == want
    assert len(right.texts) == 3
    assert [label.get_text() for label in left.get_xticklabels()] == ["0", "2"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["1", "3"]
    assert "uniform over coordinates" in figures[0].get_suptitle()


def test_bars_show_every_intervention(model, corpus, tmp_path, figures):
    fits = fit(accumulate(model, corpus, [(0, 1), (2, 3)]))
    results = ablate(model, [result.operator for result in fits], corpus, sequences=3)
    ablation_bars(results, tmp_path / "bars.svg", "a model")
    axes = figures[0].axes
    assert len(axes) == 4
    for axis, result in zip(axes[1::2], results, strict=True):
        widths = [bar.get_width() for bar in axis.patches]
        assert widths == pytest.approx([effect.delta_loss_at_edit.value for effect in result.effects.values()])
    for axis, result in zip(axes[::2], results, strict=True):
        ends = [bar.get_x() + bar.get_width() for bar in axis.patches]
        assert ends == pytest.approx([effect.log_perplexity for effect in result.effects.values()])
