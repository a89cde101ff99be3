"""BLIP's Table 1: what captioning and filtering web texts is worth, alone and together, over several seeds.

For every seed a world of its own is drawn (or the same shards are used again), and new MEDs are trained
with the same recipe and so the same number of samples, from the same start, that differ in their texts
alone:
  X    the web texts as they are
  F    the web texts that the filter keeps
  C    web texts and synthetic ones, all of them
  CF   web texts and synthetic ones that the filter keeps
and, where `controls` asks for them, as CF:
  beam        with captions of beam search
  shared      one model, fine-tuned with all three losses at once, is captioner and filter
  best_of_k   the best of k sampled captions
  continued   training goes on from X's MED instead of anew
BLIP's control of web texts replicated to the same size is X itself here, as every arm sees the same number
of samples. Without `captioner` and `filter` they are fine-tuned from X's MED on the clean set, for each
seed.

OUT holds manifest.json, <seed>/<arm>/, table.json and table.md. Killed and run again, it goes on where it
stopped.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from capfilt.hold import hold
from capfilt.select import DEFAULT_THRESHOLD
from capfilt.shards import write_json_atomically
from pipelines.bootstrap import CAPFILT, CAPTIONS, RETRIEVAL, SELECT, TRAIN, Recipes
from pipelines.config import load_config, parse_args, run_main, save_config
from pipelines.steps import Entry, Step, check_steps, read_manifest, run_step
from pipelines.testset import server_id
from pipelines.train_blip import TrainRun
from pipelines.world import WorldRun, read_truth
from pipelines.world_text import judge

WORLD = Entry("pipelines.world", WorldRun)
Control = Literal["beam", "shared", "best_of_k", "continued"]
SELECTED = {  # arm -> what `select` is told
    "F": ("sources=[web]",),
    "C": ("threshold=0",),
    "CF": (),
}
BEAM = ("capfilt.decoding.beams=3", "capfilt.decoding.top_p=null")
# Student's t for 95 %, two-sided, by the number of seeds: of any statistics book's table.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class AblationRun:
    out: str
    seeds: tuple[int, ...]  # of the training, and of the world
    recipes: Recipes
    world: str | None = None  # a config of pipelines.world, drawn anew for each seed; or the next three
    web: str | None = None  # a folder of raw shards
    clean: str | None = None  # clean shards for captioner and filter
    test: str | None = None  # clean shards that nothing is trained on
    captioner: str | None = None  # weights for all seeds; null: fine-tuned
    filter: str | None = None
    shared: str | None = None  # weights that are both, of the control of that name; null: fine-tuned
    controls: tuple[Control, ...] = ()
    captions: int = 4  # of best_of_k
    threshold: float = DEFAULT_THRESHOLD
    processes: int = 1  # of every training

    def __post_init__(self) -> None:
        if not 2 <= len(set(self.seeds)) == len(self.seeds) <= max(STUDENT):
            raise ValueError(f"seeds is {list(self.seeds)}; give 2 to {max(STUDENT)} different ones")
        if (self.world is None) == (None in (self.web, self.clean, self.test)):
            raise ValueError("give either world, or web and clean and test")
        if (self.captioner is None) != (self.filter is None):
            raise ValueError("give captioner and filter, or neither")
        if "shared" in self.controls and (self.shared is None) != (self.captioner is None):
            raise ValueError(
                f"shared is {self.shared} and captioner {self.captioner}; for the control give weights of "
                "both kinds, or none and all are fine-tuned on the clean set"
            )

    @property
    def arms(self) -> tuple[str, ...]:
        return ("X", *SELECTED, *self.controls)


def main(argv: list[str]) -> int:
    run = parse_args(argv, AblationRun)
    out = Path(run.out)
    plan = [step for seed in run.seeds for step in plan_seed(run, seed)]
    check_steps(plan)
    with hold(out):
        save_config(run, out)
        for step in plan:
            run_step(out, step)
    found = {arm: [read_arm(out / str(seed), arm, bool(run.world)) for seed in run.seeds] for arm in run.arms}
    write_table(out, run.seeds, found)
    return 0


# ---- the plan of a seed --------------------------------------------------------------------------


def plan_seed(run: AblationRun, seed: int) -> list[Step]:
    """Every step of a seed, in order: data, X, captioner and filter, corpora, the other arms."""
    folder = f"{run.out}/{seed}"
    world = (
        []
        if run.world is None
        else [Step(f"{seed}/world", WORLD, run.world, (f"out={folder}/world", f"world.seed={seed}"))]
    )
    models = [
        _train(run, seed, name, config, *_tuned(run, seed))
        for name, config in (("captioner", run.recipes.captioner), ("filter", run.recipes.filter))
        if run.captioner is None
    ]
    arms = [step for arm in (*SELECTED, *run.controls) for step in _arm(run, seed, arm)]
    web = _data(run, seed, "web")
    return [*world, *_med(run, seed, "X", web), *models, _capfilt(run, seed, "corpus"), *arms]


def _arm(run: AblationRun, seed: int, arm: str) -> list[Step]:
    """Corpus, selection and MED of an arm other than X."""
    folder = f"{run.out}/{seed}"
    before: list[Step] = []
    corpus = f"{arm}/corpus"
    if arm == "beam":
        before = [_capfilt(run, seed, corpus, *BEAM)]
    elif arm == "best_of_k":
        before = [_capfilt(run, seed, corpus, f"capfilt.captions={run.captions}")]
    elif arm == "shared":
        both = run.shared or f"{folder}/shared/model"
        if run.shared is None:
            tuned = (*_tuned(run, seed), "start.reads=null", "data.texts_per_image=1")
            before.append(_train(run, seed, "shared", run.recipes.captioner, *tuned))
        before.append(_capfilt(run, seed, corpus, f"capfilt.captioner={both}", f"capfilt.filter={both}"))
    else:
        corpus = "corpus"
    kept = f"{folder}/{arm}/clean"
    chosen = SELECTED.get(arm, ())
    rule = () if "threshold=0" in chosen else (f"threshold={run.threshold}",)
    select = (f"out={folder}/{corpus}", f"clean={kept}", *chosen, *rule)
    return [
        *before,
        Step(f"{seed}/{arm}/select", SELECT, run.recipes.select, select),
        *_med(run, seed, arm, kept),
    ]


def _med(run: AblationRun, seed: int, arm: str, texts: str) -> list[Step]:
    """A MED on these texts, and its numbers on the test set."""
    folder, recipes = f"{run.out}/{seed}/{arm}", run.recipes
    start: tuple[str, ...] = ()
    if arm == "continued":
        start = ("model=null", "init={}", f"start.weights={run.out}/{seed}/X/med/model")
    elif run.world is not None:
        start = (f"init.tokenizer={run.out}/{seed}/world/vocabulary",)
    test = (f"model={folder}/med/model", f"shards=[{_data(run, seed, 'test')}]")
    prompt = f"protocol.prompt={json.dumps(load_config(TrainRun, recipes.pretrain).data.prompt)}"
    return [
        _train(run, seed, f"{arm}/med", recipes.pretrain, f"data.shards=[{texts}]", *start),
        Step(
            f"{seed}/{arm}/retrieval", RETRIEVAL, recipes.eval_retrieval, (f"out={folder}/retrieval", *test)
        ),
        Step(
            f"{seed}/{arm}/captions",
            CAPTIONS,
            recipes.eval_captions,
            (f"out={folder}/captions", *test, prompt),
        ),
    ]


def _tuned(run: AblationRun, seed: int) -> tuple[str, ...]:
    """Fine-tuning of X's MED on the clean set."""
    return (f"start.weights={run.out}/{seed}/X/med/model", f"data.shards=[{_data(run, seed, 'clean')}]")


def _train(run: AblationRun, seed: int, name: str, config: str, *overrides: str) -> Step:
    out = f"out={run.out}/{seed}/{name}"
    return Step(f"{seed}/{name}", TRAIN, config, (out, f"train.seed={seed}", *overrides), run.processes)


def _capfilt(run: AblationRun, seed: int, name: str, *more: str) -> Step:
    folder = f"{run.out}/{seed}"
    models = (
        f"capfilt.captioner={run.captioner or f'{folder}/captioner/model'}",
        f"capfilt.filter={run.filter or f'{folder}/filter/model'}",
    )
    overrides = (f"input={_data(run, seed, 'web')}", f"out={folder}/{name}", *models, *more)
    return Step(f"{seed}/{name}", CAPFILT, run.recipes.capfilt, overrides)


def _data(run: AblationRun, seed: int, what: str) -> str:
    if run.world is None:
        return str(getattr(run, what))
    return f"{run.out}/{seed}/world/" + {"web": "noisy"}.get(what, what)


# ---- the table -----------------------------------------------------------------------------------


def read_arm(seed: Path, arm: str, of_world: bool) -> dict[str, float]:
    """The numbers of a MED: TR@1, IR@1 (re-ranked where asked for), CIDEr-D, BLEU-4; a share or a score.

    In a generated world also the share of captions that are right, by its own truth.
    """
    folder = seed / arm
    retrieval = json.loads((folder / "retrieval/metrics.json").read_text())
    captions = json.loads((folder / "captions/metrics.json").read_text())["metrics"]
    ranked = retrieval.get("itm", retrieval["itc"])
    found = {
        "TR@1": ranked["tr@1"],
        "IR@1": ranked["ir@1"],
        "mean R@1": (ranked["tr@1"] + ranked["ir@1"]) / 2,
        "CIDEr-D": captions["cider_d"],
        "BLEU-4": captions["bleu4"],
    }
    if of_world:
        found["right"] = share_right(folder / "captions/captions.json", seed / "world/test_truth.parquet")
    return found


def share_right(captions: Path, truth: Path) -> float:
    """Of captions in the layout of COCO's results; right is what is true of its picture."""
    scenes = {server_id(key): scene for key, (_, scene) in read_truth(truth).items()}
    rows = json.loads(captions.read_text())
    return sum(judge(row["caption"], scenes[row["image_id"]]).true for row in rows) / len(rows)


def write_table(out: Path, seeds: Sequence[int], found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """table.json and table.md of arms by seed, which is told to a person as well."""
    write_json_atomically(out / "table.json", {"seeds": list(seeds), "arms": found})
    minutes = sum(step["seconds"] for step in read_manifest(out).values()) / 60
    text = f"{table(found)}\n\n{len(seeds)} seeds, mean and 95 % interval; {minutes:.0f} minutes in all\n"
    (out / "table.md").write_text(text)
    print(text)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) by Student's t, for 2 to 10 values."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), STUDENT[len(values)] * spread


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown, a line an arm, times 100."""
    names = list(next(iter(found.values()))[0])
    lines = [f"| arm, times 100 | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, seeds in found.items():
        cells = [interval([100 * seed[name] for seed in seeds]) for name in names]
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.1f} +- {half:.1f}" for mean, half in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
