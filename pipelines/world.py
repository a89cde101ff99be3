"""The generated world: pictures of a few shapes with captions whose truth is known.

`write_world` makes a noisy web-like set, with the truth beside it, a small clean set and a held-out test set.
Every row is drawn from (seed, split, row) alone.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator

from blip.tokenizer import write_vocabulary
from capfilt.schema import CLEAN
from pipelines import world_captions
from pipelines.config import parse_args, run_main
from pipelines.world_picture import RADIUS, draw_jpeg
from pipelines.world_text import (
    COLOURS,
    SHAPES,
    TEXTURES,
    TONES,
    Palette,
    Scene,
    SceneObject,
    judge,
    scene_from_json,
    scene_to_json,
)

log = logging.getLogger(__name__)
SPLITS = ("noisy", "clean", "test")
KINDS = ("right", "partly", "other_image", "junk", "subtle")
BACKGROUNDS = ("flat", "gradient", "noise", "checker")
ROW_GROUP = 100
GAP = 0.04  # between two objects, and half of it to the border

TEXT = pa.string()
RAW = pa.schema(  # what img2dataset writes
    [
        *((name, TEXT) for name in ("caption", "url", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *(("exif", TEXT), ("sha256", TEXT), ("jpg", pa.binary())),
    ]
)
NOISY_TRUTH = pa.schema([("key", TEXT), ("kind", TEXT), ("true", pa.bool_()), ("scene", TEXT)])
CLEAN_TRUTH = pa.schema([("key", TEXT), ("scene", TEXT)])


@dataclass(frozen=True)
class WorldConfig:
    """Rows per split, what scenes are made of, and the shares of the five kinds of web captions."""

    seed: int = 0
    noisy_rows: int = 2000
    clean_rows: int = 500
    test_rows: int = 500
    shard_rows: int = 250
    side: int = 96  # pixels
    objects_min: int = 2
    objects_max: int = 2
    colours: int = 8
    shapes: int = 6
    textures: int = 3
    captions_per_image: int = 3
    directions: float = world_captions.DIRECTION_SHARE  # stated by clean and test captions, where clear
    brief: bool = False  # clean and test captions tell colour, shape and direction of two objects, no more
    jpeg_quality: int = 90
    right: float = 0.5
    partly: float = 0.10
    other_image: float = 0.15
    junk: float = 0.15
    subtle: float = 0.10

    def __post_init__(self) -> None:
        ranges = {
            "seed": (0, 2**63 - 1),
            **dict.fromkeys(("noisy_rows", "clean_rows", "test_rows"), (0, 10**8)),
            "shard_rows": (1, 10_000),
            "side": (32, 1024),
            "objects_min": (2, 4),
            "objects_max": (self.objects_min, 4),
            "colours": (3, len(COLOURS)),
            "shapes": (3, len(SHAPES)),
            "textures": (1, len(TEXTURES)),
            "captions_per_image": (1, 20),
            "jpeg_quality": (1, 100),
            **dict.fromkeys((*KINDS, "directions"), (0, 1)),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"world.{name} is {value}; it must lie between {low} and {high}")
        total = sum(self.shares().values())
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"the world's shares {self.shares()} sum to {total:g}; they must sum to 1")

    def shares(self) -> dict[str, float]:
        """Kind of web caption -> its share."""
        return {kind: getattr(self, kind) for kind in KINDS}

    def palette(self) -> Palette:
        return Palette(COLOURS[: self.colours], SHAPES[: self.shapes], TEXTURES[: self.textures])


@dataclass(frozen=True)
class WorldRun:
    world: WorldConfig
    out: str  # the folder it is written to


@dataclass(frozen=True)
class Row:
    """One generated picture; `kind` is None outside the noisy split."""

    key: str
    scene: Scene
    jpeg: bytes
    texts: tuple[str, ...]
    kind: str | None


def make_scene(config: WorldConfig, rng: Generator) -> Scene:
    """A random scene without overlaps."""
    palette = config.palette()
    count = int(rng.integers(config.objects_min, config.objects_max + 1))
    pairs = rng.permutation(len(palette.colours) * len(palette.shapes))[:count]
    sizes, places = _layout(count, rng)
    objects = tuple(
        SceneObject(
            shape=palette.shapes[int(pair) % len(palette.shapes)],
            colour=palette.colours[int(pair) // len(palette.shapes)],
            size=size,
            texture=_texture(palette.textures, rng),
            x=x,
            y=y,
        )
        for pair, size, (x, y) in zip(pairs, sizes, places, strict=True)
    )
    return Scene(objects, *(choices[int(rng.integers(len(choices)))] for choices in (BACKGROUNDS, TONES)))


def _texture(textures: Sequence[str], rng: Generator) -> str:
    """Plain in half of the cases, else any."""
    return textures[0] if rng.random() < 0.5 else textures[int(rng.integers(len(textures)))]


def _layout(count: int, rng: Generator) -> tuple[list[str], list[list[float]]]:
    """Sizes and centres of `count` objects that do not touch."""
    pairs = list(combinations(range(count), 2))
    while True:
        sizes = [("small", "large")[int(draw)] for draw in rng.integers(2, size=count)]
        radii = np.array([[RADIUS[size]] for size in sizes])
        edges = radii + GAP / 2
        for _ in range(50):
            places = edges + rng.random((count, 2)) * (1 - 2 * edges)  # [count, 2]
            apart = [math.dist(places[i], places[j]) - radii[i] - radii[j] for i, j in pairs]
            if min(apart) > GAP:
                return sizes, places.round(4).tolist()


def make_row(config: WorldConfig, split: str, index: int) -> Row:
    """Row `index` of a split: one web caption for "noisy", `captions_per_image` human ones otherwise."""
    # One stream each, so that a change to how pictures are drawn leaves the texts as they are.
    scene_rng, picture_rng, text_rng = (
        np.random.default_rng([config.seed, SPLITS.index(split), index, stream]) for stream in range(3)
    )
    scene = make_scene(config, scene_rng)
    if split == "noisy":
        shares = np.array(list(config.shares().values()))
        kind = str(text_rng.choice(KINDS, p=shares / shares.sum()))
        texts = [web_caption(kind, scene, config, text_rng)]
    else:
        kind = None
        texts = _human_captions(config, scene, text_rng)
    shard, row = divmod(index, config.shard_rows)
    jpeg = draw_jpeg(scene, picture_rng, config.side, config.jpeg_quality)
    return Row(f"{split}{shard:05d}{row:04d}", scene, jpeg, tuple(texts), kind)


def _human_captions(config: WorldConfig, scene: Scene, rng: Generator) -> list[str]:
    if config.brief:
        return world_captions.brief_captions(scene, rng, config.captions_per_image)
    return world_captions.captions(scene, rng, config.captions_per_image, config.directions)


def web_caption(kind: str, scene: Scene, config: WorldConfig, rng: Generator) -> str:
    """A caption of the given kind; all but "right" are false of the scene."""
    if kind == "right":
        return world_captions.captions(scene, rng, 1)[0]
    if kind == "partly":
        return world_captions.partly_right(scene, config.palette(), rng)
    if kind == "junk":
        return world_captions.junk(rng)
    if kind == "subtle":
        return world_captions.subtly_wrong(scene, config.palette(), rng)
    while True:  # "other_image": by chance another scene's caption can be true here
        text = world_captions.captions(make_scene(config, rng), rng, 1)[0]
        if not judge(text, scene).true:
            return text


def write_world(config: WorldConfig, folder: str | Path) -> None:
    """Writes the three splits and their truth under `folder`; world.json comes last and marks it finished.

    A folder that already holds this world is left as it is; one that holds another world, or parquet files
    that no world wrote, is a ValueError.
    """
    folder = Path(folder)
    finished, unfinished = folder / "world.json", folder / "world.unfinished.json"
    if finished.exists():
        _check_same_world(config, finished)
        log.info("%s already holds this world", folder)
        return
    _clear_unfinished(folder, unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(asdict(config), indent=2) + "\n")
    for split in SPLITS:
        _write_split(config, split, folder)
    os.replace(unfinished, finished)


def _check_same_world(config: WorldConfig, finished: Path) -> None:
    there, wanted = json.loads(finished.read_text()), asdict(config)
    differing = [name for name in sorted({*there, *wanted}) if there.get(name) != wanted.get(name)]
    if differing:
        found = ", ".join(f"{name} {there.get(name)} (wanted {wanted.get(name)})" for name in differing)
        raise ValueError(f"{finished} holds another world: {found}; choose another folder or remove this one")


def _clear_unfinished(folder: Path, unfinished: Path) -> None:
    """Removes what a killed run left behind, and nothing that such a run did not write."""
    left = [path for split in SPLITS for path in sorted((folder / split).glob("*.parquet"))]
    if left and not unfinished.exists():
        raise ValueError(f"{folder} holds {left[0]}, but no world.json; choose an empty folder for the world")
    for path in left:
        path.unlink()


def _write_split(config: WorldConfig, split: str, folder: Path) -> None:
    num_rows = {"noisy": config.noisy_rows, "clean": config.clean_rows, "test": config.test_rows}[split]
    (folder / split).mkdir(exist_ok=True)
    to_record, schema = (_raw_record, RAW) if split == "noisy" else (_clean_record, CLEAN)
    truth: list[dict[str, Any]] = []
    for shard, start in enumerate(
        range(0, max(num_rows, 1), config.shard_rows)
    ):  # an empty split can be read
        rows = [make_row(config, split, i) for i in range(start, min(start + config.shard_rows, num_rows))]
        table = pa.Table.from_pylist([to_record(row, config.side) for row in rows], schema=schema)
        pq.write_table(table, folder / split / f"{shard:05d}.parquet", row_group_size=ROW_GROUP)
        truth.extend(_truth_record(row) for row in rows)
        log.info("%s shard %d: %d rows", split, shard, len(rows))
    known = NOISY_TRUTH if split == "noisy" else CLEAN_TRUTH
    pq.write_table(pa.Table.from_pylist(truth, schema=known), folder / f"{split}_truth.parquet")


def _raw_record(row: Row, side: int) -> dict[str, Any]:
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), side)
    return sizes | {
        "caption": row.texts[0],
        "url": f"https://example.invalid/{row.key}.jpg",
        "key": row.key,
        "status": "success",
        "exif": "{}",
        "sha256": hashlib.sha256(row.jpeg).hexdigest(),
        "jpg": row.jpeg,
    }


def _clean_record(row: Row, side: int) -> dict[str, Any]:
    return {
        "key": row.key,
        "image": {"bytes": row.jpeg, "path": f"{row.key}.jpg"},
        "captions": [{"text": text, "source": "human", "itm": None} for text in row.texts],
    }


def _truth_record(row: Row) -> dict[str, Any]:
    true = judge(row.texts[0], row.scene).true
    return {"key": row.key, "kind": row.kind, "true": true, "scene": scene_to_json(row.scene)}


def read_truth(path: str | Path) -> dict[str, tuple[str | None, Scene]]:
    """Key -> (kind of web caption, None outside the noisy split; scene)."""
    rows = pq.read_table(path).to_pylist()
    return {row["key"]: (row.get("kind"), scene_from_json(row["scene"])) for row in rows}


def main(argv: list[str]) -> int:
    """Writes the world of a config file, and its words as a vocabulary."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = parse_args(argv, WorldRun)
    write_world(run.world, run.out)
    write_vocabulary(world_captions.VOCABULARY, Path(run.out, "vocabulary"))
    return 0


if __name__ == "__main__":
    run_main(main)
