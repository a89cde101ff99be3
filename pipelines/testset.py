"""Held-out images with their captions or questions, from shards; and what is written beside a result.

`pipelines.ingest` and `pipelines.ingest_vqa` make such shards, one row an image, in the order of the
annotations. Beside them lie ingest.json, which tells what they lack, and for NoCaps the domains of images.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from blip.checkpoint import digest
from blip.image import ImageError, decode, image_transform
from blip.weights_files import locate
from capfilt.parquet import open_parquet
from capfilt.schema import ShardError, short_reason
from capfilt.shards import input_fingerprint
from pipelines.annotations import DOMAINS
from pipelines.data import files_in, is_clean
from pipelines.image_shards import OBJECTIONS
from pipelines.log import told
from pipelines.questions import Question, is_vqa, read_question
from pipelines.turns import batched, own_turns

THREADS = 8  # they decode; Pillow does so without holding Python's lock
READ_ROWS = 64
MOST_QUESTIONS = 8  # about an image at a time; Visual Genome has a hundred about some
MOST_NAMES = 8  # shown in an error


class Stored(Protocol):
    """An image as it is stored, and its name."""

    @property
    def key(self) -> str: ...

    @property
    def data(self) -> bytes: ...


I = TypeVar("I", bound=Stored)  # noqa: E741 - an image


@dataclass(frozen=True)
class TestImage:
    """An image as it is stored, and its captions in the order of the annotations."""

    __test__ = False  # pytest: this is no test

    key: str
    data: bytes
    texts: tuple[str, ...]


@dataclass(frozen=True)
class AskedImage:
    """An image as it is stored, and questions about it, at most MOST_QUESTIONS."""

    key: str
    data: bytes
    questions: tuple[Question, ...]


def read_testset(
    shards: Sequence[str], limit: int | None = None, with_images: bool = True
) -> Iterator[TestImage]:
    """Every row of clean shards, or the first `limit`. ValueError for other shards or a double key.

    Without images, which are most of what there is to read, `data` is empty.
    """
    rows = _rows(shards, "captions", is_clean, "clean shard", "make shards", with_images)
    for row in islice(rows, limit):
        texts = tuple(caption["text"] for caption in row["captions"] or [] if caption["text"])
        yield TestImage(row["key"], _bytes(row), texts)


def read_questions(shards: Sequence[str], limit: int | None = None) -> Iterator[AskedImage]:
    """As `read_testset`, of shards of questions; an image with many questions comes several times."""
    for row in islice(_rows(shards, "questions", is_vqa, "shard of questions", "make vqa-shards"), limit):
        found = [read_question(question) for question in row["questions"] or []]
        for start in range(0, len(found), MOST_QUESTIONS):
            yield AskedImage(row["key"], _bytes(row), tuple(found[start : start + MOST_QUESTIONS]))


def files(shards: Sequence[str]) -> list[Path]:
    """The parquet files of folders and files, by name. Errors: ValueError where there is none."""
    found = []
    for place in map(Path, shards):
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder; shards must name clean shards (make shards)")
        found += files_in(place) if place.is_dir() else [place]
    return found


def refuse_gaps(shards: Sequence[str], subset: bool) -> int:
    """How many annotated images folders of shards lack, since their files were missing or broken.

    Errors: ValueError that lists them, unless a `subset` was asked for: what is left is another test set.
    """
    reports = [_beside(place, "ingest.json") for place in shards]
    dropped = [image for report in reports for image in report.get("dropped", ())]
    lost = [image["key"] for image in dropped if image["reason"] not in OBJECTIONS]
    if lost and not subset:
        raise ValueError(
            f"{', '.join(shards)}: lacks {len(lost)} of the annotated images ({some(lost)}), and scores of a "
            "part are not those of the whole; put the files there and run make shards again, or set "
            "subset=true"
        )
    return len(lost)


def domains_of(shards: Sequence[str]) -> dict[str, str]:
    """Key -> domain of the images of folders of shards, where the annotations told them (NoCaps)."""
    return {key: domain for place in shards for key, domain in _beside(place, DOMAINS).items()}


def _beside(place: str, name: str) -> dict[str, Any]:
    """A JSON object in a folder of shards, empty where there is none."""
    path = Path(place) / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({short_reason(error)}); run make shards again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; run make shards again")
    return found


def _rows(
    shards: Sequence[str],
    column: str,
    fits: Callable[[Any], bool],
    kind: str,
    maker: str,
    with_images: bool = True,
) -> Iterator[dict[str, Any]]:
    """Rows {key, image, `column`} of files whose columns fit."""
    columns = ["key", *(["image"] if with_images else []), column]
    seen: set[str] = set()
    for path in files(shards):
        with open_parquet(path) as file:
            if not fits(file.schema_arrow) or "key" not in file.schema_arrow.names:
                raise ShardError(f"{path}: is no {kind} {{key, image, {column}}}; `{maker}` writes them")
            for rows in file.iter_batches(READ_ROWS, columns=columns):
                for row in rows.to_pylist():
                    if row["key"] in seen:
                        raise ShardError(
                            f"{path}: the key {row['key']} came before; a test image counts once"
                        )
                    seen.add(row["key"])
                    yield row


def _bytes(row: dict[str, Any]) -> bytes:
    return (row.get("image") or {}).get("bytes") or b""


def batches_of_pixels(
    images: Iterable[I],
    image_size: int,
    batch_size: int,
    device: torch.device,
    transform: Callable[[Any, int], Tensor] = image_transform,
) -> Iterator[tuple[list[I], Tensor]]:
    """(B images, their pixels [B, 3, S, S]) in order.

    Of several processes each gets whole batches in turn, see `pipelines.turns`, and reads the names of all.
    What takes long tells how far it is. Errors: ValueError that names an image which cannot be decoded: a
    test set is whole, or another one.
    """
    batches = own_turns(batched(images, batch_size))
    decoded = _decoded(batches, image_size, transform)
    on_device = ((chosen, pixels.to(device)) for chosen, pixels in decoded)
    return told(on_device, "images", size=lambda batch: len(batch[0]))


def _decoded(
    batches: Iterator[list[I]], image_size: int, transform: Callable[[Any, int], Tensor]
) -> Iterator[tuple[list[I], Tensor]]:
    """Images and pixels of a batch; the next one is decoded while it is in use."""

    def pixels(image: I) -> Tensor:
        try:
            return transform(decode(image.data), image_size)
        except ImageError as error:
            raise ValueError(
                f"test image {image.key} cannot be decoded ({error}); make its shard again"
            ) from error

    with ThreadPoolExecutor(THREADS) as pool:
        waiting: tuple[list[I], list[Tensor]] | None = None
        while True:
            chosen: list[I] = next(batches, [])
            decoded = pool.map(pixels, chosen)
            if waiting:
                yield waiting[0], torch.stack(waiting[1])
            if not chosen:
                return
            waiting = chosen, list(decoded)


def provenance(model: str, shards: Sequence[str]) -> dict[str, object]:
    """What a result holds for: the digest of the weights, the fingerprint of the test set."""
    return {
        "weights": {"source": model, "sha256": digest(locate(model))},
        "data": {"shards": list(shards), "fingerprint": fingerprint(shards)},
    }


def fingerprint(shards: Sequence[str]) -> str:
    """Of a test set: sha256 of the fingerprints of its files."""
    return hashlib.sha256("".join(map(input_fingerprint, files(shards))).encode()).hexdigest()


def some(names: Sequence[str]) -> str:
    """The first of some names, for an error."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def refuse_doubles(what: str, names: Sequence[str]) -> None:
    """ValueError that lists every name that comes more than once; `what` opens it."""
    if doubles := [f"{name!r} {count} times" for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{what} {some(doubles)}; each must be there once")


def server_id(key: str) -> int | str:
    """As evaluation servers ask for it: COCO's ids are numbers."""
    return int(key) if key.isascii() and key.isdigit() and str(int(key)) == key else key
