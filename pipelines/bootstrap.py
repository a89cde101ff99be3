"""BLIP's loop whole: pre-train, fine-tune captioner and filter, caption, score, select, pre-train anew.

Round 0 trains a MED on the raw web texts and the clean set (or takes `start`). Every further round fine-
tunes a captioner and a filter from the last MED, runs CapFilt over the web shards, and trains a *new* MED
on what was kept and the clean set. Each MED is evaluated on the test set, by retrieval and by its captions.
A round whose filter is less precise on the test set, or whose captions are less diverse, than the round
before ends the loop before it trains: its corpus would be worse.

OUT holds manifest.json (every step with its command, as it can be run by hand), summary.json, and a folder
for each step: 0/med, 1/captioner, 1/filter, 1/corpus, 1/med, ... Killed and run again, it goes on where it
stopped; with more rounds it goes on from the last.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capfilt.hold import hold
from capfilt.select import DEFAULT_THRESHOLD
from capfilt.shards import write_json_atomically
from capfilt.verdicts import scored_tables
from pipelines.config import load_config, parse_args, run_main, save_config
from pipelines.eval_captions import CaptionRun
from pipelines.eval_filter import FilterRun
from pipelines.eval_retrieval import RetrievalRun
from pipelines.metrics import unique_share
from pipelines.run_capfilt import CapFiltRun
from pipelines.select import SelectRun
from pipelines.steps import Entry, Step, check_steps, run_step
from pipelines.train_blip import TrainRun

TRAIN = Entry("pipelines.train_blip", TrainRun)
CAPFILT = Entry("pipelines.run_capfilt", CapFiltRun, accepted=(0, 3))  # 3: some shards cannot be read
SELECT = Entry("pipelines.select", SelectRun)
RETRIEVAL = Entry("pipelines.eval_retrieval", RetrievalRun)
CAPTIONS = Entry("pipelines.eval_captions", CaptionRun)
FILTER = Entry("pipelines.eval_filter", FilterRun)


@dataclass(frozen=True)
class Recipes:
    """The config file of each step; what they say of inputs and outputs is overridden."""

    pretrain: str
    captioner: str
    filter: str
    capfilt: str
    select: str
    eval_retrieval: str
    eval_captions: str


@dataclass(frozen=True)
class BootstrapRun:
    out: str
    web: str  # a folder of raw shards, or one
    clean: str  # clean shards, the small set that a person has checked
    test: str  # clean shards that nothing is trained on
    recipes: Recipes
    eval_filter: str  # the config file of one step more
    captions: str | None = None  # clean shards of the captioner, where not clean
    start: str | None = None  # trained weights in place of round 0's training
    threshold: float = DEFAULT_THRESHOLD  # of P(match)
    rounds: int = 1
    tolerance: float = 0.01  # by which precision and diversity may fall from round to round
    processes: int = 1  # of every training, one for each GPU

    def __post_init__(self) -> None:
        for name in ("rounds", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Corpus:
    """What decides whether a round goes on to train."""

    precision: float  # of the filter among test texts, see pipelines.eval_filter
    unique_captions: float  # share of different ones among the synthetic captions


def main(argv: list[str]) -> int:
    run = parse_args(argv, BootstrapRun)
    out = Path(run.out)
    check_steps([step for number in range(run.rounds + 1) for step in plan(run, number)])
    with hold(out):
        save_config(run, out)
        trained, summary = go_round(run, out)
        write_json_atomically(out / "summary.json", summary)
    print(describe(summary))
    print(f"the newest MED is {model_of(run, trained)}; every step and its command: {out}/manifest.json")
    return 0


def go_round(run: BootstrapRun, out: Path) -> tuple[int, dict[str, Any]]:
    """All rounds, as far as they go: the last that has a MED, and the summary."""
    corpora: list[Corpus] = []
    stopped, trained = None, 0
    for step in plan(run, 0):
        run_step(out, step)
    for number in range(1, run.rounds + 1):
        for step in corpus_steps(run, number):
            run_step(out, step)
        corpora.append(read_corpus(out / str(number)))
        stopped = worse(corpora, run.tolerance)
        if stopped:
            break
        for step in med_steps(run, number):
            run_step(out, step)
        trained = number
    return trained, summarize(out, trained, corpora, stopped)


# ---- the plan ------------------------------------------------------------------------------------


def plan(run: BootstrapRun, number: int) -> list[Step]:
    """All steps of a round, in order."""
    return [*(corpus_steps(run, number) if number else []), *med_steps(run, number)]


def model_of(run: BootstrapRun, number: int) -> str:
    """The MED that a round ends with."""
    return run.start if run.start and number == 0 else f"{run.out}/{number}/med/model"


def corpus_steps(run: BootstrapRun, number: int) -> list[Step]:
    """From the last MED to the clean corpus of a round."""
    recipes, before, folder = run.recipes, model_of(run, number - 1), f"{run.out}/{number}"
    start, captions = f"start.weights={before}", run.captions or run.clean
    corpus = f"out={folder}/corpus"
    return [
        _train(run, number, "captioner", recipes.captioner, start, f"data.shards=[{captions}]"),
        _train(run, number, "filter", recipes.filter, start, f"data.shards=[{run.clean}]"),
        _evaluate(run, number, FILTER, run.eval_filter, "filter", f"protocol.threshold={run.threshold}"),
        Step(
            f"{number}/corpus",
            CAPFILT,
            recipes.capfilt,
            (
                f"input={run.web}",
                corpus,
                f"capfilt.captioner={folder}/captioner/model",
                f"capfilt.filter={folder}/filter/model",
            ),
        ),
        Step(f"{number}/select", SELECT, recipes.select, (corpus, f"threshold={run.threshold}")),
    ]


def med_steps(run: BootstrapRun, number: int) -> list[Step]:
    """A new MED on the corpus of a round, and what it can do."""
    recipes = run.recipes
    texts = f"{run.out}/{number}/corpus/clean" if number else run.web
    trained = [_train(run, number, "med", recipes.pretrain, f"data.shards=[{texts},{run.clean}]")]
    # A MED writes behind the prompt it was trained with, if any.
    prompt = f"protocol.prompt={json.dumps(load_config(TrainRun, recipes.pretrain).data.prompt)}"
    return [
        *([] if run.start and number == 0 else trained),
        _evaluate(run, number, RETRIEVAL, recipes.eval_retrieval, "med"),
        _evaluate(run, number, CAPTIONS, recipes.eval_captions, "med", prompt),
    ]


def _train(run: BootstrapRun, number: int, name: str, config: str, *overrides: str) -> Step:
    overrides = (f"out={run.out}/{number}/{name}", *overrides)
    return Step(f"{number}/{name}", TRAIN, config, overrides, run.processes)


def _evaluate(run: BootstrapRun, number: int, entry: Entry, config: str, name: str, *more: str) -> Step:
    model = model_of(run, number) if name == "med" else f"{run.out}/{number}/{name}/model"
    kind = entry.module.removeprefix("pipelines.")
    overrides = (f"out={run.out}/{number}/{kind}", f"model={model}", f"shards=[{run.test}]", *more)
    return Step(f"{number}/{kind}", entry, config, overrides)


# ---- what came out -------------------------------------------------------------------------------


def read_corpus(folder: Path) -> Corpus:
    """Of a round whose corpus is selected."""
    found = json.loads((folder / "eval_filter/metrics.json").read_text())["metrics"]
    tables = scored_tables(folder / "corpus", ["caption_synthetic"])
    written = [text for table in tables for text in table["caption_synthetic"].to_pylist() if text]
    return Corpus(found["precision"], unique_share(written))


def worse(corpora: list[Corpus], tolerance: float) -> str | None:
    """Why the newest corpus is not worth training on, if so."""
    if len(corpora) < 2:
        return None
    before, now = asdict(corpora[-2]), asdict(corpora[-1])
    fallen = [name for name in now if now[name] < before[name] - tolerance]
    if not fallen:
        return None
    said = ", ".join(f"{name} fell from {before[name]:.3f} to {now[name]:.3f}" for name in fallen)
    return f"round {len(corpora)} ends before training: {said}"


def summarize(out: Path, trained: int, corpora: list[Corpus], stopped: str | None) -> dict[str, Any]:
    """Per round: the corpus it made and the numbers of its MED; "stopped" tells why the loop ended early."""
    rounds = []
    for number in range(max(trained, len(corpora)) + 1):
        found: dict[str, Any] = {"round": number}
        if number:
            found |= asdict(corpora[number - 1])
            found["texts"] = json.loads((out / f"{number}/corpus/clean/_select.json").read_text())["texts"]
        if number <= trained:
            retrieval = json.loads((out / f"{number}/eval_retrieval/metrics.json").read_text())
            captions = json.loads((out / f"{number}/eval_captions/metrics.json").read_text())
            found["retrieval"] = retrieval.get("itm", retrieval["itc"])
            found["captions"] = captions["metrics"]
        rounds.append(found)
    return {"rounds": rounds, "stopped": stopped}


def describe(summary: dict[str, Any]) -> str:
    """A table, a line a round, in per cent; CIDEr-D times 100."""
    head = ("round", "precision", "unique", "web kept", "synth. kept", "TR@1", "IR@1", "CIDEr-D")
    lines = ["  ".join(f"{word:>11}" for word in head)]
    for found in summary["rounds"]:
        texts = found.get("texts", {})
        shares = [_share(texts.get(source, {})) for source in ("web", "synthetic")]
        retrieval, captions = found.get("retrieval", {}), found.get("captions", {})
        values = [found.get("precision"), found.get("unique_captions"), *shares]
        values += [retrieval.get("tr@1"), retrieval.get("ir@1"), captions.get("cider_d")]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append("  ".join(f"{cell:>11}" for cell in [str(found["round"]), *cells]))
    return "\n".join([*lines, *([summary["stopped"]] if summary["stopped"] else [])])


def _share(counts: dict[str, int]) -> float | None:
    return counts.get("kept", 0) / sum(counts.values()) if counts else None


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
