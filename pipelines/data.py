"""Image-text shards -> training batches, in an order that is a pure function of (seed, files).

Any number of data workers gives the same batches; a run resumes at any batch. Both kinds of parquet are read: clean
shards ({key, image, captions}) and raw ones (img2dataset, Hugging Face, ...).

The order: row groups are permuted over the epoch, `window` of them at a time are shuffled together, and batch k is
the rows [k * B, (k + 1) * B) of that endless stream. Nothing but row groups of the window is in memory.
"""

import hashlib
import random
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from blip.image import Augmentation, ImageError, decode, train_transform
from blip.model import Batch
from blip.tokenizer import Tokenizer, clean_caption
from capfilt.schema import CLEAN, Columns, check_schema, map_columns

Row = tuple[str, bytes | None, list[str]]  # key, image bytes, texts


@dataclass(frozen=True)
class DataConfig:
    shards: tuple[str, ...]  # folders or parquet files
    batch_size: int = 64
    prompt: str = ""  # what a captioner's texts begin with and LM does not learn, e.g. "a picture of "
    max_words: int = 30
    max_length: int = 40  # tokens
    window: int = 32  # row groups shuffled together
    workers: int = 2  # data worker processes; 0 reads in the training process
    columns: Columns = field(default_factory=Columns)  # of raw shards, where they cannot be told from their names
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.window < 1 or self.workers < 0:
            raise ValueError(
                f"batch_size {self.batch_size} and window {self.window} must be at least 1, workers {self.workers} 0"
            )


@dataclass(frozen=True)
class Group:
    """A row group of a parquet file."""

    path: Path
    index: int
    rows: int


def find_groups(shards: tuple[str, ...]) -> list[Group]:
    """Every row group of the files, in the order of their names. Raises ValueError where there is none."""
    groups = []
    for place in map(Path, shards):
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder; data.shards must name parquet shards")
        files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
        if not files:
            raise ValueError(f"{place}: holds no .parquet file; data.shards must name parquet shards")
        for path in files:
            try:
                footer = pq.read_metadata(path)
            except Exception as error:
                raise ValueError(f"{path}: not a readable parquet file ({error}); remove or rewrite it") from error
            counts = (footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            groups += [Group(path, i, count) for i, count in enumerate(counts) if count]
    if not groups:
        raise ValueError(f"{', '.join(shards)}: no rows")
    return groups


Place = tuple[int, int, int]  # epoch, group, row in the group


class Order:
    """The endless stream of rows, cut into batches; `order.batches(k)` starts at batch k."""

    def __init__(self, sizes: list[int], batch_size: int, window: int, seed: int):
        self.sizes, self.batch_size, self.window, self.seed = sizes, batch_size, window, seed
        self.rows = sum(sizes)

    def batches(self, first: int) -> Iterator[list[Place]]:
        epoch, skip = divmod(first * self.batch_size, self.rows)
        batch: list[Place] = []
        while True:
            for place in self._epoch(epoch, skip):
                batch.append(place)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[Place]:
        groups = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes))
        for start in range(0, len(groups), self.window):
            chosen = groups[start : start + self.window]
            ends = list(accumulate(self.sizes[g] for g in chosen))
            if skip >= ends[-1]:
                skip -= ends[-1]
                continue
            order = np.random.default_rng((self.seed, epoch, start)).permutation(ends[-1])
            for position in order[skip:].tolist():
                slot = bisect_right(ends, position)
                yield epoch, int(chosen[slot]), position - (ends[slot - 1] if slot else 0)
            skip = 0


class ShardRows(Dataset[Batch]):
    """A list of places -> a `Batch`: read, decode, augment, tokenise. Runs in the data workers."""

    def __init__(self, config: DataConfig, groups: list[Group], tokenizer: Tokenizer, image_size: int, seed: int):
        self.config, self.groups, self.tokenizer = config, groups, tokenizer
        self.image_size, self.seed = image_size, seed
        self.cache: OrderedDict[int, list[Row]] = OrderedDict()  # group -> rows, at most a window of them

    def __getitem__(self, places: list[Place]) -> Batch:
        found = [example for place in places if (example := self._example(place))]
        if not found:
            where = self.groups[places[0][1]].path
            raise ValueError(f"{where}: none of a batch's {len(places)} rows has both a readable image and a text")
        pixels, texts, ids = zip(*found, strict=True)
        tokens, mask = self.tokenizer(texts, self.config.max_length)
        prompt_length = len(self.tokenizer.prompt(self.config.prompt)) - 1
        return Batch(torch.stack(pixels), tokens, mask, torch.tensor(ids), prompt_length)

    def _example(self, place: Place) -> tuple[torch.Tensor, str, int] | None:
        """One row as (pixels, text, image id); None where image or text is unusable. Chance comes from the place."""
        epoch, group, row = place
        key, data, texts = self._rows(group)[row]
        rng = random.Random(f"{self.seed} {epoch} {group} {row}")
        try:
            image = decode(data)
        except ImageError:
            return None
        if not texts:
            return None
        pixels = train_transform(image, self.image_size, self.config.augmentation, rng)
        text = self.config.prompt + clean_caption(rng.choice(texts), self.config.max_words)
        return pixels, text, image_id(key)

    def _rows(self, group: int) -> list[Row]:
        if group not in self.cache:
            if len(self.cache) >= self.config.window:
                self.cache.popitem(last=False)
            self.cache[group] = read_group(self.groups[group], self.config.columns)
        self.cache.move_to_end(group)
        return self.cache[group]


def read_group(group: Group, columns: Columns) -> list[Row]:
    """The rows of a row group as (key, image bytes, texts); rows without image or text have None or []."""
    with pq.ParquetFile(group.path) as file:
        schema = file.schema_arrow
        if "captions" in schema.names:
            check_schema(schema, group.path)
            table = file.read_row_group(group.index, columns=CLEAN.names)
            rows = zip(table["key"].to_pylist(), table["image"].to_pylist(), table["captions"].to_pylist(), strict=True)
            return [(key, (image or {}).get("bytes"), [c["text"] for c in captions or []]) for key, image, captions in rows]
        names = map_columns(schema, columns, group.path)
        wanted = [name for name in (names.key, names.image, names.text) if name]
        table = file.read_row_group(group.index, columns=wanted)
    images = table[names.image].to_pylist()
    images = [image.get("bytes") if isinstance(image, dict) else image for image in images]
    texts = table[names.text].to_pylist() if names.text else [None] * len(images)
    keys = table[names.key].to_pylist() if names.key else [f"{group.path.stem}-{group.index}-{i}" for i in range(len(images))]
    return [(str(key), image, [text] if text else []) for key, image, text in zip(keys, images, texts, strict=True)]


def image_id(key: str) -> int:
    """A stable 63-bit id of an image: texts of one key are never each other's negatives."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1


def training_batches(
    config: DataConfig, tokenizer: Tokenizer, image_size: int, seed: int, first: int = 0
) -> tuple[Iterator[Batch], int]:
    """Batches from number `first` on, for ever, and the number of rows in an epoch."""
    groups = find_groups(config.shards)
    order = Order([group.rows for group in groups], config.batch_size, config.window, seed)
    loader = DataLoader(
        ShardRows(config, groups, tokenizer, image_size, seed),
        sampler=order.batches(first),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        multiprocessing_context="forkserver" if config.workers else None,  # fork would copy torch's threads
    )
    return iter(loader), order.rows
