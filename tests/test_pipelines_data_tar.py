"""Webdataset tars give the batches that the same rows in parquet give, beside them and for several ranks."""

import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile_files import make_tar, member
from test_pipelines_data_ranks import images, jpeg, read, same

from blip.tokenizer import Tokenizer, write_vocabulary
from capfilt.schema import Columns, ShardError
from capfilt.tar import PART_ROWS, TarPart
from pipelines.data import DataConfig, find_groups, image_id, training_batches

JPEGS = [jpeg(i) for i in range(8)]
Pair = tuple[bytes, str | None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    write_vocabulary(["red", "blue", *map(str, range(10))], folder)
    return Tokenizer(folder)


def config(*shards: Path, **values: Any) -> DataConfig:
    chosen = {"batch_size": 8, "window": 2, "workers": 0, "shards": tuple(map(str, shards))}
    return DataConfig(**(chosen | values))


def pairs(count: int) -> list[Pair]:
    return [(JPEGS[i % 8], f"red {' '.join(str(i))}") for i in range(count)]


def write_tar(path: Path, rows: list[Pair], metadata: bool = False) -> Path:
    """As img2dataset writes it: KEY.jpg, KEY.txt and KEY.json for every row."""
    members = []
    for i, (image, text) in enumerate(rows):
        members.append(member(f"{i:09d}.jpg", image))
        if text is not None:
            members.append(member(f"{i:09d}.txt", text.encode()))
        if metadata:
            members.append(member(f"{i:09d}.json", json.dumps({"caption": "blue", "width": 20}).encode()))
    return make_tar(path, members)


def write_parquet(path: Path, rows: list[Pair]) -> Path:
    schema = pa.schema([("jpg", pa.binary()), ("caption", pa.string())])
    table = pa.Table.from_arrays([pa.array(column) for column in zip(*rows, strict=True)], schema=schema)
    pq.write_table(table, path, row_group_size=PART_ROWS)
    return path


def folders(root: Path) -> tuple[Path, Path]:
    """The same 260 rows as tars and as parquet, in groups of 100, 100, 10 and 50."""
    rows = pairs(260)
    rows[30], rows[205] = (b"no image", "red"), (JPEGS[0], None)  # not to be used
    for kind, write in (("tar", write_tar), ("parquet", write_parquet)):
        (root / kind).mkdir()
        write(root / kind / f"00000.{kind}", rows[:210])
        write(root / kind / f"00001.{kind}", rows[210:])
    return root / "tar", root / "parquet"


def test_tars_give_the_batches_of_the_same_rows_in_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Bit by bit, over the end of an epoch, which is 26 batches."""
    tars, parquets = folders(tmp_path)
    assert training_batches(config(tars), tokenizer, 16, 0)[1] == 260
    found, expected = (read(tokenizer, config(place, batch_size=10), 30) for place in (tars, parquets))
    assert all(map(same, found, expected))
    assert sum(10 - len(batch.ids) for batch in found[:26]) == 2
    assert len({tuple(ids[:5].tolist()) for batch in found[:26] for ids in batch.ids}) == 258


def test_ranks_read_every_sample_once_an_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Three processes with batches of 13, resumed: 20 batches of 39 rows are 3 epochs of 260."""
    tars, _ = folders(tmp_path)
    found = [
        batch
        for rank in range(3)
        for first, count in ((0, 9), (9, 11))
        for batch in read(tokenizer, config(tars, batch_size=13), count, first, rank, 3)
    ]
    good = Counter(image_id(image) for i, (image, _) in enumerate(pairs(260)) if i not in (30, 205))
    assert images(found) == Counter({key: 3 * rows for key, rows in good.items()})


def test_a_sample_is_never_cut_between_two_groups(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Every image of two groups and more has its own text, which comes after it in the tar."""
    rows = [(jpeg(i), f"red {' '.join(str(i))}") for i in range(120)]
    write_tar(tmp_path / "a.tar", rows, metadata=True)
    (batch, *_) = read(tokenizer, config(tmp_path, batch_size=120), 1)
    texts = {image_id(image): tokenizer([text or ""], 40)[0][0].tolist() for image, text in rows}
    found = dict(zip(batch.image_ids.tolist(), batch.ids.tolist(), strict=True))
    assert found.keys() == texts.keys()
    assert all(ids[: len(texts[key])] == texts[key] for key, ids in found.items())
    assert [(group.first, group.rows) for group in find_groups((str(tmp_path),), Columns())] == [
        (0, 100),
        (100, 20),
    ]
    (batch,) = read(tokenizer, config(tmp_path, batch_size=120, columns=Columns(text="caption")), 1)
    assert batch.ids.tolist() == tokenizer(["blue"] * 120, 40)[0].tolist()


def test_a_folder_may_hold_tars_and_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Read in the order of their names; a parquet beside its tar is img2dataset's metadata."""
    write_parquet(tmp_path / "00000.parquet", pairs(3))
    write_tar(tmp_path / "00001.tar", pairs(4))
    pq.write_table(pa.table({"url": ["https://x"] * 4, "caption": ["red"] * 4}), tmp_path / "00001.parquet")
    (tmp_path / "00001_stats.json").write_text("{}")
    write_parquet(tmp_path / "00002.parquet", pairs(2))
    for hidden in ("_half.tar", ".half.tar"):
        (tmp_path / hidden).write_bytes(b"half written")
    groups = find_groups((str(tmp_path),), Columns())
    assert [(group.path.name, group.rows) for group in groups] == [
        ("00000.parquet", 3),
        ("00001.tar", 4),
        ("00002.parquet", 2),
    ]
    assert [isinstance(group, TarPart) for group in groups] == [False, True, False]
    (batch,) = read(tokenizer, config(tmp_path, batch_size=9), 1)
    assert len(batch.ids) == 9
    alone = find_groups((str(tmp_path / "00001.tar"),), Columns())
    assert alone == groups[1:2]


def test_tars_and_parquet_with_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tar = write_tar(tmp_path / "a.tar", [(JPEGS[0], "red")] * 5)
    parquet = write_parquet(tmp_path / "b.parquet", [(JPEGS[1], "blue")] * 9)
    stream, rows = training_batches(config(tar, parquet, weights=(3, 1)), tokenizer, 16, 0)
    assert rows == 14
    for batch in itertools.islice(stream, 4):
        assert images([batch]) == {image_id(JPEGS[0]): 6, image_id(JPEGS[1]): 2}


def test_rows_that_a_tar_cannot_give_leave_their_batch_shorter(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Those that CapFilt would not read either: a key that comes again, a member over its limit, no image."""
    members = [
        *(member("0.jpg", JPEGS[0]), member("0.txt", b"red")),
        *(member("1.jpg", JPEGS[1]), member("1.txt", b"red" * 50_000)),
        *(member("2.jpg", JPEGS[2]), member("2.txt", b"\xff\xfe")),
        *(member("0.jpg", JPEGS[3]), member("0.txt", b"red")),
        member("4.txt", b"red"),
        *(member("5.png", JPEGS[5]), member("5.txt", b"blue")),
        *(member("6.jpg", kind=tarfile.SYMTYPE, link="0.jpg"), member("6.txt", b"red")),
    ]
    make_tar(tmp_path / "a.tar", members)
    (batch,) = read(tokenizer, config(tmp_path, batch_size=7), 1)
    assert images([batch]) == {image_id(JPEGS[0]): 1, image_id(JPEGS[5]): 1}
    assert torch.isfinite(batch.pixels).all()


# Errors, before training


def test_a_cut_tar_is_named_at_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = write_tar(tmp_path / "good.tar", pairs(20)).read_bytes()
    path = tmp_path / "cut.tar"
    for cut in (0, 700, len(whole) // 2, 41 * 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"cut\.tar"):
            training_batches(config(tmp_path), tokenizer, 16, 0)


def test_columns_of_parquet_do_not_apply_to_tars(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    with pytest.raises(ValueError, match=r"a\.tar: a tar has only KEY\.jpg, KEY\.txt and KEY\.json"):
        training_batches(config(tmp_path, columns=Columns(image="photo")), tokenizer, 16, 0)


def test_tars_without_samples_are_an_error(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [member("readme.md", b"nothing else")])
    with pytest.raises(ValueError, match=r"no rows; data\.shards must name shards with rows"):
        find_groups((str(tmp_path),), Columns())
