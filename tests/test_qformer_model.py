"""The Q-Former: its size, what each use may see, its text written step by step, and transformers' own."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import transformers
from test_blip_model import linear
from test_blip_parity import assert_close
from tiny import SEP, VOCABULARY, randomize, tiny_batch
from tiny_qformer import DEC, QFORMER, tiny_qformer
from torch import Tensor
from transformers import Blip2QFormerModel

from blip.generate import Decoding, generate
from blip.layers import KV, padding_mask
from blip.model import Batch, begin
from blip.vision import CLIP_VIT_L, EVA_VIT_G, VisionEncoder
from qformer.qformer import QFormer, QFormerConfig
from qformer.stage1 import Stage1, Stage1Config
from qformer.weights import load_qformer

WIDTH, HIDDEN, IMAGE, WORDS = 768, 3072, 1408, 30523
Q = QFORMER.queries


# Sizes, counted by hand from BERT's and BLIP-2's papers


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_number_of_weights_is_that_of_the_paper() -> None:
    attention = 4 * linear(WIDTH, WIDTH) + 2 * WIDTH
    cross = 2 * linear(WIDTH, WIDTH) + 2 * linear(IMAGE, WIDTH) + 2 * WIDTH
    mlp = linear(WIDTH, HIDDEN) + linear(HIDDEN, WIDTH) + 2 * WIDTH
    looks = 12 * (attention + mlp) + 6 * cross + 32 * WIDTH + 2 * WIDTH  # with queries and their norm
    text = 12 * mlp + WORDS * WIDTH + 512 * WIDTH
    head = linear(WIDTH, WIDTH) + 2 * WIDTH + WORDS
    heads = 2 * linear(WIDTH, 256) + linear(WIDTH, 2) + 1  # and the temperature
    with torch.device("meta"):
        assert count(QFormer(QFormerConfig(text=False))) == looks
        assert count(QFormer(QFormerConfig(writes=False))) == looks + text
        assert count(QFormer(QFormerConfig())) == looks + text + head
        assert count(Stage1(Stage1Config())) == looks + text + head + heads + 2 * IMAGE
    assert round(looks / 1e6, 1) == 105.2  # what stage 2 trains, without its projection
    assert round((looks + text + head + heads + 2 * IMAGE) / 1e6, 1) == 186.7  # 188M in BLIP-2 section 3.1


def test_the_frozen_encoders_are_those_of_timm_without_their_last_block() -> None:
    with torch.device("meta"):
        eva, clip = VisionEncoder(EVA_VIT_G), VisionEncoder(CLIP_VIT_L)
        evas = timm.create_model("eva_giant_patch14_clip_224", num_classes=0, depth=39)
        clips = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0, depth=23)
    assert count(eva) == count(evas) - 2 * IMAGE + 39 * IMAGE  # no final norm; a bias of keys, which is zero
    assert round(count(eva) / 1e6, 1) == 985.9
    assert count(clip) == count(clips) - 2 * 1024


# What may be seen


@pytest.fixture(scope="module")
def qformer() -> QFormer:
    return tiny_qformer(seed=2).double()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return tiny_batch((1, 2, 3), seed=4)


def image(qformer: QFormer, images: int = 3, seed: int = 0) -> list[KV]:
    return qformer.project_image(tokens(images, seed))


def tokens(images: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(images, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def change(ids: Tensor, place: int) -> Tensor:
    """Another word at one place of every text."""
    ids = ids.clone()
    ids[:, place] = (ids[:, place] - 4) % (VOCABULARY - 7) + 5
    return ids


def in_one_pass(qformer: QFormer, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and text together under a mask [R, 1, Q + T, Q + T], as in figure 2 of BLIP-2."""
    queries = qformer.norm(qformer.queries).expand(len(ids), -1, -1)
    text = qformer.norm(qformer.words(ids) + qformer.positions(torch.arange(ids.size(1))))
    x, projected = torch.cat([queries, text], 1), image(qformer)
    for i, block in enumerate(qformer.blocks):
        x, _ = block(x, mask, Q, projected[i // 2])
    return x[:, :Q], x[:, Q:]


@torch.no_grad()
def test_the_three_masks_are_those_of_the_paper(qformer: QFormer, batch: Batch) -> None:
    ids, real, length = batch.ids, batch.mask.bool(), batch.ids.size(1)
    queries, seen = qformer.look_projected(image(qformer))
    assert torch.equal(qformer.look(tokens()), queries)
    expected = {
        "unimodal": (queries, qformer.read(ids, batch.mask)),
        "bidirectional": (qformer.look(tokens(), ids, batch.mask), None),
        "causal": (queries, qformer.write(ids, seen, batch.mask)[0]),
    }
    masks = {name: torch.zeros(3, 1, Q + length, Q + length, dtype=torch.bool) for name in expected}
    for mask in masks.values():
        mask[..., :Q, :Q] = True
    masks["unimodal"][..., Q:, Q:] = padding_mask(real)
    masks["bidirectional"][..., Q:] = padding_mask(real)
    masks["bidirectional"][..., :Q] = True
    masks["causal"][..., Q:, :Q] = True
    masks["causal"][..., Q:, Q:] = torch.ones(length, length).tril().bool() & padding_mask(real)
    for name, (looked, text) in expected.items():
        found, words = in_one_pass(qformer, ids, masks[name])
        torch.testing.assert_close(found, looked, atol=1e-10, rtol=0)
        if text is not None:
            torch.testing.assert_close(words[real], text[real], atol=1e-10, rtol=0)


@torch.no_grad()
def test_who_sees_whom(qformer: QFormer, batch: Batch) -> None:
    ids, mask = batch.ids, torch.ones_like(batch.ids)
    one, other = image(qformer), image(qformer, seed=1)
    seen, others = (qformer.look_projected(kv)[1] for kv in (one, other))
    written, read = qformer.write(ids, seen)[0], qformer.read(ids, mask)
    looked = qformer.look_projected(one, ids, mask)[0]
    assert ((qformer.write(ids, others)[0] - written).abs().amax(-1) > 1e-6).all()
    assert not torch.allclose(read, written)
    assert not torch.allclose(looked, qformer.look(tokens()))
    for place in range(ids.size(1)):
        changed = change(ids, place)
        moved = (qformer.write(changed, seen)[0] - written).abs().amax(-1)  # [R, T]
        assert (moved[:, :place] == 0).all() and (moved[:, place:] > 1e-6).all()
        assert ((qformer.read(changed, mask) - read).abs().amax(-1) > 1e-6).all()
        assert ((qformer.look_projected(one, changed, mask)[0] - looked).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_padding_changes_nothing(qformer: QFormer, batch: Batch) -> None:
    lengths = batch.mask.sum(1).tolist()
    assert min(lengths) < max(lengths)
    projected = image(qformer)
    seen = qformer.look_projected(projected)[1]
    together = (
        qformer.read(batch.ids, batch.mask),
        qformer.look_projected(projected, batch.ids, batch.mask)[0],
        qformer.write(batch.ids, seen, batch.mask)[0],
        qformer.write(batch.ids, seen)[0],
    )
    for row, length in enumerate(lengths):
        ids, mask = batch.ids[row : row + 1, :length], batch.mask[row : row + 1, :length]
        own = qformer.project_image(tokens()[row : row + 1])
        kept = qformer.look_projected(own)[1]
        written = qformer.write(ids, kept)[0]
        alone = (qformer.read(ids, mask), qformer.look_projected(own, ids)[0], written, written)
        for found, expected in zip(together, alone, strict=True):
            cut = found[row : row + 1, : expected.size(1)]
            torch.testing.assert_close(cut, expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_texts_of_one_image_share_its_keys_and_values(qformer: QFormer) -> None:
    batch, projected = tiny_batch((1, 1, 2, 2), seed=5), image(qformer, images=2)
    looked = qformer.look_projected(projected, batch.ids, batch.mask)[0]
    seen = qformer.look_projected(projected)[1]
    written, past = qformer.write(batch.ids, seen)
    assert looked.shape == (4, Q, 32)
    assert {kv.shape[:3] for layer in past for kv in layer} == {(4, 4, Q + batch.ids.size(1))}
    for row in range(4):
        one = slice(row, row + 1)
        own = [(k[row // 2 : row // 2 + 1], v[row // 2 : row // 2 + 1]) for k, v in projected]
        alone = qformer.look_projected(own, batch.ids[one], batch.mask[one])[0]
        torch.testing.assert_close(looked[one], alone, atol=1e-10, rtol=0)
        alone = qformer.write(batch.ids[one], qformer.look_projected(own)[1])[0]
        torch.testing.assert_close(written[one], alone, atol=1e-10, rtol=0)


# Writing


@torch.no_grad()
def test_text_written_in_steps_is_the_text_written_at_once(qformer: QFormer, batch: Batch) -> None:
    seen = qformer.look_projected(image(qformer))[1]
    whole, end = qformer.write(batch.ids, seen, batch.mask)
    past: list[KV] = []
    for first, last in ((0, 1), (1, 4), (4, batch.ids.size(1))):
        states, past = qformer.write(batch.ids[:, first:last], seen, batch.mask[:, :last], past or None)
        torch.testing.assert_close(states, whole[:, first:last], atol=1e-10, rtol=0)
    for mine, theirs in zip(past, end, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_the_decode_loop_of_the_med_writes_for_the_queries(qformer: QFormer, beams: int) -> None:
    seen = qformer.look_projected(image(qformer))[1]
    decoding = Decoding(beams=beams, min_length=3, max_length=9)
    found = generate(qformer, seen, torch.tensor([DEC]), SEP, decoding)
    for row in range(3):
        own = [(k[row : row + 1], v[row : row + 1]) for k, v in seen]
        alone = generate(qformer, own, torch.tensor([DEC]), SEP, decoding)
        assert torch.equal(found[row, : alone.size(1)], alone[0])
        if beams == 1:
            text = torch.tensor([[DEC]])
            while text.size(1) < 9 and text[0, -1] != SEP:
                logits = qformer.logits(qformer.write(text, own)[0])[0, -1]
                if text.size(1) < 3:
                    logits[SEP] = -torch.inf
                text = torch.cat([text, logits.argmax().view(1, 1)], 1)
            assert torch.equal(alone[0, : text.size(1)], text[0])


def test_words_and_queries_learn_from_every_use(qformer: QFormer, batch: Batch) -> None:
    qformer.zero_grad()
    queries, seen = qformer.look_projected(image(qformer))
    logits = qformer.logits(qformer.write(begin(batch.ids, DEC), seen)[0])
    total = logits.square().mean() + qformer.read(batch.ids, batch.mask).square().mean()
    total += (qformer.look(tokens(), batch.ids, batch.mask) - queries.detach()).square().mean()
    total.backward()
    unused = [name for name, weight in qformer.named_parameters() if weight.grad is None]
    assert unused == []


# What is not there


def test_a_qformer_without_text_only_looks(batch: Batch) -> None:
    only = tiny_qformer(config=replace(QFORMER, text=False)).double()
    whole = tiny_qformer().double()
    only.load_state_dict({k: v for k, v in whole.state_dict().items() if k in only.state_dict()})
    assert torch.equal(only.look(tokens()), whole.look(tokens()))
    assert not [name for name, _ in only.named_parameters() if "text" in name or "words" in name]
    for use in (
        lambda: only.look(tokens(), batch.ids, batch.mask),
        lambda: only.read(batch.ids, batch.mask),
    ):
        with pytest.raises(ValueError, match=r"made without text \(text: false\); only `look`"):
            use()
    with pytest.raises(ValueError, match="no LM head and cannot write"):
        tiny_qformer(config=replace(QFORMER, writes=False)).logits(torch.zeros(1, 32))


@pytest.mark.parametrize("name", ["queries", "cross_every", "depth"])
def test_there_must_be_something_to_look_with(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of the Q-Former is 0; it must be at least 1"):
        replace(QFORMER, **{name: 0})


# transformers


@torch.no_grad()
def test_queries_see_what_they_see_in_transformers_at_the_real_size(tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs = Blip2QFormerModel(transformers.Blip2QFormerConfig())
    theirs = randomize(theirs.to_empty(device="cpu"))
    theirs.save_pretrained(tmp_path)
    ours = load_qformer(tmp_path)
    assert ours.config == QFormerConfig(text=False, writes=False)
    seen = torch.randn(2, 9, IMAGE, generator=torch.Generator().manual_seed(1))
    found = theirs(query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=seen)
    assert_close(ours.look(seen), found.last_hidden_state)
