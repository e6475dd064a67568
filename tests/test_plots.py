"""Figures: that the numbers drawn are those of the results."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import BLOCKS
from matplotlib.figure import Figure
from test_multilayer import LATENTS, random_sae

from nnato import layer_plots, plots
from nnato.accumulation import accumulate
from nnato.efficiency import paper_efficiencies, transport_efficiency
from nnato.fitting import fit
from nnato.multilayer import layer_activity
from nnato.perplexity import ablate
from nnato.plots import (
    ablation_bars,
    correlation_spectra,
    efficiency_curves,
    paper_efficiency_curves,
    r2_heat_maps,
    scaling_curves,
    subspace_bars,
)
from nnato.scaling import scaling_study


@pytest.fixture
def figures(monkeypatch):
    drawn: list[Figure] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (drawn.append(figure), save(figure, path))[1])
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


def test_efficiency_figures_show_the_results(model, corpus, tmp_path, figures):
    results = transport_efficiency(accumulate(model, corpus, [(0, 3), (1, 3), (2, 3)]), force=True)
    efficiency_curves(results, tmp_path / "efficiency.png", "a model")
    left, right = figures[0].axes
    for line, result in zip(left.lines, results, strict=False):
        assert list(line.get_xdata()) == [point.rank for point in result.points]
        assert list(line.get_ydata()) == pytest.approx([point.efficiency.value for point in result.points], nan_ok=True)
        assert line.get_label() == f"{result.pair[0]} → {result.pair[1]}"
    assert list(right.lines[1].get_ydata()) == [point.ceilings["debiased"] for point in results[0].points]
    correlation_spectra(results, tmp_path / "spectra.png", "a model")
    panels = [axes for axes in figures[1].axes if axes.lines]
    assert len(panels) == 3
    assert list(panels[2].lines[0].get_ydata()) == pytest.approx(results[2].correlations.rho.square().tolist())
    assert f"{results[2].correlations.dimensions} dimensions" in panels[2].get_title()
    subspace_bars(results, tmp_path / "subspace.png", "a model")
    heights = [bar.get_height() for bar in figures[2].axes[0].patches]
    assert heights[:3] == pytest.approx([float(result.correlations.debiased.sum()) for result in results])
    assert heights[3:6] == [result.correlations.dimensions for result in results]


def test_the_papers_curve_and_scaling_show_the_results(model, corpus, tmp_path, figures):
    moments = accumulate(model, corpus, [(0, 3), (1, 3)])
    papers = paper_efficiencies(moments)
    paper_efficiency_curves(papers, tmp_path / "paper.png", "a model")
    assert list(figures[0].axes[0].lines[1].get_ydata()) == list(papers[1].efficiency)
    scalings = scaling_study(moments)
    scaling_curves(scalings, tmp_path / "scaling.png", "whitened", "a model")
    line = figures[1].axes[0].lines[0]
    assert list(line.get_xdata()) == [point.tokens for point in scalings[0].points]
    assert list(line.get_ydata()) == [point.r2["whitened"].value for point in scalings[0].points]


def test_layer_figure_shows_active_latents_latest_first(model, corpus, tmp_path, monkeypatch):
    """Rows are distributions over layers, by falling mean layer; a latent that was never active has none."""
    drawn = []
    monkeypatch.setattr(layer_plots, "save_figure", lambda figure, path: drawn.append(figure))
    activity = layer_activity(model, random_sae(), corpus)
    for fold in activity.folds:
        fold.total[7] = 0
    layer_plots.layer_figure(activity, tmp_path / "layers.png", "a model")
    shares = np.asarray(drawn[0].axes[0].images[0].get_array())
    totals = activity.stats.total.numpy()
    totals = totals[totals.sum(1) > 0]
    wanted = totals / totals.sum(1, keepdims=True)
    assert len(shares) == len(wanted) < LATENTS
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (np.diff(shares @ np.arange(BLOCKS)) <= 1e-12).all()
    np.testing.assert_allclose(np.sort(shares, axis=0), np.sort(wanted, axis=0))
