"""Questions about the pictures of the generated world, answered from its truth: shards to learn VQA on.

Of the world in WORLD (`make world`) the clean pictures are for training, the test ones held out. OUT gets
train/ and test/ with one row per picture ({key, image, questions}, see pipelines.questions), and vocabulary/,
the words of the world's captions and of these questions and answers. A shard is written again in every run.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator

from blip.tokenizer import write_vocabulary
from capfilt.shards import writing_shard
from pipelines.config import parse_args, run_main
from pipelines.questions import VQA
from pipelines.world import WorldConfig, read_truth
from pipelines.world_captions import BRIEF_PHRASES, VOCABULARY, clear_direction
from pipelines.world_text import FLIPPED, TONES, Palette, Scene, SceneObject

SPLITS = {"clean": "train", "test": "test"}  # of the world -> of the questions
COUNTS = {2: "two", 3: "three", 4: "four"}
# Of ten people, so many call it so.
SIZES = {"large": {"large": 0.6, "big": 0.4}, "small": {"small": 0.7, "little": 0.3}}

Asked = tuple[str, dict[str, float]]  # a question; its answers with their weights

WORDS = ("what", "colour", "how", "many", "pattern", "has", "shape", "or", "yes", "no", "?")
QUESTION_VOCABULARY = tuple(sorted({*VOCABULARY, *WORDS, *COUNTS.values()}))


@dataclass(frozen=True)
class QuestionsRun:
    world: str  # a folder of `pipelines.world`
    out: str
    questions_per_image: int = 6  # of all that could be asked
    seed: int = 0

    def __post_init__(self) -> None:
        if self.questions_per_image < 1 or self.seed < 0:
            raise ValueError("questions_per_image must be at least 1, seed at least 0")


def ask(scene: Scene, palette: Palette, rng: Generator) -> Iterator[Asked]:
    """All kinds of questions about a scene; yes and no are equally often right."""
    for thing in scene.objects:
        if [other.shape for other in scene.objects].count(thing.shape) == 1:
            yield f"what colour is the {thing.shape}?", {thing.colour: 1.0}
        if [other.colour for other in scene.objects].count(thing.colour) == 1:
            yield f"what shape is {thing.colour}?", {thing.shape: 1.0}
        yield f"how big is {_the(thing)}?", SIZES[thing.size]
        yield f"what pattern has {_the(thing)}?", {thing.texture: 1.0}
    yield "how many shapes are there?", {COUNTS[len(scene.objects)]: 1.0}
    yield f"is the background {' or '.join(TONES)}?", {scene.tone: 1.0}
    present = {(thing.colour, thing.shape) for thing in scene.objects}
    absent = [(c, s) for c in palette.colours for s in palette.shapes if (c, s) not in present]
    # Most of what is absent shares neither colour nor shape with what is there, and is told without looking
    # at both: so that what shares one comes as often.
    near = [(c, s) for c, s in absent if any(c == own or s == other for own, other in present)]
    yield _there(sorted(present), "yes", rng)
    yield _there(near if near and rng.random() < 0.5 else absent, "no", rng)
    for one, other in permutations(scene.objects, 2):
        direction = clear_direction(one, other)
        if direction is not None:
            is_so = rng.random() < 0.5
            said = BRIEF_PHRASES[direction if is_so else FLIPPED[direction]]
            yield f"is {_the(one)} {said} {_the(other)}?", {"yes" if is_so else "no": 1.0}


def _the(thing: SceneObject) -> str:
    return f"the {thing.colour} {thing.shape}"


def _there(choice: list[tuple[str, str]], answer: str, rng: Generator) -> Asked:
    colour, shape = choice[int(rng.integers(len(choice)))]
    article = "an" if colour[0] in "aeiou" else "a"
    return f"is there {article} {colour} {shape}?", {answer: 1.0}


def questions_of(key: str, scene: Scene, palette: Palette, run: QuestionsRun) -> list[dict[str, Any]]:
    """Some questions about a picture, as rows hold them; drawn from (seed, key) alone."""
    rng = np.random.default_rng([run.seed, *key.encode()])
    possible = list(ask(scene, palette, rng))
    chosen = rng.permutation(len(possible))[: run.questions_per_image].tolist()
    return [
        {
            "id": f"{key}-{number}",
            "question": possible[i][0],
            "answers": [{"text": text, "weight": weight} for text, weight in possible[i][1].items()],
        }
        for number, i in enumerate(chosen)
    ]


def write_questions(run: QuestionsRun) -> int:
    """Writes all shards; how many questions are in them. ValueError where there is no finished world."""
    world, out = Path(run.world), Path(run.out)
    if not (world / "world.json").exists():
        raise ValueError(f"{world}: holds no finished world; make one with make world")
    palette = WorldConfig(**json.loads((world / "world.json").read_text())).palette()
    total = 0
    for split, name in SPLITS.items():
        scenes = read_truth(world / f"{split}_truth.parquet")
        for path in sorted((world / split).glob("*.parquet")):
            rows = pq.read_table(path, columns=["key", "image"]).to_pylist()
            for row in rows:
                row["questions"] = questions_of(row["key"], scenes[row["key"]][1], palette, run)
            with writing_shard(out / name / path.name, VQA) as shard:
                shard.append(pa.Table.from_pylist(rows, schema=VQA))
            total += sum(len(row["questions"]) for row in rows)
    write_vocabulary(QUESTION_VOCABULARY, out / "vocabulary")
    return total


def main(argv: list[str]) -> int:
    run = parse_args(argv, QuestionsRun)
    print(f"{write_questions(run)} questions about {run.world} in {run.out}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
