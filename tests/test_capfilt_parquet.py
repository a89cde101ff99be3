"""What strangers send as parquet: rows in order, a reason for every bad one, and nothing of theirs is run."""

import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import fuzz
from hostile.mutations import patched_footer
from hostile_files import (
    BARE,
    JPEG,
    ROOT,
    dictionary_bomb,
    extension_parquet,
    late_dictionary_bomb,
    shard,
)

from capfilt import parquet, parquet_pages
from capfilt.schema import Columns, Row, ShardError
from capfilt.shards import Split, open_split, plan_splits

AUTO = Columns()


def read(path: Path, columns: Columns = AUTO, start: int = 0, stop: int | None = None) -> list[Row]:
    opened = open_split(Split("x", path, start, stop), columns)
    return [row for chunk in opened.chunks for row in chunk.rows]


def passed(path: Path, columns: Columns = AUTO) -> pa.Table:
    opened = open_split(Split("x", path), columns)
    return pa.concat_tables([opened.schema.empty_table(), *(chunk.columns for chunk in opened.chunks)])


def test_rows_come_in_order_whatever_the_range(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.parquet", 40, key=[f"k{i}" for i in range(40)])
    rows = read(path)
    assert [(r.index, r.key, r.text, r.image, r.status) for r in rows] == [
        (i, f"k{i}", f"text {i}", JPEG, "ok") for i in range(40)
    ]
    for start, stop in ((0, 7), (7, 14), (5, 23), (38, 40), (0, 0)):
        assert read(path, start=start, stop=stop) == rows[start:stop]


def test_rows_without_a_key_are_named_after_file_and_position(tmp_path: Path) -> None:
    shard(tmp_path / "s" / "a.parquet", 9)
    splits = plan_splits(tmp_path, 5)
    rows = [row for split in splits for chunk in open_split(split, AUTO).chunks for row in chunk.rows]
    assert [row.key for row in rows] == [f"s-a-{i:06d}" for i in range(9)]


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    assert read(shard(tmp_path / "a.parquet", 0)) == []
    assert passed(shard(tmp_path / "a.parquet", 0)).column_names == ["jpg", "caption"]


def test_upstream_failures_and_missing_parts_have_reasons(tmp_path: Path) -> None:
    rows = read(
        shard(
            tmp_path / "a.parquet",
            6,
            jpg=[JPEG, None, JPEG, b"", JPEG, JPEG],
            caption=["a", "b", None, "d", "   ", "x" * 32_769],
            status=["success", "failed_to_download", "success", "success", "success", "success"],
            error_message=[None] * 6,
        )
    )
    assert [(row.status, row.text) for row in rows] == [
        ("ok", "a"),
        ("skipped_upstream", "b"),
        ("ok", None),  # no text is no fault: the image can still be captioned
        ("no_image", "d"),
        ("ok", None),
        ("bad_text", None),
    ]
    assert "failed_to_download" in str(rows[1].error) and "32769" in str(rows[5].error)
    assert all((row.image is not None) == (row.status == "ok") for row in rows)
    assert len("x" * 32_768) == len(
        str(read(shard(tmp_path / "b.parquet", 1, caption=["x" * 32_768]))[0].text)
    )


def test_text_that_is_not_utf8_is_refused_row_by_row(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", "\u00e9t\u00e9".encode(), None], pa.binary())
    broken_text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    path = shard(tmp_path / "a.parquet", 4, caption=broken_text, exif=pa.array(["a", "b", "c", "d"]))
    rows, table = read(path), passed(path)
    assert [row.status for row in rows] == ["ok", "bad_text", "ok", "ok"]
    assert rows[1].error == "column 'caption' is not UTF-8"
    assert table.column("caption").to_pylist() == ["fine", None, "\u00e9t\u00e9", None]
    assert table.column("exif").to_pylist() == ["a", "b", "c", "d"]


def test_a_hugging_face_image_is_its_bytes_and_its_path_is_never_opened(tmp_path: Path) -> None:
    images = [
        {"bytes": JPEG, "path": "/home/me/secret/a.jpg"},
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": None, "path": "http://169.254.169.254/latest"},
        None,
    ]
    pq.write_table(pa.table({"image": images, "text": ["a"] * 4}), tmp_path / "a.parquet")
    assert [(r.status, r.image) for r in read(tmp_path / "a.parquet")] == [
        ("ok", JPEG),
        *[("no_image", None)] * 3,
    ]
    kept = passed(tmp_path / "a.parquet").column("image").to_pylist()
    assert kept == [{"bytes": JPEG, "path": "a.jpg"}, None, None, None]


def test_plain_columns_pass_unchanged_and_others_are_left_out(tmp_path: Path) -> None:
    extra = {
        "url": pa.array(["u", None, "w"]),
        "uid": pa.array([2**63 + 1, 2, 3], pa.uint64()),
        "similarity": pa.array([0.1, None, 0.3], pa.float32()),
        "when": pa.array([1, 2, 1_600_000_000_123_456_789], pa.timestamp("ns")),
        "nsfw": pa.array([True, False, None]),
        "category": pa.array(["a", "b", "a"]).dictionary_encode(),
    }
    left_out = {"faces": pa.array([[1], [], None]), "thumb": pa.array([b"1", b"2", b"3"])}
    table = passed(shard(tmp_path / "a.parquet", 3, **extra, **left_out))
    assert table.column_names == ["jpg", "caption", *extra]
    for name, column in extra.items():
        assert table.column(name).to_pylist() == column.to_pylist()
        assert table.schema.field(name).type == (pa.string() if name == "category" else column.type)


def test_large_images_are_refused_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_IMAGE_BYTES", 100)
    images = [b"x" * 100, b"x" * 101, b"x"]
    path = shard(tmp_path / "a.parquet", 3, jpg=images)
    rows = read(path)
    assert [row.status for row in rows] == ["ok", "too_large", "ok"]
    assert "101 bytes" in str(rows[1].error)
    assert passed(path).column("jpg").to_pylist() == [images[0], None, images[2]]


BOMB = """
import sys, pyarrow as pa
from pathlib import Path
from capfilt.parquet import read_parquet
from capfilt.schema import Columns, ShardError
try:
    for chunk in read_parquet(Path(sys.argv[1]), Columns())[2]:
        print(chunk.rows[0].status)
except ShardError as error:
    print(error)
print(pa.default_memory_pool().max_memory() >> 20)
"""


def read_apart(path: Path) -> list[str]:
    """The status of each chunk's first row, the reason if one is raised, and the MiB that Arrow took."""
    run = [sys.executable, "-c", BARE + BOMB, str(path)]
    return subprocess.run(
        run, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("kind", ["flat", "struct", "late"])
def test_a_dictionary_bomb_is_refused_before_it_unpacks(tmp_path: Path, kind: str) -> None:
    path, cell = tmp_path / "bomb.parquet", bytes(80 << 20)
    if kind == "late":
        late_dictionary_bomb(path, cell)
    else:
        dictionary_bomb(path, cell, 64, struct=kind == "struct")
    assert path.stat().st_size < 100_000  # and 5 GB when every one of 64 rows has its own copy
    reason, peak = read_apart(path)
    assert "bomb.parquet: the dictionaries of row group 0 unpack to 80 MiB, at most 64" in reason
    assert int(peak) < 40


def test_a_footer_at_which_arrow_aborts_is_an_error_of_the_shard(tmp_path: Path) -> None:
    """Of 40 rows none is null: (0, 40) is the histogram that the footer keeps, and here (0, 40, 0)."""
    path = shard(tmp_path / "a.parquet", 40, width=range(40))
    pq.write_table(pq.read_table(path), path)
    path.write_bytes(patched_footer(path.read_bytes(), b"\x26\0\x50", b"\x36\0\x50\0"))
    control = f"import pyarrow.parquet as pq; pq.read_metadata({str(path)!r}).row_group(0).column(0)"
    assert subprocess.run([sys.executable, "-c", control], capture_output=True).returncode == -signal.SIGABRT
    reason, _ = read_apart(path)
    assert "a.parquet: cannot be read from row 0 on (Definition level histogram size mismatch" in reason


def test_every_way_of_writing_a_file_is_read(tmp_path: Path) -> None:
    for way, whole in enumerate(fuzz.parquet_files(tmp_path, fuzz.tables())):
        path = tmp_path / f"{way}.parquet"
        path.write_bytes(whole)
        assert len(read(path)) == pq.read_metadata(path).num_rows > 0


def test_a_row_group_of_endless_pages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    small = {"data_page_size": 1, "write_batch_size": 1, "use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table({"jpg": [JPEG] * 40, "caption": ["a cat"] * 40}), path, **small)
    monkeypatch.setattr(parquet_pages, "MAX_PAGES", 90)  # 80, and some seen twice in the slack
    assert len(read(path)) == 40
    monkeypatch.setattr(parquet_pages, "MAX_PAGES", 79)
    with pytest.raises(ShardError, match=r"a\.parquet: row group 0 has more than 79 pages"):
        read(path)


def test_a_small_dictionary_bomb_is_refused_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_IMAGE_BYTES", 1 << 20)
    path = dictionary_bomb(tmp_path / "bomb.parquet", bytes(2 << 20), 200)  # 400 MiB
    before = pa.total_allocated_bytes()
    for chunk in open_split(Split("x", path), AUTO).chunks:
        assert {row.status for row in chunk.rows} == {"too_large"}
        assert pa.total_allocated_bytes() - before < 80 << 20


UNPICKLE = """
import sys
from pathlib import Path
import ray.data, pyarrow.parquet as pq
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType
from capfilt.schema import Columns, ShardError
from capfilt.shards import Split, open_split, plan_splits
import pyarrow as pa
folder, marker = Path(sys.argv[1]), Path(sys.argv[2])
try:
    pa.register_extension_type(ArrowPythonObjectType())
except pa.ArrowKeyError:
    pass
for split in plan_splits(folder, 10):
    try:
        list(open_split(split, Columns()).chunks)
    except ShardError as error:
        print(split.id, "extension type" in str(error), marker.exists())
pq.read_table(folder / "flat.parquet").column("extra")[0].as_py()
print("control", marker.exists())
"""


def test_a_file_that_runs_code_is_refused_even_when_ray_data_is_there_to_run_it(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    folder, marker = tmp_path / "in", tmp_path / "marker"
    folder.mkdir()
    for inside in ("", "list", "struct"):
        extension_parquet(folder / f"{inside or 'flat'}.parquet", marker, inside)
    extension_parquet(folder / "other.parquet", marker, name="some.company.type")
    run = [sys.executable, "-c", BARE + UNPICKLE, str(folder), str(marker)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=180, check=False)
    assert done.stdout.splitlines() == [
        "flat True False",
        "list True False",
        "other True False",
        "struct True False",
        "control True",  # read carelessly, the same file does run its code
    ], done.stderr[-2000:]
