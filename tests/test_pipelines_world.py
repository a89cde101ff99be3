"""The generated world: captions are as true as recorded, rows are reproducible, files are well formed."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.schema import CLEAN
from pipelines import world_text
from pipelines.world import (
    BACKGROUNDS,
    GAP,
    KINDS,
    RADIUS,
    WorldConfig,
    draw_jpeg,
    main,
    make_row,
    make_scene,
    read_truth,
    web_caption,
    write_world,
)
from pipelines.world_text import COLOURS, SHAPES, TEXTURES, TONES, VOCABULARY, Scene, SceneObject, judge

SMALL = WorldConfig(noisy_rows=30, clean_rows=7, test_rows=5, shard_rows=12, side=48)
CROWDED = WorldConfig(
    objects_max=4, colours=3, shapes=3
)  # few names for many objects: the hardest for the judge
CONFIGS = (WorldConfig(), WorldConfig(shapes=8, objects_max=3), CROWDED)


def thing(words: str, x: float, y: float) -> SceneObject:
    size, texture, colour, shape = words.split()
    return SceneObject(shape, colour, size, texture, x, y)


# The red circle is left of and a little above the blue square.
PAIR = Scene(
    (thing("large plain red circle", 0.3, 0.45), thing("small striped blue square", 0.7, 0.55)),
    "flat",
    "dark",
)
TRIO = Scene((*PAIR.objects, thing("small dotted green star", 0.5, 0.1)), "noise", "light")


def rgb(scene: Scene, side: int = 96) -> np.ndarray:
    """[side, side, 3] of the drawn scene."""
    jpeg = draw_jpeg(scene, np.random.default_rng(0), side, 95)
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle and a blue square",
        "a blue square and a red circle",
        "a red circle",
        "A Large Plain Red Circle  to the left of , a small striped blue square",
        "a red circle left of a blue square",
        "the blue square is to the right of the red circle",
        "there is a big red circle above a little blue square",
        "the blue square is below the red circle",
        "a photo of a red circle next to a blue square on a dark background",
        "a dark background with a red circle beside a blue square",
        "two shapes , a red circle and a blue square",
        "there are two shapes, a striped blue square and a red circle",
        "a picture of a red circle over a blue square",
    ],
)
def test_judge_accepts_what_is_so(text: str) -> None:
    assert judge(text, PAIR).true, judge(text, PAIR).reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a red circle and a green square", "there is no green square"),
        ("a blue circle and a red square", "there is no blue circle"),
        ("a red circle and a red circle", "one object is named more than once"),
        ("a small red circle and a blue square", "there is no small red circle"),
        ("a dotted red circle and a blue square", "there is no dotted red circle"),
        ("a red circle to the right of a blue square", "the first object is not to the right of the second"),
        ("the red circle is below the blue square", "the first object is not below the second"),
        ("a red circle and a blue square on a light background", "the background is not light"),
        ("a light background with a red circle and a blue square", "the background is not light"),
        (
            "three shapes, a red circle and a blue square",
            "there are not three shapes, or not three are named",
        ),
        ("two shapes, a red circle", "there are not two shapes, or not two are named"),
        ("a circle and a blue square", "a circle is named without a colour"),
    ],
)
def test_judge_says_what_is_wrong(text: str, reason: str) -> None:
    verdict = judge(text, PAIR)
    assert verdict.parsed
    assert not verdict.true
    assert verdict.reason == reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "and",
        "a red",
        "red circle and blue square",
        "a red circle a blue square",
        "a red circle and",
        "a red circle and and a blue square",
        "a red circle and a blue square and",
        "a red circle and a blue square jpg",
        "buy a red circle and a blue square",
        "a picture of a picture of a red circle and a blue square",
        "there is a red circle is next to a blue square",
        "a red plain circle and a blue square",
        "a redcircle and a blue square",
        "a red circles and a blue square",
        "a red circle left right of a blue square",
        "img 4 0 2 1 jpg",
    ],
)
def test_judge_does_not_parse_broken_grammar(text: str) -> None:
    assert judge(text, PAIR) == world_text.Verdict(False, False, 0, "not a sentence about shapes")


def test_judge_counts_the_objects_named() -> None:
    named = {
        "img 1 jpg": 0,
        "a red circle": 1,
        "a red circle and a green star": 2,
        "a red circle, a green star and a blue square": 3,
    }
    assert {text: judge(text, TRIO).objects_named for text in named} == named
    assert [judge(text, TRIO).true for text in named] == [False, True, True, True]
    assert not judge("two shapes, a red circle and a green star", TRIO).true  # there are three
    assert judge("three shapes, a red circle, a green star and a blue square", TRIO).true


def test_judge_binds_each_mention_to_an_object_of_its_own() -> None:
    objects = (thing("large plain red circle", 0.2, 0.5), thing("small plain red circle", 0.8, 0.5))
    twins = Scene(
        objects, "flat", "dark"
    )  # no generated scene, but the judge must find the one right binding
    assert judge("a red circle and a large red circle", twins).true
    assert judge("a small red circle right of a red circle", twins).true
    assert not judge("a small red circle left of a red circle", twins).true
    assert not judge("a large red circle and a big red circle", twins).true


@pytest.mark.parametrize(
    ("dx", "left", "right"), [(0.04, False, False), (0.06, True, False), (-0.06, False, True)]
)
def test_relations_need_a_margin(dx: float, left: bool, right: bool) -> None:
    scene = Scene(
        (thing("large plain red ring", 0.5, 0.5), thing("large plain blue ring", 0.5 + dx, 0.9)),
        "flat",
        "dark",
    )
    assert judge("a red ring left of a blue ring", scene).true is left
    assert judge("a red ring right of a blue ring", scene).true is right


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


@pytest.mark.parametrize("config", CONFIGS)
def test_human_captions_are_true_and_parse_back(config: WorldConfig) -> None:
    rng = np.random.default_rng(2)
    for _ in range(500 if config == CROWDED else 2000):
        scene = make_scene(config, rng)
        sentence = world_text.compose(scene, rng)
        text = world_text.render(sentence)
        assert world_text.parse(text) == sentence, text
        verdict = judge(text, scene)
        assert verdict.true, (text, scene, verdict.reason)
        assert verdict.objects_named in ((2,) if len(scene.objects) == 2 else (2, 3))
        assert text == text.lower()
        assert not set(text) & set('.!"()*#:;~')
        for article in ("a", "an"):
            for word, following in zip(text.split(), text.split()[1:], strict=False):
                assert word != article or (following[0] in "aeiou") is (article == "an"), text


def test_human_captions_vary() -> None:
    rng = np.random.default_rng(3)
    texts = [world_text.captions(make_scene(WorldConfig(), rng), rng, 3) for _ in range(700)]
    flat = [text for row in texts for text in row]
    sentences = [world_text.parse(text) for text in flat]
    assert all(sentence is not None for sentence in sentences)
    mentions = [mention for sentence in sentences if sentence for mention in sentence.mentions]
    for share in (sum(m.size is not None for m in mentions), sum(m.texture is not None for m in mentions)):
        assert 0.31 < share / len(mentions) < 0.39  # 0.35 +- 5 standard deviations
    links = Counter(link for sentence in sentences if sentence for link in sentence.links)
    assert set(links) == world_text.PAIR_LINKS
    openings = {sentence.opening for sentence in sentences if sentence}
    assert openings == {opening for opening in world_text.OPENINGS if "three" not in opening} - {
        "a picture of"
    }


def test_stated_relations_are_unambiguous() -> None:
    rng = np.random.default_rng(4)
    stated = 0
    for _ in range(1000):
        scene = make_scene(WorldConfig(), rng)
        sentence = world_text.compose(scene, rng)
        direction = world_text.DIRECTIONS.get(sentence.links[0].removeprefix("is "))
        if direction is None:
            continue
        stated += 1
        a, b = (
            next(o for o in scene.objects if (o.colour, o.shape) == (m.colour, m.shape))
            for m in sentence.mentions
        )
        along, across = (b.x - a.x, b.y - a.y) if direction in ("left", "right") else (b.y - a.y, b.x - a.x)
        sign = 1 if direction in ("left", "above") else -1
        assert sign * along > max(0.2, 1.5 * abs(across))
    assert stated > 200


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_web_captions_are_as_true_as_their_kind(config: WorldConfig, kind: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        scene = make_scene(config, rng)
        text = web_caption(kind, scene, config, rng)
        verdict = judge(text, scene)
        assert verdict.true is (kind == "right"), (text, scene)
        assert verdict.parsed is (kind != "junk"), text


def wrong_parts(text: str, scene: Scene) -> list[str]:
    """What differs between a wrong caption and the scene, found without the judge."""
    sentence = world_text.parse(text)
    assert sentence is not None
    return [
        f"{m.colour} {m.shape}"
        for m in sentence.mentions
        if (m.colour, m.shape) not in {(o.colour, o.shape) for o in scene.objects}
    ]


def test_partly_right_names_one_present_and_one_absent_object() -> None:
    rng = np.random.default_rng(6)
    for _ in range(500):
        scene = make_scene(WorldConfig(), rng)
        assert len(wrong_parts(world_text.partly_right(scene, WorldConfig().palette(), rng), scene)) == 1


def test_subtle_errors_come_in_their_shares() -> None:
    config, rng = WorldConfig(), np.random.default_rng(7)
    errors: Counter[str] = Counter()
    for _ in range(2000):
        scene = make_scene(config, rng)
        text = world_text.subtly_wrong(scene, config.palette(), rng)
        wrong, sentence = wrong_parts(text, scene), world_text.parse(text)
        assert sentence is not None
        present = Counter(o.shape for o in scene.objects)
        shapes_kept = Counter(m.shape for m in sentence.mentions) == present
        colours_kept = Counter(m.colour for m in sentence.mentions) == Counter(
            o.colour for o in scene.objects
        )
        if not wrong:
            errors["detail, or swap between equal shapes"] += 1
        elif shapes_kept and colours_kept:
            errors["swap"] += 1
        else:
            assert len(wrong) == 1 and shapes_kept != colours_kept, text
            errors["colour" if shapes_kept else "shape"] += 1
    shares = {error: count / 2000 for error, count in errors.items()}
    # An impossible swap (equal colours: 1 in 8 or so) is replaced by any other edit.
    assert shares["colour"] == pytest.approx(0.40, abs=0.05)
    assert shares["shape"] == pytest.approx(0.30, abs=0.05)
    assert shares["swap"] == pytest.approx(0.13, abs=0.04)
    assert shares["detail, or swap between equal shapes"] == pytest.approx(0.16, abs=0.04)


def test_every_text_is_covered_by_the_vocabulary() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) < 120
    assert {"a", "picture", "of"} <= set(VOCABULARY)
    config, rng = WorldConfig(shapes=8, objects_max=3), np.random.default_rng(8)
    used: set[str] = set()
    for _ in range(700):
        scene = make_scene(config, rng)
        for kind in KINDS:
            used.update(web_caption(kind, scene, config, rng).replace(",", " , ").split())
    assert used <= set(VOCABULARY)
    assert set(VOCABULARY) - used <= {"picture"}  # nothing in it that no text needs


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
