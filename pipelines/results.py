"""Evaluations beside the papers: results.md, recall.png and gallery.html in OUT, from folders of evaluations.

No model runs. `datasets` says which known test set (pipelines/papers.yaml) a folder is of; without it a
folder has a table of its own, without papers. The images of the gallery come from the evaluated shards.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capfilt.schema import short_reason
from capfilt.shards import replacing
from pipelines.config import parse_args, run_main, save_config
from pipelines.curves_recall import draw_recall
from pipelines.gallery import write_gallery
from pipelines.gallery_data import Shown, examples_of
from pipelines.results_papers import Papers, read_papers
from pipelines.results_ranks import SIDES, read_ranks, recall_curve
from pipelines.results_runs import Evaluation, read_evaluation
from pipelines.results_table import code, results_page

CURVE = 100  # the largest k of the picture


@dataclass(frozen=True)
class ResultsRun:
    out: str
    runs: tuple[str, ...]  # OUT folders of evaluations
    datasets: dict[str, str] = field(default_factory=dict)  # run -> a test set of pipelines/papers.yaml
    per_gallery: int = 8  # examples of each kind
    seed: int = 0  # of the random examples

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty; give the folders of evaluations, as in runs=[runs/a,runs/b]")
        if strange := [name for name in self.datasets if name not in self.runs]:
            raise ValueError(f"datasets names {strange[0]!r}, which is none of runs: {', '.join(self.runs)}")
        if not 1 <= self.per_gallery <= 200:
            raise ValueError(f"per_gallery is {self.per_gallery}; it must lie between 1 and 200")


def main(argv: list[str]) -> int:
    run = parse_args(argv, ResultsRun)
    papers, out = read_papers(), Path(run.out)
    runs = [read_evaluation(folder, run.datasets.get(folder)) for folder in dict.fromkeys(run.runs)]
    check_datasets(runs, papers)
    curves = recall_curves(runs)
    if curves:
        draw_recall(curves, out / "recall.png")
    drawn = {name for name, _ in curves}
    without = [one for one in runs if one.task == "retrieval" and str(one.folder) not in drawn]
    shown, missing = gather(runs, run.per_gallery, run.seed)
    size = write_gallery(out / "gallery.html", runs, shown, missing, run.seed)
    notes = ["![recall at k](recall.png)"] if curves else []
    notes += [f"No recall curve: {code(str(one.folder))} has no ranks.json." for one in without]
    with replacing(out / "results.md") as file:
        file.write(results_page(runs, papers, notes).encode())
    save_config(run, out)
    for folder, reason in missing.items():
        print(f"no examples of {short_reason(folder)}: {reason}")
    written = ["results.md", *(["recall.png"] if curves else []), f"gallery.html ({size / 1e6:.1f} MB)"]
    print(f"{len(runs)} evaluations, in {out}: {', '.join(written)}")
    return 0


def check_datasets(runs: Sequence[Evaluation], papers: Papers) -> None:
    """Errors: ValueError for a test set that papers.yaml does not have for the task of a run."""
    for run in runs:
        known = papers.tasks[run.task]
        if run.dataset is not None and run.dataset not in known:
            raise ValueError(
                f"{run.folder} is said to be of {run.dataset!r}; for {run.task} pipelines/papers.yaml has "
                f"{', '.join(known)}"
            )


def recall_curves(runs: Sequence[Evaluation]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(run, kind of score) -> curves of text and image retrieval, of the runs that have ranks.json."""
    found = {}
    for run in runs:
        if run.task != "retrieval":
            continue
        images, texts = run.found["images"], run.found["texts"]
        for score, sides in (read_ranks(run.folder, images, texts) or {}).items():
            longest = {"tr": min(CURVE, texts), "ir": min(CURVE, images)}
            found[str(run.folder), score] = {
                side: recall_curve(sides[side].rank, longest[side]) for side in SIDES
            }
    return found


def gather(
    runs: Sequence[Evaluation], per_gallery: int, seed: int
) -> tuple[Mapping[Path, Shown], Mapping[Path, str]]:
    """(what to show of each folder, why nothing): a gallery is no reason to go without the tables."""
    shown, missing = {}, {}
    for run in runs:
        try:
            shown[run.folder] = examples_of(run, per_gallery, seed)
        except (ValueError, OSError) as error:
            missing[run.folder] = short_reason(error)
    return shown, missing


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
