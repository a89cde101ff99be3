"""The whole model: sizes, parts, heads, captions, and what a batch is to it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import SEP, VOCABULARY, pixels, randomize, tiny_batch, tiny_blip, tiny_config, tiny_tokenizer
from torch import Tensor

from blip import load_blip
from blip.generate import Decoding
from blip.model import Blip, BlipConfig
from blip.momentum import MomentumConfig
from blip.vision import VisionConfig, interpolate_position_embedding

# Sizes, counted by hand from BERT's and ViT's papers

WORDS, POSITIONS, WIDTH, HIDDEN, LAYERS, EMBED = 30524, 512, 768, 3072, 12, 256


def linear(inside: int, outside: int) -> int:
    return inside * outside + outside


def vit_count(width: int, depth: int, tokens: int) -> int:
    block = 2 * 2 * width + linear(width, 3 * width) + linear(width, width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    return linear(16 * 16 * 3, width) + width + tokens * width + depth * block + 2 * width


def text_count(image_width: int, self_attentions: int, has_lm_head: bool) -> int:
    embeddings = WORDS * WIDTH + POSITIONS * WIDTH + 2 * WIDTH
    own = 4 * linear(WIDTH, WIDTH) + 2 * WIDTH
    cross = 2 * linear(WIDTH, WIDTH) + 2 * linear(image_width, WIDTH) + 2 * WIDTH
    mlp = linear(WIDTH, HIDDEN) + linear(HIDDEN, WIDTH) + 2 * WIDTH
    head = linear(WIDTH, WIDTH) + 2 * WIDTH + WORDS if has_lm_head else 0
    return embeddings + LAYERS * (self_attentions * own + cross + mlp) + head


def reading_heads(image_width: int) -> int:
    return linear(image_width, EMBED) + linear(WIDTH, EMBED) + linear(WIDTH, 2) + 1  # and the temperature


def count(config: BlipConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Blip(config).parameters())


@pytest.mark.parametrize(("size", "width", "depth"), [("base", 768, 12), ("large", 1024, 24)])
def test_the_number_of_weights_is_that_of_the_paper(size: str, width: int, depth: int) -> None:
    config, vit = BlipConfig.of(size), vit_count(width, depth, tokens=197)
    found = count(config)
    assert found == vit + text_count(width, 2, True) + reading_heads(width)
    texts = (replace(config.text, reads=reads, writes=not reads) for reads in (False, True))
    captioner, only_filter = (count(replace(config, text=text)) for text in texts)
    assert captioner == vit + text_count(width, 1, True)
    assert only_filter == vit + text_count(width, 1, False) + reading_heads(width)
    if size == "base":  # BLIP table 3: all but self-attention is shared 252M, one stack 224M
        assert round(found / 1e6, 1) == 252.4
        assert round(captioner / 1e6) == 224


def test_a_larger_image_adds_positions_only() -> None:
    small, large = tiny_config(), replace(tiny_config(), vision=replace(tiny_config().vision, image_size=96))
    assert (small.vision.tokens, large.vision.tokens) == (5, 37)
    assert count(large) - count(small) == (37 - 5) * 24
    assert BlipConfig.of("base", image_size=384).vision == VisionConfig(image_size=384)
    assert VisionConfig(image_size=384).tokens == 577


def test_an_unknown_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown size 'huge'; choose one of base, large"):
        BlipConfig.of("huge")


def test_patches_must_fill_the_image() -> None:
    with pytest.raises(ValueError, match="image_size 230 is not a multiple of patch_size 16"):
        VisionConfig(image_size=230)


@torch.no_grad()
def test_a_convolutional_stem_gives_the_same_tokens() -> None:
    vision = VisionConfig(image_size=32, patch_size=8, width=24, depth=1, heads=3, stem=(4, 6, 8))
    blip = Blip(replace(tiny_config(), vision=vision)).with_teacher(MomentumConfig(queue_size=3))
    assert blip.image_tokens(pixels(2)).shape == (2, vision.tokens, 24) == (2, 17, 24)
    assert blip.train()(tiny_batch((1, 2)))["itc"].isfinite()
    with pytest.raises(ValueError, match=r"patches of 4 pixels, but patch_size is 8"):
        replace(vision, stem=(4, 6))


def test_resampled_positions_keep_the_class_token_and_a_flat_grid() -> None:
    embedding = torch.full((1, 1 + 4, 3), 2.0)
    embedding[:, 0] = 7
    grown = interpolate_position_embedding(embedding, 1 + 16)
    assert grown.shape == (1, 17, 3)
    assert (grown[:, 0] == 7).all()
    torch.testing.assert_close(grown[:, 1:], torch.full((1, 16, 3), 2.0))
    with pytest.raises(ValueError, match="not a square"):
        interpolate_position_embedding(embedding, 1 + 15)


# Parts


def outputs(blip: Blip) -> dict[str, Tensor]:
    batch = tiny_batch((1, 2, 3))
    found = {}
    if blip.config.text.reads:
        found["image"] = blip.encode_images(batch.pixels)
        found["text"] = blip.encode_texts(batch.ids, batch.mask)
        found["match"] = blip.match(batch.ids, batch.mask, blip.image_tokens(batch.pixels))
    if blip.config.text.writes:
        image = blip.med.project_image(blip.image_tokens(batch.pixels))
        found["write"] = blip.med.logits(blip.med.write(batch.ids, image)[0])
    return found


def whole_med(folder: Path) -> Blip:
    """A MED with a tokenizer, saved to `folder`."""
    whole = randomize(Blip(tiny_config(), tiny_tokenizer(folder / "words")))
    whole.save_pretrained(folder / "med")
    return whole


@torch.no_grad()
def test_a_part_does_what_it_did_in_the_whole(tmp_path: Path) -> None:
    expected = outputs(whole_med(tmp_path))
    for reads, names in ((False, {"write"}), (True, {"image", "text", "match"})):
        part = load_blip(tmp_path / "med", reads=reads, writes=not reads)
        assert outputs(part).keys() == names
        for name, value in outputs(part).items():
            assert torch.equal(value, expected[name])


def test_a_captioner_has_no_weights_to_read_with() -> None:
    captioner, only_filter = tiny_blip(reads=False), tiny_blip(writes=False)
    names = [name for name, _ in captioner.named_parameters()]
    assert not [name for name in names if ".read." in name or name.startswith(("heads", "temperature"))]
    names = [name for name, _ in only_filter.named_parameters()]
    assert not [name for name in names if ".write." in name or "lm_head" in name]
    with pytest.raises(ValueError, match="no vision_proj head"):
        captioner.encode_images(pixels(1))


def test_what_is_not_there_cannot_be_loaded(tmp_path: Path) -> None:
    whole_med(tmp_path)
    load_blip(tmp_path / "med", reads=False).save_pretrained(tmp_path / "captioner")
    with pytest.raises(ValueError, match="no part that reads; reads=True needs a pretrained MED"):
        load_blip(tmp_path / "captioner", reads=True)


@torch.no_grad()
def test_a_model_is_saved_without_its_teacher(tmp_path: Path) -> None:
    blip = tiny_blip().with_teacher(MomentumConfig(queue_size=3))
    blip.tokenizer = tiny_tokenizer(tmp_path / "words")
    blip.save_pretrained(tmp_path / "model")
    loaded = load_blip(tmp_path / "model")
    assert loaded.teacher is None
    assert loaded.config == blip.config
    expected = outputs(blip)
    for name, value in outputs(loaded).items():
        assert torch.equal(value, expected[name])


# Heads


@torch.no_grad()
def test_features_are_unit_vectors_of_the_first_tokens() -> None:
    blip, batch = tiny_blip(), tiny_batch((1, 2, 3))
    tokens = blip.image_tokens(batch.pixels)
    assert tokens.shape == (3, 5, 24)
    image, text = blip.encode_images(batch.pixels), blip.encode_texts(batch.ids, batch.mask)
    for features in (image, text):
        assert features.shape == (3, 16)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    projected = blip.heads["vision_proj"](tokens[:, 0])
    torch.testing.assert_close(image * projected.norm(dim=1, keepdim=True), projected)
    tokens[:, 1:] = 0
    assert torch.equal(blip.image_features(tokens), image)


@torch.no_grad()
def test_matching_begins_with_enc_whatever_the_text_begins_with() -> None:
    blip, batch = tiny_blip(), tiny_batch((1, 2, 3))
    tokens = blip.image_tokens(batch.pixels)
    scores = blip.match(batch.ids, batch.mask, tokens)
    assert scores.shape == (3, 2)
    ids = batch.ids.clone()
    ids[:, 0] = VOCABULARY - 1  # [ENC]
    states = blip.med.match(ids, batch.mask, blip.med.project_image(tokens))
    assert torch.equal(scores, blip.heads["itm"](states[:, 0]))
    assert torch.equal(scores, blip.match(ids, batch.mask, tokens))
    assert batch.ids[:, 0].eq(2).all()  # the caller's ids are as they were


@torch.no_grad()
def test_two_texts_of_one_image_are_matched_next_to_each_other() -> None:
    blip, batch = tiny_blip(), tiny_batch((1, 2, 3, 4))
    tokens = blip.image_tokens(pixels(2))
    together = blip.match(batch.ids, batch.mask, tokens)
    for row in range(4):
        image = tokens[row // 2][None]
        alone = blip.match(batch.ids[row][None], batch.mask[row][None], image)[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


# Training


@pytest.mark.parametrize(
    ("reads", "writes", "names"),
    [(True, True, {"itc", "itm", "lm"}), (True, False, {"itc", "itm"}), (False, True, {"lm"})],
)
def test_losses_are_those_of_the_heads(reads: bool, writes: bool, names: set[str]) -> None:
    blip = tiny_blip(reads=reads, writes=writes).train()
    found = blip(tiny_batch((1, 2, 3)))
    assert found.keys() == names
    sum(found.values()).backward()
    unused = [name for name, weight in blip.named_parameters() if weight.grad is None]
    assert unused == []


def test_the_first_token_is_not_learned_and_the_prompt_neither() -> None:
    """Both are given; only what follows them is scored."""
    blip = tiny_blip(reads=False)
    batch = tiny_batch((1, 2), prompt_length=1)
    image = blip.med.project_image(blip.image_tokens(batch.pixels))
    ids = batch.ids.clone()
    ids[:, 0] = VOCABULARY - 2  # [DEC]
    log_probs = blip.med.logits(blip.med.write(ids, image)[0]).log_softmax(-1)
    terms = [
        0.9 * log_probs[row, place - 1, ids[row, place]] + 0.1 * log_probs[row, place - 1].mean()
        for row in range(2)
        for place in range(2, int(batch.mask[row].sum()))
    ]
    torch.testing.assert_close(blip(batch)["lm"], -torch.stack(terms).mean())


def test_a_captioner_trains_on_one_image() -> None:
    blip = tiny_blip(reads=False).train()
    loss = blip(tiny_batch((7,)))["lm"]
    loss.backward()
    assert loss.isfinite()
    with pytest.raises(ValueError, match="two different images"):
        tiny_blip().train()(tiny_batch((7,)))


@pytest.mark.parametrize(("temperature", "clamped"), [(0.0, 0.001), (0.07, 0.07), (0.6, 0.5)])
def test_the_temperature_is_clamped_after_a_step(temperature: float, clamped: float) -> None:
    blip = tiny_blip()
    with torch.no_grad():
        blip.temperature.fill_(temperature)
    blip.after_step()
    assert blip.temperature.item() == pytest.approx(clamped)
    tiny_blip(reads=False).after_step()  # which has none


def test_a_batch_moves_as_a_whole() -> None:
    batch = tiny_batch((1, 2), prompt_length=3)
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.pixels, moved.ids, moved.mask, moved.image_ids)} == {
        "meta"
    }
    assert moved.prompt_length == 3


# Captions


@torch.no_grad()
def test_a_caption_is_the_likeliest_next_words_after_the_prompt(tmp_path: Path) -> None:
    blip, images = tiny_blip(reads=False), pixels(4)
    assert blip.med.lm_head is not None
    blip.med.lm_head.bias[SEP] += 3  # so that some texts end early
    blip.tokenizer = tiny_tokenizer(tmp_path)
    found = blip.caption(images, "w3 w8", Decoding(min_length=0, max_length=9))
    for row, caption in enumerate(found):
        image = blip.med.project_image(blip.image_tokens(images[row : row + 1]))
        ids = [VOCABULARY - 2, 8, 13]  # [DEC] w3 w8; the first five ids are special
        while len(ids) < 9 and ids[-1] != SEP:
            states, _ = blip.med.write(torch.tensor([ids]), image)
            ids.append(int(blip.med.logits(states[0, -1]).argmax()))
        words = [id for id in ids[3:] if id != SEP]
        assert caption.split() == [f"w{id - 5}" for id in words if 5 <= id < VOCABULARY - 2]


def test_captions_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="captions need a tokenizer"):
        Blip(tiny_config()).caption(pixels(1))
