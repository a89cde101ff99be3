"""Weights of others under our names: salesforce's and Hugging Face's; every way they can fail to fit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import transformers
from foreign_weights import Tensors, bert, hf_folder, pair, pretrained, salesforce, write
from test_blip_parity import WORDS, assert_same_captioner, assert_same_filter, assert_same_vqa, hf_config
from tiny import pixels, randomize, tiny_blip, tiny_config, tiny_tokenizer, tiny_vqa
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering

from blip import Blip, export_hf, load_blip, load_vqa
from blip.checkpoint import digest, save_model
from blip.tokenizer import Tokenizer


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "words")


@pytest.fixture(scope="module")
def whole() -> Tensors:
    return pretrained()[0]


def test_a_pretrained_file_has_all_three(tmp_path: Path, words: Tokenizer) -> None:
    tensors, captioner, retrieval = pretrained()
    ours = load_blip(write(tmp_path / "model_base.pth", tensors), tokenizer=words)
    assert ours.config.text.reads and ours.config.text.writes and not ours.training
    assert (ours.config.vision.heads, ours.config.text.heads, ours.config.embed) == (3, 2, 24)
    assert (ours.config.dec_id, ours.config.enc_id) == (WORDS - 2, WORDS - 1)
    assert ours.temperature.item() == pytest.approx(0.03)
    assert_same_captioner(ours, captioner)
    assert_same_filter(ours, retrieval)


def test_a_captioner_file(tmp_path: Path, words: Tokenizer) -> None:
    captioner, _ = pair()
    ours = load_blip(write(tmp_path / "model_base_caption.pth", salesforce(captioner)), tokenizer=words)
    assert not ours.config.text.reads
    assert_same_captioner(ours, captioner)


@pytest.mark.parametrize("pointer", ["ptr_queue", "queue_ptr"])  # of BLIP and of LAVIS
def test_a_retrieval_file(tmp_path: Path, words: Tokenizer, pointer: str) -> None:
    _, retrieval = pair()
    more = {"temp": torch.tensor(0.02), "idx_queue": torch.zeros(1, 8), pointer: torch.zeros(1)}
    file = write(tmp_path / "model_base_retrieval_coco.pth", salesforce(retrieval) | more)
    ours = load_blip(file, tokenizer=words)
    assert not ours.config.text.writes and ours.temperature.item() == pytest.approx(0.02)
    assert_same_filter(ours, retrieval)


def test_a_vqa_file(tmp_path: Path, words: Tokenizer) -> None:
    config = hf_config(128, 128, num_attention_heads=2, layer_norm_eps=1e-6)
    theirs = randomize(BlipForQuestionAnswering(config))
    file = write(tmp_path / "model_base_vqa.pth", salesforce(theirs))
    assert_same_vqa(load_vqa(file, tokenizer=words), theirs)
    with pytest.raises(ValueError, match=r"is a BlipVQA, not a Blip; give weights.*load it with load_vqa"):
        load_blip(file, tokenizer=words)


def test_training_loaded_weights_leaves_their_file_alone(
    tmp_path: Path, words: Tokenizer, whole: Tensors
) -> None:
    file = write(tmp_path / "model_base.pth", whole)
    before, ours = digest(file), load_blip(file, tokenizer=words)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert digest(file) == before
    again = load_blip(file, tokenizer=words).state_dict()
    assert all(torch.allclose(again[name] + 1, tensor) for name, tensor in ours.state_dict().items())


def test_an_nlvr_file_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"text_encoder.encoder.layer.0.crossattention.self0.query.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="is an NLVR model"):
        load_blip(write(tmp_path / "model_base_nlvr.pth", tensors))


def test_parts_of_a_pretrained_med(tmp_path: Path, words: Tokenizer) -> None:
    tensors, captioner, retrieval = pretrained()
    file = write(tmp_path / "model_base.pth", tensors)
    start = load_blip(file, tokenizer=words, reads=False, dropout=0.0)
    assert not start.config.text.reads and start.config.text.dropout == 0
    assert_same_captioner(start, captioner)
    load_blip(file, tokenizer=words).save_pretrained(tmp_path / "ours")
    filter_ = load_blip(tmp_path / "ours", writes=False, drop_path=0.1)
    assert not filter_.config.text.writes and filter_.config.vision.drop_path == 0.1
    assert_same_filter(filter_, retrieval)
    filter_.save_pretrained(tmp_path / "filter")
    with pytest.raises(ValueError, match="has no part that writes"):
        load_blip(tmp_path / "filter", writes=True)


@pytest.mark.parametrize("size", [64, 48])
def test_images_of_another_size(tmp_path: Path, size: int) -> None:
    blip = randomize(tiny_blip())
    save_model(blip, tmp_path / "med")
    bigger = load_blip(tmp_path / "med", image_size=size)
    grid = size // 16
    expected = timm.layers.resample_abs_pos_embed(
        blip.state_dict()["vision.vit.pos_embed"], [grid, grid], num_prefix_tokens=1, antialias=False
    )
    torch.testing.assert_close(bigger.state_dict()["vision.vit.pos_embed"], expected)
    assert bigger.config.vision.image_size == size
    assert bigger.image_tokens(torch.zeros(1, 3, size, size)).shape == (1, grid * grid + 1, 24)
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        load_blip(tmp_path / "med", image_size=40)


def test_half_precision_weights_load_as_float32(tmp_path: Path, words: Tokenizer) -> None:
    theirs = randomize(BlipForConditionalGeneration(hf_config())).half()
    theirs.save_pretrained(tmp_path / "half")
    ours = load_blip(tmp_path / "half", tokenizer=words)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_captioner(ours, theirs.float())


def test_the_tokenizer_of_a_folder_is_used_and_must_fit(tmp_path: Path) -> None:
    randomize(BlipForConditionalGeneration(hf_config())).save_pretrained(tmp_path / "hf")
    tiny_tokenizer(tmp_path / "hf")
    ours = load_blip(tmp_path / "hf")
    assert ours.tokenizer is not None and ours.tokenizer.enc == WORDS - 1
    tiny_tokenizer(tmp_path / "other", size=WORDS + 5)
    with pytest.raises(ValueError, match=r"\[DEC\] 53 and \[ENC\] 54, the weights have 48 and 49"):
        load_blip(tmp_path / "hf", tokenizer=tmp_path / "other")


def test_a_convolutional_stem_is_kept_and_cannot_be_exported(tmp_path: Path) -> None:
    config = tiny_config()
    blip = Blip(replace(config, vision=replace(config.vision, stem=(4, 8, 12, 16))))
    blip.image_tokens(pixels(2))  # in training mode: the stem's batch norms take their statistics
    save_model(blip, tmp_path / "med")
    back = load_blip(tmp_path / "med")
    assert back.config == blip.config
    assert torch.equal(back.image_tokens(pixels(2)), blip.eval().image_tokens(pixels(2)))
    with pytest.raises(ValueError, match="convolutional stem"):
        export_hf(back, tmp_path / "hf")


# Wrong weights


LAYER = "text_encoder.encoder.layer.1."


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("itm_head.bias"), r"missing: itm_head\.bias"),
        (lambda t: t.pop(f"{LAYER}attention.self.key.bias"), rf"missing: {LAYER}attention\.self\.key\.bias"),
        (lambda t: t.pop(f"{LAYER}intermediate.dense.bias"), rf"missing: {LAYER}intermediate\.dense\.bias"),
        (lambda t: t.pop("visual_encoder.pos_embed"), r"missing: visual_encoder\.pos_embed"),
        (lambda t: t.pop("visual_encoder.blocks.0.attn.qkv.bias"), r"missing: visual_encoder\.blocks\.0"),
        (lambda t: t.update({"adapter.weight": torch.zeros(1)}), r"unexpected: adapter\.weight"),
        (
            lambda t: t.update({"text_proj.weight": torch.zeros(24, 5)}),
            r"text_proj\.weight \[24, 5\] instead of",
        ),
        (
            lambda t: t[f"{LAYER}crossattention.self.query.weight"].add_(1e-3),
            r"text_decoder\.bert\.encoder\.layer\.1\.crossattention\.self\.query\.weight differs from "
            rf"{LAYER}crossattention",
        ),
        (
            lambda t: t["text_decoder.cls.predictions.decoder.weight"].add_(1),
            r"decoder\.weight differs from text_decoder\.bert\.embeddings\.word_embeddings\.weight",
        ),
        (
            lambda t: t["text_decoder.cls.predictions.bias"].add_(1),
            r"decoder\.bias differs from text_decoder\.cls\.predictions\.bias",
        ),
        (
            lambda t: t.update({"visual_encoder.pos_embed": torch.zeros(1, 7, 192)}),
            "7 position embeddings: not a square",
        ),
        (lambda t: t.update({"epoch": 3}), "epoch is no tensor"),
    ],
)
def test_wrong_weights_are_named(
    tmp_path: Path,
    words: Tokenizer,
    whole: Tensors,
    change: Callable[[Tensors], object],
    complaint: str,
) -> None:
    tensors = {name: tensor.clone() for name, tensor in whole.items()}
    change(tensors)
    with pytest.raises(ValueError, match=complaint):
        load_blip(write(tmp_path / "model.pth", tensors), tokenizer=words)


def test_a_config_that_asks_for_more_layers(tmp_path: Path, words: Tokenizer) -> None:
    folder = hf_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing: text_decoder\.bert\.encoder\.layer\.3.* and \d+ more"):
        load_blip(folder, tokenizer=words)


@pytest.mark.parametrize(
    ("section", "setting", "complaint"),
    [
        ("text_config", {"layer_norm_eps": 1e-5}, "text_config has layer_norm_eps 1e-05; only 1e-12"),
        ("text_config", {"hidden_act": "relu"}, "text_config has hidden_act 'relu'; only 'gelu'"),
        ("vision_config", {"hidden_act": "quick_gelu"}, "vision_config has hidden_act 'quick_gelu'"),
    ],
)
def test_settings_that_we_cannot_follow(
    tmp_path: Path, section: str, setting: dict[str, object], complaint: str
) -> None:
    folder = hf_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config[section] |= setting
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=complaint):
        load_blip(folder)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"describes a bert model \(BertForMaskedLM\)"):
        load_blip(tmp_path / "bert")
    small = {"num_hidden_layers": 1, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config=small | {"hidden_size": 64, "vocab_size": 9},
        vision_config=small | {"hidden_size": 96},
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="describes a clip model"):
        load_blip(tmp_path / "clip")
    with pytest.raises(ValueError, match="BlipModel"):
        load_blip(hf_folder(tmp_path / "hf", architectures=["BlipModel"]))
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(ValueError, match="holds no BLIP"):
        load_blip(write(tmp_path / "vit.pth", vit.state_dict()))
    save_model(tiny_vqa(), tmp_path / "vqa")
    with pytest.raises(ValueError, match="load it with load_vqa"):
        load_blip(tmp_path / "vqa")
    save_model(tiny_blip(), tmp_path / "med")
    with pytest.raises(ValueError, match="load it with load_blip"):
        load_vqa(tmp_path / "med")
