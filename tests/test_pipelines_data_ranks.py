"""Processes share a stream and corpora make a mixture: no row is lost or comes twice, from any start."""

import io
import itertools
from collections import Counter
from fractions import Fraction
from math import inf, nan
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

from blip.model import Batch
from blip.tokenizer import Tokenizer, write_vocabulary
from capfilt.schema import Columns
from pipelines import data as pipelines_data
from pipelines.config import load_config
from pipelines.data import DataConfig, Group, Row, image_id, read_group, training_batches
from pipelines.order import Order, Place, batches, mixed_batches, rows_of_each

SIZE = 16
ROWS, BROKEN = 23, 17  # of `shards`
WORLD = 4


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).resize((20, 20)).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, rows: range, broken: int = -1, group: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [b"broken" if i == broken else jpeg(i) for i in rows]
    pq.write_table(pa.table({"jpg": data, "caption": ["red"] * len(data)}), path, row_group_size=group)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 rows, one of them broken, in row groups of 4 and fewer."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "0.parquet", range(10), BROKEN)
    write_shard(folder / "1.parquet", range(10, ROWS), BROKEN)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    write_vocabulary(["red", "blue"], folder)
    return Tokenizer(folder)


def config(*shards: Path, **values: Any) -> DataConfig:
    chosen = {"batch_size": 2, "window": 2, "workers": 0, "shards": tuple(map(str, shards))}
    return DataConfig(**(chosen | values))


def read(
    tokenizer: Tokenizer, data: DataConfig, count: int, first: int = 0, rank: int = 0, world: int = 1
) -> list[Batch]:
    stream, _ = training_batches(data, tokenizer, SIZE, 0, first, rank, world)
    return list(itertools.islice(stream, count))


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def images(found: list[Batch]) -> Counter[int]:
    return Counter(key for batch in found for key in batch.image_ids.tolist())


# Several processes


def test_four_processes_read_every_row_once_an_epoch_also_after_a_resume(
    shards: Path, tokenizer: Tokenizer
) -> None:
    """Stopped in the middle of the second epoch; then one process has data workers, and the others none.

    Batches of 2 in 4 processes are 8 rows: 23 batches of all are 8 epochs of 23 rows.
    """
    stop = 4
    runs = []
    for rank in range(WORLD):
        begun = read(tokenizer, config(shards), stop, rank=rank, world=WORLD)
        workers = 2 if rank == 1 else 0
        went_on = read(tokenizer, config(shards, workers=workers), ROWS - stop, stop, rank, WORLD)
        runs.append(begun + went_on)
    good = {image_id(jpeg(i)) for i in range(ROWS) if i != BROKEN}
    assert sum(map(images, runs), Counter()) == Counter(dict.fromkeys(good, 8))
    # What was lost is known: the broken row of each epoch.
    assert sum(2 - len(batch.ids) for run in runs for batch in run) == 8
    # All four together are the batches of one process that takes as many rows.
    alone = read(tokenizer, config(shards, batch_size=8), ROWS)
    for k, one in enumerate(alone):
        assert images([run[k] for run in runs]) == images([one])
        for rank, run in enumerate(runs):
            if len(one.ids) == 8:  # no row is missing
                assert torch.equal(run[k].image_ids, one.image_ids[rank::WORLD])


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, st.integers(1, 4), st.integers(1, 5), st.integers(0, 20))
def test_every_epoch_has_every_row_once_over_the_ranks(
    rows: list[int], batch_size: int, world: int, first: int
) -> None:
    """The rows of the ranks, put back in turn, are the stream, and that is cut into epochs."""
    size, total = batch_size * world, sum(rows)
    skipped = first * size
    count = -(-(skipped + 2 * total) // size)
    stream = batches(Order(rows, 2, seed=0), size, first)
    ranks = [[batch[rank::world] for rank in range(world)] for batch in itertools.islice(stream, count)]
    assert {len(part) for parts in ranks for part in parts} == {batch_size}
    places = [place for parts in ranks for turn in zip(*parts, strict=True) for place in turn]
    places = places[-skipped % total :]  # from the next epoch on
    expected = Counter((group, row) for group, found in enumerate(rows) for row in range(found))
    for epoch in range(len(places) // total):
        part = places[epoch * total : (epoch + 1) * total]
        assert Counter((group, row) for _, group, row in part) == expected
        assert len({number for number, _, _ in part}) == 1


def test_the_only_process_is_the_first_of_one(shards: Path, tokenizer: Tokenizer) -> None:
    """And what a row looks like does not depend on the process that reads it."""
    plain = read(tokenizer, config(shards, batch_size=4), 6)
    assert all(map(same, plain, read(tokenizer, config(shards, batch_size=4), 6, 0, 0, 1)))
    seen = dict(pair for batch in plain for pair in zip(batch.image_ids.tolist(), batch.pixels, strict=True))
    for rank in range(2):
        for batch in read(tokenizer, config(shards), 5, rank=rank, world=2):  # 20 of 23 rows
            for key, pixels in zip(batch.image_ids.tolist(), batch.pixels, strict=True):
                assert torch.equal(pixels, seen[key])


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_out_of_range_is_an_error(shards: Path, tokenizer: Tokenizer, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}; of {world} processes"):
        training_batches(config(shards), tokenizer, SIZE, 0, 0, rank, world)


# Shares of a mixture

weights = st.lists(
    st.floats(1e-6, 1e6) | st.integers(1, 9) | st.sampled_from([0.1, 1e-300, 1e300]), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(weights, st.integers(1, 99), st.integers(0, 10**12))
def test_shares_of_a_mixture(found: list[float], size: int, k: int) -> None:
    """Exact sums, nothing is taken back, and each is near its share of all rows."""
    before, after = rows_of_each(k * size, found), rows_of_each((k + 1) * size, found)
    assert sum(before) == k * size and sum(after) == (k + 1) * size
    assert all(old <= new for old, new in zip(before, after, strict=True))
    total = sum(Fraction(weight) for weight in found)
    for weight, rows in zip(found, before, strict=True):
        assert abs(rows - k * size * Fraction(weight) / total) < len(found)


def test_shares_by_hand() -> None:
    assert rows_of_each(0, (1, 1, 2)) == [0, 0, 0]
    assert [rows_of_each(n, (1, 1, 2)) for n in (4, 8, 400)] == [[1, 1, 2], [2, 2, 4], [100, 100, 200]]
    assert [rows_of_each(n, (1, 2)) for n in range(7)] == [
        *([0, 0], [0, 1], [0, 2]),
        *([1, 2], [1, 3], [1, 4]),
        [2, 4],
    ]
    assert rows_of_each(7, (0.25,)) == [7]
    assert rows_of_each(3 * 10**30, (1, 2)) == [10**30, 2 * 10**30]


# Mixtures

corpora = st.lists(sizes, min_size=1, max_size=4)


def take(stream: Any, count: int) -> list[list[Place]]:
    return list(itertools.islice(stream, count))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(corpora, st.data(), st.integers(1, 12), st.integers(1, 3), st.integers(0, 15))
def test_a_mixture_from_a_batch_on_is_the_rest_of_the_mixture(
    found: list[list[int]], data: st.DataObject, size: int, window: int, first: int
) -> None:
    shares = data.draw(st.lists(st.integers(1, 9), min_size=len(found), max_size=len(found)))
    parts = take(mixed_batches(found, shares, window, size, 5), first + 4)
    assert {len(batch) for batch in parts} == {size}
    assert take(mixed_batches(found, shares, window, size, 5, first), 4) == parts[first:]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(corpora, st.data(), st.integers(1, 12))
def test_every_corpus_has_epochs_of_its_own(found: list[list[int]], data: st.DataObject, size: int) -> None:
    shares = data.draw(st.lists(st.integers(1, 9), min_size=len(found), max_size=len(found)))
    places = [place for batch in take(mixed_batches(found, shares, 2, size, 5), 40) for place in batch]
    groups = itertools.count()
    for corpus in found:
        numbers = dict(zip(groups, corpus, strict=False)) if corpus else {}
        groups = itertools.count(max(numbers) + 1)
        epochs: dict[int, Counter[tuple[int, int]]] = {}
        for epoch, group, row in places:
            if group in numbers:
                epochs.setdefault(epoch, Counter())[group, row] += 1
        expected = Counter((group, row) for group, rows in numbers.items() for row in range(rows))
        assert sorted(epochs) == list(range(len(epochs)))
        assert all(epochs[epoch] == expected for epoch in list(epochs)[:-1])
        assert all(rows <= expected for rows in epochs.values())


def test_all_ranks_see_the_same_mixture() -> None:
    """1 in 4 of 100 batches of 32 rows: 200 rows of each rank, with a deviation of 12."""
    parts = take(mixed_batches([[50], [50, 50]], (1, 3), 2, 32, 0), 100)
    assert [sum(group == 0 for _, group, _ in batch) for batch in parts] == [8] * 100
    for rank in range(WORLD):
        found = sum(group == 0 for batch in parts for _, group, _ in batch[rank::WORLD])
        assert 140 < found < 260


def test_the_order_of_a_mixture_depends_on_the_seed() -> None:
    found = [[40], [40]]
    parts = [take(mixed_batches(found, (1, 1), 2, 8, seed), 10) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    # Corpora of equal sizes do not come in step: else both would have the same rows in every batch.
    steps = [{row for _, group, row in batch if group == 0} for batch in parts[0]]
    others = [{row for _, group, row in batch if group == 1} for batch in parts[0]]
    assert steps != others
    assert sum(map(len, map(set.intersection, steps, others))) < 20  # of 40


def test_batches_of_a_mixture(shards: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Two corpora 1 : 3, of 23 and of 6 rows, from the middle on and from the files."""
    write_shard(tmp_path / "small.parquet", range(100, 106), group=3)
    data = config(shards, tmp_path / "small.parquet", weights=(1, 3), batch_size=8)
    stream, rows = training_batches(data, tokenizer, SIZE, 0, 3)
    assert rows == ROWS + 6
    found = list(itertools.islice(stream, 6))
    small = {image_id(jpeg(i)) for i in range(100, 106)}
    for batch in found:
        assert sum(key in small for key in batch.image_ids.tolist()) == 6
    assert images(found).keys() > small
    assert all(images(found)[key] == 6 for key in small)  # an epoch of the small one is one batch
    assert all(map(same, found, read(tokenizer, data, 9)[3:]))
    for rank in range(2):
        halves = read(tokenizer, config(*map(Path, data.shards), weights=(1, 3), batch_size=4), 6, 3, rank, 2)
        for half, batch in zip(halves, found, strict=True):
            assert set(half.image_ids.tolist()) <= set(batch.image_ids.tolist())


def test_an_epoch_of_a_corpus_augments_anew(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Also where the same file is named twice: each entry has its own epochs, rows and chance."""
    write_shard(tmp_path / "a.parquet", range(3))
    place = tmp_path / "a.parquet"
    found = read(tokenizer, config(place, place, weights=(1, 1), batch_size=6), 3)
    pixels = [image for batch in found for image in batch.pixels]
    assert set(images(found).values()) == {6}
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(pixels, 2))


def test_a_small_corpus_keeps_its_groups_in_memory(
    shards: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many groups of the other one come between two of its rows."""
    write_shard(tmp_path / "small.parquet", range(100, 108), group=8)
    data = config(shards, tmp_path / "small.parquet", weights=(9, 1), batch_size=10, window=1)
    opened: Counter[str] = Counter()

    def counted(group: Group, columns: Columns) -> list[Row]:
        opened["small" if group.path.name == "small.parquet" else "large"] += 1
        return read_group(group, columns)

    monkeypatch.setattr(pipelines_data, "read_group", counted)
    read(tokenizer, data, 8)
    assert opened["small"] == 1
    assert opened["large"] > 8


# Weights that cannot be


@pytest.mark.parametrize("weight", [0, -1.5, nan, inf])
def test_a_weight_out_of_range_is_an_error(tmp_path: Path, weight: float) -> None:
    with pytest.raises(ValueError, match=rf"weights\[1\] is {weight}; a weight must be finite and above 0"):
        config(tmp_path, tmp_path, weights=(1.0, weight))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_weights_is_an_error(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"weights has {count} numbers and shards has 2 entries"):
        config(tmp_path, tmp_path, weights=(1.0,) * count)


def test_weights_are_read_from_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("shards: [a, b]\nweights: [1, 2.5]\n")
    assert load_config(DataConfig, path).weights == (1, 2.5)
    with pytest.raises(ValueError, match="weights has 2 numbers and shards has 1 entries"):
        load_config(DataConfig, path, ["shards=[a]"])


def test_a_corpus_without_rows_is_an_error(shards: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """In one stream it may be empty; a share of nothing cannot be given."""
    write_shard(tmp_path / "none.parquet", range(0))
    read(tokenizer, config(shards, tmp_path), 1)
    with pytest.raises(ValueError, match=rf"{tmp_path}: no rows"):
        read(tokenizer, config(shards, tmp_path, weights=(1, 1)), 1)
