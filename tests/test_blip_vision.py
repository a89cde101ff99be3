"""The ViT before it has learned anything."""

import math
from dataclasses import replace

import pytest
import torch

from blip.vision import VisionConfig, VisionEncoder, patch_positions

CONFIG = VisionConfig(image_size=80, patch_size=16, width=16, depth=1, heads=2)


def test_a_new_vit_knows_row_and_column_of_every_patch() -> None:
    positions = VisionEncoder(CONFIG).vit.pos_embed
    assert positions is not None
    start = positions[0].detach()
    for row in range(5):
        for column in range(5):
            found = start[1 + 5 * row + column].double()  # 4 rates x (sine, cosine) x (row, column)
            angles = [place / 10_000 ** (band / 4) for place in (row, column) for band in range(4)]
            values = sorted([f(angle) for angle in angles for f in (math.sin, math.cos)])
            assert found.sort().values.tolist() == pytest.approx(values, abs=1e-6)
    assert len(start.unique(dim=0)) == 26


def test_neighbours_have_the_nearest_positions() -> None:
    places = patch_positions(CONFIG)
    distance = torch.cdist(places, places).fill_diagonal_(torch.inf)
    for patch, nearest in enumerate(distance.argmin(1).tolist()):
        assert abs(patch // 5 - nearest // 5) + abs(patch % 5 - nearest % 5) == 1


def test_positions_can_be_learned() -> None:
    vision = VisionEncoder(CONFIG)
    vision(torch.rand(2, 3, 80, 80)).square().sum().backward()
    assert vision.vit.pos_embed is not None
    gradient = vision.vit.pos_embed.grad
    assert gradient is not None and gradient[0].any(-1).all()


@pytest.mark.parametrize("width", [10, 18])
def test_a_width_without_room_for_positions_is_an_error(width: int) -> None:
    with pytest.raises(ValueError, match=f"width {width} of the ViT is not a multiple of 4"):
        replace(CONFIG, width=width)
