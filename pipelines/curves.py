"""Learning curves: the metrics.jsonl of one or several runs -> one picture."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NOT_LOSSES = ("step", "seconds", "lr", "grad_norm", "rows_per_s", "peak_memory_gib")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises ValueError when it has none."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{path}: there is no training log; run the training first")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines:
        raise ValueError(f"{path}: is empty; the training stopped before its first logged step")
    return lines


def draw_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel a loss, one line a run, over the optimiser steps."""
    names = list(
        dict.fromkeys(name for lines in runs.values() for name in lines[0] if name not in NOT_LOSSES)
    )
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for run, lines in runs.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                panel.plot(*zip(*points, strict=True), label=run, linewidth=1.2)
        panel.set_title(f"{name} loss")
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
