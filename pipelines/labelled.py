"""Images with classes, from a folder for each class or from parquet with a label column; lists of classes.

A list of classes is a text file, a class a line: its name, or its label, a tab and its name
("n01440764<TAB>tench"). A folder is named by the label. A label column holds labels, or the numbers of the
lines from 0 on, as Hugging Face datasets do.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from capfilt.parquet import open_parquet
from capfilt.schema import ShardError, short_reason
from capfilt.shards import input_fingerprint
from pipelines.annotations import read_folder
from pipelines.data import files_in
from pipelines.testset import READ_ROWS, refuse_doubles, some


@dataclass(frozen=True)
class Class:
    label: str  # of the folder or in the column
    name: str  # in prompts


@dataclass(frozen=True)
class LabelColumns:
    """Of parquet files."""

    image: str = "image"  # bytes, or a struct with bytes; "img" in CIFAR of Hugging Face
    label: str = "label"


@dataclass(frozen=True)
class ImageSet:
    images: str  # a folder with a folder for each class; or a parquet file, or a folder of them
    labels: str | None = None  # a file with the labels of this set, as of ImageNet-R; null: all classes


@dataclass(frozen=True)
class LabelledImage:
    """An image as it is stored, and what is said of its class; `data` is empty where only that was read."""

    key: str
    label: str | int | None
    data: bytes


@dataclass(frozen=True)
class FolderImage:
    """An image of a folder, which is opened where its bytes are asked for: in one of several processes."""

    key: str
    label: str | None
    path: Path

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()


def read_lines(path: str) -> list[str]:
    """The lines that hold something. Errors: ValueError where there is none, or a line comes twice."""
    try:
        lines = [line.strip(" ") for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({short_reason(error)})") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{path}: is empty; it must hold a class, a label or a template a line")
    refuse_doubles(f"{path} lists", lines)
    return lines


def read_classes(path: str) -> list[Class]:
    """Errors: ValueError where there is none, or where labels or names come twice, naming all of them."""
    parts = [line.partition("\t") for line in read_lines(path)]
    classes = [Class(label.strip(), (name if tab else label).strip()) for label, tab, name in parts]
    refuse_doubles(f"{path} lists", [one.label for one in classes])
    refuse_doubles(f"{path} lists", [one.name for one in classes])
    if empty := [one.label or one.name for one in classes if not one.label or not one.name]:
        raise ValueError(
            f"{path}: {some(empty)} lacks a name or a label; a line is a name, or label, tab, name"
        )
    return classes


def read_templates(path: str) -> list[str]:
    """Errors: ValueError for lines without one {}, where the name of a class goes."""
    templates = read_lines(path)
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"{path}: {some([repr(one) for one in wrong])} must hold {{}} once, for the class")
    return templates


def class_numbers(name: str, given: ImageSet, classes: Sequence[Class], columns: LabelColumns) -> list[int]:
    """The class of every image of a set, without reading images, in the order of `read_images`.

    Errors: ValueError that lists the images without a class and the classes without an image.
    """
    numbers = {one.label: number for number, one in enumerate(classes)}
    wanted = list(numbers) if given.labels is None else read_lines(given.labels)
    if strange := [label for label in wanted if label not in numbers]:
        raise ValueError(f"{given.labels}: {some(strange)} are not among the classes")
    allowed = {label: numbers[label] for label in wanted}
    found: list[int] = []
    lost: list[str] = []
    for image in read_images(given, columns, with_data=False):
        label = image.label
        if isinstance(label, int) and 0 <= label < len(classes):
            label = classes[label].label
        if label in allowed:
            found.append(allowed[str(label)])
        else:
            lost.append(image.key if label is None else f"{image.key} ({label})")
    seen = set(found)
    empty = [label for label, number in allowed.items() if number not in seen]
    kinds = {"images without a class of the list": lost, "classes without an image": empty}
    if wrong := "; ".join(f"{what}: {some(names)}" for what, names in kinds.items() if names):
        raise ValueError(f"set {name}, {given.images}: {wrong}. Mend the list of classes or the set")
    return found


def read_images(
    given: ImageSet, columns: LabelColumns, with_data: bool = True
) -> Iterator[LabelledImage | FolderImage]:
    """Every image of a set, in the order of names or rows. Errors: ValueError where there is none."""
    place = Path(given.images)
    if files := _parquet_files(place):
        for path in files:
            yield from _of_parquet(path, columns, with_data)
        return
    for one in read_folder(place):
        parts = PurePosixPath(one.image).parts
        label = parts[0] if len(parts) > 1 else None
        yield FolderImage(one.image, label, place / one.image)


def fingerprint(given: ImageSet) -> str:
    """Changes when a parquet file does, or the name, class or size of an image in a folder."""
    place = Path(given.images)
    if files := _parquet_files(place):
        parts = [input_fingerprint(path) for path in files]
    else:
        parts = [f"{one.image} {(place / one.image).stat().st_size}\n" for one in read_folder(place)]
    return hashlib.sha256("".join(parts).encode(errors="surrogateescape")).hexdigest()


def _parquet_files(place: Path) -> list[Path]:
    """None where the set is a folder of folders. Errors: ValueError where there is no such place."""
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder; it must hold images in folders, or parquet files")
    if place.is_file():
        return [place]
    return files_in(place) if any(place.glob("*.parquet")) else []


def _of_parquet(path: Path, columns: LabelColumns, with_data: bool) -> Iterator[LabelledImage]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if absent := [name for name in (columns.image, columns.label) if name not in names]:
            raise ShardError(
                f"{path}: has no column {' and '.join(map(repr, absent))}, only "
                f"{', '.join(map(repr, names))}; set columns.image and columns.label"
            )
        wanted = [columns.label, *([columns.image] if with_data else [])]
        row = 0
        for batch in file.iter_batches(READ_ROWS, columns=wanted):
            for record in batch.to_pylist():
                image = record.get(columns.image)
                data = image.get("bytes") if isinstance(image, dict) else image
                yield LabelledImage(f"{path.name} row {row}", record[columns.label], data or b"")
                row += 1
