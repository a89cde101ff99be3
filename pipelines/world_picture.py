"""Pictures of the generated world: shapes with colour, size and texture on a muted background, as JPEG."""

import io
import math

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw

from pipelines.world_text import Scene, SceneObject

SUPERSAMPLING = 3
RADIUS = {"small": 0.15, "large": 0.24}  # of the side
PITCH = {"small": 0.064, "large": 0.08}  # of stripes and dots, of the side
# Plain colour, and the second one of stripes and dots: far in brightness, never another colour's plain look.
# The plain ones keep JITTER away from 0 and 255.
RGB = {
    "red": ((220, 30, 35), (255, 165, 165)),
    "green": ((25, 150, 45), (165, 235, 165)),
    "blue": ((35, 70, 225), (165, 195, 255)),
    "yellow": ((245, 222, 30), (140, 115, 0)),
    "purple": ((145, 40, 170), (230, 170, 250)),
    "orange": ((245, 130, 15), (135, 60, 0)),
    "white": ((245, 245, 245), (120, 120, 120)),
    "black": ((14, 14, 14), (165, 165, 165)),
}
JITTER = 8  # of every channel
TONE_LEVELS = {"dark": (70, 95), "light": (155, 180)}  # mid-tones: black and white both stand out


def draw_jpeg(scene: Scene, rng: Generator, side: int, quality: int) -> bytes:
    """The scene as a JPEG of `side` x `side` pixels; `rng` jitters colours and fills backgrounds."""
    canvas = _background(scene, rng, side).resize((side * SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)
    for thing in scene.objects:
        _draw_object(canvas, thing, rng)
    file = io.BytesIO()
    canvas.reduce(SUPERSAMPLING).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _background(scene: Scene, rng: Generator, side: int) -> Image.Image:
    base = rng.uniform(*TONE_LEVELS[scene.tone]) + rng.uniform(-7, 7, size=3)  # [3], a muted tint
    level = np.zeros((side, side))
    if scene.background == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        ramp = np.linspace(-1, 1, side)
        level = 12 * (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None])  # [side, side]
    elif scene.background == "noise":
        level = rng.normal(0, 9, size=(side, side))
    elif scene.background == "checker":
        cell = np.arange(side) // max(1, side // int(rng.integers(6, 11)))
        level = np.where((cell[None, :] + cell[:, None]) % 2 == 0, 8.0, -8.0)
    pixels = np.clip(base + level[:, :, None], 0, 255).astype(np.uint8)  # [side, side, 3]
    return Image.fromarray(pixels)


def _draw_object(canvas: Image.Image, thing: SceneObject, rng: Generator) -> None:
    """Paints one object: its plain colour, and its pattern inside a rim that keeps the outline whole."""
    size = round(2 * RADIUS[thing.size] * canvas.width)
    left, top = (round(place * canvas.width - size / 2) for place in (thing.x, thing.y))
    box = (left, top, left + size, top + size)
    plain, second = RGB[thing.colour]
    jittered = tuple((np.array(plain) + rng.integers(-JITTER, JITTER + 1, size=3)).tolist())
    canvas.paste(jittered, box, _mask(thing.shape, size, 1.0))
    if thing.texture != "plain":
        pattern = _pattern(thing.texture, size, PITCH[thing.size] * canvas.width)
        canvas.paste(second, box, ImageChops.multiply(pattern, _mask(thing.shape, size, 0.86)))


def _pattern(texture: str, size: int, pitch: float) -> Image.Image:
    """White stripes or dots on black, `pitch` pixels apart, symmetric about the middle."""
    steps = (np.arange(size) + 0.5 - size / 2) / pitch
    x, y = np.meshgrid(steps, steps)  # [size, size] each
    row = np.rint(y)
    if texture == "dotted":
        x = x - row % 2 / 2  # every other row is shifted by half a step
        on = np.hypot(x - np.rint(x), y - row) < 0.34
    else:
        on = np.abs(y - row) < 0.25
    return Image.fromarray(on.astype(np.uint8) * 255)


def _mask(shape: str, size: int, scale: float) -> Image.Image:
    """The shape in white on black, in the middle of the picture; at scale 1 it fills the picture."""
    image = Image.new("L", (size, size), 0)
    pen, middle = ImageDraw.Draw(image), size / 2
    reach = scale * middle
    pen.polygon([(middle + reach * x, middle + reach * y) for x, y in OUTLINES[shape]], fill=255)
    if shape == "ring":  # where the outside shrinks, the hole grows
        low, high = middle * (0.36 + 0.2 * scale), middle * (1.64 - 0.2 * scale)
        pen.ellipse((low, low, high, high), fill=0)
    return image


def _heart(t: float) -> tuple[float, float]:
    """The classic curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, moved to the middle."""
    height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -(height + 2.5) / 15.5


def _polar(radius: float, turn: float) -> tuple[float, float]:
    return radius * math.sin(2 * math.pi * turn), -radius * math.cos(2 * math.pi * turn)


_CIRCLE = [_polar(0.97, i / 60) for i in range(60)]
# Two corners of a cross's upper arm and the inner corner after it: (radius, quarter turns).
_ARM = ((1.02, -0.2), (1.02, 0.2), (0.46, 0.5))
# Corners in units of the radius, y downwards.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _CIRCLE,
    "ring": _CIRCLE,
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "star": [_polar((1.0, 0.45)[i % 2], i / 10) for i in range(10)],
    "cross": [_polar(r, (quarter + turn) / 4) for quarter in range(4) for r, turn in _ARM],
    "heart": [_heart(2 * math.pi * i / 40) for i in range(40)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
}
