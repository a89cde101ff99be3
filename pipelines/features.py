"""Tokens of a frozen vision encoder, kept on disk: what they are, how they lie there, how they are read.

`pipelines.cache_features` writes them, and training reads them in place of images. PLACE holds one folder for
every encoder, transform, image size and dtype, named after them:

    <encoder>-<transform>-<S>px-<dtype>/
        kind.json           what the tokens are of
        <shard>.npy         one record for each row of the shard, in their order
        _done/<shard>.json  the shard has its tokens if and only if this is there

Shards are known by name and content: one in another folder keeps its tokens, one that changed has none. A
record says of which image it is, and has a checksum: wrong and damaged tokens are found when they are read.

Shapes: B images, S pixels, N tokens of width D.
"""

import base64
import hashlib
import json
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip.image import Augmentation, ImageError, decode, train_transform
from blip.vision import VisionConfig, VisionEncoder
from capfilt.schema import ShardError, short_reason
from capfilt.shards import Split, input_fingerprint, is_done
from qformer.frozen import Frozen

KIND_FILE = "kind.json"
NO_IMAGE = -1  # the image id of a row that cannot be decoded, and has no tokens
WHOLE = Augmentation(min_scale=1.0, flip=False, randaugment=False)  # what every epoch sees alike
KEPT_AS = {torch.float32: torch.float16, torch.bfloat16: torch.bfloat16}  # the latter as it is, bit for bit
MAX_STEM = 100  # characters of a shard's name that its file keeps
HASH = 12  # hexadecimal digits of a sha256 in a name

# 5 x 3 pixels, some of them transparent, as a PNG: what a transform makes of them tells transforms apart.
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAUAAAADCAYAAABbNsX4AAAASklEQVR42gE/AMD/AEQggv/95vF4azD5/8fdAXiIdTQAAA8LDf/Dbtj/"
    "ceD9/7B2cHiUC9X/AF+XPQDYYZsA/8kReHzO1P+7vyx4JQIhospKKY0AAAAASUVORK5CYII="
)


@dataclass(frozen=True)
class Kind:
    """What decides the tokens of an image, and their shape."""

    encoder: str  # sha256 of its weights, and of what they do not tell
    transform: str  # sha256 of what it makes of a picture
    image_size: int  # S
    dtype: str  # float16 of an encoder in fp32, bfloat16 of one in bf16
    tokens: int  # N
    width: int  # D

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"{self.encoder[:HASH]}-{self.transform[:HASH]}-{self.image_size}px-{self.dtype}"

    @property
    def record(self) -> np.dtype[np.void]:
        """A row. Two bytes a number, whatever the dtype: numpy has no bfloat16."""
        return np.dtype([("image", "<i8"), ("crc", "<u4"), ("tokens", "<i2", (self.tokens, self.width))])


def kind_of(vision: Frozen[VisionEncoder], config: VisionConfig) -> Kind:
    """The kind of the tokens that `vision` makes as it is now, in its dtype."""
    told = [getattr(config, name) for name in ("heads", "eps", "final_norm", "pre_norm", "quick_gelu")]
    encoder = hashlib.sha256(bytes(vision.digest().tolist()) + json.dumps(told).encode())
    pixels = pixels_of(PICTURE, config.image_size, WHOLE, random.Random(0))
    assert pixels is not None, "the picture cannot be decoded"
    transform = hashlib.sha256(pixels.numpy().tobytes())
    dtype = str(KEPT_AS[vision.dtype]).removeprefix("torch.")
    sizes = config.image_size, dtype, config.tokens, config.width
    return Kind(encoder.hexdigest(), transform.hexdigest(), *sizes)


def pixels_of(data: bytes, size: int, augmentation: Augmentation, rng: random.Random) -> Tensor | None:
    """[3, size, size] of an image as training sees it, None where it cannot be decoded."""
    try:
        return train_transform(decode(data), size, augmentation, rng)
    except ImageError:
        return None


def shard_of(path: Path) -> Split:
    """A shard by its name and content, whatever folder it is in."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:MAX_STEM]
    return Split(f"{stem}-{input_fingerprint(path)[:HASH]}", path)


def records_path(folder: Path, shard: Split) -> Path:
    return folder / f"{shard.id}.npy"


def has_tokens(folder: Path, shard: Split, kind: Kind) -> bool:
    """Whether the tokens of all rows of the shard are there, as far as the size of their file tells."""
    return is_done(folder, shard, {"kind": kind.name})


# ---- write -----------------------------------------------------------------------------------------


def records(kind: Kind, tokens: Tensor, images: Sequence[int]) -> np.ndarray:
    """Records [B] of tokens [B, N, D] and of the ids of their images, which are NO_IMAGE where there is none.

    Raises ValueError where the dtype of the kind cannot hold them.
    """
    kept = tokens.to("cpu", getattr(torch, kind.dtype))
    if not kept.isfinite().all():
        raise ValueError(
            f"tokens reach {float(tokens.abs().max()):.4g}, which {kind.dtype} cannot hold; use precision: "
            "bf16, or look for weights that are not finite"
        )
    found = np.zeros(len(images), kind.record)
    found["image"] = images
    found["tokens"] = kept.view(torch.int16).numpy()
    found["tokens"][found["image"] == NO_IMAGE] = 0
    found["crc"] = [zlib.crc32(row.tobytes()) for row in found["tokens"]]
    return found


# ---- read ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """The tokens of every row of some shards. Small: it goes to the data workers."""

    folder: Path
    kind: Kind
    shards: Mapping[Path, Split]

    def read(self, shard: Path, row: int, image: int) -> Tensor | None:
        """Tokens [N, D] of a row that shows `image`, None where it could not be decoded.

        Raises ShardError where the record is of another image, or damaged.
        """
        path = records_path(self.folder, self.shards[shard])
        again = "delete it, and make features writes it anew"
        try:
            record = np.load(path, mmap_mode="r")[row]
        except (OSError, ValueError, IndexError) as error:
            raise ShardError(f"{path}: row {row} cannot be read ({short_reason(error)}); {again}") from error
        tokens = record["tokens"].copy()
        if zlib.crc32(tokens) != record["crc"]:
            raise ShardError(f"{path}: the tokens of row {row} are damaged; {again}")
        if record["image"] == NO_IMAGE:
            return None
        if record["image"] != image:
            raise ShardError(f"{path}: row {row} is of another image than row {row} of {shard}; {again}")
        return torch.from_numpy(tokens).view(getattr(torch, self.kind.dtype))


def open_features(place: str, shards: Sequence[Path]) -> Features:
    """What `place` keeps of these shards. Raises ValueError where it lacks one of them or a part of one."""
    folder, kind = find_kind(place)
    found = {path: shard_of(path) for path in shards}
    lacking = [path for path, shard in found.items() if not has_tokens(folder, shard, kind)]
    if lacking:
        raise ValueError(
            f"{folder}: {len(lacking)} of {len(found)} shards have no tokens here, or no longer all of them, "
            f"the first is {lacking[0]}; run make features with these shards, which adds what is missing"
        )
    return Features(folder, kind, found)


def find_kind(place: str) -> tuple[Path, Kind]:
    """The folder of tokens that `place` is, or the only one that it holds. Raises ValueError."""
    root = Path(place)
    marks = [root / KIND_FILE] if (root / KIND_FILE).exists() else sorted(root.glob(f"*/{KIND_FILE}"))
    if len(marks) != 1:
        held = ", ".join(mark.parent.name for mark in marks)
        advice = f"name one of those that it holds: {held}" if marks else "write them with make features"
        raise ValueError(f"{place}: data.features must be a folder of kept tokens; {advice}")
    try:
        return marks[0].parent, Kind(**json.loads(marks[0].read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{marks[0]}: cannot be read ({short_reason(error)}); write it again") from error


def check_kind(place: str | None, vision: torch.nn.Module, config: VisionConfig) -> None:
    """Raises ValueError where the tokens of `place` are not those of `vision` as it is now."""
    if place is None:
        return
    if not isinstance(vision, Frozen):
        raise ValueError(
            f"{place}: kept tokens are those of a frozen encoder, but this run trains its own; leave "
            "data.features out"
        )
    folder, kept = find_kind(place)
    had, has = asdict(kept), asdict(kind_of(vision, config))
    changed = "; ".join(f"{k} was {_short(had[k])}, is {_short(has[k])}" for k in had if had[k] != has[k])
    if changed:
        raise ValueError(
            f"{folder}: keeps tokens of another kind than this run needs ({changed}); write those with make "
            "features, or leave data.features out"
        )


def _short(value: object) -> str:
    return str(value)[:HASH]
