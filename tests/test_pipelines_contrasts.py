"""Texts made wrong by a rule, judged by the generated world, and what ITM makes of them."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_blip
from torch.nn.functional import cross_entropy

from pipelines.contrasts import check, contrast
from pipelines.world import WorldConfig, make_scene
from pipelines.world_captions import captions
from pipelines.world_text import COLOURS, SHAPES, TEXTURES, TONES, judge, parse

SETS = (("red", "blue"), ("small little", "large"), ("left", "right"))
WORLD_SETS = (
    COLOURS,
    SHAPES,
    TEXTURES,
    TONES,
    ("large big", "small little"),
    ("left", "right"),
    ("above over", "below under"),
)


def outcomes(text: str, draws: int = 200) -> set[str | None]:
    return {contrast(text, SETS, Random(i)) for i in range(draws)}


def test_one_word_is_exchanged_for_another_of_its_set() -> None:
    assert outcomes("a red cup") == {"a blue cup"}
    assert outcomes("a large cup") == {"a small cup", "a little cup"}
    assert outcomes("a little cup") == {"a large cup"}  # not small, which means the same
    assert outcomes("a cup") == {None}


def test_two_words_of_a_set_are_swapped_too() -> None:
    swapped = "a blue cup and a red bowl"
    assert outcomes("a red cup and a blue bowl") == {
        swapped,
        "a blue cup and a blue bowl",
        "a red cup and a red bowl",
    }
    draws = [contrast("a red cup and a blue bowl", SETS, Random(i)) for i in range(2000)]
    assert draws.count(swapped) == pytest.approx(1000, abs=100)


def test_articles_follow() -> None:
    sets = (("orange", "red"),)
    assert contrast("this is an orange cup", sets, Random(0)) == "this is a red cup"
    assert contrast("a red cup", sets, Random(0)) == "an orange cup"


def test_of_the_worlds_captions_nearly_all_become_wrong() -> None:
    """But for swaps that say the same: of the colours of two circles, say, of which no relation is told."""
    config, chance = WorldConfig(), np.random.default_rng(0)
    wrong = total = 0
    for i in range(500):
        scene = make_scene(config, chance)
        made = contrast(captions(scene, chance, 1)[0].replace(",", ""), WORLD_SETS, Random(i))
        assert made is not None
        assert parse(made) is not None, made
        total += 1
        wrong += not judge(made, scene).true
    assert wrong / total > 0.95


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((("red",),), "needs two entries"),
        ((("red", " "),), "needs two entries"),
        ((("red", "blue"), ("red", "green")), "name red twice"),
        ((("red", "red"),), "name red twice"),
    ],
)
def test_sets_that_contrast_nothing_are_refused(sets: tuple[tuple[str, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(sets)


@torch.no_grad()
def test_itm_counts_the_wrong_texts_beside_the_pairs() -> None:
    """The mean over 3B + K pairs, of which the K are scored one by one here."""
    model, batch = tiny_blip(writes=False), tiny_batch((1, 2, 3))
    other = tiny_batch((1, 2, 3), seed=5)
    mask = other.mask * torch.tensor([[1], [0], [1]])
    torch.manual_seed(0)
    plain = model(batch)["itm"]
    torch.manual_seed(0)
    found = model(replace(batch, wrong_ids=other.ids, wrong_mask=mask))["itm"]
    tokens = model.image_tokens(batch.pixels)
    made = [
        cross_entropy(model.match(other.ids[[i]], other.mask[[i]], tokens[[i]]), torch.tensor([0]))
        for i in (0, 2)
    ]
    torch.testing.assert_close(found, (9 * plain + sum(made)) / 11, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    none = replace(batch, wrong_ids=other.ids, wrong_mask=0 * mask)
    torch.testing.assert_close(model(none)["itm"], plain)
