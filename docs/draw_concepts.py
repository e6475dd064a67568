"""Draws docs/images/concepts.png: what is measured, fitted, judged and put back. Run it when the concepts change."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, LIGHT, GOLD, RED, GREY = "#2a6f97", "#d7e8f2", "#e09f3e", "#bc4749", "#5d6678"


def box(axes, left, bottom, width, height, text, colour=LIGHT, edge=BLUE):
    """A box with words in it."""
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0.02,rounding_size=0.06", fc=colour, ec=edge, lw=1.3))
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes, start, end, colour=GREY, bend=0.0):
    """An arrow from a point to a point."""
    style = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, lw=1.5, connectionstyle=style))


def main():
    """Draw."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 5.2)
    axes.set_axis_off()
    for place, name in enumerate(("embed", "block 0", "…", "source\nblock s", "…", "target\nblock t", "…", "logits")):
        box(axes, 0.2 + 1.22 * place, 4.1, 1.0, 0.75, name, "#fff3dc" if "block s" in name or "block t" in name else "#f4f6f9", GREY)
        if place:
            arrow(axes, (1.22 * place - 0.02, 4.47), (0.2 + 1.22 * place, 4.47))
    axes.text(4.36, 5.02, "x", color=GOLD, fontsize=12, ha="center", weight="bold")
    axes.text(6.8, 5.02, "y", color=GOLD, fontsize=12, ha="center", weight="bold")
    arrow(axes, (4.36, 4.1), (2.2, 3.3), GOLD, 0.1)
    arrow(axes, (6.8, 4.1), (3.0, 3.3), GOLD, -0.08)
    box(axes, 0.6, 2.5, 3.0, 0.78, "moments: counts, means, x xᵀ, x yᵀ, y yᵀ\nby split, fold and token class")
    box(axes, 0.6, 1.1, 3.0, 0.78, "operator  ŷ = ȳ + (x − x̄) W\nfitted on train, penalty by validation")
    arrow(axes, (2.1, 2.48), (2.1, 1.9), BLUE)
    box(axes, 4.3, 1.1, 2.4, 0.78, "judged on test documents:\nR², baselines, ceiling, η(r)")
    arrow(axes, (3.62, 1.49), (4.28, 1.49), BLUE)
    arrow(axes, (3.62, 2.9), (4.6, 1.9), BLUE, -0.15)
    box(axes, 7.3, 1.1, 2.5, 0.78, "put back in the place of y:\nΔloss, KL, loss recovered", "#fbe3e1", RED)
    arrow(axes, (2.1, 1.08), (8.5, 1.08), RED, 0.12)
    arrow(axes, (8.2, 1.9), (7.0, 4.08), RED, 0.12)
    axes.text(
        5.0,
        0.25,
        "no activation is stored: one pass over text, and everything else is algebra on moments",
        ha="center",
        fontsize=9,
        color=GREY,
    )
    figure.savefig(Path(__file__).parent / "images" / "concepts.png", dpi=110)


if __name__ == "__main__":
    main()
