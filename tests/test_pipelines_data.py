"""Shards -> batches: the same ones for any number of workers and from any start, and nothing bad gets in."""

import io
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip.image import Augmentation, decode, image_transform
from blip.model import Batch
from blip.tokenizer import Tokenizer, write_vocabulary
from capfilt.schema import CLEAN, Columns
from pipelines import data
from pipelines.data import DataConfig, Group, Row, find_groups, image_id, read_group, training_batches
from pipelines.order import Order
from pipelines.order import batches as ordered
from pipelines.world import WorldConfig, write_world
from pipelines.world_captions import VOCABULARY

SIZE = 32
PLAIN = Augmentation(min_scale=1.0, flip=False, randaugment=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of the noisy set, 23 rows, and two of the clean one, 7 rows of 3 captions."""
    folder = tmp_path_factory.mktemp("world")
    write_world(WorldConfig(noisy_rows=23, clean_rows=7, test_rows=1, shard_rows=5, side=32), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    write_vocabulary(VOCABULARY, folder)
    return Tokenizer(folder)


def config(shards: Path | str, **values: Any) -> DataConfig:
    return DataConfig(**({"shards": (str(shards),), "batch_size": 4, "window": 2, "workers": 0} | values))


def batches(tokenizer: Tokenizer, data: DataConfig, count: int, first: int = 0, seed: int = 0) -> list[Batch]:
    stream, _ = training_batches(data, tokenizer, SIZE, seed, first)
    return list(itertools.islice(stream, count))


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).resize((40, 40)).save(file, "JPEG")
    return file.getvalue()


def raw_shard(path: Path, rows: list[dict[str, Any]]) -> Path:
    schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("jpg", pa.binary())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def clean_shard(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=CLEAN), path)
    return path


def caption(text: str | None) -> dict[str, Any]:
    return {"text": text, "source": "web", "itm": 0.5}


# The order


def take(order: Order, batch_size: int, count: int, first: int = 0) -> list[list[tuple[int, int, int]]]:
    return list(itertools.islice(ordered(order, batch_size, first), count))


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_every_row_comes_once_an_epoch(rows: list[int], batch_size: int, window: int, seed: int) -> None:
    total = sum(rows)
    places = list(itertools.chain(*take(Order(rows, window, seed), batch_size, 3 * total)))[: 3 * total]
    expected = {(group, row) for group, count in enumerate(rows) for row in range(count)}
    for epoch in range(3):
        part = places[epoch * total : (epoch + 1) * total]
        assert {number for number, _, _ in part} == {epoch}
        assert Counter((group, row) for _, group, row in part) == Counter(expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, st.integers(1, 12), st.integers(1, 5), st.integers(0, 20))
def test_the_stream_from_a_batch_on_is_the_rest_of_the_stream(
    rows: list[int], batch_size: int, window: int, first: int
) -> None:
    order = Order(rows, window, seed=1)
    assert take(order, batch_size, 5, first) == take(order, batch_size, first + 5)[first:]


def test_the_order_depends_on_the_seed_and_nothing_else() -> None:
    rows = [7, 3, 9, 4]
    first = take(Order(rows, 2, seed=3), 5, 20)
    torch.manual_seed(9), np.random.seed(9)
    assert take(Order(rows, 2, seed=3), 5, 20) == first
    assert take(Order(rows, 2, seed=4), 5, 20) != first
    places = [place for batch in take(Order([23], 1, seed=3), 23, 2) for place in batch]
    assert [row for _, _, row in places[:23]] != [row for _, _, row in places[23:]]  # each epoch has its own


def test_only_a_window_of_row_groups_is_mixed() -> None:
    places = [place for batch in take(Order([10] * 6, 2, seed=0), 10, 6) for place in batch]
    windows = [{group for _, group, _ in places[start : start + 20]} for start in (0, 20, 40)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))
    assert places[:20] != sorted(places[:20])


# Batches


@pytest.mark.parametrize("split", ["noisy", "clean"])
def test_batches_hold_what_the_shards_hold(world: Path, tokenizer: Tokenizer, split: str) -> None:
    """An epoch without augmentation against the files, read with pyarrow alone."""
    expected = {}
    for path in sorted((world / split).glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            data = row["jpg"] if split == "noisy" else row["image"]["bytes"]
            texts = [row["caption"]] if split == "noisy" else [c["text"] for c in row["captions"]]
            expected[image_id(data)] = image_transform(decode(data), SIZE), texts
    stream, found_rows = training_batches(
        config(world / split, batch_size=1, augmentation=PLAIN), tokenizer, SIZE, 0
    )
    assert found_rows == len(expected) == {"noisy": 23, "clean": 7}[split]
    seen = set()
    for batch in itertools.islice(stream, found_rows):
        pixels, texts = expected[int(batch.image_ids)]
        seen.add(int(batch.image_ids))
        torch.testing.assert_close(batch.pixels[0], pixels)
        assert batch.ids[0].tolist() in [tokenizer([clean(text)], 40)[0][0].tolist() for text in texts]
    assert seen == expected.keys()


def clean(text: str) -> str:
    return " ".join("".join(" " if c in '.!"()*#:;~' else c for c in text.lower()).split()[:30])


def test_batches_are_the_same_with_data_workers(world: Path, tokenizer: Tokenizer) -> None:
    """Two of them, which together run ahead over the end of an epoch; one is part of the trainer's test."""
    alone = batches(tokenizer, config(world / "noisy"), 14)
    shared = batches(tokenizer, config(world / "noisy", workers=2), 9, first=5)
    assert all(same(one, other) for one, other in zip(alone[5:], shared, strict=True))


def test_batches_from_a_number_on_are_those_of_the_undisturbed_stream(
    world: Path, tokenizer: Tokenizer
) -> None:
    data = config(world / "noisy")
    whole = batches(tokenizer, data, 16)
    for first in (1, 6, 11):  # 23 rows are 5.75 batches
        rest = batches(tokenizer, data, 16 - first, first)
        assert all(same(one, other) for one, other in zip(whole[first:], rest, strict=True))
    assert not same(whole[0], batches(tokenizer, data, 1, seed=1)[0])


def test_reading_batches_draws_no_global_random_numbers(world: Path, tokenizer: Tokenizer) -> None:
    """Or a resumed run, which reads from another batch on, would draw other dropouts and negatives."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(tokenizer, config(world / "noisy"), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_augments_anew(world: Path, tokenizer: Tokenizer) -> None:
    data = config(world / "clean", batch_size=7)
    first, second = batches(tokenizer, data, 2)
    images = [dict(zip(b.image_ids.tolist(), b.pixels, strict=True)) for b in (first, second)]
    assert images[0].keys() == images[1].keys()
    assert not any(torch.equal(images[0][key], images[1][key]) for key in images[0])


def test_every_caption_of_an_image_is_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["a red circle", "a blue square", "two stars"]
    clean_shard(
        tmp_path / "a.parquet",
        [{"key": "k", "image": {"bytes": jpeg(0), "path": None}, "captions": [caption(t) for t in texts]}],
    )
    stream = batches(tokenizer, config(tmp_path, batch_size=1), 40)
    found = Counter(tuple(batch.ids[0].tolist()) for batch in stream)
    assert len(found) == 3
    assert min(found.values()) > 4


@pytest.mark.parametrize("prompt", ["a picture of", "a picture of "])
def test_a_prompt_precedes_every_text(tmp_path: Path, tokenizer: Tokenizer, prompt: str) -> None:
    raw_shard(
        tmp_path / "a.parquet",
        [{"key": str(i), "caption": "A red circle.", "jpg": jpeg(i)} for i in range(3)],
    )
    (batch,) = batches(tokenizer, config(tmp_path, batch_size=3, prompt=prompt), 1)
    words = tokenizer(["a picture of a red circle"], 40)[0][0].tolist()
    assert batch.ids.tolist() == [words] * 3
    assert batch.prompt_length == 3


def test_texts_are_cut_by_words_and_by_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw_shard(tmp_path / "a.parquet", [{"key": "0", "caption": "red " * 50, "jpg": jpeg(0)}])
    for limits, length in (({}, 32), ({"max_words": 4}, 6), ({"max_length": 9}, 9)):
        (batch,) = batches(tokenizer, config(tmp_path, batch_size=1, **limits), 1)
        assert batch.ids.shape == (1, length)
        assert batch.ids[0, -1] == tokenizer.sep


# What cannot be used


def test_broken_rows_of_a_raw_shard_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = {1: "a red circle", 5: "a blue square", 8: "two stars"}
    rows = [
        {"key": "0", "caption": "a red circle", "jpg": b"not an image"},
        {"key": "1", "caption": good[1], "jpg": jpeg(1)},
        {"key": "2", "caption": "a red circle", "jpg": None},
        {"key": "3", "caption": None, "jpg": jpeg(3)},
        {"key": "4", "caption": " ...!! ", "jpg": jpeg(4)},  # nothing is left of it
        {"key": "5", "caption": good[5], "jpg": jpeg(5)},
        {"key": "6", "caption": "a red circle", "jpg": jpeg(6)[:300]},
        {"key": "7", "caption": "a red circle", "jpg": b""},
        {"key": "8", "caption": good[8], "jpg": jpeg(8)},
    ]
    raw_shard(tmp_path / "a.parquet", rows)
    (batch,) = batches(tokenizer, config(tmp_path, batch_size=9), 1)
    ids, _ = tokenizer(list(good.values()), 40)
    expected = {image_id(jpeg(key)): ids[i].tolist() for i, key in enumerate(good)}
    assert dict(zip(batch.image_ids.tolist(), batch.ids.tolist(), strict=True)) == expected


def test_broken_captions_of_a_clean_shard_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def row(key: int, *texts: str | None) -> dict[str, Any]:
        image = {"bytes": jpeg(key), "path": None}
        return {"key": str(key), "image": image, "captions": [caption(text) for text in texts]}

    rows = [row(0, None, "", "#", "a red circle"), row(1), row(2, "a blue square"), row(3, None, "")]
    rows += [{"key": "4", "image": None, "captions": [caption("two stars")]}]
    rows += [
        {"key": "5", "image": {"bytes": None, "path": "/etc/passwd"}, "captions": [caption("two stars")]}
    ]
    rows += [{"key": "6", "image": {"bytes": jpeg(6), "path": None}, "captions": None}]
    clean_shard(tmp_path / "a.parquet", rows)
    (batch,) = batches(tokenizer, config(tmp_path, batch_size=7), 1)
    assert sorted(batch.image_ids.tolist()) == sorted(image_id(jpeg(key)) for key in (0, 2))
    assert batch.mask.sum() == 10  # [CLS], three words, [SEP]


def test_a_bad_row_shifts_no_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"key": str(i), "caption": "a red circle", "jpg": jpeg(i)} for i in range(12)]
    for name, bad in (("good", ()), ("bad", (3, 7))):
        (tmp_path / name).mkdir()
        broken = [row | {"jpg": b"broken"} if i in bad else row for i, row in enumerate(rows)]
        raw_shard(tmp_path / name / "a.parquet", broken)
    good, bad = (batches(tokenizer, config(tmp_path / name), 6) for name in ("good", "bad"))
    lost = {image_id(jpeg(i)) for i in (3, 7)}
    for one, other in zip(good, bad, strict=True):
        kept = [i for i, key in enumerate(one.image_ids.tolist()) if key not in lost]
        assert other.image_ids.tolist() == one.image_ids[kept].tolist()
        assert torch.equal(other.pixels, one.pixels[kept])


def test_the_same_image_has_one_id_under_every_key(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """And equal keys of two sets are two images, as all of img2dataset's sets have a 000000000."""
    for name, image in (("a", 0), ("b", 1)):
        rows = [
            {"key": "000000000", "caption": "a red circle", "jpg": jpeg(image)},
            {"key": name, "caption": "a blue square", "jpg": jpeg(7)},
        ]
        raw_shard(tmp_path / f"{name}.parquet", rows)
    (batch,) = batches(tokenizer, config(tmp_path), 1)
    assert sorted(Counter(batch.image_ids.tolist()).values()) == [1, 1, 2]
    assert all(0 <= key < 2**63 for key in batch.image_ids.tolist())


def test_columns_with_other_names(tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = pa.table({"photo": [jpeg(0)], "words": ["a red circle"], "caption": ["a blue square"]})
    pq.write_table(table, tmp_path / "a.parquet")
    columns = Columns(image="photo", text="words")
    (batch,) = batches(tokenizer, config(tmp_path, batch_size=1, columns=columns), 1)
    assert batch.ids.tolist() == tokenizer(["a red circle"], 40)[0].tolist()


def test_half_written_files_are_not_shards(world: Path, tmp_path: Path) -> None:
    for name in ("00000.parquet", ".00001.parquet", "_tmp.parquet"):
        raw_shard(tmp_path / name, [{"key": "0", "caption": "a", "jpg": b""}])
    assert [group.path.name for group in find_groups((str(tmp_path),), Columns())] == ["00000.parquet"]
    assert len(find_groups((str(tmp_path / "_tmp.parquet"),), Columns())) == 1  # named on purpose


def test_row_groups_are_found_with_their_first_rows(tmp_path: Path) -> None:
    rows = [{"key": str(i), "caption": f"text {i}", "jpg": jpeg(i)} for i in range(8)]
    table = pq.read_table(raw_shard(tmp_path / "a.parquet", rows))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    groups = find_groups((str(tmp_path),), Columns())
    assert [(group.index, group.first, group.rows) for group in groups] == [(0, 0, 3), (1, 3, 3), (2, 6, 2)]
    read = [texts for group in groups for _, texts in read_group(group, Columns())]
    assert read == [[f"text {i}"] for i in range(8)]


# Errors


def damaged(path: Path) -> Path:
    """The footer is whole, the pages are not."""
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("is_clean", [False, True])
def test_a_damaged_page_names_its_file(tmp_path: Path, tokenizer: Tokenizer, is_clean: bool) -> None:
    path = tmp_path / "damaged.parquet"
    if is_clean:
        image = {"bytes": jpeg(0), "path": None}
        clean_shard(path, [{"key": "0", "image": image, "captions": [caption("a red circle")]}])
    else:
        raw_shard(path, [{"key": "0", "caption": "a red circle", "jpg": jpeg(0)}])
    damaged(path)
    with pytest.raises(ValueError, match=r"damaged\.parquet"):
        batches(tokenizer, config(tmp_path, batch_size=1), 1)


def test_shards_that_cannot_be_used_are_named_before_training(world: Path, tmp_path: Path) -> None:
    def refused(place: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match) as error:
            find_groups((str(world / "noisy"), str(place)), Columns())
        assert str(place) in str(error.value)

    refused(tmp_path / "missing", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no .parquet file")
    (tmp_path / "text.parquet").write_text("no parquet at all, but long enough to have a footer")
    refused(tmp_path / "text.parquet", "is not a whole parquet file")
    whole = (world / "noisy" / "00000.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.parquet", "is not a whole parquet file")
    refused(world / "noisy_truth.parquet", "has no image column")
    pq.write_table(pa.table({"jpg": [b"x"], "captions": [["a list of texts"]]}), tmp_path / "lists.parquet")
    refused(tmp_path / "lists.parquet", "has no text column")


def test_shards_without_rows_are_an_error(tmp_path: Path) -> None:
    raw_shard(tmp_path / "a.parquet", [])
    with pytest.raises(ValueError, match="no rows"):
        find_groups((str(tmp_path),), Columns())


def test_a_batch_of_nothing_but_broken_rows_names_a_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = raw_shard(tmp_path / "a.parquet", [{"key": "0", "caption": "a", "jpg": b"broken"}] * 4)
    with pytest.raises(ValueError, match="none of them has both a readable image and a text") as error:
        batches(tokenizer, config(tmp_path), 1)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("window", 0), ("workers", -1), ("max_words", 0), ("max_length", 2)],
)
def test_a_config_out_of_range_is_an_error(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least"):
        config("somewhere", **{name: value})


def test_rows_are_read_once_while_their_window_lasts(
    world: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more row groups than a window are held."""
    read: list[Group] = []

    def counted(group: Group, columns: Columns) -> list[Row]:
        read.append(group)
        return read_group(group, columns)

    monkeypatch.setattr(data, "read_group", counted)
    batches(tokenizer, config(world / "noisy", window=5), 11)  # not yet two epochs of 23 rows
    assert len(read) == 5
