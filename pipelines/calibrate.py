"""Find the threshold for a wanted precision from labelled texts, with intervals and curves. No model.

Labels are a file of verdicts about scored texts of `out`, or the scores of a clean set (`positives`) and of
the same set with its texts moved on by one image (`negatives`). Writes out/calibration/calibration.json and
curve.png, and prints the line for `make select`.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capfilt.calibrate import (
    Bands,
    Curve,
    Labels,
    Prediction,
    Share,
    agreement_alarm,
    best_precision,
    bootstrap_bands,
    caught_share,
    labels_from_swaps,
    predict,
    share,
    threshold_curve,
    threshold_for_precision,
    too_few,
)
from capfilt.select import DEFAULT_THRESHOLD
from capfilt.shards import write_json_atomically
from capfilt.verdicts import all_scores, join_scores, read_verdicts, rows_of_keys, web_texts
from pipelines.config import ConfigError, parse_args, run_main
from pipelines.curves_calibration import draw_calibration

CURVE_POINTS = 200  # thresholds that are drawn and written
FEW_KEPT = 50  # labelled texts behind a precision, below which a person is warned
SAMPLE_LEVEL = 0.999  # of the interval that shows labelled texts to be no random sample


@dataclass(frozen=True)
class CalibrateRun:
    out: str  # the output folder of CapFilt
    verdicts: str | None = None  # labelled texts of `out`: .json, .jsonl, .csv or .parquet
    positives: str | None = None  # or: CapFilt's output folder of a clean set,
    negatives: str | None = None  # and that of the same set with the texts of other images
    precision: float = 0.95  # wanted: the share of right texts among the kept ones
    resamples: int = 1000  # of the bootstrap
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.precision <= 1:
            raise ValueError(f"precision is {self.precision}; it is a share, above 0 and at most 1")
        if not 100 <= self.resamples <= 100_000:
            raise ValueError(f"resamples is {self.resamples}; it must lie between 100 and 100000")


@dataclass(frozen=True)
class SourceReport:
    """What the labels say about the texts of one source."""

    labels: int
    right: int
    unsure: int
    not_scored: int
    noise: Share  # wrong texts, before filtering
    dropped: float | None  # share of all scored texts of `out` that the paper's threshold, 0.5, drops
    caught: Share | None  # of the wrong texts, dropped at 0.5
    own: Prediction | None  # the smallest threshold with the wanted precision
    best: Prediction  # the highest precision in reach
    chosen: Prediction | None  # at the threshold for `select`
    kept_of_all: float | None  # share of all scored texts of `out` that the threshold for `select` keeps
    curve: Curve
    bands: Bands


@dataclass(frozen=True)
class Calibration:
    """`threshold` is the number that `select` takes: the highest that a source needs, None without any."""

    wanted: float
    threshold: float | None
    sources: Mapping[str, SourceReport]
    left_out: Mapping[str, str]  # sources without a report, and why
    alarm: str | None
    warnings: tuple[str, ...]


def main(argv: list[str]) -> int:
    run = parse_args(argv, CalibrateRun)
    labels = read_labels(run)
    scores = all_scores(Path(run.out))
    sampled = run.verdicts is not None
    result = calibrate(labels, scores, run.precision, run.resamples, run.seed, sampled=sampled)
    folder = Path(run.out) / "calibration"
    write_json_atomically(folder / "calibration.json", {"labels": _origin(run), **plain(result)})
    curves = {source: (report.curve, report.bands) for source, report in result.sources.items()}
    draw_calibration(curves, run.precision, result.threshold, folder / "curve.png")
    print(describe(result))
    print(f"\ncurves and all numbers in {folder}")
    if result.threshold is None:
        best = "; ".join(
            f"{source}: {report.best.precision.value:.3f} at {report.best.threshold:.4g}"
            for source, report in result.sources.items()
            if report.best.precision is not None
        )
        raise ValueError(
            f"no threshold reaches the precision {run.precision:g}; the best are {best}. "
            "Ask for less, label more, or train a better filter"
        )
    print(f"make select OUT={run.out} THRESHOLD={result.threshold!r}")
    return 0


def read_labels(run: CalibrateRun) -> dict[str, Labels]:
    """Source -> labelled texts. Errors: ConfigError for both or neither kind of labels, ValueError else."""
    pairs = (run.positives, run.negatives)
    if run.verdicts is not None and pairs == (None, None):
        path = Path(run.verdicts)
        verdicts = read_verdicts(path)
        return join_scores(verdicts, rows_of_keys(Path(run.out), [v.key for v in verdicts]), path)
    if run.verdicts is None and run.positives is not None and run.negatives is not None:
        return {"web": labels_from_swaps(web_texts(Path(run.positives)), web_texts(Path(run.negatives)))}
    raise ConfigError(
        "give the labels as verdicts=FILE, or as positives=FOLDER and negatives=FOLDER, and not as both"
    )


def _origin(run: CalibrateRun) -> dict[str, Any]:
    kept = ("verdicts", "positives", "negatives", "resamples", "seed")
    return {name: value for name, value in asdict(run).items() if name in kept and value is not None}


# ---- the numbers ---------------------------------------------------------------------------------


def calibrate(
    labels: Mapping[str, Labels],
    scores: Mapping[str, np.ndarray],
    wanted: float,
    resamples: int = 1000,
    seed: int = 0,
    *,
    sampled: bool = True,
) -> Calibration:
    """`labels` and all `scores` by source; `sampled` when the labels are drawn from these scores.

    Errors: ValueError when no source has enough labels.
    """
    left_out = {source: reason for source, found in labels.items() if (reason := too_few(found.right))}
    used = {source: found for source, found in labels.items() if source not in left_out}
    if not used:
        raise ValueError("; ".join(f"{source}: {reason}" for source, reason in left_out.items()))
    own = {s: threshold_for_precision(found.scores, found.right, wanted) for s, found in used.items()}
    reached = [prediction.threshold for prediction in own.values() if prediction is not None]
    threshold = max(reached, default=None)
    dropped = {source: _mean(values < DEFAULT_THRESHOLD) for source, values in scores.items()}
    reports = {
        source: _report(found, scores.get(source, np.empty(0)), own[source], threshold, resamples, seed)
        for source, found in used.items()
    }
    alarm = agreement_alarm({source: report.caught for source, report in reports.items()}, dropped)
    warnings = tuple(
        warning
        for source, report in reports.items()
        for warning in _warnings(source, report, wanted, sampled)
    )
    return Calibration(wanted, threshold, reports, left_out, alarm, warnings)


def _report(
    found: Labels,
    scores: np.ndarray,
    own: Prediction | None,
    threshold: float | None,
    resamples: int,
    seed: int,
) -> SourceReport:
    curve = _thinned(threshold_curve(found.scores, found.right))
    return SourceReport(
        labels=len(found.right),
        right=int(found.right.sum()),
        unsure=found.unsure,
        not_scored=found.not_scored,
        noise=share(int((~found.right).sum()), len(found.right)),
        dropped=_mean(scores < DEFAULT_THRESHOLD),
        caught=caught_share(found.scores, found.right, DEFAULT_THRESHOLD),
        own=own,
        best=best_precision(found.scores, found.right),
        chosen=None if threshold is None else predict(found.scores, found.right, threshold),
        kept_of_all=None if threshold is None else _mean(scores >= threshold),
        curve=curve,
        bands=bootstrap_bands(found.scores, found.right, curve.thresholds, resamples=resamples, seed=seed),
    )


def _mean(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if len(flags) else None


def _thinned(curve: Curve) -> Curve:
    total = len(curve.thresholds)
    at = np.unique(np.linspace(0, total - 1, min(total, CURVE_POINTS)).round().astype(int))
    return Curve(curve.thresholds[at], curve.precision[at], curve.recall[at], curve.kept[at])


def _warnings(source: str, report: SourceReport, wanted: float, sampled: bool) -> list[str]:
    found, chosen = [], report.chosen
    if report.own is None:
        found.append(f"no threshold reaches {wanted:g} for {source} texts")
    if chosen is not None and chosen.kept.count < FEW_KEPT:
        found.append(
            f"the threshold keeps {chosen.kept.count} labelled {source} texts; label more before you rely on "
            "their precision"
        )
    if sampled and chosen is not None and report.kept_of_all is not None:
        kept = share(chosen.kept.count, chosen.kept.total, SAMPLE_LEVEL)
        if not kept.low <= report.kept_of_all <= kept.high:
            found.append(
                f"of the labelled {source} texts {kept.value:.0%} are kept, of all {report.kept_of_all:.0%}: "
                "the labelled ones are no random sample, so these numbers are not those of your corpus"
            )
    if not sampled:
        found.append("these labels are half right and half other images' texts; the corpus may be neither")
    return found


# ---- what is written -------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Dataclasses and arrays as what JSON knows; NaN becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    return None if isinstance(value, float) and math.isnan(value) else value


def describe(result: Calibration) -> str:
    """The table, one column a source."""
    reports = list(result.sources.values())
    best = [report.best for report in reports]
    rows = [
        ("", list(result.sources)),
        ("labelled texts", [f"{report.labels}, {report.right} right" for report in reports]),
        ("wrong texts (noise)", [_shown(report.noise) for report in reports]),
        ("dropped at 0.5, of all", [_percent(report.dropped) for report in reports]),
        ("wrong texts caught at 0.5", [_shown(report.caught) for report in reports]),
        (
            f"threshold for {result.wanted:g}",
            [f"{r.own.threshold:.4g}" if r.own else "none" for r in reports],
        ),
        ("best precision in reach", [f"{_shown(b.precision)} at {b.threshold:.4g}" for b in best]),
    ]
    if result.threshold is not None:
        at = [report.chosen for report in reports]
        rows += [
            (f"at {result.threshold:.4g}: precision", [_shown(p.precision) for p in at if p]),
            ("  recall", [_shown(p.recall) for p in at if p]),
            ("  kept, of the labelled", [_shown(p.kept) for p in at if p]),
            ("  kept, of all scored", [_percent(report.kept_of_all) for report in reports]),
        ]
    lines = [f"{name:<27}" + "".join(f"{cell:>36}" for cell in cells) for name, cells in rows]
    lines += [f"left out: {source}: {reason}" for source, reason in result.left_out.items()]
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join([*lines, *([f"ALARM: {result.alarm}"] if result.alarm else [])])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _shown(found: Share | None) -> str:
    return "-" if found is None else f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
