"""The generated world: scenes keep their rules, rows are reproducible, files are well formed."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_pipelines_world_text import CONFIGS, thing

from capfilt.schema import CLEAN
from pipelines import world_text
from pipelines.world import (
    BACKGROUNDS,
    GAP,
    WorldConfig,
    main,
    make_row,
    make_scene,
    read_truth,
    write_world,
)
from pipelines.world_picture import RADIUS, draw_jpeg
from pipelines.world_text import COLOURS, SHAPES, TEXTURES, TONES, Scene, judge

SMALL = WorldConfig(noisy_rows=30, clean_rows=7, test_rows=5, shard_rows=12, side=48)


def rgb(scene: Scene, side: int = 96) -> np.ndarray:
    """[side, side, 3] of the drawn scene."""
    jpeg = draw_jpeg(scene, np.random.default_rng(0), side, 95)
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


@pytest.mark.parametrize("config", CONFIGS)
def test_scenes_keep_their_rules(config: WorldConfig) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = make_scene(config, rng)
        assert config.objects_min <= len(scene.objects) <= config.objects_max
        assert len({(a.colour, a.shape) for a in scene.objects}) == len(scene.objects)
        assert scene.background in BACKGROUNDS and scene.tone in TONES
        for i, a in enumerate(scene.objects):
            assert a.colour in COLOURS[: config.colours] and a.shape in SHAPES[: config.shapes]
            assert RADIUS[a.size] <= min(a.x, a.y, 1 - a.x, 1 - a.y)
            for b in scene.objects[:i]:
                distance = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5
                assert distance > RADIUS[a.size] + RADIUS[b.size] + GAP - 1e-3
        assert world_text.scene_from_json(world_text.scene_to_json(scene)) == scene


def test_rows_depend_on_nothing_but_their_place() -> None:
    row = make_row(WorldConfig(noisy_rows=50), "noisy", 17)
    assert make_row(WorldConfig(noisy_rows=9000, clean_rows=1, captions_per_image=1), "noisy", 17) == row
    assert make_row(WorldConfig(seed=1), "noisy", 17).scene != row.scene
    assert make_row(WorldConfig(), "noisy", 18).scene != row.scene
    assert len({make_row(WorldConfig(), split, 17).scene for split in ("noisy", "clean", "test")}) == 3
    smaller = make_row(WorldConfig(side=64), "noisy", 17)
    assert (smaller.scene, smaller.texts) == (row.scene, row.texts)
    assert smaller.jpeg != row.jpeg


def test_kinds_come_in_their_shares() -> None:
    config = WorldConfig(side=32)
    kinds = Counter(make_row(config, "noisy", i).kind for i in range(1500))
    for kind, share in config.shares().items():
        assert kinds[kind] / 1500 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_drawn_colour_is_the_nearest_to_its_name(colour: str, background: str, tone: str) -> None:
    """Against the textbook RGB of each name, with the two greys of the backgrounds among the choices."""
    names = {
        "red": (255, 0, 0),
        "green": (0, 128, 0),
        "blue": (0, 0, 255),
        "yellow": (255, 255, 0),
        "purple": (128, 0, 128),
        "orange": (255, 140, 0),
        "white": (255, 255, 255),
        "black": (0, 0, 0),
        "dark": (85, 85, 85),
        "light": (170, 170, 170),
    }
    scene = Scene((thing(f"small plain {colour} square", 0.25, 0.25),), background, tone)
    for side in (64, 96):
        pixels = rgb(scene, side)
        for place, expected in ((0.25, colour), (0.75, tone)):
            middle = round(place * side)
            seen = pixels[middle - 3 : middle + 4, middle - 3 : middle + 4].mean(axis=(0, 1))
            nearest = min(names, key=lambda name: float(((seen - names[name]) ** 2).sum()))
            assert nearest == expected


def test_large_objects_cover_far_more_than_small_ones_and_textures_show() -> None:
    empty = rgb(Scene((), "flat", "dark"))
    for shape in SHAPES:
        areas, spread = {}, {}
        for size in ("small", "large"):
            for texture in TEXTURES:
                pixels = rgb(Scene((thing(f"{size} {texture} red {shape}", 0.5, 0.5),), "flat", "dark"))
                changed = np.abs(pixels - empty).sum(axis=2) > 80
                areas[size, texture] = changed.sum()
                spread[size, texture] = pixels[..., 1][changed].std()
        ratio = areas["large", "plain"] / areas["small", "plain"]
        assert ratio == pytest.approx((RADIUS["large"] / RADIUS["small"]) ** 2, rel=0.1)
        for size in ("small", "large"):
            assert areas[size, "striped"] == pytest.approx(
                areas[size, "plain"], rel=0.1
            )  # the outline is kept
            assert min(spread[size, "striped"], spread[size, "dotted"]) > 2 * spread[size, "plain"]


def test_shapes_differ_from_each_other() -> None:
    empty = rgb(Scene((), "flat", "light"))
    masks = {}
    for shape in SHAPES:
        pixels = rgb(Scene((thing(f"small plain black {shape}", 0.5, 0.5),), "flat", "light"))
        masks[shape] = np.abs(pixels - empty).sum(axis=2) > 200
        rows, columns = np.nonzero(masks[shape])
        centred = 0.28 * 96 * RADIUS["small"]  # the centroid of a triangle lies below the middle of its box
        assert abs(rows.mean() - 47.5) < centred and abs(columns.mean() - 47.5) < 1
    for i, a in enumerate(SHAPES):
        for b in SHAPES[:i]:
            overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
            assert overlap < 0.86, (a, b, overlap)


def test_written_world(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "world")
    folder = tmp_path / "world"
    assert sorted(path.name for path in folder.rglob("*") if path.is_file() and path.parent == folder) == [
        "clean_truth.parquet",
        "noisy_truth.parquet",
        "test_truth.parquet",
        "world.json",
    ]
    assert WorldConfig(**json.loads((folder / "world.json").read_text())) == SMALL
    rows = [row for path in sorted((folder / "noisy").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [len(pq.read_table(path)) for path in sorted((folder / "noisy").iterdir())] == [12, 12, 6]
    truth = read_truth(folder / "noisy_truth.parquet")
    recorded = {row["key"]: row["true"] for row in pq.read_table(folder / "noisy_truth.parquet").to_pylist()}
    assert [row["key"] for row in rows] == list(truth)
    assert len(truth) == 30 and not any("." in key for key in truth)
    for row in rows:
        assert row["sha256"] == hashlib.sha256(row["jpg"]).hexdigest()
        with Image.open(io.BytesIO(row["jpg"])) as image:
            assert (image.format, image.size) == ("JPEG", (48, 48))
        assert {row[name] for name in ("width", "height", "original_width", "original_height")} == {48}
        assert (row["status"], row["error_message"], row["exif"]) == ("success", None, "{}")
        assert row["url"] == f"https://example.invalid/{row['key']}.jpg"
        kind, scene = truth[row["key"]]
        assert judge(row["caption"], scene).true is recorded[row["key"]] is (kind == "right")
    keys = set(truth)
    for split, num_rows in (("clean", 7), ("test", 5)):
        table = pq.read_table(folder / split / "00000.parquet")
        # Parquet calls a list's item "element", so metadata is compared by itself.
        assert table.schema.equals(CLEAN) and table.schema.metadata == CLEAN.metadata
        scenes = read_truth(folder / f"{split}_truth.parquet")
        assert pq.read_schema(folder / f"{split}_truth.parquet").names == ["key", "scene"]
        assert table.num_rows == len(scenes) == num_rows
        for row in table.to_pylist():
            kind, scene = scenes[row["key"]]
            assert kind is None
            assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (48, 48)
            assert len(row["captions"]) == 3
            for caption in row["captions"]:
                assert (caption["source"], caption["itm"]) == ("human", None)
                assert judge(caption["text"], scene).true
        assert not keys & set(scenes)
        keys |= set(scenes)


def test_row_groups_have_a_hundred_rows(tmp_path: Path) -> None:
    write_world(WorldConfig(noisy_rows=230, clean_rows=0, test_rows=0, side=32), tmp_path)
    metadata = pq.ParquetFile(tmp_path / "noisy" / "00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [100, 100, 30]
    assert pq.read_table(tmp_path / "clean" / "00000.parquet").num_rows == 0
    assert read_truth(tmp_path / "test_truth.parquet") == {}


def test_the_same_config_gives_the_same_bytes_and_is_done_once(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "a")
    write_world(SMALL, tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    before = {file: (tmp_path / "a" / file).stat().st_mtime_ns for file in files}
    write_world(SMALL, tmp_path / "a")
    assert {file: (tmp_path / "a" / file).stat().st_mtime_ns for file in files} == before


def test_a_killed_run_is_done_again_and_foreign_files_are_left(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "whole")
    killed = tmp_path / "killed"
    (killed / "noisy").mkdir(parents=True)
    (killed / "world.unfinished.json").write_text("{")
    (killed / "noisy" / "00077.parquet").write_bytes(b"torn")
    write_world(SMALL, killed)
    assert sorted(path.name for path in (killed / "noisy").iterdir()) == [
        f"0000{i}.parquet" for i in range(3)
    ]
    assert not (killed / "world.unfinished.json").exists()

    mine = tmp_path / "mine" / "test" / "00000.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(
        ValueError, match=r"mine holds .*00000.parquet, but no world.json; choose an empty folder"
    ):
        write_world(SMALL, tmp_path / "mine")
    assert mine.read_bytes() == b"mine"


def test_another_world_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path)
    with pytest.raises(
        ValueError, match=r"another world: seed 0 \(wanted 3\), side 48 \(wanted 64\); choose another"
    ):
        write_world(
            WorldConfig(noisy_rows=30, clean_rows=7, test_rows=5, shard_rows=12, side=64, seed=3), tmp_path
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, r"world.seed is -1; it must lie between 0 and"),
        ({"noisy_rows": -5}, r"world.noisy_rows is -5"),
        ({"shard_rows": 0}, r"world.shard_rows is 0; it must lie between 1 and 10000"),
        ({"side": 8}, r"world.side is 8; it must lie between 32"),
        ({"objects_min": 1}, r"world.objects_min is 1; it must lie between 2 and 4"),
        ({"objects_min": 3}, r"world.objects_max is 2; it must lie between 3 and 4"),
        ({"colours": 9}, r"world.colours is 9; it must lie between 3 and 8"),
        ({"shapes": 2}, r"world.shapes is 2"),
        ({"textures": 0}, r"world.textures is 0"),
        ({"captions_per_image": 0}, r"world.captions_per_image is 0"),
        ({"directions": 1.1}, r"world.directions is 1.1; it must lie between 0 and 1"),
        ({"jpeg_quality": 101}, r"world.jpeg_quality is 101"),
        ({"right": 0.6}, r"sum to 1.1; they must sum to 1"),
        ({"right": float("nan")}, r"world.right is nan"),
        ({"right": -0.1, "partly": 0.7}, r"world.right is -0.1"),
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldConfig(**wrong)  # type: ignore[arg-type]


def test_the_command_writes_the_world_of_its_config(tmp_path: Path) -> None:
    config = tmp_path / "world.yaml"
    config.write_text(f"out: {tmp_path / 'out'}\nworld:\n  noisy_rows: 4\n  clean_rows: 2\n  test_rows: 1\n")
    assert main([str(config), "world.side=32"]) == 0
    written = json.loads((tmp_path / "out" / "world.json").read_text())
    assert (written["noisy_rows"], written["side"]) == (4, 32)
    assert len(read_truth(tmp_path / "out" / "noisy_truth.parquet")) == 4
