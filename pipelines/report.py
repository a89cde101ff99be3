"""Write report.html beside the scored shards: a page to look at what is kept, dropped, and why. No model."""

import sys
from dataclasses import dataclass
from pathlib import Path

from capfilt.report import Report, write_report
from capfilt.schema import short_reason
from pipelines.config import parse_args, run_main


@dataclass(frozen=True)
class ReportRun:
    out: str  # the output folder of CapFilt
    threshold: float | None = None  # of the decisions shown; null: that of the last select, or 0.5
    per_gallery: int = 20  # rows shown of each kind
    to_judge: int = 120  # rows drawn at random, for verdicts
    seed: int = 0  # of all that is drawn


def main(argv: list[str]) -> int:
    run = parse_args(argv, ReportRun)
    written = write_report(
        Path(run.out),
        threshold=run.threshold,
        per_gallery=run.per_gallery,
        to_judge=run.to_judge,
        seed=run.seed,
    )
    print(describe(written))
    return 0


def describe(written: Report) -> str:
    lines = [f"{written.rows} rows, {written.bytes / 1e6:.1f} MB: open {written.path}"]
    return "\n".join([*lines, *(f"warning: {short_reason(warning)}" for warning in written.warnings)])


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
