"""Write down what a frozen vision encoder makes of images, for training to read and not to compute again.

OUT gets one folder for the encoder, the transform, the image size and the precision, named after them; see
pipelines.features. Training takes the tokens with data.features=OUT and without augmentation, as every epoch
must see the same pixels. Stopped, the same command goes on with the shard that was being written.
"""

import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blip.distributed import rank, world_size
from blip.vision import EVA_VIT_G, VisionConfig, VisionEncoder
from capfilt.hold import hold
from capfilt.schema import Columns
from capfilt.shards import Split, done_path, mark_done, replacing, sweep_temporary, write_json_atomically
from pipelines.config import parse_args, run_main, save_config
from pipelines.data import Group, Recent, Row, find_groups, image_id, load, read_group
from pipelines.features import (
    KIND_FILE,
    NO_IMAGE,
    WHOLE,
    Kind,
    has_tokens,
    kind_of,
    pixels_of,
    records,
    records_path,
    shard_of,
)
from pipelines.order import Place
from pipelines.parallel import DTYPE, Precision, processes, wait_for_all
from qformer.frozen import Frozen
from qformer.weights_vision import EVA_SOURCE, read_vision, take_tower

GB = 1e9


@dataclass(frozen=True)
class FeaturesRun:
    out: str
    shards: tuple[str, ...]  # as data.shards of the training
    vision: VisionConfig | None = None  # as model.vision of the training; null: EVA's ViT-g
    source: str = EVA_SOURCE  # its weights, as init.vision of the training
    precision: Precision = "bf16"  # as train.precision of the training
    columns: Columns = field(default_factory=Columns)
    batch_size: int = 64
    workers: int = 2  # data worker processes; 0 reads in this process
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size}, workers {self.workers}; it must be at least 1, and 0"
            )


@dataclass(frozen=True)
class Shard:
    """A file whose rows get tokens; its groups in their order, by their numbers among those of all files."""

    split: Split
    groups: dict[int, Group]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups.values())

    def batches(self, size: int) -> Iterator[list[Place]]:
        rows = iter((0, number, row) for number, group in self.groups.items() for row in range(group.rows))
        while batch := list(islice(rows, size)):
            yield batch


class Images(Dataset[tuple[Tensor, list[int]]]):
    """Places -> pixels [B, 3, S, S] and image ids [B], NO_IMAGE and zeros where a row cannot be decoded."""

    def __init__(self, groups: Sequence[Group], columns: Columns, image_size: int):
        self.groups, self.columns, self.image_size = groups, columns, image_size
        self.recent: Recent[Row] = Recent(2)  # a batch may end in the next group

    def __getitem__(self, places: list[Place]) -> tuple[Tensor, list[int]]:
        size = self.image_size
        pixels, ids = torch.zeros(len(places), 3, size, size), [NO_IMAGE] * len(places)
        for i, (_, number, row) in enumerate(places):
            read = partial(read_group, self.groups[number], self.columns)
            data, _ = self.recent.rows(number, read)[row]
            seen = pixels_of(data, size, WHOLE, random.Random(0)) if data else None
            if data and seen is not None:
                pixels[i], ids[i] = seen, image_id(data)
        return pixels, ids


def load_vision(config: VisionConfig, source: str) -> Frozen[VisionEncoder]:
    """The frozen encoder of `source`, see `read_vision`, at the image size of `config`."""
    with torch.device("meta"):
        vision = Frozen(VisionEncoder(config))
    take_tower(vision, read_vision(source), config, source)
    return vision


def find_shards(groups: Sequence[Group]) -> list[Shard]:
    """The files of the groups; of files of equal content one."""
    of_file: dict[Path, dict[int, Group]] = {}
    for number, group in enumerate(groups):
        if group not in of_file.setdefault(group.path, {}).values():  # a file may be named twice
            of_file[group.path][number] = group
    found = {(split := shard_of(path)).id: Shard(split, own) for path, own in of_file.items()}
    return list(found.values())


def check_room(folder: Path, kind: Kind, shards: Sequence[Shard], waiting: Sequence[Shard]) -> None:
    """Say what will be written. Raises ValueError where the disk has no room for it."""
    rows, left = (sum(shard.rows for shard in part) for part in (shards, waiting))
    need, free = left * kind.record.itemsize, shutil.disk_usage(folder).free
    each = f"{kind.tokens} x {kind.width} x 2 bytes"
    told = f"tokens of {left} rows need {need / GB:.2f} GB ({each} a row), free are {free / GB:.2f} GB"
    if need > free:
        raise ValueError(f"{folder}: {told}; choose an out on a larger disk, or fewer shards")
    if rank() == 0:
        print(f"{folder}\n{rows} rows in {len(shards)} shards, {len(shards) - len(waiting)} of them are done")
        print(f"{told}", flush=True)


def write_shard(folder: Path, kind: Kind, shard: Shard, parts: Iterator[tuple[Tensor, list[int]]]) -> int:
    """Write the tokens of a shard, a batch of them and of their images' ids at a time, and mark it as done.

    How many rows have none.
    """
    path, written, none = records_path(folder, shard.split), 0, 0
    done_path(folder, shard.split.id).unlink(missing_ok=True)  # of a file that is gone or cut off
    descr = np.lib.format.dtype_to_descr(kind.record)
    with replacing(path) as file:
        header = {"descr": descr, "fortran_order": False, "shape": (shard.rows,)}
        np.lib.format.write_array_header_1_0(file, header)
        while written < shard.rows:
            tokens, ids = next(parts)
            try:
                file.write(records(kind, tokens, ids).tobytes())
            except ValueError as error:
                where = f"{shard.split.path}, rows {written} to {written + len(ids) - 1}"
                raise ValueError(f"{where}: {error}") from error
            written, none = written + len(ids), none + ids.count(NO_IMAGE)
    counts = {"rows": written, "without_image": none}
    mark_done(folder, shard.split, {"kind": kind.name}, counts, [path])
    return none


@torch.inference_mode()
def write_features(run: FeaturesRun, device: torch.device) -> Path:
    """Write what is not yet written of the tokens; their folder. With several processes each takes shards."""
    config = run.vision or EVA_VIT_G
    vision = load_vision(config, run.source).to(device, DTYPE[run.precision])
    kind = kind_of(vision, config)
    folder = Path(run.out) / kind.name
    folder.mkdir(parents=True, exist_ok=True)
    groups = find_groups(run.shards, run.columns)
    shards = find_shards(groups)
    waiting = [shard for shard in shards if not has_tokens(folder, shard.split, kind)]
    check_room(folder, kind, shards, waiting)
    if rank() == 0:
        sweep_temporary(folder)
        save_config(run, folder)
        write_json_atomically(folder / KIND_FILE, asdict(kind))
    wait_for_all()

    mine = waiting[rank() :: world_size()]
    places = (batch for shard in mine for batch in shard.batches(run.batch_size))
    images = load(Images(groups, run.columns, kind.image_size), places, run.workers, 0, 1)
    parts = ((vision(pixels.to(device)), ids) for pixels, ids in images)
    for number, shard in enumerate(mine, start=1):
        begun = time.perf_counter()
        none = write_shard(folder, kind, shard, parts)
        rate = shard.rows / (time.perf_counter() - begun)
        what = f"{shard.rows} rows, {none} without an image, {rate:.1f} a second"
        print(f"{shard.split.path.name}: {what}; {number} of {len(mine)}", flush=True)
    wait_for_all()
    return folder


def main(argv: list[str]) -> int:
    run = parse_args(argv, FeaturesRun)
    with processes(run.device) as device, hold(run.out) if rank() == 0 else nullcontext():
        folder = write_features(run, device)
        if rank() == 0:
            print(f"for training: data.features={folder}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
