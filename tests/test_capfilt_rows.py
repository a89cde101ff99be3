"""Rows in = rows out: good and bad ones in any order, and the good ones as if they were alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import make_tar, member
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import jpeg
from small_run import save_models
from test_blip_image import png_header

from blip.generate import Decoding
from capfilt.schema import STATUSES
from capfilt.shards import plan_splits
from capfilt.stats import Stats
from capfilt.worker import CapFiltConfig, CapFiltWorker, Progress, ShardResult

Record = dict[str, Any]
Parts = tuple[bytes | None, bytes | None]  # image, text
GRID = 4  # images in a batch, so that a shard has many of them, whole and not

TEXTS = (b"a red circle", b"", b"a blue square left of a red circle " * 9, None)
GOOD: dict[str, Parts] = {f"good{i}": (jpeg(i), TEXTS[i % 4]) for i in range(8)}
BAD: dict[str, tuple[Parts, str]] = {
    "absent": ((None, b"a text"), "no_image"),
    "empty": ((b"", b"a text"), "no_image"),
    "half": ((jpeg(0)[:300], b"a text"), "decode_error"),
    "html": ((b"<html>404</html>", b"a text"), "decode_error"),
    "bomb": ((png_header(20_000, 20_000), b"a text"), "too_large"),
    "small": ((png_header(3, 9), None), "too_small"),
    "long": ((jpeg(1), b"x" * 32_769), "bad_text"),
    "bytes": ((jpeg(2), b"\xff\xfe"), "bad_text"),
    "upstream": ((jpeg(3), b"a text"), "skipped_upstream"),  # in a tar: its key came before
}


def write_parquet(path: Path, keys: list[str], parts: list[Parts], kinds: list[str]) -> None:
    texts = pa.array([text for _, text in parts], pa.binary())
    table = {
        "key": pa.array(keys, pa.string()),
        "caption": pa.Array.from_buffers(pa.string(), len(texts), texts.buffers()),  # UTF-8 or not
        "jpg": pa.array([image for image, _ in parts], pa.binary()),
        "status": pa.array(["failed" if kind == "upstream" else "success" for kind in kinds], pa.string()),
        "error_message": pa.nulls(len(kinds), pa.string()),
    }
    pq.write_table(pa.table(table), path.with_suffix(".parquet"), row_group_size=7)


def write_tar(path: Path, keys: list[str], parts: list[Parts], kinds: list[str]) -> None:
    members = [member("first.jpg", jpeg(9)), member("first.txt", b"the key that comes again")]
    for key, (image, text) in zip(keys, parts, strict=True):
        members += [member(f"{key}.jpg", image)] if image is not None else []
        members += [member(f"{key}.txt", text)] if text is not None else []
        members += [member(f"{key}.json", b"{}")]  # or neighbours that repeat `first` would be one sample
    make_tar(path.with_suffix(".tar"), members)


Score = Callable[[Path], tuple[list[Record], Stats, int]]


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> Score:
    """A worker with both models; of a shard, the rows it writes, its counts, and the rows it told of."""
    captioner, judge = save_models(tmp_path_factory.mktemp("models"))
    decoding = Decoding(top_p=0.9, min_length=5, max_length=9)
    config = CapFiltConfig(
        str(captioner), str(judge), decoding=decoding, batch_size=GRID, min_side=4, device="cpu"
    )
    worker = CapFiltWorker(config, tmp_path_factory.mktemp("out"), {})

    def run(folder: Path) -> tuple[list[Record], Stats, int]:
        (split,) = plan_splits(folder, 1000)
        *told, result = worker.steps(split)
        assert isinstance(result, ShardResult) and result.error is None, result
        written = pq.read_table(worker.out / f"scored/{split.id}.parquet").to_pylist()
        return written, result.stats, sum(one.rows for one in told if isinstance(one, Progress))

    return run


@pytest.fixture(scope="module")
def alone(score: Score, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Every good row as it comes out of a shard of its own."""
    found = {}
    for name, parts in GOOD.items():
        folder = tmp_path_factory.mktemp(name)
        write_parquet(folder / "a", [name], [parts], ["good"])
        (found[name],) = score(folder)[0]
    return found


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.permutations(list(GOOD)).flatmap(
        lambda good: st.lists(st.sampled_from(list(BAD)), max_size=16).flatmap(
            lambda bad: st.permutations([*good[: len(bad) // 2 + 1], *bad])
        )
    ),
    st.sampled_from([write_parquet, write_tar]),
)
def test_any_mix_of_rows_comes_out_row_by_row(
    score: Score,
    alone: dict[str, Record],
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[str],
    write: Callable[[Path, list[str], list[Parts], list[str]], None],
) -> None:
    """Captions to the letter; scores within what another number of images in a batch may change."""
    folder = tmp_path_factory.mktemp("mix")
    repeated = "first" if write is write_tar else "again"
    keys = [
        kind if kind in GOOD else repeated if kind == "upstream" else f"{kind}{i}"
        for i, kind in enumerate(kinds)
    ]
    parts = [GOOD[kind] if kind in GOOD else BAD[kind][0] for kind in kinds]
    write(folder / "a", keys, parts, kinds)
    rows, stats, told = score(folder)
    if write is write_tar:
        assert rows[0]["capfilt_status"] == "ok"
        rows, told, stats.rows = rows[1:], told - 1, stats.rows - 1
        stats.statuses["ok"] -= 1
    assert [row["capfilt_key"] for row in rows] == keys
    assert stats.rows == told == len(kinds)
    expected = [BAD[kind][1] if kind in BAD else alone[kind]["capfilt_status"] for kind in kinds]
    assert [row["capfilt_status"] for row in rows] == expected and set(expected) <= set(STATUSES)
    assert +stats.statuses == {status: expected.count(status) for status in set(expected)}
    for kind, row in zip(kinds, rows, strict=True):
        assert (row["capfilt_error"] is None) == (row["capfilt_status"] == "ok")
        if kind in BAD:
            assert row["captions_synthetic"] == [] and row["itm_web"] is row["itm_synthetic"] is None
            continue
        for name in ("caption_web", "captions_synthetic", "caption_synthetic"):
            assert row[name] == alone[kind][name], (kind, name)
        for name in ("itm_web", "itc_web", "itm_synthetic", "itc_synthetic"):
            assert row[name] == pytest.approx(alone[kind][name], abs=1e-5), (kind, name)
