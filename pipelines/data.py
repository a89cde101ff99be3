"""Image-text shards -> training batches, in an order that is a pure function of (seed, files).

Any number of data workers gives the same batches; a run resumes at any batch. Read are clean parquet shards
({key, image, captions}), raw ones (img2dataset, Hugging Face, ...) and webdataset tars.

The order is that of `pipelines.order`, over groups of rows: row groups of parquet, a hundred neighbouring
samples of a tar. With W processes the batch k of all is cut from that order and process r takes every W-th
row of it. Nothing but groups of the window is in memory. A row whose image or text cannot be used leaves its
batch one row shorter and moves no other row.
"""

import hashlib
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.types as kind
import torch
from torch.utils.data import DataLoader, Dataset

from blip.image import Augmentation
from blip.model import Batch
from blip.tokenizer import Tokenizer, clean_caption
from capfilt.parquet import as_records, open_parquet, read_parquet, read_row_group
from capfilt.schema import Columns, map_columns
from capfilt.shards import SUFFIXES
from capfilt.tar import TarPart, index_tar, read_part
from pipelines.contrasts import Contrasts, check, contrast
from pipelines.features import WHOLE, Features, open_features, pixels_of
from pipelines.order import Order, Place, batches, mixed_batches

T = TypeVar("T")
Row = tuple[bytes | None, list[str]]  # image, texts


@dataclass(frozen=True)
class DataConfig:
    shards: tuple[str, ...]  # folders, parquet files or tars
    weights: tuple[float, ...] | None = None  # of each entry of shards; null: one stream of all their rows
    batch_size: int = 64  # of one process
    prompt: str = ""  # what a captioner's texts begin with and LM does not learn, e.g. "a picture of"
    texts_per_image: int = 1  # drawn at each step; a captioner learns several at the cost of one image
    max_words: int = 30
    max_length: int = 40  # tokens
    window: int = 32  # groups of rows shuffled together, of each entry of shards where they have weights
    workers: int = 2  # data worker processes; 0 reads in the training process
    columns: Columns = field(
        default_factory=Columns
    )  # of raw shards; null: found by the names of known producers
    augmentation: Augmentation = field(default_factory=Augmentation)
    contrasts: Contrasts = ()  # sets of words that exclude each other, for ITM: see pipelines.contrasts
    features: str | None = None  # read the tokens of a frozen encoder that pipelines.cache_features kept here

    def __post_init__(self) -> None:
        check(self.contrasts)
        least = {
            "batch_size": 1,
            "texts_per_image": 1,
            "max_words": 1,
            "max_length": 3,
            "window": 1,
            "workers": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if self.features is not None and self.augmentation != WHOLE:
            raise ValueError(
                f"features {self.features} are tokens of whole images, but augmentation draws others "
                f"in every epoch ({self.augmentation}); set augmentation to {{min_scale: 1.0, flip: false, "
                "randaugment: false}, or leave features out"
            )
        if self.weights is None:
            return
        if len(self.weights) != len(self.shards):
            raise ValueError(
                f"weights has {len(self.weights)} numbers and shards has {len(self.shards)} entries; give "
                "one weight for each, or leave weights out"
            )
        for i, weight in enumerate(self.weights):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weights[{i}] is {weight}; a weight must be finite and above 0")


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file."""

    path: Path
    index: int
    first: int  # number of its first row in the file
    rows: int


Group = RowGroup | TarPart  # rows that are read together


def find_groups(shards: tuple[str, ...], columns: Columns) -> list[Group]:
    """Every group of the files, in the order of their names, which start with neither '.' nor '_'.

    A folder may hold both kinds of files; a parquet beside a tar of the same stem is left out, as it is
    img2dataset's metadata. Of tars all headers are read here. Raises ValueError for a file that cannot be
    read, lacks a column or is cut off, and where there is no row at all: now, and not in a data worker hours
    later.
    """
    groups: list[Group] = []
    for place in map(Path, shards):
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder; data.shards must name parquet or tar shards")
        for path in files_in(place) if place.is_dir() else [place]:
            groups += index_tar(path, columns) if path.suffix == ".tar" else _row_groups(path, columns)
    if not groups:
        raise ValueError(f"{', '.join(shards)}: no rows; data.shards must name shards with rows")
    return groups


def files_in(folder: Path) -> list[Path]:
    files = {path for path in folder.iterdir() if path.suffix in SUFFIXES and path.name[0] not in "._"}
    if not files:
        raise ValueError(
            f"{folder}: holds no .parquet file and no .tar file; data.shards must name parquet or tar shards"
        )
    return sorted(files - {path.with_suffix(".parquet") for path in files if path.suffix == ".tar"})


def _row_groups(path: Path, columns: Columns) -> list[RowGroup]:
    with open_parquet(path) as file:
        if not is_clean(file.schema_arrow):
            map_columns(file.schema_arrow, columns, path)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    firsts = accumulate(counts, initial=0)
    return [
        RowGroup(path, i, first, rows)
        for i, (first, rows) in enumerate(zip(firsts, counts, strict=False))
        if rows
    ]


def is_clean(schema: pa.Schema) -> bool:
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


@dataclass
class Recent(Generic[T]):
    """The rows of the groups that were asked for last, of at most `size` groups."""

    size: int
    groups: OrderedDict[int, list[T]] = field(default_factory=OrderedDict)

    def rows(self, number: int, read: Callable[[], list[T]]) -> list[T]:
        """The rows of group `number`, which `read` fetches where they are not here."""
        if number not in self.groups:
            if len(self.groups) >= self.size:
                self.groups.popitem(last=False)
            self.groups[number] = read()
        self.groups.move_to_end(number)
        return self.groups[number]


@dataclass(frozen=True)
class Example:
    """A row of a batch."""

    pixels: torch.Tensor  # [3, S, S], or kept tokens [N, D]
    texts: list[str]  # cleaned up, `texts_per_image` of them
    wrong: str | None  # the first of them made wrong, see pipelines.contrasts
    image_id: int
    chance: float  # its own in this epoch, uniform in [0, 1)


Collate = Callable[[list[Example]], T]  # also what runs in the data workers: words become tensors here


@dataclass(frozen=True)
class MedBatch:
    """Examples -> a `Batch` of a MED or of the Q-Former's stage 1."""

    config: DataConfig
    tokenizer: Tokenizer

    def __call__(self, found: list[Example]) -> Batch:
        texts = [self._begin(text) for example in found for text in example.texts]
        tokens, mask = self.tokenizer(texts, self.config.max_length)
        prompt_length = len(self.tokenizer.prompt(self.config.prompt)) - 1
        ids = torch.tensor([example.image_id for example in found])
        batch = Batch(torch.stack([example.pixels for example in found]), tokens, mask, ids, prompt_length)
        if not self.config.contrasts:
            return batch
        wrong = [example.wrong for example in found]
        made = ["" if text is None else self._begin(text) for text in wrong]
        tokens, mask = self.tokenizer(made, self.config.max_length)
        mask = mask * torch.tensor([[text is not None] for text in wrong])
        return replace(batch, wrong_ids=tokens, wrong_mask=mask)

    def _begin(self, text: str) -> str:
        return f"{self.config.prompt} {text}"


class ShardRows(Dataset[T]):
    """A list of places -> a batch: read, decode, augment, collate. Runs in the data workers."""

    def __init__(
        self,
        config: DataConfig,
        corpora: list[list[Group]],
        collate: Collate[T],
        image_size: int,
        seed: int,
        features: Features | None = None,
    ):
        self.features = features
        self.config, self.collate, self.image_size, self.seed = config, collate, image_size, seed
        self.groups = [(group, corpus) for corpus, groups in enumerate(corpora) for group in groups]
        # One for each corpus, or the groups that a large one has done with would push out those that a small
        # one still reads.
        self.recent: list[Recent[Row]] = [Recent(config.window) for _ in corpora]

    def __getitem__(self, places: list[Place]) -> T:
        found = [example for place in places if (example := self._example(place))]
        if not found:
            where = self.groups[places[0][1]][0].path
            raise ValueError(
                f"{where}: a batch of {len(places)} rows begins here, and none of them has both a readable "
                "image and a text; check the shards, or raise data.batch_size"
            )
        return self.collate(found)

    def _example(self, place: Place) -> Example | None:
        """One row, None where it cannot be used. Its chance is the place's."""
        epoch, group, row = place
        data, texts = self._rows(group)[row]
        cleaned = [text for text in (clean_caption(text, self.config.max_words) for text in texts) if text]
        if not data or not cleaned:
            return None
        rng = random.Random(f"{self.seed} {epoch} {group} {row}")
        if self.features is not None:  # which draw nothing, nor do whole images
            file, _ = self.groups[group]
            pixels = self.features.read(file.path, file.first + row, image_id(data))
        else:
            pixels = pixels_of(data, self.image_size, self.config.augmentation, rng)
        if pixels is None:
            return None
        chosen = _draw(cleaned, self.config.texts_per_image, rng)
        wrong = contrast(chosen[0], self.config.contrasts, rng)
        return Example(pixels, chosen, wrong, image_id(data), rng.random())

    def _rows(self, number: int) -> list[Row]:
        group, corpus = self.groups[number]
        return self.recent[corpus].rows(number, partial(read_group, group, self.config.columns))


def _draw(texts: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` of the texts, none again before all came."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(texts, min(len(texts), count - len(drawn)))
    return drawn


def read_group(group: Group, columns: Columns) -> list[Row]:
    """The rows of a group as (image bytes, texts); rows without image or text have None or [].

    Raises ShardError, which names the file, when a page is damaged.
    """
    if isinstance(group, TarPart):
        return [(row.image, [row.text] if row.text else []) for row in read_part(group, columns)]
    with open_parquet(group.path) as file:
        if is_clean(file.schema_arrow):
            table = read_row_group(file, group.path, group.index, ["image", "captions"])
            return [_clean_row(r["image"] or {}, r["captions"] or []) for r in as_records(table, group.path)]
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
    config: DataConfig,
    tokenizer: Tokenizer,
    image_size: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
) -> tuple[Iterator[Batch], int]:
    """`collated_batches` for a MED or for the Q-Former's stage 1."""
    return collated_batches(config, MedBatch(config, tokenizer), image_size, seed, first, rank, world)


def collated_batches(
    config: DataConfig,
    collate: Collate[T],
    image_size: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
) -> tuple[Iterator[T], int]:
    """Batches of process `rank` out of `world`, from number `first` on, for ever; and the rows of an epoch.

    Batch k of all processes together is `config.batch_size * world` rows, of which each process takes every
    `world`-th. A batch is shorter than `config.batch_size` by the rows that could not be used. With weights
    every entry of `config.shards` has epochs of its own, in which each of its rows comes once; the rows of an
    epoch are then the sum of the rows of all entries, after which a heavy one has come more than once and a
    light one only in part.
    """
    entries = [config.shards] if config.weights is None else [(entry,) for entry in config.shards]
    corpora = [find_groups(entry, config.columns) for entry in entries]
    places = _places(config, corpora, config.batch_size * world, seed, first)
    files = list(dict.fromkeys(group.path for groups in corpora for group in groups))
    features = open_features(config.features, files) if config.features is not None else None
    rows = ShardRows(config, corpora, collate, image_size, seed, features)
    stream = load(rows, places, config.workers, rank, world)
    return stream, sum(group.rows for groups in corpora for group in groups)


def load(
    dataset: Dataset[T], places: Iterator[list[Place]], workers: int, rank: int, world: int
) -> Iterator[T]:
    """The batches of `dataset` at `places`, of which this process takes every `world`-th; in their order."""
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; of {world} processes it must be from 0 to {world - 1}")
    loader = DataLoader(
        dataset,
        sampler=(batch[rank::world] for batch in places),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        # fork would copy torch's threads; workers of a forkserver outlive a killed run.
        multiprocessing_context="spawn" if workers else None,
        # By default a loader draws from torch's global numbers, and a resumed run would go on with others.
        generator=torch.Generator(),
    )
    return iter(loader)


def _places(
    config: DataConfig, corpora: list[list[Group]], size: int, seed: int, first: int
) -> Iterator[list[Place]]:
    sizes = [[group.rows for group in groups] for groups in corpora]
    if config.weights is None:
        return batches(Order(sizes[0], config.window, seed), size, first)
    return mixed_batches(sizes, config.weights, config.window, size, seed, first)
