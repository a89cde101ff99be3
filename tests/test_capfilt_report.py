"""The report page: its numbers against a count by hand, and folders in every state."""

import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_folder import Page, finish, make_folder, score

from capfilt.report import write_report
from capfilt.report_cards import decision_words
from capfilt.report_data import Plan, Sample, Told, read_folder
from capfilt.report_health import health
from capfilt.schema import Scores, ShardError
from capfilt.select import select
from capfilt.shards import done_splits, mark_done, scored_path

WORDS = re.compile(r"\w+")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("run"), score)
    finish(folder)
    return folder


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page(write_report(out).path)


def numbers(row: list[str]) -> list[int]:
    return [int(cell.replace(",", "")) for cell in row if re.fullmatch(r"[\d,]+", cell)]


def kept_by_hand(row: dict[str, object], threshold: float) -> Counter[str]:
    """The rule once more, from its sentence: P(match) of the threshold or more, words not kept yet."""
    kept: Counter[str] = Counter()
    seen = set()
    texts = [("web", row["caption_web"], row["itm_web"])]
    texts += [
        ("synthetic", t, s) for t, s in zip(row["captions_synthetic"], row["itms_synthetic"], strict=True)
    ]  # type: ignore[call-overload]
    for source, text, itm in texts:
        words = " ".join(WORDS.findall(str(text or "").lower()))
        if words and itm is not None and itm >= threshold and words not in seen:  # type: ignore[operator]
            seen.add(words)
            kept[source] += 1
    return kept


def test_the_funnel_adds_up_to_a_count_by_hand(out: Path, page: Page) -> None:
    rows = pq.read_table(out / "scored").to_pylist()
    kept = [kept_by_hand(row, 0.5) for row in rows]
    usable = [row["capfilt_status"] in ("ok", "caption_error") for row in rows]
    both, web, synthetic = (
        sum((bool(k["web"]), bool(k["synthetic"])) == wanted for k in kept)
        for wanted in ((True, True), (True, False), (False, True))
    )
    captioned = sum(any(t.strip() for t in row["captions_synthetic"]) for row in rows)
    assert min(both, web, synthetic) > 0
    stages = page.tables["From rows to images that keep a text"][1:]
    assert [numbers(row) for row in stages] == [[80], [sum(usable)], [captioned], [both + web + synthetic]]
    none = sum(usable) - both - web - synthetic
    assert f"{both} + {web} + {synthetic} + {none} + {80 - sum(usable)} = 80 rows" in page.words
    fates = {row[0]: dict(zip(page.tables["What became of every text"][0][1:], numbers(row), strict=True))
             for row in page.tables["What became of every text"][1:]}  # fmt: skip
    for source, texts in (("web", 80), ("synthetic", sum(len(row["captions_synthetic"]) for row in rows))):
        assert fates[source].pop("sum") == sum(fates[source].values()) == texts
        assert fates[source]["kept"] == sum(k[source] for k in kept)
    assert fates["synthetic"]["duplicate of web"] > 0


def test_the_slider_promises_what_select_does(out: Path, page: Page, tmp_path: Path) -> None:
    state = page.state
    for threshold in ("0.00", "0.29", "0.50", "0.57", "0.99", "1.00"):
        at = state["grid"].index(threshold)
        done = select(out, threshold=float(threshold), clean=tmp_path / threshold)
        promised = {what: state["kept"][what][at] for what in ("web", "synthetic", "rows")}
        assert promised == {
            "web": done.texts["web"].get("kept", 0),
            "synthetic": done.texts["synthetic"].get("kept", 0),
            "rows": done.rows_kept,
        }
    assert state["command"] == f"make select OUT={out} THRESHOLD="


def test_the_histograms_and_the_numbers_below_them_count_every_score(out: Path, page: Page) -> None:
    table = pq.read_table(out / "scored")
    for source, scores in (
        ("web", table["itm_web"].drop_null().to_pylist()),
        ("synthetic", [itm for row in table["itms_synthetic"].to_pylist() for itm in row]),
    ):
        by_hand = [sum(min(int(s * 50), 49) // 5 == tenth for s in scores) for tenth in range(10)]
        assert [numbers(row)[0] for row in page.tables[f"Scores of {source} texts"][1:]] == by_hand


def test_galleries_hold_what_they_say(out: Path) -> None:
    tally = read_folder(out, Plan(0.5, per_gallery=1000)).tally
    shown = {name: sample.items for name, sample in tally.galleries.items()}
    assert all(pair.web.itm < 0.5 for pair in shown["dropped_web"])  # type: ignore[operator]
    assert all(pair.synthetic[0].itm >= 0.5 for pair in shown["kept_synthetic"])  # type: ignore[operator]
    rows = [row for row in pq.read_table(out / "scored").to_pylist() if row["capfilt_status"] == "ok"]
    assert len(shown["kept_web"]) == sum(row["itm_web"] >= 0.5 for row in rows) == tally.strata["kept_web"]
    assert len(shown["both_dropped"]) == sum(
        max(row["itm_web"], *row["itms_synthetic"]) < 0.5 for row in rows
    )
    gaps = sorted((abs(row["itm_web"] - row["itm_synthetic"]) for row in rows), reverse=True)
    found = [abs(p.web.itm - p.synthetic[0].itm) for p in shown["disagreement"]]  # type: ignore[operator]
    assert found == [gap for gap in gaps if gap]
    assert all(min(abs(t.itm - 0.5) for t in (p.web, p.synthetic[0])) < 0.05 for p in shown["borderline"])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("itm", "threshold", "fate", "words"),
    [
        (0.0849, 0.5, "below_threshold", "dropped: 0.08 < 0.50"),
        (0.4999, 0.5, "below_threshold", "dropped: 0.4999 < 0.5000"),
        (0.5, 0.5, "kept", "kept: 0.50 \u2265 0.50"),
        (0.9, 0.5, "duplicate_of_web", "dropped: the same words as the web text"),
        (None, 0.5, "not_scored", "dropped: it was not scored"),
    ],
)
def test_decisions_in_words(itm: float | None, threshold: float, fate: str, words: str) -> None:
    assert decision_words(Told("web", "a cat", itm, fate), threshold) == words


# ---- folders in every state ------------------------------------------------------------------------


def test_the_same_folder_gives_the_same_page(out: Path) -> None:
    first = write_report(out).path.read_bytes()
    assert write_report(out).path.read_bytes() == first
    assert write_report(out, seed=1, per_gallery=5).path.read_bytes() != first
    assert write_report(out).path.read_bytes() == first
    assert b"<h2>Warnings</h2>" in first and not list(out.glob(".*.tmp"))


def test_an_unfinished_run_is_shown_and_said_to_be_so(tmp_path: Path) -> None:
    out = make_folder(tmp_path, score)
    said = "The run is unfinished"
    assert any(said in warning for warning in write_report(out).warnings)
    finish(out)
    assert not any(said in warning for warning in write_report(out).warnings)
    finish(out, splits=7, failed={f"shard{i}": "it is cut off" for i in range(22)})
    warnings = write_report(out).warnings
    assert any("2 shards done, of 7 that the last run to end had planned" in warning for warning in warnings)
    assert "The shard shard3 failed: it is cut off" in warnings
    assert "2 shards more failed; summary.json lists them." in warnings
    finish(out)
    (out / "scored" / ".00009.parquet.0.tmp").touch()
    assert any("a shard is being written" in warning for warning in write_report(out).warnings)


def test_a_split_without_its_file_is_left_out(tmp_path: Path) -> None:
    out = make_folder(tmp_path, score)
    scored_path(out, "00001").unlink()
    report = write_report(out)
    assert report.rows == 40 and any(
        "1 shard left out, 00001 first" in warning for warning in report.warnings
    )


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    out = make_folder(tmp_path, score, shards=1)
    path = scored_path(out, "00000")
    path.write_bytes(b"PAR1" + bytes(path.stat().st_size - 8) + b"PAR1")
    with pytest.raises(ShardError, match=r"00000\.parquet: is not a whole parquet file"):
        write_report(out)
    assert not (out / "report.html").exists()


def test_columns_that_capfilt_would_not_write_are_refused_or_counted(tmp_path: Path) -> None:
    out = make_folder(tmp_path, score, shards=1)
    path = scored_path(out, "00000")
    good, mark = pq.read_table(path), done_splits(out)[0]

    def rewrite(name: str, values: pa.Array) -> None:
        pq.write_table(good.set_column(good.schema.get_field_index(name), name, values), path)
        mark_done(out, mark.split, mark.fingerprint, mark.counts, [path])

    for name, values, message in (
        ("itm_web", pa.array(["0.5"] * 40), "column 'itm_web' is string"),
        ("capfilt_key", pa.nulls(40, pa.string()), "has nulls where CapFilt writes none"),
    ):
        rewrite(name, values)
        with pytest.raises(ShardError, match=message):
            write_report(out)
    rewrite("capfilt_status", pa.array([f"made up {i}" for i in range(40)]))
    page = Page(write_report(out).path)
    assert page.tables["Rows that were not scored, by reason"][1:] == [["unknown status", "", "40", "100.0%"]]


def test_a_run_without_a_finished_shard(tmp_path: Path) -> None:
    (tmp_path / "scored").mkdir()
    report = write_report(tmp_path)
    page = Page(report.path)
    assert report.rows == 0 and "No row has been scored yet." in page.words
    assert "0 + 0 + 0 + 0 + 0 = 0 rows" in page.words and page.classed("card") == 0
    with pytest.raises(ValueError, match="is no output folder of CapFilt"):
        write_report(tmp_path / "typo")


def test_a_run_of_errors_only(tmp_path: Path) -> None:
    out = make_folder(tmp_path, lambda row: Scores("too_large", "image is 9 x 9"), shards=1)
    report = write_report(out)
    page = Page(report.path)
    assert "0 + 0 + 0 + 0 + 40 = 40 rows" in page.words
    assert page.tables["Rows that were not scored, by reason"][1:] == [["too large", "", "40", "100.0%"]]
    assert "100.0% of the rows could not be scored; see the errors below." in report.warnings
    assert page.words.count("No text was scored.") == 2 and page.words.count("image is 9 x 9") == 5


def test_the_threshold_is_that_of_the_last_select(tmp_path: Path) -> None:
    out = make_folder(tmp_path, score)
    assert "0.50 (no clean shards were selected with it yet)" in Page(write_report(out).path).words
    done = select(out, fraction=0.37)
    page = Page(write_report(out).path)
    assert f"{done.threshold!r} (the threshold of the last make select)" in page.words
    assert page.state["kept"]["rows"][page.state["grid"].index(repr(done.threshold))] == done.rows_kept
    assert "0.70 (no clean" in Page(write_report(out, threshold=0.7).path).words
    with pytest.raises(ValueError, match="threshold is 7"):
        write_report(out, threshold=7)


def test_only_rows_that_a_verdict_can_name_are_judged(tmp_path: Path) -> None:
    keys = ["same", *(f"k{i}" for i in range(18)), " "]
    out = make_folder(tmp_path, score, rows=20, keys=keys, shards=1)
    make_folder(tmp_path, score, rows=20, keys=[*keys[:1], *(f"m{i}" for i in range(19))], shards=1)
    shared = Page(write_report(out).path).state["keys"]
    assert "same" in shared and " " not in shared  # one file, so far
    both = make_folder(tmp_path / "two", score, rows=20, keys=keys, shards=2)
    assert Page(write_report(both).path).state["keys"] == []  # every key is there twice


def test_speed_is_read_from_the_done_marks(tmp_path: Path) -> None:
    out = make_folder(tmp_path, score)
    for mark, seconds in zip(done_splits(out), (4.0, 10.0), strict=True):
        files = [scored_path(out, mark.split.id)]
        mark_done(out, mark.split, mark.fingerprint, {"rows": 40, "seconds": seconds}, files)
    page = Page(write_report(out).path)
    assert page.tables["The shards"][1:] == [
        ["00001", "", "40", "10.0", "4.0"],
        ["00000", "", "40", "4.0", "10.0"],
    ]
    assert (
        "2 shards in 14.0 s of work; a worker did 4.0 to 10.0 rows a second, 7.0 in the median" in page.words
    )


# ---- parts ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(0, 9))), st.integers(0, 6))
def test_a_sample_is_the_lowest_ranks_in_any_order(ranks: list[tuple[float, int]], size: int) -> None:
    sample = Sample[tuple[float, int]](size)
    for rank in ranks:
        sample.offer(rank, rank)
    lowest = sorted(set(ranks))[:size]
    assert sample.items == lowest
    assert sample.unique == [rank for rank in lowest if ranks.count(rank) == 1]


def test_health_by_hand() -> None:
    texts = [
        "A cat, a cat.",
        "a cat a cat",
        "the the dog",
        "a picture of a dog",
        " ",
        "one two three four one two three",
    ]
    found = health(texts, prompt="a picture of ")
    assert (found.texts, found.unique, found.prompted, found.echoed) == (5, 4, 1, 2)
    assert found.frequent == (("a cat a cat", 2),)
    assert found.lengths[3:8] == (1, 2, 1, 0, 1) and sum(found.lengths) == 5
    assert found.mean_words == pytest.approx((4 + 4 + 3 + 5 + 7) / 5)
    # a cat 4, cat a 2, the the, the dog, the picture 4, one two 2, two three 2, three four, four one
    assert found.distinct_pairs == pytest.approx(12 / 18)
    assert found.beginnings[0] == ("a cat a", 2)
    assert health([]).mean_words == 0
