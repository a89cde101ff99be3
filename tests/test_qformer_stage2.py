"""Stage 2 beside transformers' BLIP-2 with OPT and FlanT5; its training, its folders. Random weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from test_blip_parity import assert_close
from tiny import pixels, randomize
from tiny_language import (
    OPT_BOS,
    OPT_IMAGE,
    T5_IMAGE,
    opt_config,
    opt_tokenizer,
    t5_config,
    t5_tokenizer,
    tiny_opt,
    tiny_t5,
)
from tiny_qformer import QFORMER, VISION, tiny_stage1
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blip.generate import Decoding
from blip.vision import EVA_VIT_G, VisionEncoder
from qformer import export_hf
from qformer.frozen import Frozen
from qformer.language import CausalLM, EncoderDecoderLM
from qformer.qformer import QFormerConfig
from qformer.stage2 import SHORT_QUESTION, Stage2, Stage2Batch, Stage2Config, start_stage2
from qformer.texts import CausalTokenizer, EncoderDecoderTokenizer
from qformer.weights_stage2 import load_stage2

CLOSE = 1e-4
BEAMS = Decoding(beams=5, min_length=2, max_length=10)
SETTINGS = {"num_beams": 5, "min_new_tokens": 2, "max_new_tokens": 10, "do_sample": False}
PROMPTS = ["", "a photo of", "question: what is on the left? answer:"]
CAPTIONS = ["a red cat", "the dog on the right", "blue"]
QUERIES = 5


def opt() -> CausalLM:
    return CausalLM(tiny_opt(), CausalTokenizer(opt_tokenizer()))


def t5() -> EncoderDecoderLM:
    return EncoderDecoderLM(tiny_t5(), EncoderDecoderTokenizer(t5_tokenizer()))


BOTH = pytest.mark.parametrize("language", [opt, t5])
Language = Callable[[], CausalLM | EncoderDecoderLM]


def hf_config(causal: bool, width: int = 32, **qformer: object) -> transformers.Blip2Config:
    return transformers.Blip2Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 32,
            "patch_size": 16,
        },
        qformer_config={
            "hidden_size": width,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            **qformer,
        },
        text_config=(opt_config() if causal else t5_config()).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=OPT_IMAGE if causal else T5_IMAGE,
    )


def hf_blip2(causal: bool, **settings: object) -> Blip2ForConditionalGeneration:
    model = Blip2ForConditionalGeneration(hf_config(causal, **settings))
    randomize(model)
    model.language_model.load_state_dict((tiny_opt() if causal else tiny_t5()).state_dict())
    return model


def hf_folder(folder: Path, causal: bool) -> tuple[Path, Blip2ForConditionalGeneration]:
    model = hf_blip2(causal)
    model.save_pretrained(folder)
    (opt_tokenizer() if causal else t5_tokenizer()).save_pretrained(folder)
    return folder, model


def theirs_read(model: Blip2ForConditionalGeneration, prompt: str) -> Tensor:
    """[1, Q + T]: one image token for each query, then the words as the released processors have them."""
    causal = model.config.use_decoder_only_language_model
    words = (
        [OPT_BOS, *opt_tokenizer()(prompt)["input_ids"]] if causal else t5_tokenizer()(prompt)["input_ids"]
    )
    return torch.tensor([[model.config.image_token_index] * QUERIES + words])


def theirs_write(model: Blip2ForConditionalGeneration, images: Tensor, prompt: str) -> str:
    causal = model.config.use_decoder_only_language_model
    read = theirs_read(model, prompt)
    found = model.generate(images, input_ids=read, **SETTINGS)[0].tolist()
    if causal and found[: read.size(1)] == read[0].tolist():
        found = found[read.size(1) :]
    return str(
        (opt_tokenizer() if causal else t5_tokenizer()).decode(found, skip_special_tokens=True)
    ).strip()


@torch.no_grad()
def assert_same(ours: Stage2, theirs: Blip2ForConditionalGeneration) -> None:
    """Soft prompts, logits, losses, and the text of five beams, ours in a batch and theirs one by one."""
    images = pixels(3, seed=3)
    soft = ours.soft_prompt(images)
    assert_close(soft, theirs.get_image_features(images).pooler_output)
    texts = ours.language.tokenizer(PROMPTS, CAPTIONS)
    logits = ours.language.logits(soft, texts)
    total, count = torch.zeros(()), 0
    for i in range(3):
        length = int(texts.mask[i].sum())
        image = torch.full((1, QUERIES), theirs.config.image_token_index)
        read = torch.cat([image, texts.ids[i : i + 1, :length]], 1)
        labels = texts.labels[i : i + 1, : int((texts.labels[i] != -100).nonzero().max()) + 1]
        if theirs.config.use_decoder_only_language_model:
            out = theirs(images[i : i + 1], read, labels=torch.cat([torch.full_like(image, -100), labels], 1))
            expected = out.logits[0, QUERIES - 1 : -1]
        else:
            out = theirs(images[i : i + 1], read, labels=labels)
            expected = out.logits[0]
        assert_close(logits[i, : len(expected)], expected)
        words = int((labels != -100).sum())
        total, count = total + out.loss * words, count + words
    loss = ours(Stage2Batch(images, texts))["lm"]
    torch.testing.assert_close(loss, total / count, atol=CLOSE, rtol=0)
    captions = ours.caption(images, PROMPTS, BEAMS)
    assert captions == [theirs_write(theirs, images[i : i + 1], PROMPTS[i]) for i in range(3)]
    assert len(set(captions)) == 3
    alone = [ours.caption(images[i : i + 1], PROMPTS[i], BEAMS)[0] for i in range(3)]
    assert alone == captions


# Against transformers


@pytest.mark.parametrize("causal", [True, False])
def test_transformers_and_back(tmp_path: Path, causal: bool) -> None:
    folder, theirs = hf_folder(tmp_path / "hf", causal)
    ours = load_stage2(folder, dtype=torch.float32)
    assert not ours.training and ours.config.norm_eps == 1e-6 and ours.config.qformer.queries == QUERIES
    assert_same(ours, theirs)
    export_hf(ours, tmp_path / "back")
    back, info = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, back.eval())
    mine, yours = back.state_dict(), theirs.state_dict()
    assert mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


def test_a_captioner_without_prompt_says_the_same_there(tmp_path: Path) -> None:
    """transformers' own start: the image and <s>."""
    ours = tiny_stage2(opt)
    export_hf(ours, tmp_path)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = theirs.generate(pixels(4), **SETTINGS)
    found = [text.strip() for text in opt_tokenizer().batch_decode(ids, skip_special_tokens=True)]
    assert ours.caption(pixels(4), decoding=BEAMS) == found and len(set(found)) > 2


@BOTH
def test_an_export_is_complete_for_the_processor(tmp_path: Path, language: Language) -> None:
    ours = tiny_stage2(language)
    export_hf(ours, tmp_path)
    processor = Blip2Processor.from_pretrained(tmp_path)
    image = Image.effect_noise((40, 50), 80).convert("RGB")
    seen = processor(images=image, text="a photo of", return_tensors="pt")
    assert seen["pixel_values"].shape == (1, 3, 32, 32)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (seen["input_ids"][0, :QUERIES] == theirs.config.image_token_index).all()
    assert theirs.generate(**seen, **SETTINGS).numel() > 0


def test_the_real_q_former(tmp_path: Path) -> None:
    real = {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    with torch.device("meta"):
        theirs = Blip2ForConditionalGeneration(hf_config(True, 768, **real))
    theirs.to_empty(device="cpu")
    theirs.language_model = tiny_opt()
    for name in ("vision_model", "qformer", "language_projection"):
        randomize(getattr(theirs, name))
    with torch.no_grad():
        theirs.query_tokens.normal_(generator=torch.Generator().manual_seed(1))
    theirs.eval().save_pretrained(tmp_path)
    opt_tokenizer().save_pretrained(tmp_path)
    ours = load_stage2(tmp_path, dtype=torch.float32)
    wanted = QFormerConfig(text=False, queries=QUERIES, image_width=24)
    assert ours.config.qformer == replace(wanted, writes=ours.config.qformer.writes)
    assert_same(ours, theirs)


# Training


def tiny_stage2(language: Language, seed: int = 0) -> Stage2:
    config = Stage2Config(VISION, replace(QFORMER, text=False), norm_eps=1e-6)
    model = Stage2(config, Frozen(randomize(VisionEncoder(VISION), seed + 100)), language())
    return randomize(model, seed)


def batch(model: Stage2) -> Stage2Batch:
    return Stage2Batch(pixels(3), model.language.tokenizer(PROMPTS, CAPTIONS))


def count(model: torch.nn.Module) -> float:
    return round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1)


@pytest.mark.parametrize(("width", "millions"), [(2560, 107.1), (4096, 108.3)])
def test_the_number_of_weights_with_opt(width: int, millions: float) -> None:
    """BLIP-2 table 1 and 2 count 107M and 108M trainable ones for OPT of 2.7 and 6.7 billion."""
    with torch.device("meta"):
        config = transformers.OPTConfig(
            hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=1, num_attention_heads=32
        )
        lm = CausalLM(transformers.OPTForCausalLM(config), CausalTokenizer(opt_tokenizer()))
        model = Stage2(Stage2Config(), Frozen(VisionEncoder(EVA_VIT_G)), lm)
    assert count(model) == millions


def test_the_number_of_weights_with_flan_t5() -> None:
    with torch.device("meta"):
        config = transformers.T5Config(d_model=2048, num_layers=1)
        lm = EncoderDecoderLM(
            transformers.T5ForConditionalGeneration(config), EncoderDecoderTokenizer(t5_tokenizer())
        )
        model = Stage2(Stage2Config(), Frozen(VisionEncoder(EVA_VIT_G)), lm)
    assert count(model) == 106.7


@BOTH
def test_a_step_moves_what_is_trained_and_nothing_else(language: Language) -> None:
    model = tiny_stage2(language).train()
    frozen = {name: part.module for name, part in model.named_modules() if isinstance(part, Frozen)}
    assert frozen.keys() == {"vision", "language.lm"}
    before = {
        f"{part}.{name}": weight.clone()
        for part, module in frozen.items()
        for name, weight in module.state_dict().items()
    }
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert {name.split(".")[0] for name in trained} == {"ln_vision", "qformer", "projection"}
    assert not any(module.training for module in frozen.values())
    model.eval()  # without dropout the loss falls for sure
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = model(batch(model))["lm"]
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for name, weight in model.named_parameters():
        grows = not name.endswith(("key.bias", "queries"))  # what all keys share, softmax does not see
        assert not grows or not torch.equal(weight, trained[name]), name
    for part, module in frozen.items():
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, before[f"{part}.{name}"]) and weight.grad is None


@BOTH
def test_the_loss_of_a_batch_is_that_of_its_rows(language: Language) -> None:
    model = tiny_stage2(language)
    whole = batch(model)
    rows = [
        Stage2Batch(
            whole.pixels[i : i + 1], model.language.tokenizer(PROMPTS[i : i + 1], CAPTIONS[i : i + 1])
        )
        for i in range(3)
    ]
    counts = torch.tensor([int((row.texts.labels != -100).sum()) for row in rows])
    losses = torch.stack([model(row)["lm"] for row in rows])
    expected = (losses * counts).sum() / counts.sum()
    torch.testing.assert_close(model(whole)["lm"], expected, atol=CLOSE, rtol=0)
    assert losses.std() > 0.1


def test_stage_2_starts_where_stage_1_ended() -> None:
    stage1 = tiny_stage1(seed=4)
    model = start_stage2(stage1, opt(), "somewhere").eval()
    images = pixels(3)
    queries = stage1.qformer.look(stage1.image_tokens(images))
    assert_close(model.soft_prompt(images), model.projection(queries))
    assert model.vision is stage1.vision  # a billion weights, not copied
    assert model.config.vision_source == stage1.config.vision_source
    assert not any(
        part in name for name in model.state_dict() for part in ("words", "positions", "text_mlp", "lm_head")
    )
    model.qformer.queries.data.zero_()
    assert stage1.qformer.queries.abs().sum() > 0


# Use


def test_answers(tmp_path: Path) -> None:
    model = tiny_stage2(opt)
    images, questions = pixels(2), ["What is on the left?", "Is it red?!"]
    decoding = Decoding(beams=3, min_length=1, max_length=6)
    asked = ["Question: what is on the left? Answer:", "Question: is it red? Answer:"]
    assert model.answer(images, questions, decoding) == model.caption(images, asked, decoding)
    short = [one.replace("Answer", "Short answer") for one in asked]
    assert model.answer(images, questions, decoding, template=SHORT_QUESTION) == model.caption(
        images, short, decoding
    )


@BOTH
def test_nucleus_captions_depend_on_their_own_seed(language: Language) -> None:
    model = tiny_stage2(language)
    nucleus = Decoding(top_p=0.9, min_length=3, max_length=8)
    together = model.caption(pixels(3), PROMPTS, nucleus, [1, 2, 3])
    assert together[1:] == model.caption(pixels(3)[1:], PROMPTS[1:], nucleus, [2, 3])
    assert together != model.caption(pixels(3), PROMPTS, nucleus, [4, 5, 6])
