"""Learning curves: the metrics.jsonl of one or several runs -> one picture, a panel for each metric."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.config import parse_args, run_main

NOT_DRAWN = ("step", "seconds", "lr", "grad_norm", "rows_per_s", "peak_memory_gib", "alarms", "itm_prior")
COLUMNS = 3


@dataclass(frozen=True)
class CurvesRun:
    runs: tuple[str, ...]  # OUT folders of trainings
    picture: str  # a .png


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
    """One panel a metric, one line a run, over the optimiser steps."""
    names = list(
        dict.fromkeys(
            name for lines in runs.values() for line in lines for name in line if name not in NOT_DRAWN
        )
    )
    columns = min(len(names), COLUMNS)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        for run, lines in runs.items():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), label=run, linewidth=1.2)
        panel.set_title(name.replace("_", " "))
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    run = parse_args(argv, CurvesRun)
    draw_curves({source: read_metrics(source) for source in run.runs}, Path(run.picture))
    print(f"learning curves: {run.picture}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
