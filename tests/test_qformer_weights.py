"""Weights of transformers, LAVIS and timm come in and compute the same, ours go out; nothing goes unseen."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from foreign_weights import TO_SALESFORCE, bert
from test_blip_parity import assert_close
from tiny import pixels, randomize, tiny_batch, tiny_blip, tiny_tokenizer
from tiny_qformer import CONFIG, DEC, QFORMER, VISION, save_tower, tiny_stage1
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip.checkpoint import save_state
from blip.tokenizer import Tokenizer
from blip.vision import EVA_VIT_G, VisionEncoder
from qformer import Stage1, export_hf, load_stage1
from qformer.frozen import Frozen
from qformer.qformer import QFormer, QFormerConfig
from qformer.stage1 import similarity
from qformer.weights import read_parts, start_stage1
from qformer.weights_names import ONLY_TEXT, tower_to_ours

Tensors = dict[str, Tensor]

IMAGE = 1408

TO_LAVIS = [  # transformers' convert_blip_2_original_to_pytorch.py, the other way round
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^qformer\.", "Qformer.bert."),
    (r"^embeddings\.", "Qformer.bert.embeddings."),
    (r"attention\.attention\.", "attention.self."),
    (r"^vision_projection", "vision_proj"),
    (r"^text_projection", "text_proj"),
    (r"^language_projection", "opt_proj"),
    *TO_SALESFORCE,
]


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "words")


def hf_config(**qformer: object) -> transformers.Blip2Config:
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
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 40,
            "use_qformer_text_input": True,
            **qformer,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": 50,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "max_position_embeddings": 64,
        },
        num_query_tokens=5,
        image_text_hidden_size=16,
    )


def retrieval(seed: int = 0) -> Blip2ForImageTextRetrieval:
    return randomize(Blip2ForImageTextRetrieval(hf_config(bos_token_id=DEC)), seed)


def lavis(model: nn.Module, leave: tuple[str, ...] = ("language_model",)) -> Tensors:
    """The state dict under LAVIS' names; biases of queries and values apart, and none of keys."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in TO_LAVIS:
            name = re.sub(pattern, replacement, name)
        if name.startswith(leave):
            continue
        if name.endswith(".attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            renamed |= {name[:-8] + "q_bias": query.clone(), name[:-8] + "v_bias": value.clone()}
        else:
            renamed[name] = tensor.clone()
    return renamed | {"Qformer.bert.embeddings.position_ids": torch.arange(40)[None]}


def of_lavis(kind: type[nn.Module] = Blip2ForImageTextRetrieval) -> nn.Module:
    """A model that LAVIS could have: images 1408 wide, 64 channels a head. Its encoder has one block."""
    config = hf_config(hidden_size=128, num_attention_heads=2)
    config.vision_config.hidden_size = config.qformer_config.encoder_hidden_size = IMAGE
    config.vision_config.num_hidden_layers, config.vision_config.num_attention_heads = 1, 16
    return randomize(kind(config))


def stage1_file(theirs: nn.Module) -> Tensors:
    """What LAVIS saves of a stage 1: no encoder, but the LM head with its copies, and the temperature."""
    tensors = lavis(theirs, leave=("visual_encoder",))
    words = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
    transform = {"dense.weight": (128, 128), "dense.bias": (128,), "LayerNorm.weight": (128,)}
    head = {f"transform.{name}": torch.randn(shape) for name, shape in transform.items()}
    head |= {"transform.LayerNorm.bias": torch.randn(128), "bias": torch.randn(50), "decoder.weight": words}
    head["decoder.bias"] = head["bias"].clone()
    tensors |= {f"Qformer.cls.predictions.{name}": tensor for name, tensor in head.items()}
    return tensors | {"temp": torch.tensor(0.03)}


def write(path: Path, tensors: Tensors) -> Path:
    torch.save({"model": tensors, "epoch": 9}, path)
    return path


def inputs(config: transformers.Blip2Config) -> tuple[Tensor, Tensor, Tensor]:
    batch = tiny_batch((1, 2, 3), seed=6)
    size = config.vision_config.image_size
    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5))
    return image, batch.ids, batch.mask


@torch.no_grad()
def assert_same(ours: Stage1, theirs: Blip2ForImageTextRetrieval) -> None:
    image, ids, mask = inputs(theirs.config)
    itc = theirs(pixel_values=image, input_ids=ids, attention_mask=mask)
    tokens = ours.image_tokens(image)
    assert_close(tokens, itc.vision_model_output.last_hidden_state)
    assert_close(ours.encode_images(image), itc.image_embeds)
    assert_close(ours.encode_texts(ids, mask), itc.text_embeds)
    assert_close(similarity(ours.encode_images(image), ours.encode_texts(ids, mask)), itc.logits_per_image)
    itm = theirs(pixel_values=image, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    assert_close(ours.match(ids, mask, tokens), itm.logits_per_image)


# transformers


def test_a_retrieval_model_computes_what_it_does_in_transformers(tmp_path: Path, words: Tokenizer) -> None:
    theirs = retrieval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_stage1(tmp_path / "hf", tokenizer=words)
    assert ours.config.vision == replace(VISION, hidden=80)
    assert ours.config.qformer == replace(QFORMER, writes=False)
    assert (ours.config.dec_id, ours.config.norm_eps, ours.config.embed) == (DEC, 1e-6, 16)
    assert not ours.training
    assert_same(ours, theirs)


def test_so_does_one_of_the_real_size(tmp_path: Path) -> None:
    """On a small encoder."""
    config = transformers.Blip2Config(
        vision_config={**hf_config().vision_config.to_dict(), "hidden_size": 48},
        qformer_config={"vocab_size": 30523, "use_qformer_text_input": True},
        text_config=hf_config().text_config.to_dict(),
    )
    with torch.device("meta"):
        theirs = Blip2ForImageTextRetrieval(config)
    theirs = randomize(theirs.to_empty(device="cpu"))
    theirs.embeddings.position_ids.copy_(torch.arange(512)[None])
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_stage1(tmp_path / "hf", tokenizer=tiny_tokenizer(tmp_path / "words", size=30524))
    assert ours.config.qformer == QFormerConfig(image_width=48, writes=False)
    assert_same(ours, theirs)


@torch.no_grad()
def test_what_looks_is_taken_from_a_stage_2(tmp_path: Path) -> None:
    theirs = randomize(Blip2ForConditionalGeneration(hf_config(use_qformer_text_input=False)))
    theirs.save_pretrained(tmp_path / "hf")
    parts = read_parts(tmp_path / "hf", text=False)
    assert parts.qformer == replace(QFORMER, vocab_size=30523, max_positions=512, text=False, writes=False)
    qformer, norm = QFormer(parts.qformer).eval(), nn.LayerNorm(24, parts.norm_eps)
    for prefix, module in (("qformer.", qformer), ("ln_vision.", norm)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in parts.tensors.items() if prefix in k})
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    expected = theirs.get_image_features(image, return_dict=True)
    vision = Frozen(VisionEncoder(parts.vision))
    vision.fill(tower_to_ours(vision.module.state_dict().keys(), parts.tower, parts.vision), "hf")
    queries = qformer.look(norm(vision(image)))
    assert_close(queries, expected.qformer_outputs.last_hidden_state)
    assert torch.equal(parts.tensors["projection.weight"], theirs.language_projection.weight)
    with pytest.raises(ValueError, match="is no stage 1 but a stage 2, for load_stage2"):
        load_stage1(tmp_path / "hf")


@pytest.mark.parametrize("hidden", [None, 80])
def test_what_is_exported_computes_the_same_in_transformers(
    tmp_path: Path, words: Tokenizer, hidden: int | None
) -> None:
    ours = tiny_stage1(config=replace(CONFIG, vision=replace(VISION, hidden=hidden)), tokenizer=words)
    export_hf(ours, tmp_path / "hf")
    theirs, told = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values())
    assert_same(ours, theirs.eval())
    again = load_stage1(tmp_path / "hf")
    assert again.config.qformer == replace(QFORMER, writes=False)
    assert (again.config.vision, again.config.dec_id) == (ours.config.vision, DEC)
    for name, weight in again.state_dict().items():
        assert name == "temperature" or torch.equal(weight, ours.state_dict()[name])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.size == {"height": 32, "width": 32}


def test_an_encoder_that_transformers_cannot_have_is_not_exported(tmp_path: Path) -> None:
    model = tiny_stage1(config=replace(CONFIG, vision=replace(VISION, final_norm=True)))
    with pytest.raises(ValueError, match=r"final_norm cannot be exported"):
        export_hf(model, tmp_path / "hf")


# LAVIS


def test_a_stage_1_of_lavis_has_the_weights_of_transformers(tmp_path: Path) -> None:
    theirs = of_lavis()
    theirs.save_pretrained(tmp_path / "hf")
    tensors = stage1_file(theirs)
    found, expected = read_parts(write(tmp_path / "stage1.pth", tensors)), read_parts(tmp_path / "hf")
    assert (found.vision, found.tower, found.dec_id, found.norm_eps) == (EVA_VIT_G, {}, 49, 1e-5)
    assert found.qformer == replace(expected.qformer, writes=True)
    assert found.qformer == replace(QFORMER, width=128, heads=2, image_width=IMAGE)
    for name, weight in expected.tensors.items():
        assert name == "temperature" or torch.equal(found.tensors.pop(name), weight)
    head = "Qformer.cls.predictions."
    renamed = {
        "bias": "bias",
        "dense.weight": "transform.dense.weight",
        "norm.bias": "transform.LayerNorm.bias",
    }
    for ours, name in renamed.items():
        assert torch.equal(found.tensors[f"qformer.lm_head.{ours}"], tensors[head + name])
    assert float(found.tensors["temperature"]) == pytest.approx(0.03)
    only = read_parts(tmp_path / "stage1.pth", text=False)
    assert not [name for name in only.tensors if re.search("text|words|head|temp", name)]
    with pytest.raises(ValueError, match=r"not among these weights; give vision=, the file, folder or timm"):
        load_stage1(tmp_path / "stage1.pth")


def test_a_stage_2_of_lavis_brings_the_encoder_that_was_trained_with_it(tmp_path: Path) -> None:
    theirs = of_lavis(Blip2ForConditionalGeneration)
    tensors = {k: v for k, v in lavis(theirs).items() if not ONLY_TEXT.fullmatch(k)}
    tensors["visual_encoder.pos_embed"] = torch.randn(1, 677, IMAGE)
    found = read_parts(write(tmp_path / "stage2.pth", tensors), text=False)
    assert found.vision == replace(EVA_VIT_G, image_size=364)
    assert found.tower["pos_embed"].shape == (1, 677, IMAGE)
    assert torch.equal(found.tensors["projection.weight"], theirs.language_projection.weight)
    assert torch.equal(found.tensors["qformer.queries"], theirs.query_tokens[0])
    narrow = {k: v[:, :8] if ".crossattention.self." in k and v.ndim == 2 else v for k, v in tensors.items()}
    with pytest.raises(ValueError, match="images of width 8; LAVIS' vision encoders have 1408 or 1024"):
        read_parts(write(tmp_path / "narrow.pth", narrow), text=False)


WRONG = [
    (lambda t: t.pop("ln_vision.bias"), "missing: ln_vision.bias"),
    (lambda t: t.update({"Qformer.bert.pooler.weight": torch.ones(1)}), "unexpected: Qformer.bert.pooler"),
    (lambda t: t.update({"temp": torch.ones(3)}), r"temperature \[3\] instead of \[\]"),
    (lambda t: t.update({"query_tokens": torch.ones(1, 5, 8)}), r"qformer.queries \[5, 8\] instead of"),
    (lambda t: t["Qformer.cls.predictions.decoder.bias"].add_(1), "decoder.bias differs from"),
    (lambda t: t.pop("query_tokens"), "holds no BLIP-2, which has query_tokens; it has Qformer, itm_head"),
    (
        lambda t: t.pop("Qformer.bert.encoder.layer.2.crossattention.self.key.bias"),
        r"missing: Qformer.*crossattention.self.key.bias",
    ),
]


@pytest.fixture(scope="module")
def good() -> Tensors:
    return stage1_file(of_lavis())


@pytest.mark.parametrize(("spoil", "message"), WRONG)
def test_what_does_not_fit_is_named(
    tmp_path: Path, good: Tensors, spoil: Callable[[Tensors], object], message: str
) -> None:
    tensors = {name: tensor.clone() for name, tensor in good.items()}
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        load_stage1(write(tmp_path / "stage1.pth", tensors))


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"query_tokens": Path("x")}}, tmp_path / "stage1.pth")
    with pytest.raises(ValueError, match="unpickling anything else can run code"):
        load_stage1(tmp_path / "stage1.pth")


# Our own folders


@torch.no_grad()
def test_a_saved_model_is_loaded_beside_its_encoder(tmp_path: Path, words: Tokenizer) -> None:
    model = tiny_stage1(tokenizer=words)
    tower = save_tower(model, tmp_path / "vit.pth")
    model.config = replace(model.config, vision_source=str(tower))
    model.save_pretrained(tmp_path / "model")
    loaded = load_stage1(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.tokenizer is not None and not loaded.training
    batch = tiny_batch((1, 2, 3))
    torch.manual_seed(0)
    expected = model(batch)
    torch.manual_seed(0)
    assert {k: float(v) for k, v in loaded(batch).items()} == {k: float(v) for k, v in expected.items()}
    save_state(tmp_path / "state.pt", loaded.state_dict())  # as a trainer does
    assert load_stage1(tmp_path / "model", dropout=0.3).config.qformer.dropout == 0.3


@torch.no_grad()
def test_an_encoder_it_was_not_trained_with_is_refused(tmp_path: Path) -> None:
    model, other = tiny_stage1(), tiny_stage1(seed=1)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="the frozen vision encoder is not among these weights; give vision="
    ):
        load_stage1(tmp_path / "model")
    right, wrong = save_tower(model, tmp_path / "vit.pth"), save_tower(other, tmp_path / "other.pth")
    assert load_stage1(tmp_path / "model", vision=right).config.vision_source == str(right)
    with pytest.raises(ValueError, match="these weights belong to a frozen vision whose sha256 begins with"):
        load_stage1(tmp_path / "model", vision=wrong)


@torch.no_grad()
def test_larger_images_have_more_positions_of_the_same_encoder(tmp_path: Path) -> None:
    model = tiny_stage1()
    model.save_pretrained(tmp_path / "model")
    tower = save_tower(model, tmp_path / "vit.pth")
    larger = load_stage1(tmp_path / "model", vision=tower, image_size=64)
    assert larger.image_tokens(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 24)
    larger.save_pretrained(tmp_path / "larger")
    again = load_stage1(tmp_path / "larger", vision=tower)
    assert torch.equal(again.vision.digest(), larger.vision.digest())
    assert not torch.equal(again.vision.digest(), model.vision.digest())


# A start


@torch.no_grad()
def test_stage_1_starts_from_bert_and_the_encoder_of_a_blip(tmp_path: Path) -> None:
    blip, start = tiny_blip(), bert(DEC)
    blip.save_pretrained(tmp_path / "blip")
    start.save_pretrained(tmp_path / "bert")
    config = replace(CONFIG, qformer=replace(QFORMER, depth=2))
    model = start_stage1(config, tmp_path / "blip", tmp_path / "bert")
    features, norm = blip.vision(pixels(2)), blip.vision.vit.norm
    assert_close(norm(model.vision(pixels(2))), features)
    theirs = start.bert.encoder.layer[1]
    block = model.qformer.blocks[1]
    for mlp in (block.query_mlp, block.text_mlp):
        assert torch.equal(mlp.up.weight, theirs.intermediate.dense.weight)
        assert torch.equal(mlp.norm.bias, theirs.output.LayerNorm.bias)
    batch = tiny_batch((1, 2))
    read = model.eval().qformer.read(batch.ids, batch.mask)
    expected = start.bert(batch.ids, attention_mask=batch.mask).last_hidden_state
    assert_close(read, expected)
    assert_close(model.qformer.logits(read)[..., :DEC], start.cls(expected))
    assert model.qformer.words.weight[DEC:].std() > 1e-3  # drawn
