"""Images from strangers -> tensors: safe decoding, the train and the eval transform, the one mean and std.

The only file of the models that knows Pillow.
"""

import io
import math
import random
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch import Tensor

# CLIP's statistics, used by BLIP and BLIP-2 alike (salesforce/BLIP data/__init__.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # GIF: the first frame. Every other parser of Pillow stays shut
MAX_PIXELS = 25_000_000  # open_clip's gate, checked on the header before anything is decoded
MAX_SIDE = 16_384
FILL = (128, 128, 128)


class ImageFault(StrEnum):
    """Why bytes are not an image we can use."""

    NO_IMAGE = "no_image"
    DECODE_ERROR = "decode_error"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"


class ImageError(ValueError):
    """Bytes that are not a usable image; `fault` says why in one word, the message in a sentence."""

    def __init__(self, fault: ImageFault, message: str):
        super().__init__(message)
        self.fault = fault


def decode(data: bytes | None, min_side: int = 1) -> Image.Image:
    """Bytes -> RGB image. Transparent pixels become white. A truncated file is an error, never half an image.

    Raises ImageError. Sizes are checked on the header, before a pixel is decoded.
    """
    if not data:
        raise ImageError(ImageFault.NO_IMAGE, "no image bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            limit = f"at most {MAX_PIXELS} pixels and {MAX_SIDE} a side"
            raise ImageError(ImageFault.TOO_LARGE, f"image is {width} x {height}; {limit} are allowed")
        if min(width, height) < min_side:
            raise ImageError(ImageFault.TOO_SMALL, f"image is {width} x {height}; a side needs {min_side}")
        return _to_rgb(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(ImageFault.TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:  # its own message holds an address, which differs from run to run
        message = f"the bytes are no image of the kinds {', '.join(FORMATS)}"
        raise ImageError(ImageFault.DECODE_ERROR, message) from error
    except Exception as error:  # Pillow's parsers raise nearly every type on hostile bytes
        raise ImageError(ImageFault.DECODE_ERROR, f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def thumbnail(image: Image.Image, side: int, quality: int = 75) -> bytes:
    """A JPEG of an RGB image whose longer side has at most `side` pixels. It carries pixels and nothing else.

    Comments, which Pillow would copy along, colour profiles and places stay behind.
    """
    small = image.copy()
    small.info = {}
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def image_transform(image: Image.Image, size: int) -> Tensor:
    """The eval transform: square bicubic resize, no crop. -> [3, size, size], normalised."""
    return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def crop_transform(image: Image.Image, size: int) -> Tensor:
    """CLIP's eval transform: the short side to `size`, bicubic, and the middle square (openai/CLIP)."""
    width, height = (max(size, size * side // min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    return _to_tensor(whole.crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class Augmentation:
    """The training transform. Defaults are BLIP's for pre-training; fine-tuning uses min_scale 0.5."""

    min_scale: float = 0.2  # smallest share of the area a crop keeps
    flip: bool = True  # left and right; turn it off where captions speak of sides
    randaugment: bool = True  # two of ten operations, magnitude 5, each with probability 1/2

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale is {self.min_scale}; it must be in (0, 1]")


def train_transform(image: Image.Image, size: int, augmentation: Augmentation, rng: random.Random) -> Tensor:
    """Random resized crop, flip, RandAugment -> [3, size, size]. All chance comes from `rng`."""
    box = random_crop(image.width, image.height, augmentation.min_scale, rng)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if augmentation.flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if augmentation.randaugment:
        image = rand_augment(image, rng)
    return _to_tensor(image)


def random_crop(width: int, height: int, min_scale: float, rng: random.Random) -> tuple[int, int, int, int]:
    """The box of torchvision's RandomResizedCrop: area in [min_scale, 1], aspect in [3/4, 4/3].

    Where ten draws do not fit, the largest box in the middle whose aspect is allowed. A min_scale of 1 crops
    nothing, whatever the aspect.
    """
    if min_scale == 1:
        return 0, 0, width, height
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """BLIP's RandomAugment(N=2, M=5): salesforce/BLIP transform/randaugment.py.

    At this magnitude its Brightness and Sharpness have factor 1.0, no change; they are kept as draws.
    """
    operations = ("identity", "autocontrast", "equalize", "brightness", "sharpness",
                  "shear_x", "shear_y", "translate_x", "translate_y", "rotate")  # fmt: skip
    for name in rng.choices(operations, k=2):
        if rng.random() < 0.5:
            sign = rng.choice((-1, 1))
            image = _operate(image, name, sign)
    return image


def _operate(image: Image.Image, name: str, sign: int) -> Image.Image:
    shear, shift, angle = 0.15 * sign, 5 * sign, 15 * sign
    matrices = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
    }
    if name in matrices:
        return image.transform(
            image.size, Image.Transform.AFFINE, matrices[name], Image.Resampling.BILINEAR, fillcolor=FILL
        )
    match name:
        case "rotate":
            return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=FILL)
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(1.0)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(1.0)
        case _:
            return image


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
