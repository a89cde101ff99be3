"""Run CapFilt over noisy shards: caption, score, and write scored shards one to one with the input.

OUT holds scored/, _done/ and summary.json; nothing that is done is done again. Then
`python -m pipelines.select` chooses what to keep, in seconds. Exit code 3: finished, but some shards failed
(listed in summary.json).
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

import capfilt
from capfilt.job import RayConfig, Summary
from capfilt.worker import CapFiltConfig
from pipelines.config import parse_args, run_main


@dataclass(frozen=True)
class CapFiltRun:
    input: str  # a folder, a shard or a glob; img2dataset, Hugging Face, LAION, DataComp or webdataset
    out: str
    capfilt: CapFiltConfig
    engine: Literal["ray", "local"] = "ray"
    ray: RayConfig = field(default_factory=RayConfig)
    local_workers: int = 1  # processes of the local engine


def run(config: CapFiltRun) -> Summary:
    if config.engine == "local":
        return capfilt.run_local(config.capfilt, config.input, config.out, config.local_workers)
    return capfilt.run_on_ray(config.capfilt, config.input, config.out, config.ray)


def main(argv: list[str]) -> int:
    config = parse_args(argv, CapFiltRun)
    summary = run(config)
    print(describe(summary))
    print(f"scored shards in {config.out}/scored; now choose: make select OUT={config.out} THRESHOLD=0.5")
    return 3 if summary.failed else 0


def describe(summary: Summary) -> str:
    """The summary for a person; the rows by status add up to all rows."""
    stats = summary.stats
    lines = [
        f"{summary.done} of {summary.splits} splits done, {stats.rows} rows, in {summary.seconds:.0f} s:"
    ]
    lines += [
        f"  {count:>9}  {status}"
        for status, count in sorted(stats.statuses.items(), key=lambda item: -item[1])
    ]
    lines += [f"  failed: {split}: {reason}" for split, reason in summary.failed.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
