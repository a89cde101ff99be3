"""What strangers send as tar: the rows a parquet would give, nothing extracted, no shard silently short."""

import io
import json
import random
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hostile_files import JPEG, make_tar, member, shard

from capfilt.schema import Columns, Row, ShardError
from capfilt.shards import Split, open_split
from capfilt.tar import index_tar, read_part

AUTO = Columns()


def read(path: Path, columns: Columns = AUTO, start: int = 0, stop: int | None = None) -> list[Row]:
    opened = open_split(Split("x", path, start, stop), columns)
    return [row for chunk in opened.chunks for row in chunk.rows]


def passed(path: Path, columns: Columns = AUTO) -> pa.Table:
    opened = open_split(Split("x", path), columns)
    return pa.concat_tables([opened.schema.empty_table(), *(chunk.columns for chunk in opened.chunks)])


def test_damaged_bytes_never_give_anything_but_rows_or_a_shard_error(tmp_path: Path) -> None:
    chance = random.Random(1)
    make_tar(
        tmp_path / "b.tar", [member(f"{i}.{s}", JPEG) for i in range(30) for s in ("jpg", "txt", "json")]
    )
    for name, good in (("a.parquet", shard(tmp_path / "a.parquet", 60)), ("b.tar", tmp_path / "b.tar")):
        whole = good.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
            for _ in range(chance.randrange(1, 8)):
                if damaged:
                    damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            path = tmp_path / f"damaged_{name}"
            path.write_bytes(damaged)
            try:
                assert len(read(path)) <= 90
            except ValueError as error:  # a column may have lost its name, which is no ShardError
                assert path.name in str(error)


def test_a_tar_of_img2dataset_gives_the_same_rows_as_a_parquet(tmp_path: Path) -> None:
    members = []
    for i in range(20):
        members += [member(f"{i:09d}.jpg", JPEG), member(f"{i:09d}.txt", b"text %d" % i)]
        members.append(member(f"{i:09d}.json", json.dumps({"caption": "other", "sha256": "ab"}).encode()))
    from_tar = read(make_tar(tmp_path / "a.tar", members))
    keys = [f"{i:09d}" for i in range(20)]
    assert from_tar == read(shard(tmp_path / "a.parquet", 20, key=keys))
    assert {row.text for row in read(tmp_path / "a.tar", Columns(text="caption"))} == {"other"}
    table = passed(tmp_path / "a.tar")
    assert table.column_names == ["key", "image", "txt", "json"]
    assert table.to_pylist()[3]["image"] == {"bytes": JPEG, "path": "000000003.jpg"}
    assert json.loads(table.to_pylist()[3]["json"])["sha256"] == "ab"


def test_the_caption_of_a_tar_may_be_in_its_json(tmp_path: Path) -> None:
    contents = [
        b'{"caption": "a cat"}',
        b'["a", "b"]',
        b'{"caption": null}',
        b"{broken",
        b'{"caption": "\\ud800"}',
    ]
    members = [m for i, c in enumerate(contents) for m in (member(f"{i}.jpg", JPEG), member(f"{i}.json", c))]
    rows = read(make_tar(tmp_path / "a.tar", members))
    assert [(r.text, r.status) for r in rows] == [
        ("a cat", "ok"),
        (None, "ok"),
        (None, "ok"),
        (None, "bad_text"),
        (None, "bad_text"),
    ]
    deep = [member("0.jpg", JPEG), member("0.json", b"[" * 100_000)]
    assert read(make_tar(tmp_path / "b.tar", deep))[0].status == "bad_text"


def test_hostile_members_are_passed_over_and_nothing_is_written(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    members = [
        member("../escape.jpg", JPEG),
        member("/etc/absolute.jpg", JPEG),
        member("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("hard.txt", kind=tarfile.LNKTYPE, link="../escape.jpg"),
        member("device.jpg", kind=tarfile.CHRTYPE),
        member("folder.jpg", kind=tarfile.DIRTYPE),
        member("code.pkl", b"cos\nsystem\n(S'true'\ntR."),
        member("sparse.jpg", kind=tarfile.GNUTYPE_SPARSE),
        member("no_suffix", JPEG),
        member(".jpg", JPEG),
        member("last.PNG", JPEG),
    ]
    before = sorted(tmp_path.rglob("*"))
    path = make_tar(inside / "a.tar", members)
    rows = read(path)
    assert [(row.key, row.status) for row in rows] == [
        ("../escape", "ok"),
        ("/etc/absolute", "ok"),
        ("last", "ok"),
    ]
    assert sorted(tmp_path.rglob("*")) == [*before, path]
    assert [image["path"] for image in passed(path).column("image").to_pylist()] == [
        "escape.jpg",
        "absolute.jpg",
        "last.png",
    ]


def test_keys_with_dots_end_at_the_last_one_and_repeats_are_accounted_for(tmp_path: Path) -> None:
    names = [
        "a.0.jpg",
        "a.0.txt",
        "a.1.jpg",
        "a.1.txt",
        "b.jpg",
        "b.png",
        "c.jpg",
        "d.txt",
        "a.0.txt",
        "./e.jpg",
    ]
    rows = read(make_tar(tmp_path / "a.tar", [member(name, b"x") for name in names]))
    assert [(row.key, row.status, row.text) for row in rows] == [
        ("a.0", "ok", "x"),
        ("a.1", "ok", "x"),
        ("b", "ok", None),
        ("b", "skipped_upstream", None),
        ("c", "ok", None),
        ("d", "no_image", "x"),
        ("a.0", "skipped_upstream", "x"),
        ("e", "ok", None),
    ]
    assert "neighbours" in str(rows[3].error)


def test_a_tar_has_the_same_limits(tmp_path: Path) -> None:
    members = [
        *(member("big.jpg", bytes((32 << 20) + 1)), member("big.txt", b"t")),
        *(member("long.jpg", JPEG), member("long.txt", b"x" * 32_769)),
        *(member("huge.jpg", JPEG), member("huge.txt", b"x" * 200_000)),
        *(member("bytes.jpg", JPEG), member("bytes.txt", b"\xff\xfe")),
        *(member("k" * 1_025 + ".jpg", JPEG), member("\udcff.jpg", JPEG)),
    ]
    rows = read(make_tar(tmp_path / "a.tar", members))
    assert [row.status for row in rows] == ["too_large", *["bad_text"] * 5]
    assert [row.key for row in rows[4:]] == ["a-000004", "a-000005"]
    assert passed(tmp_path / "a.tar").num_rows == 6


def test_a_tar_that_was_cut_anywhere_is_an_error_and_not_a_short_shard(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "a.tar", [member(f"{i}.jpg", bytes(700)) for i in range(5)]).read_bytes()
    for cut in (0, 100, 512, 700, 1536, 1600, 5 * 1536 - 1, 5 * 1536):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"cut\.tar"):
            read(tmp_path / "cut.tar")
    middle = bytearray(whole)
    middle[2 * 1536 + 150] ^= 0xFF  # the checksum of the third header
    (tmp_path / "bad.tar").write_bytes(middle)
    with pytest.raises(ShardError, match=r"bad\.tar: is damaged or cut off at byte 3072"):
        read(tmp_path / "bad.tar")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Z"])
def test_a_size_below_zero_does_not_lead_back_for_ever(tmp_path: Path, kind: bytes) -> None:
    header = bytearray(tarfile.TarInfo("1.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = kind
    header[124:136] = b"\xff" + (-512 & (1 << 88) - 1).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("0.jpg").tobuf() + bytes(header) + bytes(4096))
    with pytest.raises(ShardError, match=r"a\.tar: has a header with an impossible size"):
        read(tmp_path / "a.tar")


def test_parquet_columns_do_not_apply_to_a_tar(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tar: a tar has only KEY\.jpg"):
        read(make_tar(tmp_path / "a.tar", [member("0.jpg", JPEG)]), Columns(image="jpg"))


# Parts: a tar read from the middle


def mixed_members(samples: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Samples of 1 to 3 members with what may disturb them: strangers between, long names, repeated keys."""
    members = [member("readme.md", b"first of all")]
    for i in range(samples):
        key = {3: "k" * 150, 7: "sample 2", 9: "sample 9 " + "\u00e9" * 90}.get(i, f"sample {i}")
        members.append(member(f"{key}.jpg", JPEG + bytes([i])))
        members += [member("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")] * (i % 3 == 0)
        members += [member(f"{key}.txt", b"text %d" % i)] * (i % 2)
        members += [member(f"{key}.json", b'{"caption": "json %d"}' % i)] * (i % 5 > 1)
    return members


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_parts_of_a_tar_together_are_the_tar(tmp_path: Path, form: int) -> None:
    """However it is cut, and read from the last to the first; repeated keys are told in every part."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for info, content in mixed_members(12):
            archive.addfile(info, io.BytesIO(content))
    expected = read(path)
    assert [row.status for row in expected] == ["ok"] * 7 + ["skipped_upstream"] + ["ok"] * 4
    for rows in (1, 2, 5, 8, 100):
        parts = index_tar(path, AUTO, rows)
        assert [part.first for part in parts] == list(range(0, 12, rows))
        assert [part.rows for part in parts] == [min(rows, 12 - first) for first in range(0, 12, rows)]
        assert [row for part in reversed(parts) for row in reversed(read_part(part, AUTO))] == expected[::-1]
    assert [row.text for row in read_part(parts[0], Columns(text="caption"))][2:4] == ["json 2", "json 3"]


def test_an_index_reads_no_contents(tmp_path: Path) -> None:
    """A file with holes: 3 GB to read, and 6 headers."""
    path, size = tmp_path / "a.tar", 1 << 29
    with open(path, "wb") as file:
        for i in range(6):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = size
            file.write(info.tobuf())
            file.seek(size, 1)
        file.write(bytes(1024))
    before = time.process_time()
    parts = index_tar(path, AUTO, 4)
    assert [(part.offset, part.rows) for part in parts] == [(0, 4), (4 * (512 + size), 2)]
    assert time.process_time() - before < 0.2
    assert [row.status for row in read_part(parts[1], AUTO)] == ["too_large"] * 2


def test_a_tar_that_was_cut_or_damaged_is_found_by_its_index(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "a.tar", [member(f"{i}.jpg", bytes(700)) for i in range(5)]).read_bytes()
    for cut in (0, 100, 512, 700, 1536, 1600, 5 * 1536 - 1, 5 * 1536):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"cut\.tar"):
            index_tar(tmp_path / "cut.tar", AUTO)
    middle = bytearray(whole)
    middle[2 * 1536 + 150] ^= 0xFF  # the checksum of the third header
    (tmp_path / "bad.tar").write_bytes(middle)
    with pytest.raises(ShardError, match=r"bad\.tar: is damaged or cut off at byte 3072"):
        index_tar(tmp_path / "bad.tar", AUTO)
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with pytest.raises(ShardError, match=r"text\.tar: is not a whole, uncompressed tar"):
        index_tar(tmp_path / "text.tar", AUTO)
    with pytest.raises(ShardError, match=r"none\.tar: there is no such file"):
        index_tar(tmp_path / "none.tar", AUTO)
    with pytest.raises(ValueError, match=r"a\.tar: a tar has only KEY\.jpg"):
        index_tar(tmp_path / "a.tar", Columns(key="id"))


def test_a_tar_that_changed_since_its_index_is_an_error(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [member(f"{i}.jpg", bytes(700)) for i in range(5)])
    whole = path.read_bytes()
    first, second = index_tar(path, AUTO, 3)
    assert (second.offset, second.first, second.rows) == (3 * 1536, 3, 2)
    path.write_bytes(whole[: 4 * 1536 + 600])
    assert len(read_part(first, AUTO)) == 3
    with pytest.raises(ShardError, match=r"a\.tar: is damaged or cut off near byte"):
        read_part(second, AUTO)
    path.write_bytes(whole[: 4 * 1536] + bytes(1024))
    with pytest.raises(ShardError, match=r"a\.tar: has 1 samples from byte 4608 on, and had 2"):
        read_part(second, AUTO)
    path.write_bytes(whole[:4608] + b"x" * 3000)  # no header where one was
    with pytest.raises(ShardError, match=r"a\.tar: is damaged or cut off at byte 4608"):
        read_part(second, AUTO)


def test_damaged_bytes_never_give_parts_but_of_the_same_rows(tmp_path: Path) -> None:
    chance = random.Random(2)
    whole = make_tar(tmp_path / "a.tar", mixed_members(20)).read_bytes()
    path, found = tmp_path / "damaged.tar", []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):  # mostly in a header
            damaged[512 * chance.randrange(len(whole) // 512) + chance.randrange(160)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            expected = read(path)
        except ShardError:
            with pytest.raises(ShardError, match=r"damaged\.tar"):
                index_tar(path, AUTO)
            found.append(False)
            continue
        parts = index_tar(path, AUTO, chance.randrange(1, 9))
        assert [row for part in parts for row in read_part(part, AUTO)] == expected
        found.append(True)
    assert 15 < sum(found) < 135


def header(kind: bytes, size: int) -> bytes:
    """Of a member of any size, more than the 8 GiB of octal numbers too."""
    raw = bytearray(tarfile.TarInfo("0.jpg").tobuf(tarfile.GNU_FORMAT))
    raw[156:157] = kind
    raw[124:136] = b"\x80" + size.to_bytes(11, "big")
    raw[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(raw))[0]
    return bytes(raw)


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize(
    "bad",
    [header(b"L", 0) * 2000, header(b"x", 0) * 2000, header(b"L", 1 << 60), header(b"0", 1 << 80)],
    ids=["many long names", "many extended headers", "a huge name", "a huge member"],
)
def test_a_header_that_breaks_tarfile_is_an_error_of_the_shard(tmp_path: Path, bad: bytes, good: int) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"0", 0) * good + bad + bytes(1024))
    for reader in (read, lambda path: index_tar(path, AUTO)):
        with pytest.raises(ShardError, match=r"a\.tar: is "):
            reader(path)
