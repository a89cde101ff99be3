"""The whole of CapFilt on a small generated corpus: noisy pairs in, clean pairs out, judged by its own truth.

Makes noisy shards of the generated world, runs CapFilt over them on a local Ray with the tiny captioner and
filter of this repository, selects, and prints a table. Everything lies under OUT; run again, it goes on where
it stopped.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import capfilt
from capfilt.job import RayConfig
from capfilt.report import write_report
from capfilt.select import keep, select
from capfilt.worker import CapFiltConfig
from pipelines import run_capfilt
from pipelines import select as select_entry
from pipelines.config import parse_args, run_main
from pipelines.world import WorldConfig, read_truth, write_world
from pipelines.world_text import Scene, judge


@dataclass(frozen=True)
class DemoRun:
    out: str
    world: WorldConfig
    capfilt: CapFiltConfig
    ray: RayConfig = field(default_factory=RayConfig)
    threshold: float = 0.5


@dataclass(frozen=True)
class Pair:
    """A scored row beside the truth."""

    web: str
    synthetic: str
    itm_web: float | None
    itm_synthetic: float | None
    kind: str
    web_right: bool
    synthetic_right: bool


@dataclass(frozen=True)
class Judgement:
    """Before and after, in shares of texts; right means: all it states is true of the picture."""

    rows: int
    noise_before: float  # wrong web texts
    noise_after: float  # wrong among the kept web texts
    right_kept: float  # of the right web texts
    synthetic_right_before: float
    synthetic_right_after: float  # among the kept synthetic texts
    synthetic_kept: float
    images_kept: float  # with at least one kept text


def main(argv: list[str]) -> int:
    run = parse_args(argv, DemoRun)
    started, out = time.monotonic(), Path(run.out)
    noisy, scored = out / "world" / "noisy", out / "out"
    print(
        f"1. the world: {run.world.noisy_rows} pictures, about half of their texts wrong -> {noisy}",
        flush=True,
    )
    write_world(run.world, out / "world")
    print(f"2. CapFilt: caption every picture, score both texts -> {scored / 'scored'}", flush=True)
    summary = capfilt.run_on_ray(run.capfilt, noisy, scored, run.ray)
    print(run_capfilt.describe(summary))
    if summary.failed:
        return 3
    print(f"3. select: keep what matches -> {scored / 'clean'}", flush=True)
    print(select_entry.describe(select(scored, threshold=run.threshold)))
    pairs = list(read_pairs(scored / "scored", out / "world" / "noisy_truth.parquet"))
    judgement = judged(pairs, run.threshold)
    print(f"\n{table(judgement)}\n\n{examples(pairs, run.threshold)}\n")
    page = write_report(scored).path
    print(f"a page to look at, in a browser     {page}")
    print(f"scored texts, nothing thrown away   {scored / 'scored'}")
    print(f"clean pairs to train on             {scored / 'clean'}")
    print(f"another threshold, in seconds       make select OUT={scored} THRESHOLD=0.9")
    print(f"{time.monotonic() - started:.0f} seconds in all")
    return 0


def read_pairs(scored: Path, truth: Path) -> Iterator[Pair]:
    """Every scored row of the world, judged by its own truth."""
    scenes = read_truth(truth)
    columns = ["key", "caption_web", "caption_synthetic", "itm_web", "itm_synthetic"]
    for path in sorted(scored.glob("*.parquet")):
        for row in pq.read_table(path, columns=columns).to_pylist():
            kind, scene = scenes[row["key"]]
            yield _pair(row, kind or "", scene)


def _pair(row: dict[str, Any], kind: str, scene: Scene) -> Pair:
    web, synthetic = row["caption_web"] or "", row["caption_synthetic"] or ""
    right = judge(web, scene).true, judge(synthetic, scene).true
    return Pair(web, synthetic, row["itm_web"], row["itm_synthetic"], kind, *right)


def judged(pairs: list[Pair], threshold: float) -> Judgement:
    web = [pair for pair in pairs if keep(pair.itm_web, threshold)]
    synthetic = [pair for pair in pairs if keep(pair.itm_synthetic, threshold)]
    any_kept = [
        pair for pair in pairs if keep(pair.itm_web, threshold) or keep(pair.itm_synthetic, threshold)
    ]
    return Judgement(
        rows=len(pairs),
        noise_before=1 - share(pair.web_right for pair in pairs),
        noise_after=1 - share(pair.web_right for pair in web),
        right_kept=sum(pair.web_right for pair in web) / max(1, sum(pair.web_right for pair in pairs)),
        synthetic_right_before=share(pair.synthetic_right for pair in pairs),
        synthetic_right_after=share(pair.synthetic_right for pair in synthetic),
        synthetic_kept=len(synthetic) / max(1, len(pairs)),
        images_kept=len(any_kept) / max(1, len(pairs)),
    )


def share(flags: Iterator[bool]) -> float:
    found = list(flags)
    return sum(found) / max(1, len(found))


def table(judgement: Judgement) -> str:
    """The before/after table."""
    j = judgement
    rows = [
        ("", "before", "after"),
        ("web texts that are wrong", f"{j.noise_before:.1%}", f"{j.noise_after:.1%}"),
        ("right web texts that are kept", "", f"{j.right_kept:.1%}"),
        (
            "synthetic texts that are right",
            f"{j.synthetic_right_before:.1%}",
            f"{j.synthetic_right_after:.1%}",
        ),
        ("synthetic texts that are kept", "", f"{j.synthetic_kept:.1%}"),
        ("pictures with a text", "100.0%", f"{j.images_kept:.1%}"),
    ]
    return "\n".join(f"  {name:<34}{before:>8}{after:>9}" for name, before, after in rows)


def examples(pairs: list[Pair], threshold: float) -> str:
    """One row of every kind of web text, with the scores and what became of both texts."""
    lines = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        pair = next(pair for pair in pairs if pair.kind == kind)
        lines.append(f"  [{kind}]")
        for source, text, itm in (
            ("web", pair.web, pair.itm_web),
            ("synthetic", pair.synthetic, pair.itm_synthetic),
        ):
            decision = "kept   " if keep(itm, threshold) else "dropped"
            lines.append(f"    {source:<10}{decision} {itm if itm is not None else float('nan'):.2f}  {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
