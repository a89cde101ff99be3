"""Stage 1: its losses pair by pair, alone and in two processes, and that what is frozen stays so."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_blip_losses import loop_itc, loop_itm, loop_lm
from test_pipelines_parallel import in_processes, part
from test_pipelines_trainer import disable_dropout
from tiny import pixels, tiny_batch, tiny_tokenizer
from tiny_qformer import CONFIG, DEC, QFORMER, tiny_stage1
from torch import Tensor, nn

from blip.model import Batch
from pipelines.optim import OptimConfig, make_optimizer
from pipelines.parallel import data_parallel, mean_over_ranks
from qformer.frozen import Frozen
from qformer.stage1 import Stage1, Stage1Config, similarity

NO_SIBLINGS, SIBLINGS = [(4, 7), (4, 7, 1, 9, 2)], [(4, 4, 7), (4, 7, 4, 1, 4)]


@pytest.fixture(autouse=True)
def likeliest_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", likeliest)


def likeliest(weights: Tensor, count: int) -> Tensor:
    assert count == 1
    return weights.argmax(1, keepdim=True)


def double(seed: int = 0) -> Stage1:
    """Of float64, training but without dropout."""
    model = tiny_stage1(seed).double().train()
    disable_dropout(model)
    return model


def a_batch(image_ids: tuple[int, ...], prompt_length: int = 0, seed: int = 0) -> Batch:
    batch = tiny_batch(image_ids, prompt_length, seed)
    return replace(batch, pixels=batch.pixels.double())


# The losses, one pair after the other


def explicit(model: Stage1, batch: Batch) -> dict[str, float]:
    rows, ids = range(len(batch.ids)), batch.image_ids.tolist()
    texts = [batch.ids[i, : int(batch.mask[i].sum())][None] for i in rows]
    tokens = [model.ln_vision(model.vision.module(batch.pixels[i : i + 1])) for i in rows]

    def unit(head: str, x: Tensor) -> Tensor:
        x = model.heads[head](x)
        return x / x.norm(dim=-1, keepdim=True)

    images = [unit("vision_proj", model.qformer.look(one)[0]) for one in tokens]  # [Q, E]
    words = [unit("text_proj", model.qformer.read(one, torch.ones_like(one))[0, 0]) for one in texts]
    to_text = [[max(float(q @ w / model.temperature) for q in image) for w in words] for image in images]
    to_image = [list(column) for column in zip(*to_text, strict=True)]

    def match(text: int, image: int) -> list[float]:
        logits = model.heads["itm"](model.qformer.look(tokens[image], texts[text]))  # [1, Q, 2]
        return [sum(float(q[k]) for q in logits[0]) / QFORMER.queries for k in range(2)]

    def wrong(scores: list[float], own: int) -> int:
        return max((i for i in rows if ids[i] != ids[own]), key=lambda i: scores[i])

    unmatched = [match(wrong(to_text[i], i), i) for i in rows] + [
        match(i, wrong(to_image[i], i)) for i in rows
    ]
    return {
        "itc": smoothed_itc(to_text, to_image, ids),
        "itm": loop_itm([match(i, i) for i in rows], unmatched),
        "itg": loop_lm(*written(model, texts, tokens, batch.prompt_length), 0.1),
    }


def smoothed_itc(to_text: list[list[float]], to_image: list[list[float]], ids: list[int]) -> float:
    """0.9 of the mass is on the positives, all candidates share the rest."""
    everyone = [0] * len(ids)  # as if all showed one image
    hard = loop_itc(to_text, to_image, ids, ids, None, 0.0)
    return 0.9 * hard + 0.1 * loop_itc(to_text, to_image, everyone, everyone, None, 0.0)


def written(
    model: Stage1, texts: list[Tensor], tokens: list[Tensor], prompt_length: int
) -> tuple[list[list[float]], list[int]]:
    """Each word from a text that ends before it, so that nothing can be seen of it."""
    rows, targets = [], []
    for text, image in zip(texts, tokens, strict=True):
        seen = model.qformer.look_projected(model.project_image(image))[1]
        for place in range(1 + prompt_length, text.size(1)):
            before = torch.cat([torch.tensor([[DEC]]), text[:, 1:place]], 1)
            states, _ = model.qformer.write(before, seen)
            rows.append(model.qformer.logits(states[0, -1]).tolist())
            targets.append(int(text[0, place]))
    return rows, targets


@pytest.mark.parametrize("prompt_length", [0, 2])
@pytest.mark.parametrize("ids", NO_SIBLINGS + SIBLINGS)
@torch.no_grad()
def test_the_forward_pass_is_the_sum_over_pairs(ids: tuple[int, ...], prompt_length: int) -> None:
    model, batch = double(), a_batch(ids, prompt_length)
    found = {name: float(value) for name, value in model(batch).items()}
    assert found == pytest.approx(explicit(model, batch), abs=1e-6)


@torch.no_grad()
def test_texts_made_wrong_are_further_negatives() -> None:
    model, batch = double(), a_batch((1, 2, 3))
    wrong = a_batch((1, 2, 3), seed=9)
    mask = wrong.mask * torch.tensor([[1], [0], [1]])  # the second image has none
    found = model(replace(batch, wrong_ids=wrong.ids, wrong_mask=mask))
    made = model.match(wrong.ids, wrong.mask, model.image_tokens(batch.pixels))[[0, 2]]
    extra = -made.log_softmax(1)[:, 0].sum()
    torch.testing.assert_close(found["itm"], (9 * model(batch)["itm"] + extra) / 11)


def test_in_half_precision_the_losses_stay_whole_and_near() -> None:
    """Under autocast, with a frozen encoder in bfloat16, as a trainer runs it on a GPU."""
    model, batch = tiny_stage1(), tiny_batch((1, 2, 3))
    expected = model(batch)
    model.vision.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.1, atol=0.05)


def test_without_an_lm_head_nothing_is_written() -> None:
    config = replace(CONFIG, qformer=replace(QFORMER, writes=False))
    assert tiny_stage1(config=config)(tiny_batch((1, 2))).keys() == {"itc", "itm"}


def test_both_sides_of_itc_learn_from_every_pair() -> None:
    """The gradient of torch's own smoothed cross-entropy over one matrix of similarities."""
    model, batch = double(), a_batch((4, 7, 1))
    model(batch)["itc"].backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    images, texts = model.encode_images(batch.pixels), model.encode_texts(batch.ids, batch.mask)
    logits = torch.stack([(images @ text).amax(1) for text in texts], 1) / model.temperature
    losses = (
        nn.functional.cross_entropy(x, torch.arange(3), label_smoothing=0.1) for x in (logits, logits.T)
    )
    (sum(losses) / 2).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, atol=1e-7, rtol=1e-5)


def test_every_trained_weight_gets_a_gradient() -> None:
    model = double()
    sum(model(a_batch((1, 2, 3))).values()).backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert [name for name in idle if not name.endswith("key.bias")] == []  # which softmax does not see


# Several processes


IMAGE_IDS, CUT = (1, 2, 1, 3, 2), 3  # rows 0-2 are rank 0's, 3-4 rank 1's: fewer, with siblings on both


def steps(batch: Batch, count: int = 2) -> dict[str, Tensor]:
    """Losses and gradients of `count` steps of plain descent."""
    drawn, torch.multinomial = torch.multinomial, likeliest
    model, found = double(), {}
    parallel = data_parallel(model)
    for step in range(count):
        losses = parallel(batch)
        sum(losses.values()).backward()
        found |= {f"{step} {k}": mean_over_ranks(torch.stack([v.detach()])) for k, v in losses.items()}
        for key, weight in model.named_parameters():
            assert weight.grad is not None
            found[f"{step} {key}"] = weight.grad.clone()
            weight.data -= 0.1 * weight.grad
            weight.grad = None
        model.after_step()
    torch.multinomial = drawn
    return found


def steps_of_this_rank() -> dict[str, Tensor]:
    rows = (slice(0, CUT), slice(CUT, None))[dist.get_rank()]
    return steps(part(a_batch(IMAGE_IDS, 1, seed=3), rows))


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    """In float64, with negatives of both and fewer rows on one of them."""
    expected = steps(a_batch(IMAGE_IDS, 1, seed=3))
    for rank, found in enumerate(in_processes(steps_of_this_rank, tmp_path)):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, atol=1e-6, rtol=1e-6, msg=lambda m, k=key, r=rank: f"rank {r}, {k}: {m}"
            )


# What evaluation asks for


@torch.no_grad()
def test_features_are_unit_vectors_and_the_best_query_counts() -> None:
    model, batch = tiny_stage1(), tiny_batch((1, 2, 3))
    images, texts = model.encode_images(batch.pixels), model.encode_texts(batch.ids, batch.mask)
    assert images.shape == (3, 5, 16)
    assert texts.shape == (3, 16)
    for features in (images, texts):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1]))
    found = similarity(images, texts[:2])
    assert found.shape == (3, 2)
    assert float(found[1, 0]) == pytest.approx(max(float(query @ texts[0]) for query in images[1]), abs=1e-6)


@torch.no_grad()
def test_one_image_and_one_text_are_a_batch() -> None:
    model, batch = tiny_stage1(), tiny_batch((1,))
    assert model.encode_images(batch.pixels).shape == (1, 5, 16)
    assert model.encode_texts(batch.ids, batch.mask).shape == (1, 16)
    assert model.match(batch.ids, batch.mask, model.image_tokens(batch.pixels)).shape == (1, 2)


@torch.no_grad()
def test_texts_of_one_image_are_matched_together() -> None:
    model, batch = tiny_stage1().double(), a_batch((1, 1, 2, 2))
    tokens = model.image_tokens(batch.pixels[[0, 2]])
    found = model.match(batch.ids, batch.mask, tokens)
    for row in range(4):
        one = slice(row, row + 1)
        alone = model.match(batch.ids[one], batch.mask[one], tokens[row // 2][None])
        torch.testing.assert_close(found[one], alone, atol=1e-10, rtol=0)


# Frozen


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_what_is_frozen_is_not_trained_and_not_stored() -> None:
    model = tiny_stage1().train()
    tower = model.vision.module
    before = weights(tower)
    assert not any(module.training for module in tower.modules())
    assert not any(name.startswith("vision.") for name, _ in model.named_parameters())
    assert [name for name in model.state_dict() if name.startswith("vision.")] == ["vision.digest"]
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5), torch.optim.AdamW)
    sum(model(tiny_batch((1, 2, 3))).values()).backward()
    optimizer.step()
    assert all(weight.grad is None for weight in tower.parameters())
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_gradient_passes_through_what_is_frozen() -> None:
    model = tiny_stage1()
    image = pixels(1).requires_grad_()
    model.image_tokens(image).square().sum().backward()
    assert image.grad is not None and image.grad.any()
    assert not model.vision(pixels(1)).requires_grad  # and nothing is kept for one where none is asked for


@torch.no_grad()
def test_it_computes_in_its_own_dtype_and_moves_with_its_model() -> None:
    model = tiny_stage1()
    model.vision.to(torch.bfloat16)
    assert model.vision.dtype == model.vision(pixels(1)).dtype == torch.bfloat16
    assert model.image_tokens(pixels(1)).dtype == next(model.parameters()).dtype == torch.float32
    whole = tiny_stage1()
    with torch.autocast("cpu", torch.bfloat16):
        assert whole.vision(pixels(1)).dtype == torch.float32
    assert whole.double().vision.dtype == torch.float64
    assert whole.to("meta").vision.digest().is_meta


def test_the_digest_is_of_the_weights_whatever_their_dtype() -> None:
    model = tiny_stage1()
    other, again = copy.deepcopy(model), copy.deepcopy(model)
    again.vision.to(torch.bfloat16)
    with torch.no_grad():
        other.vision.module.vit.blocks[1].mlp.fc2.bias[0] += 0.1
    digests = [one.state_dict()["vision.digest"] for one in (model, again, model.double(), other)]
    assert [torch.equal(digests[0], one) for one in digests] == [True, True, True, False]
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"belong to a frozen vision whose sha256 begins with \w{12}, but"):
        other.load_state_dict(model.state_dict())
    without = {name: tensor for name, tensor in model.state_dict().items() if name != "vision.digest"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "vision.digest"'):
        model.load_state_dict(without)


def test_other_weights_have_another_digest() -> None:
    one = nn.Linear(2, 3)
    other = nn.Linear(2, 3)
    other.load_state_dict(one.state_dict())
    held = Frozen(one)
    assert torch.equal(held.digest(), Frozen(other).digest())
    held.fill({name: tensor + 1 for name, tensor in one.state_dict().items()}, "here")
    assert not torch.equal(held.digest(), Frozen(other).digest())
    assert not any(weight.requires_grad for weight in held.module.parameters())
    with pytest.raises(ValueError, match="the weights of there do not fit the model: missing: bias"):
        held.fill({"weight": torch.zeros(3, 2)}, "there")


# Bad input


@pytest.mark.parametrize("ids", [(4,), (4, 4)])
def test_negatives_need_two_images(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two different images"):
        tiny_stage1()(tiny_batch(ids))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: replace(CONFIG, dec_id=50), r"a vocabulary of 50 words has no \[DEC\], which is 50"),
        (lambda: Stage1Config(qformer=replace(CONFIG.qformer, image_width=1408)), r"has no \[DEC\]"),
        (
            lambda: Stage1Config(CONFIG.vision),
            "tokens of width 1408, but those of the vision encoder have 24",
        ),
        (lambda: replace(CONFIG, qformer=replace(QFORMER, text=False)), "stage 1 needs a Q-Former with text"),
    ],
)
def test_a_config_that_cannot_work_is_an_error(wrong: Callable[[], Stage1Config], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_the_tokenizer_must_have_the_same_dec(tmp_path: Path) -> None:
    assert Stage1(CONFIG, tiny_tokenizer(tmp_path / "words")).tokenizer is not None
    with pytest.raises(ValueError, match=r"the tokenizer has \[DEC\] 38, the config dec_id 48"):
        Stage1(CONFIG, tiny_tokenizer(tmp_path / "fewer", size=40))
