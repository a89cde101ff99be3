"""The rule itself, and the rule over a folder: pure, repeatable, every text accounted for."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hostile_files import JPEG, make_tar, member, shard
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt import shards
from capfilt.schema import CLEAN, Columns, Row, Scores, ShardError, scored_schema, scored_table
from capfilt.select import Caption, Rejected, keep, select, threshold_for_fraction, verdict
from capfilt.shards import Split, input_fingerprint, open_split, plan_splits, scored_path


@pytest.mark.parametrize(
    ("score", "threshold", "kept"),
    [
        (0.5, 0.5, True),  # the paper drops what is predicted as unmatched: a tie is not
        (math.nextafter(0.5, 0), 0.5, False),
        (1.0, 1.0, True),
        (0.0, 0.0, True),
        (None, 0.0, False),
        (math.nan, 0.0, False),
    ],
)
def test_the_rule(score: float | None, threshold: float, kept: bool) -> None:
    assert keep(score, threshold) is kept


def test_a_verdict_keeps_the_web_text_first_and_says_why_the_rest_went() -> None:
    judged = verdict(
        ("A Cat, sitting.", 0.75),
        [("a cat sitting", 0.9), ("a dog", 0.49), ("a sofa", 0.5), ("A sofa!", 0.6), ("", 0.9), ("x", None)],
        0.5,
    )
    assert judged.kept == (Caption("A Cat, sitting.", "web", 0.75), Caption("a sofa", "synthetic", 0.5))
    assert judged.rejected == (
        Rejected("a cat sitting", "synthetic", 0.9, "duplicate_of_web"),
        Rejected("a dog", "synthetic", 0.49, "below_threshold"),
        Rejected("A sofa!", "synthetic", 0.6, "duplicate_of_synthetic"),
        Rejected("", "synthetic", 0.9, "empty"),
        Rejected("x", "synthetic", None, "not_scored"),
    )


def test_a_rejected_web_text_makes_nothing_a_duplicate() -> None:
    judged = verdict(("a cat", 0.1), [("a cat", 0.9)], 0.5)
    assert judged.kept == (Caption("a cat", "synthetic", 0.9),)
    assert verdict((None, None), [("a cat", math.nan)], 0.0).rejected == (
        Rejected(None, "web", None, "empty"),
        Rejected("a cat", "synthetic", None, "not_scored"),
    )


def test_texts_without_words_are_compared_as_they_are() -> None:
    assert len(verdict(("\u2764", 0.9), [("\u2600", 0.9), ("\u2764", 0.9)], 0.5).kept) == 2


TEXTS = st.tuples(st.none() | st.text(max_size=4), st.none() | st.floats(0, 1) | st.just(math.nan))


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_every_text_has_one_fate_and_a_higher_threshold_keeps_no_more_images(
    web: tuple[str | None, float | None],
    synthetic: list[tuple[str | None, float | None]],
    threshold: float,
    higher: float,
) -> None:
    judged = verdict(web, synthetic, threshold)
    assert len(judged.kept) + len(judged.rejected) == 1 + len(synthetic)
    assert all(caption.itm >= threshold and caption.text.strip() for caption in judged.kept)
    if higher >= threshold and not judged.kept:
        assert not verdict(web, synthetic, higher).kept


# ---- fraction ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "fraction", "threshold"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.5, 0.3),
        ([0.4, 0.1, 0.3, 0.2], 0.51, 0.2),  # at least that share
        ([0.1, 0.2], 1.0, 0.1),
        ([0.1, 0.2], 1e-12, 0.2),  # at least one
        ([1.0, 1.0, 1.0, 0.2], 0.25, 1.0),  # ties are kept together: three of four
        ([0.9, None, math.nan, 0.1], 0.5, 0.9),  # half of the scored ones
        ([i / 10 for i in range(10)], 0.7, 0.3),  # 0.7 * 10 is 7.000000000000001 in floating point
    ],
)
def test_the_threshold_for_a_fraction(scores: list[float | None], fraction: float, threshold: float) -> None:
    assert threshold_for_fraction(scores, fraction) == threshold


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1), st.integers(1, 100))
def test_it_is_the_highest_threshold_that_keeps_at_least_the_fraction(
    scores: list[float], percent: int
) -> None:
    threshold = threshold_for_fraction(scores, percent / 100)

    def enough(candidate: float) -> bool:
        return 100 * sum(keep(score, candidate) for score in scores) >= percent * len(scores)

    assert enough(threshold)
    assert not any(
        enough(candidate) for candidate in {*scores, math.nextafter(threshold, 2)} if candidate > threshold
    )


def test_fractions_without_sense_are_refused() -> None:
    for fraction in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="share of texts"):
            threshold_for_fraction([0.5], fraction)
    with pytest.raises(ValueError, match="no text was scored"):
        threshold_for_fraction([None, math.nan], 0.5)


# ---- over a folder -------------------------------------------------------------------------------


def score(row: Row) -> Scores:
    """Web texts score 0.0, 0.1, ... 0.9 by row; of two captions, one is always good."""
    if row.status != "ok":
        return Scores(row.status, row.error)
    web = None if row.text is None else row.index % 10 / 10
    return Scores("ok", None, (f"good {row.index}", "bad"), web, 0.0, (0.75, 0.25), (0.0, 0.0))


def run(source: Path, out: Path, *, keep_images: bool = True) -> list[Split]:
    """What a worker does, with `score` for its models."""
    splits = plan_splits(source, 8)
    for split in splits:
        opened = open_split(split, Columns())
        schema = scored_schema(opened.schema, opened.found, keep_images=keep_images)
        with shards.writing_shard(scored_path(out, split.id), schema) as writer:
            for chunk in shards.batches(opened.chunks, 4):
                writer.append(scored_table(chunk, [score(row) for row in chunk.rows], schema))
        fingerprint = {"input": input_fingerprint(split.path), "config": "c"}
        shards.mark_done(out, split, fingerprint, {}, [scored_path(out, split.id)])
    return splits


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """20 rows: every kind of source, one without a text and one without an image."""
    texts, images = [f"web {i}" for i in range(10)], [JPEG + bytes([i]) for i in range(10)]
    shard(tmp_path / "in" / "a.parquet", 10, caption=[*texts[:9], None], jpg=[*images[:8], None, images[9]])
    structs = [{"bytes": image, "path": "/home/me/x.jpg"} for image in images[:5]]
    shard(tmp_path / "in" / "b.parquet", 5, caption=texts[:5], jpg=images[:5], image=structs)
    tar = [
        m for i in range(5) for m in (member(f"{i}.jpg", images[i]), member(f"{i}.txt", texts[i].encode()))
    ]
    make_tar(tmp_path / "in" / "c.tar", tar)
    return tmp_path / "in"


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "clean").iterdir())}


def test_one_source_alone_into_a_folder_of_its_own(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path)
    select(tmp_path)
    before = files(tmp_path)
    found = select(tmp_path, threshold=0.0, sources=["web"], clean=tmp_path / "web")
    assert found.texts == {
        "web": {"kept": 18, "empty": 1, "not_scored": 1},
        "synthetic": {"not_wanted": 38},
    }
    captions = [
        caption
        for path in sorted((tmp_path / "web").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
        for caption in row["captions"]
    ]
    assert len(captions) == 18 and {caption["source"] for caption in captions} == {"web"}
    assert files(tmp_path) == before  # the usual place is as it was
    shard(tmp_path / "mine" / "other.parquet", 1)
    with pytest.raises(ValueError, match=r"mine: holds other.parquet, which is not of"):
        select(tmp_path, clean=tmp_path / "mine")
    assert (tmp_path / "mine" / "other.parquet").exists()


def test_select_writes_the_rows_that_keep_a_text(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path)
    summary = select(tmp_path)
    assert (summary.threshold, summary.fraction, summary.splits) == (0.5, None, 4)
    assert (summary.rows, summary.rows_kept) == (20, 19)
    assert summary.texts == {
        "web": {"kept": 3, "below_threshold": 15, "empty": 1, "not_scored": 1},
        "synthetic": {"kept": 19, "below_threshold": 19},
    }
    names = ["_select.json", "a-000000000000.parquet", "a-000000000008.parquet", "b.parquet", "c.parquet"]
    assert list(files(tmp_path)) == names
    assert json.loads(files(tmp_path)["_select.json"])["rows_kept"] == 19
    table = pq.read_table(tmp_path / "clean" / "a-000000000000.parquet")
    assert table.schema.equals(CLEAN)
    assert table.to_pylist()[6] == {
        "key": "a-000006",
        "image": {"bytes": JPEG + b"\x06", "path": "a-000006.jpg"},
        "captions": [
            {"text": "web 6", "source": "web", "itm": pytest.approx(0.6)},
            {"text": "good 6", "source": "synthetic", "itm": 0.75},
        ],
    }
    last = pq.read_table(tmp_path / "clean" / "a-000000000008.parquet").to_pylist()
    assert [row["key"] for row in last] == ["a-000009"]
    metadata = pq.read_schema(tmp_path / "clean" / "b.parquet").metadata
    assert metadata[b"huggingface"] == CLEAN.metadata[b"huggingface"]
    assert json.loads(metadata[b"capfilt"])["threshold"] == 0.5


def test_select_again_gives_the_same_bytes_and_leaves_scored_alone(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path)
    scored = [path.read_bytes() for path in sorted((tmp_path / "scored").iterdir())]
    select(tmp_path)
    first = files(tmp_path)
    select(tmp_path, threshold=0.9)
    assert files(tmp_path) != first
    select(tmp_path, threshold=0.5)
    assert files(tmp_path) == first
    assert [path.read_bytes() for path in sorted((tmp_path / "scored").iterdir())] == scored


def test_images_come_from_the_input_when_scored_did_not_keep_them(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "with")
    splits = run(source, tmp_path / "without", keep_images=False)
    select(tmp_path / "with")
    select(tmp_path / "without")
    for split in splits:
        tables = [
            pq.read_table(tmp_path / out / "clean" / f"{split.id}.parquet") for out in ("with", "without")
        ]
        assert tables[0].equals(tables[1])
    assert JPEG not in b"".join(p.read_bytes() for p in (tmp_path / "without" / "scored").iterdir())
    shard(source / "b.parquet", 6)
    with pytest.raises(ShardError, match=r"b\.parquet: has changed since it was scored"):
        select(tmp_path / "without")
    (source / "b.parquet").unlink()
    with pytest.raises(ShardError, match=r"b\.parquet: is gone"):
        select(tmp_path / "without")


def test_only_done_splits_are_selected_and_stale_files_go(source: Path, tmp_path: Path) -> None:
    splits = run(source, tmp_path)
    select(tmp_path)
    shards.done_path(tmp_path, splits[0].id).unlink()
    assert select(tmp_path).splits == 3
    assert f"{splits[0].id}.parquet" not in files(tmp_path)
    assert scored_path(tmp_path, splits[0].id).exists()


def test_a_damaged_scored_shard_stops_select(source: Path, tmp_path: Path) -> None:
    splits = run(source, tmp_path)
    select(tmp_path)
    scored_path(tmp_path, splits[1].id).write_bytes(b"cut")
    with pytest.raises(ShardError, match=rf"scored/{splits[1].id}\.parquet is gone or not as it was"):
        select(tmp_path)


def test_a_fraction_chooses_the_threshold(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path)
    summary = select(tmp_path, fraction=0.5)
    # 56 scored texts, of which 28 are at least: 19 captions of 0.75, web texts of 0.7 0.6 0.5 3x0.4 3x0.3
    assert summary.threshold == float(np.float32(0.3))
    assert sum(counts["kept"] for counts in summary.texts.values()) == 28
    assert summary.fraction == 0.5


def test_select_refuses_both_numbers_wrong_numbers_and_an_empty_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished split"):
        select(tmp_path)
    run(source, tmp_path)
    with pytest.raises(ValueError, match="give only one"):
        select(tmp_path, threshold=0.5, fraction=0.5)
    for wrong in (-0.1, 1.1, 50.0, math.nan):
        with pytest.raises(ValueError, match="probability"):
            select(tmp_path, threshold=wrong)
