"""Image-text shards -> training batches, in an order that is a pure function of (seed, files).

Any number of data workers gives the same batches; a run resumes at any batch. Both kinds of parquet are read:
clean shards ({key, image, captions}) and raw ones (img2dataset, Hugging Face, ...).

The order: row groups are permuted over the epoch, `window` of them at a time are shuffled together, and
batch k is the rows [k * B, (k + 1) * B) of that endless stream. Nothing but row groups of the window is in
memory. A row whose image or text cannot be used leaves its batch one row shorter and moves no other row.
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
import pyarrow as pa
import pyarrow.types as kind
import torch
from torch.utils.data import DataLoader, Dataset

from blip.image import Augmentation, ImageError, decode, train_transform
from blip.model import Batch
from blip.tokenizer import Tokenizer, clean_caption
from capfilt.parquet import open_parquet, read_parquet
from capfilt.schema import Columns, ShardError, map_columns, short_reason

Row = tuple[bytes | None, list[str]]  # image, texts


@dataclass(frozen=True)
class DataConfig:
    shards: tuple[str, ...]  # folders or parquet files
    batch_size: int = 64
    prompt: str = ""  # what a captioner's texts begin with and LM does not learn, e.g. "a picture of"
    max_words: int = 30
    max_length: int = 40  # tokens
    window: int = 32  # row groups shuffled together
    workers: int = 2  # data worker processes; 0 reads in the training process
    columns: Columns = field(
        default_factory=Columns
    )  # of raw shards; null: found by the names of known producers
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "max_words": 1, "max_length": 3, "window": 1, "workers": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")


@dataclass(frozen=True)
class Group:
    """A row group of a parquet file."""

    path: Path
    index: int
    first: int  # number of its first row in the file
    rows: int


def find_groups(shards: tuple[str, ...], columns: Columns) -> list[Group]:
    """Every row group of the files, in the order of their names, which start with neither '.' nor '_'.

    Raises ValueError for a file that cannot be read or lacks a column, and where there is no row at all: now,
    and not in a data worker hours later.
    """
    groups: list[Group] = []
    for place in map(Path, shards):
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder; data.shards must name parquet shards")
        inside = sorted(path for path in place.glob("*.parquet") if path.name[0] not in "._")
        if place.is_dir() and not inside:
            raise ValueError(f"{place}: holds no .parquet file; data.shards must name parquet shards")
        for path in inside if place.is_dir() else [place]:
            groups += _groups_of(path, columns)
    if not groups:
        raise ValueError(f"{', '.join(shards)}: no rows; data.shards must name parquet shards with rows")
    return groups


def _groups_of(path: Path, columns: Columns) -> list[Group]:
    with open_parquet(path) as file:
        if not _is_clean(file.schema_arrow):
            map_columns(file.schema_arrow, columns, path)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    firsts = accumulate(counts, initial=0)
    return [
        Group(path, i, first, rows)
        for i, (first, rows) in enumerate(zip(firsts, counts, strict=False))
        if rows
    ]


def _is_clean(schema: pa.Schema) -> bool:
    """Whether these are the columns of `capfilt.schema.CLEAN`, as far as they are read here."""
    types = {field.name: field.type for field in schema}
    if not {"image", "captions"} <= types.keys():
        return False
    image, captions = types["image"], types["captions"]
    return bool(
        kind.is_struct(image)
        and image.get_field_index("bytes") >= 0
        and kind.is_list(captions)
        and kind.is_struct(captions.value_type)
        and captions.value_type.get_field_index("text") >= 0
    )


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

    def __init__(
        self, config: DataConfig, groups: list[Group], tokenizer: Tokenizer, image_size: int, seed: int
    ):
        self.config, self.groups, self.tokenizer = config, groups, tokenizer
        self.image_size, self.seed = image_size, seed
        self.cache: OrderedDict[int, list[Row]] = OrderedDict()  # group -> rows, at most a window of them

    def __getitem__(self, places: list[Place]) -> Batch:
        found = [example for place in places if (example := self._example(place))]
        if not found:
            where = self.groups[places[0][1]].path
            raise ValueError(
                f"{where}: a batch of {len(places)} rows begins here, and none of them has both a readable "
                "image and a text; check the shards, or raise data.batch_size"
            )
        pixels, texts, ids = zip(*found, strict=True)
        tokens, mask = self.tokenizer(texts, self.config.max_length)
        prompt_length = len(self.tokenizer.prompt(self.config.prompt)) - 1
        return Batch(torch.stack(pixels), tokens, mask, torch.tensor(ids), prompt_length)

    def _example(self, place: Place) -> tuple[torch.Tensor, str, int] | None:
        """One row as (pixels, text, image id), None where one cannot be used; its chance is the place's."""
        epoch, group, row = place
        data, texts = self._rows(group)[row]
        cleaned = [text for text in (clean_caption(text, self.config.max_words) for text in texts) if text]
        if not data or not cleaned:
            return None
        try:
            image = decode(data)
        except ImageError:
            return None
        rng = random.Random(f"{self.seed} {epoch} {group} {row}")
        pixels = train_transform(image, self.image_size, self.config.augmentation, rng)
        return pixels, f"{self.config.prompt} {rng.choice(cleaned)}", image_id(data)

    def _rows(self, group: int) -> list[Row]:
        if group not in self.cache:
            if len(self.cache) >= self.config.window:
                self.cache.popitem(last=False)
            self.cache[group] = read_group(self.groups[group], self.config.columns)
        self.cache.move_to_end(group)
        return self.cache[group]


def read_group(group: Group, columns: Columns) -> list[Row]:
    """The rows of a row group as (image bytes, texts); rows without image or text have None or [].

    Raises ShardError, which names the file, when a page is damaged.
    """
    with open_parquet(group.path) as file:
        if _is_clean(file.schema_arrow):
            try:
                records = file.read_row_group(group.index, columns=["image", "captions"]).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                what = f"row group {group.index} cannot be read ({short_reason(error)})"
                raise ShardError(f"{group.path}: {what}; copy or write the file again") from error
            return [_clean_row(record["image"] or {}, record["captions"] or []) for record in records]
    _, _, chunks = read_parquet(group.path, columns, start=group.first, stop=group.first + group.rows)
    return [(row.image, [row.text] if row.text else []) for chunk in chunks for row in chunk.rows]


def _clean_row(image: dict[str, bytes | None], captions: list[dict[str, str | None] | None]) -> Row:
    texts = (caption["text"] for caption in captions if caption)
    return image.get("bytes"), [text for text in texts if text]


def image_id(data: bytes) -> int:
    """A stable 63-bit id of an image: texts of the same bytes are never each other's negatives.

    Of the bytes and not of the key: keys such as 000000012 occur in every set, and the same image under many.
    """
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) >> 1


def training_batches(
    config: DataConfig, tokenizer: Tokenizer, image_size: int, seed: int, first: int = 0
) -> tuple[Iterator[Batch], int]:
    """Batches from number `first` on, for ever, and the number of rows in an epoch."""
    groups = find_groups(config.shards, config.columns)
    order = Order([group.rows for group in groups], config.batch_size, config.window, seed)
    loader = DataLoader(
        ShardRows(config, groups, tokenizer, image_size, seed),
        sampler=order.batches(first),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        # fork would copy torch's threads; workers of a forkserver outlive a killed run.
        multiprocessing_context="spawn" if config.workers else None,
        # By default a loader draws from torch's global numbers, and a resumed run would go on with others.
        generator=torch.Generator(),
    )
    return iter(loader), order.rows
