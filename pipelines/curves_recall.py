"""Recall over the number of candidates that count, text and image retrieval side by side -> one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANELS = {"tr": "text retrieval: the texts of an image", "ir": "image retrieval: the image of a text"}
STYLES = {"itc": "o--", "itm": "o-"}
TICKS = (1, 2, 5, 10, 20, 50, 100)


def draw_recall(curves: Mapping[tuple[str, str], Mapping[str, Sequence[float]]], path: Path) -> None:
    """`curves` are of (run, score) and then of the panel: recall at 1, 2, ...; a run has one colour."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    colours = {run: f"C{i % 10}" for i, run in enumerate(dict.fromkeys(run for run, _ in curves))}
    worst = min(min(curve) for of_sides in curves.values() for curve in of_sides.values())
    low = max(0.0, worst - 0.1 * (1 - worst) - 0.01)  # a good model has no use for the whole axis
    for panel, (side, title) in zip(panels, PANELS.items(), strict=True):
        for (run, score), of_sides in curves.items():
            curve = of_sides[side]
            label = f"{score.upper()} {run}".replace("$", r"\$")  # or it would be read as a formula
            marks = [k - 1 for k in TICKS if k <= len(curve)]
            panel.plot(range(1, len(curve) + 1), curve, STYLES[score], color=colours[run], label=label,
                       linewidth=1.4, markersize=4, markevery=marks)  # fmt: skip
        panel.set_title(title)
        panel.set_xlabel("k")
        panel.set_xscale("log")  # the first places are what differs
        panel.set_xticks(TICKS, labels=map(str, TICKS))
        panel.minorticks_off()
        panel.set_ylim(low, 1 + 0.03 * (1 - low))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("recall at k")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
