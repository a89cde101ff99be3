"""Planning, batches, writing all or nothing, and done-marks."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import BARE, JPEG, ROOT, extension_parquet, make_tar, member, shard

from capfilt import shards
from capfilt.schema import Columns, Row, ShardError
from capfilt.shards import FingerprintMismatch, Split, batches, open_split, plan_splits

AUTO = Columns()


def read(path: Path, columns: Columns = AUTO, start: int = 0, stop: int | None = None) -> list[Row]:
    opened = open_split(Split("x", path, start, stop), columns)
    return [row for chunk in opened.chunks for row in chunk.rows]


# ---- plan ----------------------------------------------------------------------------------------


def test_a_folder_is_planned_in_order_with_readable_ids(tmp_path: Path) -> None:
    shard(tmp_path / "b.parquet", 5)
    shard(tmp_path / "sub" / "00000.parquet", 20)
    shard(tmp_path / "empty.parquet", 0)
    shard(tmp_path / "_done" / "x.parquet")
    shard(tmp_path / ".b.parquet")
    (tmp_path / "b_stats.json").write_text("{}")
    splits = plan_splits(tmp_path, 8)
    assert [(s.id, s.path.relative_to(tmp_path).as_posix(), s.start, s.stop) for s in splits] == [
        ("b", "b.parquet", 0, 5),
        ("empty", "empty.parquet", 0, 0),
        ("sub-00000-000000000000", "sub/00000.parquet", 0, 8),
        ("sub-00000-000000000008", "sub/00000.parquet", 8, 16),
        ("sub-00000-000000000016", "sub/00000.parquet", 16, 20),
    ]
    assert plan_splits(tmp_path, 8) == splits


def test_the_parquet_beside_a_tar_is_its_metadata(tmp_path: Path) -> None:
    make_tar(tmp_path / "00000.tar", [member("0.jpg", JPEG)])
    shard(tmp_path / "00000.parquet")
    shard(tmp_path / "00001.parquet")
    assert [(s.id, s.path.name, s.stop) for s in plan_splits(tmp_path, 100)] == [
        ("00000", "00000.tar", None),
        ("00001", "00001.parquet", 3),
    ]


def test_a_file_and_a_glob_are_sources_too(tmp_path: Path) -> None:
    for name in ("a/1.parquet", "a/2.parquet", "b/1.parquet"):
        shard(tmp_path / name)
    assert [s.id for s in plan_splits(tmp_path / "a" / "2.parquet", 10)] == ["2"]
    assert [s.id for s in plan_splits(str(tmp_path / "*" / "1.parquet"), 10)] == ["a-1", "b-1"]


def test_ids_never_clash(tmp_path: Path) -> None:
    for name in (
        "a/b.parquet",
        "a-b.parquet",
        "a b.parquet",
        "a_b.parquet",
        "A_B.parquet",
        f"{'x' * 240}.parquet",
    ):
        shard(tmp_path / name)
    ids = [split.id for split in plan_splits(tmp_path, 10)]
    assert len({i.casefold() for i in ids}) == 6
    assert all(len(i) < 200 and set(i) <= set("abABx_-.0123456789cdef") for i in ids)


@pytest.mark.parametrize("source", ["nothing", "nothing/*.parquet", "."])
def test_a_source_without_shards_is_an_error_that_names_it(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match=r"(no such file or folder|holds no shards).*; give"):
        plan_splits(tmp_path / source, 10)


def broken(tmp_path: Path) -> dict[str, Path]:
    """Shards that cannot be read at all, by what their error must say."""
    good = shard(tmp_path / "good.parquet", 50).read_bytes()
    files = {
        "cut": good[: len(good) // 2],
        "magic": b"not parquet" * 9,
        "nothing": b"",
        "short": b"PAR1",
        "footer": good[:-200] + random.Random(0).randbytes(192) + good[-8:],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
    found = {name: tmp_path / f"{name}.parquet" for name in files}
    found["extension"] = extension_parquet(tmp_path / "extension.parquet", tmp_path / "marker")
    found["cut_tar"], found["text_tar"] = tmp_path / "cut_tar.tar", tmp_path / "text_tar.tar"
    whole = make_tar(tmp_path / "whole.tar", [member(f"{i}.jpg", JPEG) for i in range(9)]).read_bytes()
    found["cut_tar"].write_bytes(whole[:5000])
    found["text_tar"].write_bytes(b"hello" * 200)
    return found


def test_broken_files_are_planned_and_fail_alone_with_their_name(tmp_path: Path) -> None:
    files = broken(tmp_path)
    planned = {split.path: split for split in plan_splits(tmp_path, 100)}
    assert set(files.values()) <= set(planned)
    for path in files.values():
        with pytest.raises(ShardError, match=path.name):
            read(path, stop=planned[path].stop)
    assert len(read(tmp_path / "good.parquet")) == 50


def test_a_missing_file_is_named() -> None:
    for name in ("gone.parquet", "gone.tar"):
        with pytest.raises(ShardError, match=f"{name}: there is no such file"):
            read(Path(name))


def test_a_missing_column_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet: has no column 'captions'.*did you mean 'caption'"):
        read(shard(tmp_path / "a.parquet"), Columns(text="captions"))


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 16, 17, 100])
def test_batches_lie_on_a_fixed_grid(tmp_path: Path, size: int) -> None:
    path = shard(tmp_path / "a.parquet", 50, number=list(range(50)))
    cut = list(batches(open_split(Split("x", path), AUTO).chunks, size))
    assert [[row.index for row in chunk.rows] for chunk in cut] == [
        list(range(50))[i : i + size] for i in range(0, 50, size)
    ]
    assert all(c.columns.column("number").to_pylist() == [row.index for row in c.rows] for c in cut)


# ---- write ---------------------------------------------------------------------------------------


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64())])
    path = tmp_path / "scored" / "a.parquet"
    with pytest.raises(KeyboardInterrupt), shards.writing_shard(path, schema) as writer:
        writer.append(pa.table({"a": range(250)}))
        assert not path.exists()
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with shards.writing_shard(path, schema) as writer:
        writer.append(pa.table({"a": range(250)}))
    assert pq.read_table(path).column("a").to_pylist() == list(range(250))
    with pytest.raises(ValueError), shards.writing_shard(path, schema) as writer:
        raise ValueError
    assert pq.read_metadata(path).num_rows == 250  # the old one stays


def test_the_bytes_do_not_depend_on_how_the_rows_came(tmp_path: Path) -> None:
    table = pa.table({"a": range(321), "b": [str(i) for i in range(321)]})
    for name, step in (("a", 1), ("b", 17), ("c", 1000)):
        with shards.writing_shard(tmp_path / name, table.schema) as writer:
            for start in range(0, 321, step):
                writer.append(table.slice(start, step))
        assert writer.num_rows == 321
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    groups = pq.read_metadata(tmp_path / "a")
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [100, 100, 100, 21]


KILLED = """
import sys, os, signal, pyarrow as pa
from pathlib import Path
from capfilt.shards import writing_shard
with writing_shard(Path(sys.argv[1]), pa.schema([("a", pa.int64())])) as writer:
    writer.append(pa.table({"a": range(250)}))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_only_what_the_sweep_removes(tmp_path: Path) -> None:
    path = tmp_path / "scored" / "a.parquet"
    done = subprocess.run(
        [sys.executable, "-c", BARE + KILLED, str(path)], cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = path.parent.iterdir()
    assert left.name.startswith(".a.parquet.")
    (path.parent / ".notes.tmp").write_text("not ours")
    assert shards.sweep_temporary(tmp_path) == [left]
    assert [p.name for p in path.parent.iterdir()] == [".notes.tmp"]


def test_json_is_written_atomically_and_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    shards.write_json_atomically(path, {"b": 1, "a": [2]})
    first = path.read_bytes()
    with pytest.raises(TypeError):
        shards.write_json_atomically(path, {"a": object()})
    shards.write_json_atomically(path, {"a": [2], "b": 1})
    assert path.read_bytes() == first and os.listdir(tmp_path) == ["a.json"]


# ---- done-marks ----------------------------------------------------------------------------------

PRINT = {"config": "c1", "weights": "w1", "input": "i1"}


def finished(out: Path, split: Split) -> Path:
    file = shards.scored_path(out, split.id)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"scored")
    shards.mark_done(out, split, PRINT, {"rows": 3}, [file])
    return file


def test_a_split_is_done_when_its_mark_and_its_files_are_there(tmp_path: Path) -> None:
    split = Split("a", tmp_path / "in" / "a.parquet", 0, 3, "a")
    assert not shards.is_done(tmp_path, split, PRINT)
    file = finished(tmp_path, split)
    assert shards.is_done(tmp_path, split, PRINT)
    (mark,) = shards.done_splits(tmp_path)
    assert (mark.split, mark.fingerprint, mark.counts) == (split, PRINT, {"rows": 3})
    sha256 = "5f6bbff87ce0d40ce05d10b9aebd44b8d40b3cf6e5a0e6a3a8bfb7ad9c38a4c8"
    record = mark.files["scored/a.parquet"]
    assert record["bytes"] == 6 and len(record["sha256"]) == len(sha256)
    file.write_bytes(b"cut")
    assert shards.missing_files(tmp_path, mark) == ["scored/a.parquet"]
    assert not shards.is_done(tmp_path, split, PRINT)
    file.unlink()
    assert not shards.is_done(tmp_path, split, PRINT)


def test_another_fingerprint_is_an_error_that_names_what_differs(tmp_path: Path) -> None:
    split = Split("a", tmp_path / "a.parquet", 0, 3)
    finished(tmp_path, split)
    with pytest.raises(FingerprintMismatch, match=r"another weights \(weights was w1, is w2\).*delete"):
        shards.is_done(tmp_path, split, {**PRINT, "weights": "w2"})
    with pytest.raises(FingerprintMismatch, match="rows was 0:3, is 0:2"):
        shards.is_done(tmp_path, replace(split, stop=2), PRINT)
    with pytest.raises(FingerprintMismatch, match="another config, input"):
        shards.is_done(tmp_path, split, {"weights": "w1"})


def test_done_splits_outside_the_plan_are_refused(tmp_path: Path) -> None:
    splits = [Split(name, tmp_path / f"{name}.parquet", 0, 3) for name in "ab"]
    for split in splits:
        finished(tmp_path, split)
    shards.check_plan(tmp_path, splits)
    with pytest.raises(FingerprintMismatch, match=r"1 done splits that the input lacks \(b\)"):
        shards.check_plan(tmp_path, splits[:1])


def test_a_damaged_mark_says_so(tmp_path: Path) -> None:
    finished(tmp_path, Split("a", tmp_path / "a.parquet", 0, 3))
    for content in ("{", "[]", '{"split": {}}'):
        shards.done_path(tmp_path, "a").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json: is no done-mark .*delete it"):
            shards.read_done(tmp_path, "a")


def test_the_input_fingerprint_sees_content_and_not_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(3 << 20))
    before = shards.input_fingerprint(path)
    os.utime(path, (1, 1))
    assert shards.input_fingerprint(path) == before
    for position in (0, (3 << 20) - 1):
        changed = bytearray(3 << 20)
        changed[position] = 1
        path.write_bytes(changed)
        assert shards.input_fingerprint(path) != before
    path.write_bytes(bytes((3 << 20) + 1))
    assert shards.input_fingerprint(path) != before
