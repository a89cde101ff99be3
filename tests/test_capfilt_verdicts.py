"""Verdicts: every format reads alike, every mistake is one clear error, scores are found by key and text."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import JPEG, shard
from scored_folder import score_shards

from capfilt.schema import Row, Scores, ShardError
from capfilt.shards import scored_path
from capfilt.verdicts import (
    Verdict,
    all_scores,
    join_scores,
    read_verdicts,
    rows_of_keys,
    scored_tables,
    web_texts,
)

ENTRIES = [
    {"key": "a", "source": "web", "text": "a cat, \u201csitting\u201d", "verdict": "keep"},
    {"key": "7", "source": "synthetic", "text": None, "verdict": "unsure"},
]
VERDICTS = [
    Verdict("a", "web", "keep", "a cat, \u201csitting\u201d"),
    Verdict("7", "synthetic", "unsure", None),
]


def write(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_every_format_reads_alike(tmp_path: Path) -> None:
    write(
        tmp_path / "v.json", [ENTRIES[0], {"key": 7, "source": "synthetic", "verdict": "unsure", "itm": 0.1}]
    )
    (tmp_path / "v.jsonl").write_text("\n".join(json.dumps(entry) for entry in ENTRIES) + "\n\n")
    csv = 'verdict,key,source,text\r\nkeep,a,web,"a cat, \u201csitting\u201d"\r\nunsure,7,synthetic,\r\n'
    (tmp_path / "v.csv").write_text(csv, encoding="utf-8-sig", newline="")  # with the mark that Excel writes
    pq.write_table(pa.Table.from_pylist(ENTRIES), tmp_path / "v.parquet")
    for name in ("v.json", "v.jsonl", "v.csv", "v.parquet"):
        assert read_verdicts(tmp_path / name) == VERDICTS, name


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"key": "a", "verdict": "keep"}], "1 entries without key, source and verdict: entry 1"),
        ([{"key": " ", "source": "web", "verdict": "keep"}, "keep"], r"2 entries without.*entry 2: keep"),
        ([{"key": "a", "source": "alt", "verdict": "keep"}], "1 verdicts with an unknown source: 'a': 'alt'"),
        (
            [{"key": str(i), "source": "web", "verdict": "good"} for i in range(5)],
            r"5 verdicts with an unknown verdict: '0': 'good', '1': 'good', '2': 'good', \.\.\.; write one "
            "of keep, drop, unsure",
        ),
        ([], "holds no verdicts"),
        ({"key": "a"}, "holds no list of verdicts"),
    ],
)
def test_entries_that_are_no_verdicts_are_named(tmp_path: Path, entries: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_verdicts(write(tmp_path / "v.json", entries))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text("[{")
    (tmp_path / "v.csv").write_bytes(b"key\xff\xfe")
    (tmp_path / "v.parquet").write_bytes(b"cut")
    for name, message in (
        ("v.json", "cannot be read as json"),
        ("v.csv", "cannot be read as csv"),
        ("v.parquet", "not a whole parquet file"),
        ("none.json", "there is no such file"),
        ("v.txt", "is no file of verdicts"),
    ):
        with pytest.raises(ValueError, match=message):
            read_verdicts(tmp_path / name)


# ---- beside the scores -----------------------------------------------------------------------------


def score(row: Row) -> Scores:
    """Two captions, the second one the better; row 3 has no image, the web text of row 2 no score."""
    if row.status != "ok":
        return Scores(row.status, row.error)
    web = None if row.index == 2 else row.index / 10
    captions = (f"first {row.index}", f"second  {row.index}")
    return Scores("ok", None, captions, web, 0.0, (0.25, 0.75), (0.0, 0.0))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    images = [JPEG, JPEG, JPEG, None, JPEG]
    keys = [f"k{i}" for i in range(5)]
    shard(tmp_path / "in" / "a.parquet", 5, jpg=images, key=keys)
    shard(tmp_path / "in" / "b.parquet", 2, key=["k0", "other"])
    score_shards(tmp_path / "in", tmp_path / "out", score, rows_per_split=2)
    return tmp_path / "out"


def labels(out: Path, *verdicts: Verdict):  # type: ignore[no-untyped-def]
    return join_scores(verdicts, rows_of_keys(out, [verdict.key for verdict in verdicts]), "v.json")


def test_verdicts_meet_the_scores_of_their_texts(out: Path) -> None:
    found = labels(
        out,
        Verdict("k1", "web", "keep"),
        Verdict("k1", "web", "keep", "text 1"),  # once more
        Verdict("k4", "web", "drop", " text   4\n"),
        Verdict("k2", "web", "keep"),  # not scored
        Verdict("other", "web", "unsure"),
        Verdict("k1", "synthetic", "drop", "first 1"),
        Verdict("k1", "synthetic", "keep", "second 1"),
        Verdict("k4", "synthetic", "keep"),  # the best
    )
    web, synthetic = found["web"], found["synthetic"]
    assert web.scores.tolist() == pytest.approx([0.1, 0.4])
    assert web.right.tolist() == [True, False]
    assert (web.unsure, web.not_scored) == (1, 1)
    assert synthetic.scores.tolist() == [0.25, 0.75, 0.75]
    assert synthetic.right.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        (
            [Verdict("k1", "web", "keep"), Verdict("x", "web", "keep"), Verdict("y", "web", "drop")],
            r"v\.json: 2 keys that no scored row has: 'x', 'y'; was this file made for another OUT",
        ),
        ([Verdict("k0", "web", "keep")], "1 keys that several scored rows have: 'k0'"),
        (
            [Verdict("k1", "web", "keep", "text 2"), Verdict("k1", "synthetic", "keep", "text 1")],
            "2 verdicts about texts that their row does not have: 'k1' web: 'text 2', 'k1' synthetic: ",
        ),
        ([Verdict("k3", "synthetic", "keep")], "texts that their row does not have: 'k3' synthetic"),
        (
            [Verdict("k1", "synthetic", "keep"), Verdict("k1", "synthetic", "drop", "second 1")],
            "1 texts with different verdicts: 'k1' synthetic: keep and drop",
        ),
        ([Verdict("k1", "web", "keep"), Verdict("k1", "web", "unsure")], "1 texts with different verdicts"),
    ],
)
def test_verdicts_that_do_not_fit_are_named(out: Path, verdicts: list[Verdict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels(out, *verdicts)


def test_all_scores_are_those_that_select_judges(out: Path) -> None:
    found = all_scores(out)
    assert sorted(found["web"].tolist()) == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.4])
    assert sorted(found["synthetic"].tolist()) == [0.25] * 6 + [0.75] * 6
    assert web_texts(out)["k1"] == ("text 1", pytest.approx(0.1))
    assert {"k2", "k3"}.isdisjoint(web_texts(out))


def test_an_empty_or_damaged_folder_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished split"):
        list(scored_tables(tmp_path, ["capfilt_key"]))
    scored_path(out, "b").write_bytes(b"cut")
    with pytest.raises(ShardError, match=r"scored/b\.parquet is gone or not as it was"):
        all_scores(out)
