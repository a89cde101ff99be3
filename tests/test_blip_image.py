"""Bytes of strangers, and the two transforms against torchvision and plain arithmetic."""

import io
import math
import random
import statistics
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from blip.image import (
    Augmentation,
    ImageError,
    ImageFault,
    decode,
    image_transform,
    rand_augment,
    random_crop,
    thumbnail,
    train_transform,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds a few bytes."""
    parts = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        parts += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return parts


def fault(data: bytes | None, min_side: int = 1) -> ImageFault:
    with pytest.raises(ImageError) as error:
        decode(data, min_side)
    assert str(error.value)
    return error.value.fault


# Decoding


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "GIF"])
def test_the_four_kinds_are_decoded(kind: str) -> None:
    image = smooth(24, 16)
    found = decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (found.mode, found.size) == ("RGB", (24, 16))
    exact = kind in ("PNG", "WEBP")
    assert np.abs(np.asarray(found, int) - np.asarray(image, int)).max() <= (0 if exact else 40)


@pytest.mark.parametrize("data", [b"", None])
def test_nothing_is_no_image(data: bytes | None) -> None:
    assert fault(data) is ImageFault.NO_IMAGE


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 500,
        b"<html><body>404 not found</body></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",  # runs Ghostscript
        b"SIMPLE  =                    T / FITS" + b" " * 2880,
        b"%PDF-1.4\n",
        encoded(noise(9, 9), "TIFF"),
        encoded(noise(9, 9), "BMP"),
        encoded(noise(9, 9), "PPM"),
        encoded(noise(9, 9), "ICO"),
        encoded(noise(9, 9), "TGA"),
    ],
    ids=["zeros", "html", "svg", "eps", "fits", "pdf", "tiff", "bmp", "ppm", "ico", "tga"],
)
def test_other_bytes_are_refused_whatever_they_are_called(data: bytes) -> None:
    assert fault(data) is ImageFault.DECODE_ERROR


def test_the_reason_is_the_same_in_every_run() -> None:
    """It becomes part of scored shards; Pillow's own text holds an address in memory."""
    messages = set()
    for _ in range(2):
        with pytest.raises(ImageError) as error:
            decode(b"no image at all")
        messages.add(str(error.value))
    assert messages == {"the bytes are no image of the kinds JPEG, PNG, WEBP, GIF"}


# Thumbnails


@pytest.mark.parametrize(
    ("size", "small"), [((900, 300), (100, 33)), ((30, 60), (30, 60)), ((5000, 1), (100, 1))]
)
def test_a_thumbnail_is_a_small_jpeg(size: tuple[int, int], small: tuple[int, int]) -> None:
    image = smooth(*size)
    found = decode(thumbnail(image, 100))
    assert (found.size, image.size) == (small, size)
    box = np.asarray(image.resize(small, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(found, int) - box).mean() < 8


def test_a_thumbnail_carries_nothing_but_pixels() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    data = encoded(noise(40, 40), "JPEG", exif=exif, comment=b"a secret note", icc_profile=b"a secret screen")
    assert data.count(b"secret") == 3
    assert b"secret" not in thumbnail(decode(data), 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_never_half_an_image(kind: str, share: float) -> None:
    data = encoded(noise(60, 60), kind)
    assert fault(data[: int(share * len(data))]) is ImageFault.DECODE_ERROR


@pytest.mark.parametrize(
    ("width", "height"),
    [(60_000, 60_000), (12_000, 12_000), (5_001, 5_000), (16_385, 1), (1, 16_385)],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    data = png_header(width, height)
    assert len(data) < 200
    assert fault(data) is ImageFault.TOO_LARGE


def test_a_side_must_have_so_many_pixels() -> None:
    data = encoded(noise(40, 20))
    assert decode(data, min_side=20).size == (40, 20)
    assert fault(data, min_side=21) is ImageFault.TOO_SMALL
    assert fault(encoded(noise(1, 1)), min_side=2) is ImageFault.TOO_SMALL


def test_one_pixel_is_an_image() -> None:
    image = decode(encoded(Image.new("RGB", (1, 1), (9, 8, 7))))
    assert (image.size, image.getpixel((0, 0))) == ((1, 1), (9, 8, 7))
    assert image_transform(image, 32).shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_a_moving_image_the_first_frame_counts(kind: str) -> None:
    red, green, blue = (Image.new("RGB", (8, 8), rgb) for rgb in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(red, kind, save_all=True, append_images=[green, blue], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert decode(data).getpixel((4, 4)) == (255, 0, 0)


def test_cmyk_becomes_rgb() -> None:
    for cmyk, rgb in (
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255,) * 3),
    ):
        found = decode(encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG"))
        assert np.abs(np.array(found.getpixel((8, 8))) - rgb).max() <= 3


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    found = np.asarray(decode(encoded(Image.fromarray(values))))
    for channel in range(3):
        assert np.abs(found[..., channel].astype(int) - values / 257).max() <= 1


def test_grey_and_two_levels_become_rgb() -> None:
    assert decode(encoded(Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_what_is_transparent_becomes_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (200, 100, 0, 0))
    rgba.putpixel((1, 1), (200, 100, 0, 255))
    rgba.putpixel((2, 2), (200, 100, 0, 51))  # a fifth of the colour, four fifths of white
    found = decode(encoded(rgba))
    assert [found.getpixel((i, i)) for i in range(3)] == [(255, 255, 255), (200, 100, 0), (244, 224, 204)]
    grey = Image.new("LA", (4, 4), (10, 0))
    assert decode(encoded(grey)).getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    for data in (encoded(image, transparency=0), encoded(image, "GIF", transparency=0)):
        found = decode(data)
        assert (found.getpixel((0, 0)), found.getpixel((1, 1))) == ((255, 255, 255), (200, 100, 50))
    assert decode(encoded(image)).getpixel((0, 0)) == (10, 20, 30)


SAMPLES = [encoded(noise(20, 20), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8))
def test_damaged_bytes_give_an_image_or_a_reason(data: bytes, changes: list[tuple[float, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    try:
        assert decode(bytes(damaged)).mode == "RGB"
    except ImageError as error:
        assert error.fault in tuple(ImageFault)


# The eval transform


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (17, 90), (1, 1)])
def test_the_eval_transform_is_blips(size: tuple[int, int]) -> None:
    """salesforce/BLIP data/__init__.py, in torchvision."""
    bicubic = transforms.InterpolationMode.BICUBIC
    blip = transforms.Compose(
        [
            transforms.Resize((64, 64), interpolation=bicubic),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    image = noise(*size)
    torch.testing.assert_close(image_transform(image, 64), blip(image), atol=1e-5, rtol=0)


def test_black_and_white_by_hand() -> None:
    for value in (0, 255):
        found = image_transform(Image.new("RGB", (5, 5), (value,) * 3), 8)
        for channel in range(3):
            expected = (value / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
            assert float((found[channel] - expected).abs().max()) < 1e-6


# The training transform

PLAIN = Augmentation(min_scale=1.0, flip=False, randaugment=False)


def test_chance_comes_from_the_given_numbers_alone() -> None:
    image = noise(70, 50)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = [train_transform(image, 32, Augmentation(), random.Random(seed)) for seed in range(6)]
    random.seed(6)
    again = [train_transform(image, 32, Augmentation(), random.Random(seed)) for seed in range(6)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
        assert one.shape == (3, 32, 32)
    assert len({one.numpy().tobytes() for one in first}) == 6
    random.seed(5)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_without_augmentation_it_is_the_eval_transform() -> None:
    image = noise(70, 50)
    assert torch.equal(train_transform(image, 32, PLAIN, random.Random(0)), image_transform(image, 32))


def test_half_of_the_images_are_flipped() -> None:
    image, rng = noise(16, 16), random.Random(0)
    flipping = Augmentation(min_scale=1.0, flip=True, randaugment=False)
    straight = image_transform(image, 16)
    flips = 0
    for _ in range(400):
        found = train_transform(image, 16, flipping, rng)
        is_flipped = torch.equal(found, straight.flip(2))
        assert is_flipped or torch.equal(found, straight)
        flips += is_flipped
    assert abs(flips - 200) < 5 * 10  # five standard deviations


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.1])
def test_a_scale_out_of_range_is_an_error(scale: float) -> None:
    with pytest.raises(ValueError, match="min_scale"):
        Augmentation(min_scale=scale)


@pytest.mark.parametrize("scale", [0.2, 0.5])
@pytest.mark.parametrize("size", [(300, 200), (90, 160)])
def test_crops_are_those_of_random_resized_crop(size: tuple[int, int], scale: float) -> None:
    """Within bounds, and area, aspect and place spread as torchvision's."""
    width, height = size
    rng, draws = random.Random(0), 3000
    torch.manual_seed(0)
    ours, theirs = [], []
    blank = Image.new("L", size)
    for _ in range(draws):
        left, top, right, bottom = random_crop(width, height, scale, rng)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        w, h = right - left, bottom - top
        assert scale * 0.97 <= w * h / (width * height) <= 1
        assert 0.75 * 0.97 <= w / h <= 4 / 3 * 1.03
        ours.append((w * h, math.log(w / h), left, top))
        t, le, hh, ww = transforms.RandomResizedCrop.get_params(blank, [scale, 1.0], [3 / 4, 4 / 3])
        theirs.append((ww * hh, math.log(ww / hh), le, t))
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        error = math.hypot(statistics.stdev(mine), statistics.stdev(other)) / math.sqrt(draws)
        assert abs(statistics.mean(mine) - statistics.mean(other)) < 5 * error
        assert statistics.stdev(mine) == pytest.approx(statistics.stdev(other), rel=0.1)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (5, 1), (1, 1)])
def test_where_no_crop_fits_it_is_torchvisions_middle(size: tuple[int, int]) -> None:
    top, left, height, width = transforms.RandomResizedCrop.get_params(
        Image.new("L", size), [0.95, 1.0], [3 / 4, 4 / 3]
    )
    assert random_crop(*size, 0.95, random.Random(0)) == (left, top, left + width, top + height)


def test_the_shifts_of_randaugment_are_five_pixels_on_grey() -> None:
    """Every one of the four shifts is seen, pixel by pixel as numpy shifts it."""
    image = noise(16, 16)
    expected = set()
    for axis in (0, 1):
        for shift in (-5, 5):
            moved = np.roll(np.asarray(image), shift, axis)
            uncovered = [slice(None)] * 2
            uncovered[axis] = slice(0, 5) if shift > 0 else slice(-5, None)
            moved[tuple(uncovered)] = 128
            expected.add(moved.tobytes())
    rng = random.Random(0)
    found = {rand_augment(image, rng).tobytes() for _ in range(400)}
    assert expected <= found


def test_randaugment_leaves_as_many_images_alone_as_chance_says() -> None:
    """Two draws of ten, each applied in half of the cases; three of the ten change nothing."""
    image = noise(16, 16).point(lambda value: 50 + value // 2)  # room for autocontrast to do something
    rng, draws, share = random.Random(0), 1500, (0.5 + 0.5 * 0.3) ** 2
    same = sum(rand_augment(image, rng).tobytes() == image.tobytes() for _ in range(draws))
    assert abs(same - share * draws) < 5 * math.sqrt(draws * share * (1 - share))


def test_randaugment_keeps_size_and_mode() -> None:
    rng = random.Random(1)
    for _ in range(100):
        found = rand_augment(noise(20, 20), rng)
        assert (found.size, found.mode) == ((20, 20), "RGB")
