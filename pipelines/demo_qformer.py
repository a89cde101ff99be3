"""BLIP-2 on the generated world: a Q-Former between a frozen ViT and language models that saw no picture.

Writes down what the ViT sees, pre-trains a tiny OPT and a tiny FlanT5 on texts alone, trains stage 1, and
stage 2 into each of them; then captions held-out pictures and answers questions about them, judged by the
world's own truth. Everything lies under OUT, with a manifest of all commands; run again, it goes on where it
stopped.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipelines.cache_features import FeaturesRun
from pipelines.config import load_config, parse_args, run_main
from pipelines.steps import Entry, Step, check_steps, run_step
from pipelines.testset import TestImage, batches_of_pixels, read_testset
from pipelines.train_language import ASKED, LanguageRun
from pipelines.train_stage1 import Stage1Run
from pipelines.train_stage2 import Stage2Run
from pipelines.world import WorldConfig, WorldRun, read_truth
from pipelines.world_questions import ask
from pipelines.world_text import Scene, judge, names_things
from qformer import Stage2, load_stage2
from qformer.language import CAPTION

WORLD = Entry("pipelines.world", WorldRun)
FEATURES = Entry("pipelines.cache_features", FeaturesRun)
LANGUAGE = Entry("pipelines.train_language", LanguageRun)
STAGE1 = Entry("pipelines.train_stage1", Stage1Run)
STAGE2 = Entry("pipelines.train_stage2", Stage2Run)

# BLIP-2 writes eight tokens at least; "a red ring above a blue star" has seven.
BRIEF = replace(CAPTION, min_length=1)


@dataclass(frozen=True)
class Recipes:
    """The config file of each step; what they say of inputs and outputs is overridden."""

    world: str
    features: str
    language_opt: str
    language_t5: str
    stage1: str
    stage2_opt: str
    stage2_flant5: str


@dataclass(frozen=True)
class DemoRun:
    out: str
    recipes: Recipes
    pictures: int = 100  # of the test set, that are told of
    examples: int = 4


@dataclass(frozen=True)
class Told:
    """What a stage 2 says of a picture: a caption, and answers to questions with what would be right."""

    caption: str
    answers: tuple[tuple[str, str, Mapping[str, float]], ...]


def plan(run: DemoRun) -> list[Step]:
    """Every step, in order."""
    out, recipes = run.out, run.recipes
    first = f"stage1.weights={out}/stage1/model"
    steps = first_steps(out, recipes)
    words = f"init.tokenizer={out}/world/vocabulary"
    steps.append(Step("stage1", STAGE1, recipes.stage1, (f"out={out}/stage1", *pictures(out), words)))
    for name, config in (("opt", recipes.stage2_opt), ("flant5", recipes.stage2_flant5)):
        overrides = (f"out={out}/stage2_{name}", f"language={out}/language_{name}", first, *pictures(out))
        steps.append(Step(f"stage2_{name}", STAGE2, config, overrides))
    return steps


def first_steps(out: str, recipes: Recipes) -> list[Step]:
    """The world, what the frozen ViT sees of it, and the language models that read of it."""
    shards = f"shards=[{out}/world/clean]"
    return [
        Step("world", WORLD, recipes.world, (f"out={out}/world",)),
        Step("features", FEATURES, recipes.features, (f"out={out}/features", shards)),
        Step("language_opt", LANGUAGE, recipes.language_opt, (f"out={out}/language_opt",)),
        Step("language_flant5", LANGUAGE, recipes.language_t5, (f"out={out}/language_flant5",)),
    ]


def pictures(out: str) -> tuple[str, str]:
    """What a stage is shown, as `first_steps` made it."""
    return f"data.shards=[{out}/world/clean]", f"data.features={out}/features"


def main(argv: list[str]) -> int:
    run = parse_args(argv, DemoRun)
    started, out = time.monotonic(), Path(run.out)
    steps = plan(run)
    check_steps(steps)
    for step in steps:
        run_step(out, step)
    world = load_config(WorldRun, run.recipes.world).world
    scenes = {key: scene for key, (_, scene) in read_truth(out / "world/test_truth.parquet").items()}
    images = list(read_testset([str(out / "world/test")], run.pictures))
    told = {}
    for name, config in (("OPT", run.recipes.stage2_opt), ("FlanT5", run.recipes.stage2_flant5)):
        model = load_stage2(out / f"stage2_{name.lower()}/model", dtype=torch.float32)
        prompt = load_config(Stage2Run, config).data.prompt
        told[name] = dict(tell(model, images, scenes, world, prompt))
    print(f"\n{table(told, scenes)}\n\n{examples(run.examples, told, images, scenes)}")
    print(f"pictures: {out}/world/test; every step and its command: {out}/manifest.json")
    print(f"{time.monotonic() - started:.0f} seconds in all")
    return 0


def tell(
    model: Stage2, images: list[TestImage], scenes: Mapping[str, Scene], world: WorldConfig, prompt: str
) -> Iterator[tuple[str, Told]]:
    """Key -> a caption of every image, and answers to what can be asked of colours and shapes."""
    size = model.config.vision.image_size
    for chosen, pixels in batches_of_pixels(images, size, 50, torch.device("cpu")):
        asked = [
            (number, question, right)
            for number, image in enumerate(chosen)
            for question, right in ask(scenes[image.key], world.palette(), np.random.default_rng(0))
            if question.startswith(ASKED)
        ]
        about = [number for number, _, _ in asked]
        said = model.answer(pixels, [question for _, question, _ in asked], images=about) if asked else []
        captions = model.caption(pixels, prompt, BRIEF)
        for number, (image, caption) in enumerate(zip(chosen, captions, strict=True)):
            own = ((row[1], text, row[2]) for row, text in zip(asked, said, strict=True) if row[0] == number)
            yield image.key, Told(caption, tuple(own))


def table(told: Mapping[str, Mapping[str, Told]], scenes: Mapping[str, Scene]) -> str:
    """Shares that are right, a line for each language model."""
    found = {name: share_right(of, scenes) for name, of in told.items()}
    lines = [f"{'':<10}" + "".join(f"{what:>16}" for what in next(iter(found.values())))]
    for name, shares in found.items():
        lines.append(f"{name:<10}" + "".join(f"{share:>16.1%}" for share in shares.values()))
    return "\n".join(lines)


def share_right(told: Mapping[str, Told], scenes: Mapping[str, Scene]) -> dict[str, float]:
    """Of the captions, those with the right things, wherever they are said to lie, and those right in all;
    and of the answers."""
    right = {
        "things right": [names_things(one.caption, scenes[key]) for key, one in told.items()],
        "captions right": [judge(one.caption, scenes[key]).true for key, one in told.items()],
        "answers right": [said in right for one in told.values() for _, said, right in one.answers],
    }
    return {what: float(np.mean(each)) for what, each in right.items()}


def examples(
    count: int, told: Mapping[str, Mapping[str, Told]], images: list[TestImage], scenes: Mapping[str, Scene]
) -> str:
    """The first pictures: their truth, and what is said of them."""
    lines = []
    for image in images[:count]:
        things = "; ".join(f"{thing.colour} {thing.shape}" for thing in scenes[image.key].objects)
        lines.append(f"[{image.key}] {things}; a person: {image.texts[0]}")
        for name, of in told.items():
            one = of[image.key]
            verdict = judge(one.caption, scenes[image.key])
            lines.append(f"  {name:<8}{one.caption}   ({'right' if verdict.true else verdict.reason})")
            lines += [
                f"          {q} {said} ({'right' if said in right else 'wrong'})"
                for q, said, right in one.answers[:2]
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
