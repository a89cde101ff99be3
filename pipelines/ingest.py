"""Image files and their captions -> clean shards, for training and evaluation. No model.

`images` is the folder that image paths start from. The captions come from one of
  karpathy: {file, splits}            dataset_coco.json, dataset_flickr30k.json
  blip_list: {file}                   BLIP's coco_karpathy_train.json, flickr30k_test.json, ...
  coco: {file}                        captions_val2014.json, nocaps_val_4500_captions.json
  table: {file, image, caption, key, quotes}    TSV or CSV with a header
  none of these                       the .txt beside every image below `images`, one caption a line
OUT holds 00000.parquet, ... with one row per image ({key, image, captions}, in the order of the annotations;
the key is their image id), _done/ and, once all is written, ingest.json: the counts, and every image that was
dropped, with the reason. A finished shard is not written again, unless files that it lacks have appeared.
Where a coco file tells the domains of its images, as NoCaps' does, domains.json holds them by key.
Exit code 3: finished, but some image files are missing or broken.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfilt.schema import CLEAN
from capfilt.shards import write_json_atomically
from pipelines.annotations import (
    DOMAINS,
    Annotation,
    BlipList,
    Coco,
    Karpathy,
    Table,
    read_blip_list,
    read_coco,
    read_domains,
    read_folder,
    read_karpathy,
    read_table,
)
from pipelines.config import parse_args, run_main
from pipelines.image_shards import Kind, Summary, finish, is_usable, write_shards


@dataclass(frozen=True)
class IngestRun:
    images: str  # the folder that image paths start from
    out: str
    karpathy: Karpathy | None = None
    blip_list: BlipList | None = None
    coco: Coco | None = None
    table: Table | None = None
    require_captions: bool = True  # false: an image without captions is a row with none
    rows_per_shard: int = 1000

    def __post_init__(self) -> None:
        formats = ("karpathy", "blip_list", "coco", "table")
        given = [name for name in formats if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are all given; one run reads one kind of annotations")
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {self.rows_per_shard}; it must be at least 1")

    @property
    def source(self) -> str:
        """The annotation file, or the folder where captions lie beside the images."""
        section = self.karpathy or self.blip_list or self.coco or self.table
        return section.file if section else self.images


def annotations_of(run: IngestRun) -> Iterator[Annotation[str]]:
    if run.karpathy:
        return read_karpathy(run.karpathy.file, run.karpathy.splits)
    if run.blip_list:
        return read_blip_list(run.blip_list.file)
    if run.coco:
        return read_coco(run.coco.file)
    if run.table:
        return read_table(run.table)
    return read_folder(Path(run.images))


def ingest(run: IngestRun) -> Summary:
    """As `write_shards`. White space around captions goes."""
    none = "no_caption" if run.require_captions else ""
    summary = write_shards(run, annotations_of(run), Kind("captions", none, CLEAN, _usable, _record))
    if run.coco and (domains := read_domains(run.coco.file)):
        write_json_atomically(Path(run.out) / DOMAINS, domains)
    return summary


def _usable(text: str) -> str | None:
    return text.strip() if is_usable(text.strip()) else None


def _record(text: str) -> dict[str, Any]:
    return {"text": text, "source": "human", "itm": None}


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = parse_args(argv, IngestRun)
    return finish(ingest(run), run.out)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
