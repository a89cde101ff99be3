"""Weights of others: salesforce's files, Hugging Face folders, BERT, ViT; and every way they can be wrong."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_blip_parity import (
    WORDS,
    assert_close,
    assert_same_captioner,
    assert_same_filter,
    assert_same_vqa,
    hf_config,
)
from tiny import pixels, randomize, tiny_blip, tiny_config, tiny_tokenizer, tiny_vqa
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

from blip import Blip, export_hf, load_blip, load_vqa
from blip.checkpoint import digest, save_model
from blip.tokenizer import Tokenizer
from blip.weights import init_text, init_vision

Tensors = dict[str, Tensor]
Theirs = BlipForConditionalGeneration | BlipForImageTextRetrieval | BlipForQuestionAnswering
ROOT = Path(__file__).resolve().parent.parent

TO_SALESFORCE = [  # transformers' convert_blip_original_pytorch_to_hf.py, the other way round
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.post_layernorm", "visual_encoder.norm"),
    (r"^vision_model\.encoder\.layers", "visual_encoder.blocks"),
    (r"\.self_attn\.projection", ".attn.proj"),
    (r"\.self_attn\.qkv", ".attn.qkv"),
    (r"\.layer_norm(\d)", r".norm\1"),
]


def salesforce(model: Theirs) -> Tensors:
    """The state dict under salesforce's names, with its buffers and the tied copies."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in TO_SALESFORCE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.clone()
    for stack in ("text_encoder", "text_decoder.bert"):
        if f"{stack}.embeddings.word_embeddings.weight" in renamed:
            renamed[f"{stack}.embeddings.position_ids"] = torch.arange(20)[None]
    return renamed


def pair() -> tuple[BlipForConditionalGeneration, BlipForImageTextRetrieval]:
    """A captioner and a filter that share all but text self-attention, as a pretrained MED does."""
    captioner = randomize(BlipForConditionalGeneration(salesforce_config()), 1)
    retrieval = randomize(BlipForImageTextRetrieval(salesforce_config()), 2)
    retrieval.vision_model.load_state_dict(captioner.vision_model.state_dict())
    shared = {k: v for k, v in captioner.text_decoder.bert.state_dict().items() if ".attention." not in k}
    retrieval.text_encoder.load_state_dict(retrieval.text_encoder.state_dict() | shared)
    return captioner, retrieval


def salesforce_config() -> transformers.BlipConfig:
    """64 channels per head: 3 and 2 heads. LayerNorm's eps as in salesforce's code."""
    return hf_config(192, 128, layer_norm_eps=1e-6)


def pretrained() -> tuple[Tensors, BlipForConditionalGeneration, BlipForImageTextRetrieval]:
    captioner, retrieval = pair()
    tensors = salesforce(captioner) | salesforce(retrieval) | {"temp": torch.tensor(0.03)}
    teachers = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
    tensors |= {k.replace(".", "_m.", 1): v for k, v in tensors.items() if k.startswith(teachers)}
    queues = {
        "image_queue": torch.zeros(24, 8),
        "text_queue": torch.zeros(24, 8),
        "queue_ptr": torch.zeros(1),
    }
    return tensors | queues, captioner, retrieval


def write(path: Path, tensors: Tensors) -> Path:
    torch.save({"model": tensors, "epoch": 3, "config": {"image_size": 32}}, path)
    return path


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "words")


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
    with pytest.raises(ValueError, match="is a BlipVQA, not a Blip; load it with load_vqa"):
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


def test_every_file_format_of_a_folder(tmp_path: Path, words: Tokenizer) -> None:
    theirs = randomize(BlipForConditionalGeneration(hf_config()))
    single, sharded, pickled = (tmp_path / name for name in ("single", "sharded", "pickled"))
    theirs.save_pretrained(single)
    theirs.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    pickled.mkdir()
    (pickled / "config.json").write_text((single / "config.json").read_text())
    old = theirs.state_dict() | {"text_decoder.bert.embeddings.position_ids": torch.arange(20)[None]}
    torch.save(old, pickled / "pytorch_model.bin")
    for folder in (single, sharded, pickled):
        assert_same_captioner(load_blip(folder, tokenizer=words), theirs)
    next(sharded.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"00002.*missing or damaged"):
        load_blip(sharded, tokenizer=words)


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


# Wrong weights


@pytest.fixture(scope="module")
def whole() -> Tensors:
    return pretrained()[0]


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


def hf_folder(folder: Path, tensors: Tensors | None = None, **config: object) -> Path:
    randomize(BlipForConditionalGeneration(hf_config())).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    save_file(load_file(folder / "model.safetensors") | (tensors or {}), folder / "model.safetensors")
    return folder


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


def test_damaged_and_absent_files(tmp_path: Path, words: Tokenizer) -> None:
    folder = hf_folder(tmp_path / "hf")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for end in (0, 5, 1000, len(content) - 1):
        file.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged"):
            load_blip(folder, tokenizer=words)
    file.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_blip(folder, tokenizer=words)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files of its own folder"):
        load_blip(folder, tokenizer=words)
    with pytest.raises(ValueError, match=r"absent\.pth does not exist"):
        load_blip(tmp_path / "absent.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_blip(tmp_path / "empty")


class Bomb:
    """Pickled, it runs a command when unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    torch.save({"model": {"text_proj.weight": Bomb(trace)}}, folder / "pytorch_model.bin")
    torch.save({"model": {"text_proj.weight": Bomb(trace)}}, tmp_path / "model.pth")
    for source in (folder, tmp_path / "model.pth"):
        with pytest.raises(ValueError, match="is refused"):
            load_blip(source)
        with pytest.raises(ValueError, match=r"is refused|model_type"):
            init_text(tiny_blip(), source)
    with pytest.raises(ValueError, match="is refused"):
        init_vision(tiny_blip(), tmp_path / "model.pth")
    assert not trace.exists()


# The hub


def test_a_hub_name_is_loaded_from_the_cache_and_its_absence_is_explained(tmp_path: Path) -> None:
    """In another process, since the hub's library reads its settings once. No network is used."""
    folder = tmp_path / "hub" / "models--someone--blip" / "snapshots" / ("0" * 40)
    hf_folder(folder)
    tiny_tokenizer(folder)
    refs = tmp_path / "hub" / "models--someone--blip" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    torch.save(
        {"model": salesforce(randomize(BlipForConditionalGeneration(salesforce_config())))},
        tmp_path / "x.pth",
    )
    code = (
        "from blip import load_blip\n"
        "print(load_blip('someone/blip').config.text.vocab_size)\n"
        f"for source in ('someone/else', {str(tmp_path / 'x.pth')!r}):\n"
        "    try: load_blip(source)\n"
        "    except ValueError as error: print(error)\n"
    )
    settings = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True
    )
    size, absent, no_words = done.stdout.splitlines()
    assert size == str(WORDS)
    assert absent.startswith(
        "someone/else is no local file or folder, and cannot be had from the Hugging Face hub"
    )
    assert "vocabulary" in no_words  # salesforce's files carry none, and there is no network to fetch BERT's


# BERT and ViT


def bert(words: int = WORDS - 2) -> transformers.BertForMaskedLM:
    config = transformers.BertConfig(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    model = randomize(transformers.BertForMaskedLM(config))
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # BLIP leaves them out
    return model


@torch.no_grad()
def assert_starts_as_bert(ours: Blip, theirs: transformers.BertForMaskedLM) -> None:
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    mask = (ids != 0).long()
    states = theirs.bert(ids, attention_mask=mask).last_hidden_state
    assert_close(ours.med.encode(ids, mask), states)
    state = ours.med.state_dict()
    for name in state:
        if ".write." in name:
            assert torch.equal(state[name], state[name.replace(".write.", ".read.")])


def test_text_starts_from_bert(tmp_path: Path) -> None:
    theirs = bert()
    theirs.save_pretrained(tmp_path / "bert")
    ours, drawn = tiny_blip(), tiny_blip().state_dict()
    init_text(ours, tmp_path / "bert")
    assert_starts_as_bert(ours, theirs)
    states = torch.randn(3, 32)
    assert_close(ours.med.logits(states)[:, : WORDS - 2], theirs.cls(states))
    for name, tensor in ours.state_dict().items():
        if ".look." in name or not name.startswith("med."):
            assert torch.equal(tensor, drawn[name])  # cross-attention is not BERT's, images and heads neither
    assert torch.equal(ours.med.embeddings.word.weight[-2:], drawn["med.embeddings.word.weight"][-2:])


@pytest.mark.parametrize("writes", [True, False])
def test_text_starts_from_older_and_headless_berts(tmp_path: Path, writes: bool) -> None:
    theirs = bert()
    tensors = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in theirs.state_dict().items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    tensors["bert.pooler.dense.weight"] = tensors["cls.seq_relationship.weight"] = torch.zeros(2, 2)
    theirs.bert.save_pretrained(tmp_path / "headless")
    for source in (write(tmp_path / "bert.pth", tensors), tmp_path / "headless"):
        ours = tiny_blip(writes=writes)
        init_text(ours, source)
        assert_starts_as_bert(ours, theirs)


def test_a_bert_that_does_not_fit(tmp_path: Path) -> None:
    theirs = bert()
    theirs.save_pretrained(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(file)
    key = "bert.encoder.layer.1.attention.self.key.bias"
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.1\.attention\.self\.key\.bias"):
        init_text(tiny_blip(), tmp_path / "bert")
    save_file(tensors | {"bert.encoder.layer.2.attention.self.key.bias": torch.zeros(32)}, file)
    with pytest.raises(ValueError, match=r"unexpected: encoder\.layer\.2"):
        init_text(tiny_blip(), tmp_path / "bert")
    bert(words=30).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"has 30 words, the model 48 before"):
        init_text(tiny_blip(), tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    with pytest.raises(ValueError, match="num_attention_heads 8; only 4"):
        init_text(tiny_blip(), tmp_path / "bert")
    with pytest.raises(ValueError, match="model_type 'blip'; only 'bert'"):
        init_text(tiny_blip(), hf_folder(tmp_path / "hf"))


@pytest.mark.parametrize("size", [32, 48])
def test_vision_starts_from_a_file_of_timm(tmp_path: Path, size: int) -> None:
    vit = timm.models.VisionTransformer(img_size=size, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    blip, image = tiny_blip(), pixels(2)
    init_vision(blip, write(tmp_path / "deit.pth", randomize(vit).state_dict()))
    positions = timm.layers.resample_abs_pos_embed(vit.pos_embed, [2, 2], antialias=False)
    vit.set_input_size(img_size=32)
    with torch.no_grad():
        vit.pos_embed.copy_(positions)  # its own resampling smooths, BLIP's does not
        assert_close(blip.image_tokens(image), vit.forward_features(image))


def test_a_vit_that_does_not_fit(tmp_path: Path) -> None:
    vit = timm.models.VisionTransformer(img_size=32, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.2"):
        init_vision(tiny_blip(), write(tmp_path / "deep.pth", vit.state_dict()))


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
