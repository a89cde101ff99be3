"""Held-out images with their captions, from clean shards; and what is written beside a result.

`pipelines.ingest` makes such shards of COCO, Flickr30k, NoCaps and others, one row an image, in the order of
the annotations.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from blip.checkpoint import digest
from blip.image import ImageError, decode, image_transform
from blip.weights_files import locate
from capfilt.parquet import open_parquet
from capfilt.schema import ShardError
from capfilt.shards import input_fingerprint
from pipelines.data import files_in, is_clean

THREADS = 8  # they decode; Pillow does so without holding Python's lock
READ_ROWS = 64


@dataclass(frozen=True)
class TestImage:
    """An image as it is stored, and its captions in the order of the annotations."""

    __test__ = False  # pytest: this is no test

    key: str
    data: bytes
    texts: tuple[str, ...]


def read_testset(shards: Sequence[str], limit: int | None = None) -> Iterator[TestImage]:
    """Every row of clean shards, or the first `limit`. ValueError for other shards or a double key."""
    return islice(_read(files(shards)), limit)


def files(shards: Sequence[str]) -> list[Path]:
    """The parquet files of folders and files, by name. Errors: ValueError where there is none."""
    found = []
    for place in map(Path, shards):
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder; shards must name clean shards (make shards)")
        found += files_in(place) if place.is_dir() else [place]
    return found


def _read(paths: Iterable[Path]) -> Iterator[TestImage]:
    seen: set[str] = set()
    for path in paths:
        with open_parquet(path) as file:
            if not is_clean(file.schema_arrow) or "key" not in file.schema_arrow.names:
                raise ShardError(
                    f"{path}: is no clean shard {{key, image, captions}}; `make shards` writes them"
                )
            for rows in file.iter_batches(READ_ROWS, columns=["key", "image", "captions"]):
                for row in rows.to_pylist():
                    if row["key"] in seen:
                        raise ShardError(
                            f"{path}: the key {row['key']} came before; a test image counts once"
                        )
                    seen.add(row["key"])
                    texts = tuple(caption["text"] for caption in row["captions"] or [] if caption["text"])
                    data = (row["image"] or {}).get("bytes") or b""
                    yield TestImage(row["key"], data, texts)


def batches_of_pixels(
    images: Iterable[TestImage], image_size: int, batch_size: int, device: torch.device
) -> Iterator[tuple[list[TestImage], Tensor]]:
    """(B images, their pixels [B, 3, S, S]) in order; the next batch is decoded while one is in use.

    Errors: ValueError that names an image which cannot be decoded: a test set is whole, or another one.
    """

    def pixels(image: TestImage) -> Tensor:
        try:
            return image_transform(decode(image.data), image_size)
        except ImageError as error:
            raise ValueError(
                f"test image {image.key} cannot be decoded ({error}); make its shard again"
            ) from error

    source = iter(images)
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: tuple[list[TestImage], list[Tensor]] | None = None
        while True:
            chosen = list(islice(source, batch_size))
            decoded = pool.map(pixels, chosen)
            if waiting:
                yield waiting[0], torch.stack(waiting[1]).to(device)
            if not chosen:
                return
            waiting = chosen, list(decoded)


def provenance(model: str, shards: Sequence[str]) -> dict[str, object]:
    """What a result holds for: the digest of the weights, the fingerprint of the test set."""
    prints = hashlib.sha256("".join(map(input_fingerprint, files(shards))).encode()).hexdigest()
    return {
        "weights": {"source": model, "sha256": digest(locate(model))},
        "data": {"shards": list(shards), "fingerprint": prints},
    }
