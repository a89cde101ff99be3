"""The three objectives against plain Python loops, alone and in the forward pass of the whole model."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_batch, tiny_blip
from torch import Tensor

from blip import losses
from blip.model import Batch, Blip, lm_targets
from blip.momentum import NO_IMAGE, MomentumConfig

Rows = list[list[float]]

NO_SIBLINGS = [(4,), (4, 7), (4, 7, 1, 9, 2)]
SIBLINGS = [(4, 4, 7), (4, 7, 4, 1, 4), (3, 3, 5, 5, 5)]


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def loop_itc(
    to_text: Rows,
    to_image: Rows,
    ids: list[int],
    candidates: list[int],
    slow: list[Rows] | None,
    alpha: float,
) -> float:
    """Pair by pair; `slow` holds the teacher's logits for both directions."""
    total = 0.0
    for direction, logits in enumerate((to_text, to_image)):
        for i, row in enumerate(logits):
            positives = sum(candidate == ids[i] for candidate in candidates)
            guess = softmax(row)
            for j, candidate in enumerate(candidates):
                target = (candidate == ids[i]) / positives
                if slow is not None:
                    target = alpha * softmax(slow[direction][i])[j] + (1 - alpha) * target
                total -= target * math.log(guess[j])
    return total / (2 * len(ids))


def loop_itm(matched: Rows, unmatched: Rows) -> float:
    parts = [-math.log(softmax(row)[1]) for row in matched] + [
        -math.log(softmax(row)[0]) for row in unmatched
    ]
    return sum(parts) / len(parts)


def loop_lm(rows: Rows, targets: list[int], smoothing: float) -> float:
    """The right word has 1 - smoothing of the mass, all words share the rest."""
    total = 0.0
    for row, target in zip(rows, targets, strict=True):
        for word, probability in enumerate(softmax(row)):
            mass = (1 - smoothing) * (word == target) + smoothing / len(row)
            total -= mass * math.log(probability)
    return total / len(rows)


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ids", NO_SIBLINGS + SIBLINGS)
def test_itc_in_the_batch_is_the_double_loop(ids: tuple[int, ...]) -> None:
    to_text, to_image = numbers(len(ids), len(ids)), numbers(len(ids), len(ids), seed=1)
    same = losses.same_image(torch.tensor(ids), torch.tensor(ids))
    targets = losses.itc_targets(same)
    expected = loop_itc(to_text.tolist(), to_image.tolist(), list(ids), list(ids), None, 0.0)
    assert float(losses.itc_loss(to_text, to_image, targets, targets)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ids", NO_SIBLINGS + SIBLINGS)
def test_itc_with_a_teacher_and_a_queue_is_the_double_loop(ids: tuple[int, ...], alpha: float) -> None:
    candidates = [*ids, 4, NO_IMAGE, 100, 3, NO_IMAGE]  # the queue holds earlier texts of some of the images
    shape = len(ids), len(candidates)
    fast = [numbers(*shape, seed=seed) for seed in (0, 1)]
    slow = [numbers(*shape, seed=seed) for seed in (2, 3)]
    same = losses.same_image(torch.tensor(ids), torch.tensor(candidates))
    targets = [losses.itc_targets(same, logits, alpha) for logits in slow]
    expected = loop_itc(
        fast[0].tolist(), fast[1].tolist(), list(ids), candidates, [x.tolist() for x in slow], alpha
    )
    assert float(losses.itc_loss(*fast, *targets)) == pytest.approx(expected, abs=1e-6)
    for target in targets:
        torch.testing.assert_close(target.sum(1), torch.ones(len(ids), dtype=torch.float64))


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_itm_is_the_loop(pairs: int) -> None:
    matched, unmatched = numbers(pairs, 2), numbers(2 * pairs, 2, seed=1)
    expected = loop_itm(matched.tolist(), unmatched.tolist())
    assert float(losses.itm_loss(matched, unmatched)) == pytest.approx(expected, abs=1e-6)


def test_itm_of_a_model_that_only_knows_the_prior() -> None:
    """One pair in three matches: the entropy of (1/3, 2/3), where training that does not learn gets stuck."""
    prior = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64).log()
    loss = losses.itm_loss(prior.expand(4, 2), prior.expand(8, 2))
    assert float(loss) == pytest.approx(0.6365142, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("words", [1, 2, 5])
def test_lm_is_the_double_loop(words: int, smoothing: float) -> None:
    logits = numbers(words, 7)
    targets = [3 * i % 7 for i in range(words)]
    expected = loop_lm(logits.tolist(), targets, smoothing)
    found = losses.lm_loss(logits, torch.tensor(targets), smoothing)
    assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("prompt_length", [0, 1, 2])
def test_lm_targets_are_the_next_words_after_the_prompt(prompt_length: int) -> None:
    batch = tiny_batch((1, 2, 3, 4, 5))
    targets = lm_targets(batch.ids, batch.mask, prompt_length)
    for row in range(5):
        for place in range(batch.ids.size(1) - 1):
            counts = bool(batch.mask[row, place + 1]) and place >= prompt_length
            assert targets[row, place] == (batch.ids[row, place + 1] if counts else -100)


def test_hard_negatives_never_show_the_same_image() -> None:
    ids = torch.tensor([3, 3, 5, 8, 5, 5])
    same = losses.same_image(ids, ids)
    logits = numbers(6, 6).float().masked_fill(same, 60.0)  # siblings are by far the most similar
    for _ in range(300):
        drawn = losses.hard_negatives(logits, same)
        assert not (ids[drawn] == ids).any()


@pytest.mark.parametrize(
    ("logits", "floor"),
    [
        ([2.0, 0.5, -1.0, 1.5, 0.0], 1e-4),
        ([2.0, 0.5, -1.0, 1.5, 0.0], 0.1),
        ([50.0, 0.0, 1.0, 2.0, 3.0], 1e-4),  # only the floor counts
    ],
)
def test_hard_negatives_are_drawn_by_their_weights(logits: list[float], floor: float) -> None:
    same = torch.tensor([True, False, False, True, False])
    weights = [0.0 if same[i] else p + floor for i, p in enumerate(softmax(logits))]
    draws = 40_000
    torch.manual_seed(0)
    drawn = losses.hard_negatives(torch.tensor(logits).expand(draws, -1), same.expand(draws, -1), floor)
    for i, count in enumerate(drawn.bincount(minlength=5).tolist()):
        share = weights[i] / sum(weights)
        assert abs(count / draws - share) <= 5 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("ids", [(4,), (4, 4), (7, 7, 7)])
def test_hard_negatives_need_another_image(ids: tuple[int, ...]) -> None:
    same = losses.same_image(torch.tensor(ids), torch.tensor(ids))
    with pytest.raises(ValueError, match="at least two different images"):
        losses.hard_negatives(torch.zeros(len(ids), len(ids)), same)


def test_hard_negatives_of_logits_that_are_not_numbers_leave_the_complaint_to_the_loss() -> None:
    ids = torch.tensor([3, 3, 5])
    drawn = losses.hard_negatives(torch.full((3, 3), math.nan), losses.same_image(ids, ids))
    assert not (ids[drawn] == ids).any()


# The whole forward pass, one row at a time


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def explicit(blip: Blip, batch: Batch, seed: int) -> dict[str, float]:
    """What `Blip.forward` must give: in float64, without padding, every pair on its own.

    Only the three uses of the MED are taken from the model; tests of their own show what they do.
    """
    blip, ids = copy.deepcopy(blip).double(), batch.image_ids.tolist()
    rows = range(len(ids))
    texts = [batch.ids[i][batch.mask[i].bool()] for i in rows]
    tokens = [blip.image_tokens(batch.pixels[i : i + 1].double()) for i in rows]
    found: dict[str, float] = {}
    if blip.config.text.writes:
        found["lm"] = explicit_lm(blip, texts, tokens, batch.prompt_length)
    if not blip.config.text.reads:
        return found

    def first(state: Tensor) -> Tensor:
        return state[0, 0]

    def features(model: Blip | torch.nn.Module, part: str) -> list[Tensor]:
        if part == "image":
            return [
                unit(model.heads["vision_proj"](first(model.vision(batch.pixels[i : i + 1].double()))))
                for i in rows
            ]
        return [
            unit(
                model.heads["text_proj"](
                    first(model.med.encode(texts[i][None], torch.ones(1, len(texts[i]))))
                )
            )
            for i in rows
        ]

    images, words = features(blip, "image"), features(blip, "text")
    image_keys, word_keys, candidates, slow, alpha = images, words, list(ids), None, 0.0
    if blip.teacher is not None:
        slow_images, slow_words = features(blip.teacher, "image"), features(blip.teacher, "text")
        image_keys = slow_images + list(blip.teacher.image_queue)
        word_keys = slow_words + list(blip.teacher.text_queue)
        candidates = ids + blip.teacher.id_queue.tolist()
        alpha = blip.teacher.alpha
        slow = [cosines(blip, slow_images, word_keys), cosines(blip, slow_words, image_keys)]
    to_text, to_image = cosines(blip, images, word_keys), cosines(blip, words, image_keys)
    found["itc"] = loop_itc(to_text, to_image, ids, candidates, slow, alpha)

    torch.manual_seed(seed)
    floor = blip.config.negative_floor
    wrong_text, wrong_image = draw(to_text, ids, floor), draw(to_image, ids, floor)
    matched = [explicit_match(blip, texts[i], tokens[i]) for i in rows]
    unmatched = [explicit_match(blip, texts[wrong_text[i]], tokens[i]) for i in rows]
    unmatched += [explicit_match(blip, texts[i], tokens[wrong_image[i]]) for i in rows]
    found["itm"] = loop_itm(matched, unmatched)
    return found


def cosines(blip: Blip, left: list[Tensor], right: list[Tensor]) -> Rows:
    return [[float(x @ y / blip.temperature) for y in right] for x in left]


def draw(logits: Rows, ids: list[int], floor: float) -> list[int]:
    """The negatives that the model draws from the same random numbers."""
    weights = [softmax(row[: len(ids)]) for row in logits]
    for i, row in enumerate(weights):
        for j in range(len(ids)):
            row[j] = 0.0 if ids[i] == ids[j] else row[j] + floor
    return torch.multinomial(torch.tensor(weights), 1)[:, 0].tolist()


def explicit_match(blip: Blip, text: Tensor, tokens: Tensor) -> list[float]:
    text = torch.cat([torch.tensor([blip.config.enc_id]), text[1:]])
    states = blip.med.match(text[None], torch.ones(1, len(text)), blip.med.project_image(tokens))
    return blip.heads["itm"](states[0, 0]).tolist()


def explicit_lm(blip: Blip, texts: list[Tensor], tokens: list[Tensor], prompt_length: int) -> float:
    """Each word from a text that ends before it, so that nothing can be seen of it."""
    rows, targets = [], []
    for text, image in zip(texts, tokens, strict=True):
        text = torch.cat([torch.tensor([blip.config.dec_id]), text[1:]])
        for place in range(1 + prompt_length, len(text)):
            states, _ = blip.med.write(text[None, :place], blip.med.project_image(image))
            rows.append(blip.med.logits(states[0, -1]).tolist())
            targets.append(int(text[place]))
    return loop_lm(rows, targets, blip.config.label_smoothing)


def with_teacher(blip: Blip) -> Blip:
    """A teacher that has gone another way, half up the ramp of alpha, with a queue partly filled."""
    blip.with_teacher(MomentumConfig(queue_size=6, alpha=0.4, alpha_steps=10))
    other = tiny_blip(seed=5).with_teacher(MomentumConfig(queue_size=6)).teacher
    assert blip.teacher is not None and other is not None
    with torch.no_grad():
        for mine, theirs in zip(blip.teacher.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    keys = torch.nn.functional.normalize(numbers(4, 16).float(), dim=1)
    blip.teacher.enqueue(keys, keys.flip(0), torch.tensor([4, 30, 4, 31]))
    blip.teacher.steps.fill_(5)
    return blip


@pytest.mark.parametrize("has_teacher", [False, True])
@pytest.mark.parametrize("ids", NO_SIBLINGS[1:] + SIBLINGS)
@torch.no_grad()
def test_the_forward_pass_is_the_sum_over_pairs(ids: tuple[int, ...], has_teacher: bool) -> None:
    blip = tiny_blip()
    if has_teacher:
        with_teacher(blip)
    else:
        blip.config = replace(blip.config, negative_floor=0.3)
    batch = tiny_batch(ids, prompt_length=1)
    torch.manual_seed(3)
    found = {name: float(value) for name, value in blip(batch).items()}
    assert found == pytest.approx(explicit(blip, batch, seed=3), abs=1e-5)


@pytest.mark.parametrize("prompt_length", [0, 2])
@pytest.mark.parametrize("ids", NO_SIBLINGS)
@torch.no_grad()
def test_the_forward_pass_of_a_captioner(ids: tuple[int, ...], prompt_length: int) -> None:
    blip, batch = tiny_blip(reads=False), tiny_batch(ids, prompt_length)
    found = {name: float(value) for name, value in blip(batch).items()}
    assert found == pytest.approx(explicit(blip, batch, seed=0), abs=1e-5)


@pytest.mark.parametrize("ids", [(4,), (4, 4)])
def test_a_batch_without_two_images_cannot_train_itm(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two different images"):
        tiny_blip(writes=False)(tiny_batch(ids))


def test_gradients_of_the_merged_pass_are_those_of_single_pairs() -> None:
    """ITM folds two texts of an image into one row of attention; the image's gradient must be their sum."""
    blip, batch = tiny_blip().double(), tiny_batch((1, 2, 3))
    tokens = blip.image_tokens(batch.pixels.double()).detach().requires_grad_()
    ids = torch.stack([batch.ids, batch.ids.roll(1, 0)], 1).flatten(0, 1)
    mask = torch.stack([batch.mask, batch.mask.roll(1, 0)], 1).flatten(0, 1)
    (merged,) = torch.autograd.grad(blip.match(ids, mask, tokens)[:, 1].square().sum(), tokens)
    apart = sum(
        blip.match(ids[row : row + 1], mask[row : row + 1], tokens[row // 2 : row // 2 + 1])[:, 1]
        .square()
        .sum()
        for row in range(6)
    )
    (single,) = torch.autograd.grad(apart, tokens)
    torch.testing.assert_close(merged, single, atol=1e-6, rtol=1e-6)
