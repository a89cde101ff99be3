"""Choose the texts to keep from scored shards, by threshold or fraction; write clean shards. No model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from capfilt.select import SelectSummary, select
from pipelines.config import parse_args, run_main


@dataclass(frozen=True)
class SelectRun:
    out: str  # the output folder of CapFilt
    threshold: float | None = None  # of P(match); 0.5, the paper's rule, when neither is given
    fraction: float | None = None  # or: the share of all scored texts to keep
    sources: tuple[Literal["web", "synthetic"], ...] = ("web", "synthetic")  # whose texts may be kept
    clean: str | None = None  # another folder for the clean shards; null: OUT/clean


def main(argv: list[str]) -> int:
    run = parse_args(argv, SelectRun)
    clean = Path(run.clean) if run.clean else None
    summary = select(
        Path(run.out), threshold=run.threshold, fraction=run.fraction, sources=run.sources, clean=clean
    )
    print(describe(summary))
    print(f"clean shards in {clean or Path(run.out, 'clean')}")
    return 0


def describe(summary: SelectSummary) -> str:
    lines = [f"threshold {summary.threshold:.4g}: {summary.rows_kept} of {summary.rows} rows keep a text"]
    for source, counts in summary.texts.items():
        total, kept = sum(counts.values()), counts.get("kept", 0)
        dropped = ", ".join(
            f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "kept"
        )
        lines.append(
            f"  {source}: kept {kept} of {total} ({kept / max(1, total):.1%}); {dropped or 'none dropped'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
