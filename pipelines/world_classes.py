"""Pictures of one shape each, with a folder for every colour and shape: classes of the generated world.

OUT gets train/ and test/, shifted/ with small patterned shapes alone, and classes.txt and templates.txt, for
zero-shot classification and the linear probe. A picture is drawn from (seed, set, class, number) alone.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from capfilt.shards import replacing
from pipelines.config import parse_args, run_main
from pipelines.world import WorldConfig, make_scene
from pipelines.world_picture import draw_jpeg

TEMPLATES = ("a {}", "there is a {}", "a photo of a {}", "an image of a {}", "this is a {}")
SETS = ("train", "test", "shifted")


@dataclass(frozen=True)
class ClassesRun:
    out: str
    images_per_class: int = 10
    seed: int = 0
    side: int = 96  # pixels

    def __post_init__(self) -> None:
        if self.images_per_class < 1 or self.seed < 0:
            raise ValueError("images_per_class must be at least 1, seed at least 0")


def draw(run: ClassesRun, config: WorldConfig, name: str, colour: str, shape: str, number: int) -> bytes:
    """A JPEG of one shape, of any size and texture; in shifted/ small, and striped or dotted."""
    rng = np.random.default_rng([run.seed, *f"{name} {colour} {shape} {number}".encode()])
    scene = make_scene(config, rng)
    thing = replace(scene.objects[0], colour=colour, shape=shape)
    if name == "shifted":
        thing = replace(thing, size="small", texture=config.palette().textures[1 + int(rng.integers(2))])
    return draw_jpeg(replace(scene, objects=(thing,)), rng, run.side, config.jpeg_quality)


def write_classes(run: ClassesRun) -> int:
    """Writes all pictures and both lists; how many pictures there are in a set."""
    config, out = WorldConfig(), Path(run.out)
    palette = config.palette()
    classes = [(colour, shape) for colour in palette.colours for shape in palette.shapes]
    for name in SETS:
        for colour, shape in classes:
            folder = out / name / f"{colour} {shape}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(run.images_per_class):
                picture = draw(run, config, name, colour, shape, number)
                (folder / f"{number:03d}.jpg").write_bytes(picture)
    for file, lines in (("classes", [" ".join(pair) for pair in classes]), ("templates", TEMPLATES)):
        with replacing(out / f"{file}.txt") as text:
            text.write(("\n".join(lines) + "\n").encode())
    return len(classes) * run.images_per_class


def main(argv: list[str]) -> int:
    run = parse_args(argv, ClassesRun)
    print(f"{write_classes(run)} pictures in each of {', '.join(SETS)} of {run.out}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
