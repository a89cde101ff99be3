"""What we load computes what transformers computes, and what we export too. float32, random weights."""

from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tiny import randomize, tiny_blip, tiny_tokenizer, tiny_vqa
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

from blip import Blip, BlipVQA, export_hf, image_transform, load_blip, load_vqa
from blip.generate import Decoding
from blip.vision import VisionConfig

Theirs = TypeVar("Theirs", bound=transformers.PreTrainedModel)

CLOSE = 1e-4
WORDS = 50  # of the tiny vocabulary: [DEC] is 48, [ENC] 49
LENGTHS = (7, 4)  # tokens of the two texts


def hf_config(vision: int = 48, text: int = 32, **vision_settings: object) -> transformers.BlipConfig:
    return transformers.BlipConfig(
        image_text_hidden_size=24,
        text_config={
            "vocab_size": WORDS,
            "hidden_size": text,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 20,
            "bos_token_id": WORDS - 2,
            "sep_token_id": 3,
        },
        vision_config={
            "hidden_size": vision,
            "intermediate_size": 4 * vision,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 32,
            **vision_settings,
        },
    )


def real_config(image_size: int) -> transformers.BlipConfig:
    """ViT-B/16 and BERT-base, as on the hub."""
    return transformers.BlipConfig(
        text_config={"num_attention_heads": 12}, vision_config={"image_size": image_size}
    )


def real(kind: type[Theirs], image_size: int) -> Theirs:
    """A base-size model with random weights, drawn once: transformers would draw its own first."""
    with torch.device("meta"):
        model = kind(real_config(image_size))
    model.to_empty(device="cpu").tie_weights()
    for positions in model.buffers():
        positions.copy_(torch.arange(positions.size(-1)))
    return randomize(model)


def inputs(config: transformers.BlipConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [2, 3, S, S], ids [2, 7] that start with [CLS] (2), and their mask."""
    generator = torch.Generator().manual_seed(5)
    size = config.vision_config.image_size
    ids = torch.randint(5, config.text_config.vocab_size - 2, (2, max(LENGTHS)), generator=generator)
    ids[:, 0] = 2
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(2, 3, size, size, generator=generator), ids * mask, mask.long()


def begin(ids: Tensor, first: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], first), ids[:, 1:]], 1)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-2  # something to compare
    torch.testing.assert_close(ours, theirs, atol=CLOSE, rtol=0)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    mine, yours = one.state_dict(), other.state_dict()
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)


@torch.no_grad()
def assert_same_captioner(ours: Blip, theirs: BlipForConditionalGeneration) -> None:
    pixels, ids, _ = inputs(theirs.config)
    ids = begin(ids, theirs.config.text_config.bos_token_id)
    tokens = ours.image_tokens(pixels)
    out = theirs(pixel_values=pixels, input_ids=ids)
    assert_close(tokens, out.last_hidden_state)
    states, _ = ours.med.write(ids, ours.med.project_image(tokens))
    assert_close(ours.med.logits(states), out.logits)


@torch.no_grad()
def assert_same_filter(ours: Blip, theirs: BlipForImageTextRetrieval) -> None:
    pixels, ids, mask = inputs(theirs.config)
    tokens = ours.image_tokens(pixels)
    itc = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_itm_head=False)
    assert_close(tokens, itc.last_hidden_state)
    assert_close(ours.encode_images(pixels), F.normalize(theirs.vision_proj(itc.last_hidden_state[:, 0])))
    assert_close(ours.encode_texts(ids, mask), F.normalize(theirs.text_proj(itc.question_embeds[:, 0])))
    assert_close(ours.encode_images(pixels) @ ours.encode_texts(ids, mask).T, itc.itm_score)
    enc = theirs.config.text_config.bos_token_id + 1
    itm = theirs(pixel_values=pixels, input_ids=begin(ids, enc), attention_mask=mask, use_itm_head=True)
    assert_close(ours.match(ids, mask, tokens), itm.itm_score)
    with_cls = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_itm_head=True)
    assert (with_cls.itm_score - itm.itm_score).abs().max() > 10 * CLOSE  # so [ENC] was there


@torch.no_grad()
def assert_same_vqa(ours: BlipVQA, theirs: BlipForQuestionAnswering) -> None:
    pixels, ids, mask = inputs(theirs.config)
    dec = theirs.config.text_config.bos_token_id
    image = theirs.vision_model(pixels).last_hidden_state
    asked = theirs.text_encoder(begin(ids, dec + 1), attention_mask=mask, encoder_hidden_states=image)
    question, states = asked.last_hidden_state, ours.read(pixels, ids, mask)
    assert_close(states, question)
    answers = begin(ids, dec)
    for row, length in enumerate(LENGTHS):  # cut, since transformers 5.23 ignores encoder_attention_mask here
        one, cut = slice(row, row + 1), slice(0, length)
        out = theirs.text_decoder(answers[one], encoder_hidden_states=question[one, cut])
        written, _ = ours.writer.write(answers[one], ours.writer.project_image(states[one, cut]))
        assert_close(ours.writer.logits(written), out.logits)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_tiny_captioner(tmp_path: Path, eps: float) -> None:
    theirs = randomize(BlipForConditionalGeneration(hf_config(layer_norm_eps=eps)))
    theirs.save_pretrained(tmp_path)
    ours = load_blip(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words"))
    assert not ours.config.text.reads and ours.config.vision.eps == eps
    assert_same_captioner(ours, theirs)
    export_hf(ours, tmp_path / "back")
    back = BlipForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert_same_captioner(ours, back)
    assert_same_state(back, theirs)


def test_tiny_filter(tmp_path: Path) -> None:
    theirs = randomize(BlipForImageTextRetrieval(hf_config()))
    theirs.save_pretrained(tmp_path)
    ours = load_blip(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words"))
    assert not ours.config.text.writes and ours.temperature.item() == pytest.approx(0.07)
    assert_same_filter(ours, theirs)
    export_hf(ours, tmp_path / "back")
    back = BlipForImageTextRetrieval.from_pretrained(tmp_path / "back").eval()
    assert_same_filter(ours, back)
    assert_same_state(back, theirs)


def test_tiny_vqa(tmp_path: Path) -> None:
    theirs = randomize(BlipForQuestionAnswering(hf_config(vision=48, text=48)))
    theirs.save_pretrained(tmp_path)
    ours = load_vqa(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words"))
    assert_same_vqa(ours, theirs)
    ours.save_pretrained(tmp_path / "saved")
    assert_same_vqa(load_vqa(tmp_path / "saved"), theirs)


def test_a_pretrained_med_is_exported_as_two_models(tmp_path: Path) -> None:
    ours = tiny_blip()
    ours.tokenizer = tiny_tokenizer(tmp_path / "words")
    export_hf(ours, tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["captioner", "retrieval"]
    captioner = BlipForConditionalGeneration.from_pretrained(tmp_path / "hf" / "captioner").eval()
    assert_same_captioner(ours, captioner)
    assert_same_filter(ours, BlipForImageTextRetrieval.from_pretrained(tmp_path / "hf" / "retrieval").eval())
    assert captioner.config.text_config.sep_token_id == ours.tokenizer.sep


def test_an_export_is_complete_for_transformers(tmp_path: Path) -> None:
    """No weight is newly drawn or left over there, and its processor sees the images and words as we do."""
    ours = tiny_blip(reads=False)
    ours.tokenizer = tiny_tokenizer(tmp_path / "words")
    export_hf(ours, tmp_path / "hf")
    _, info = BlipForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = transformers.BlipProcessor.from_pretrained(tmp_path / "hf")
    image = Image.effect_noise((53, 41), 80).convert("RGB")
    seen = processor(images=image, text="w3 w1", return_tensors="pt")
    assert seen["input_ids"].tolist() == ours.tokenizer(["w3 w1"], 9)[0].tolist()
    torch.testing.assert_close(seen["pixel_values"][0], image_transform(image, 32), atol=0.02, rtol=0)


def test_greedy_captions_of_an_export(tmp_path: Path) -> None:
    ours = tiny_blip(reads=False)
    ours.tokenizer = tiny_tokenizer(tmp_path / "words")
    export_hf(ours, tmp_path / "hf")
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    prompt = ours.tokenizer(["w3 w1"] * 4, 9)[0]
    settings = {"min_length": 5, "max_length": 12, "num_beams": 1, "do_sample": False}
    found = theirs.generate(pixels, input_ids=prompt, **settings)
    expected = [text.removeprefix("w3 w1").strip() for text in ours.tokenizer.decode(found)]
    captions = ours.caption(pixels, "w3 w1", Decoding(min_length=5, max_length=12))
    assert captions == expected and len(set(captions)) > 1


def test_answers_of_questions_of_one_length(tmp_path: Path) -> None:
    theirs = randomize(BlipForQuestionAnswering(hf_config(vision=48, text=48)))
    theirs.save_pretrained(tmp_path)
    ours = load_vqa(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words"))
    assert ours.tokenizer is not None
    questions = ["w1 w2 w3", "w9 w8 w7", "w30 w2 w5"]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ids, mask = ours.tokenizer(questions, 35)
    settings = {"min_length": 1, "max_length": 10, "num_beams": 1, "do_sample": False}
    found = theirs.generate(begin(ids, WORDS - 1), pixels, attention_mask=mask, **settings)
    answers = ours.answer(pixels, questions, Decoding(min_length=1, max_length=10))
    assert answers == ours.tokenizer.decode(found[:, 1:]) and len(set(answers)) > 1


def test_an_answer_does_not_depend_on_the_longest_question(tmp_path: Path) -> None:
    vqa = tiny_vqa()
    vqa.tokenizer = tiny_tokenizer(tmp_path)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    questions = ["w1 w2", "w1 w2 w3 w4 w5 w6 w7", "w5 w6"]
    alone = [vqa.answer(pixels[i : i + 1], questions[i : i + 1])[0] for i in range(3)]
    assert vqa.answer(pixels, questions) == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize("image_size", [224, 384])
def test_real_captioner(tmp_path: Path, image_size: int) -> None:
    theirs = real(BlipForConditionalGeneration, image_size)
    theirs.save_pretrained(tmp_path)
    ours = load_blip(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words", 30524))
    assert ours.config.vision == VisionConfig(image_size=image_size, eps=1e-5)
    assert_same_captioner(ours, theirs)


@pytest.mark.parametrize("image_size", [224, 384])
def test_real_filter(tmp_path: Path, image_size: int) -> None:
    theirs = real(BlipForImageTextRetrieval, image_size)
    theirs.save_pretrained(tmp_path)
    ours = load_blip(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words", 30524))
    assert_same_filter(ours, theirs)
    del theirs
    export_hf(ours, tmp_path / "back")
    assert_same_filter(ours, BlipForImageTextRetrieval.from_pretrained(tmp_path / "back").eval())


@pytest.mark.parametrize("image_size", [224, 384])
def test_real_vqa(tmp_path: Path, image_size: int) -> None:
    theirs = real(BlipForQuestionAnswering, image_size)
    theirs.save_pretrained(tmp_path)
    assert_same_vqa(load_vqa(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words", 30524)), theirs)
