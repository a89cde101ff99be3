"""Precision, recall and kept share over the threshold, one panel a source -> one picture."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capfilt.calibrate import Bands, Curve

SHARES = {"precision": "tab:blue", "recall": "tab:orange", "kept": "tab:gray"}


def draw_calibration(
    curves: Mapping[str, tuple[Curve, Bands]], wanted: float, threshold: float | None, path: Path
) -> None:
    """`wanted` is the wanted precision, dotted; `threshold` the chosen one, dashed, if there is one."""
    figure = Figure(figsize=(4.6 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for panel, (source, (curve, bands)) in zip(panels, curves.items(), strict=True):
        for name, colour in SHARES.items():
            panel.step(
                curve.thresholds, getattr(curve, name), where="pre", color=colour, label=name, linewidth=1.4
            )
            low, high = getattr(bands, name)
            panel.fill_between(curve.thresholds, low, high, step="pre", color=colour, alpha=0.18, linewidth=0)
        panel.axhline(wanted, color="tab:blue", linestyle=":", linewidth=1)
        if threshold is not None:
            panel.axvline(
                threshold, color="black", linestyle="--", linewidth=1, label=f"chosen {threshold:.4g}"
            )
        panel.set_title(f"{source} texts")
        panel.set_xlabel("threshold of P(match)")
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
