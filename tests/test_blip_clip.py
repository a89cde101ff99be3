"""Clip computes what transformers' CLIPModel does, from its folders and from open_clip's. float32, random."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from image_files import put_json
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import pixels, randomize
from torch import Tensor
from torchvision import transforms

from blip import weights_clip
from blip.checkpoint import digest
from blip.clip import Clip, ClipConfig, ClipTextConfig
from blip.image import MEAN, STD, crop_transform
from blip.model import Batch
from blip.vision import VisionConfig
from blip.weights_clip import is_clip, load_clip, weights_place

CLOSE = 1e-4
WORDS, END = 60, 59


def hf_config(act: str = "quick_gelu", **vision: Any) -> transformers.CLIPConfig:
    return transformers.CLIPConfig(
        projection_dim=24,
        text_config={
            "vocab_size": WORDS,
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 20,
            "bos_token_id": END - 1,
            "eos_token_id": END,
            "pad_token_id": END,
            "hidden_act": act,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 32,
            "patch_size": 16,
            "hidden_act": act,
            **vision,
        },
    )


def clip_folder(folder: Path, config: transformers.CLIPConfig) -> transformers.CLIPModel:
    model = randomize(transformers.CLIPModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
    model.save_pretrained(folder)
    return model


def texts() -> tuple[Tensor, Tensor]:
    """ids and mask [3, 7]; the last real token, and the padding, is END."""
    ids = torch.randint(1, END - 1, (3, 7), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([7, 4, 2])[:, None]
    ids = torch.where(torch.arange(7) < lengths - 1, ids, END)
    return ids, (torch.arange(7) < lengths).long()


@torch.no_grad()
def assert_same(ours: Clip, theirs: transformers.CLIPModel, size: int = 32) -> None:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    ids, mask = texts()
    out = theirs(input_ids=ids, pixel_values=images, attention_mask=mask, return_loss=True)
    torch.testing.assert_close(ours.encode_images(images), out.image_embeds, atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(ours.encode_texts(ids, mask), out.text_embeds, atol=CLOSE, rtol=CLOSE)
    loss = ours(Batch(images, ids, mask, torch.arange(3)))["itc"]
    torch.testing.assert_close(loss, out.loss, atol=CLOSE, rtol=CLOSE)
    assert not torch.allclose(out.image_embeds[0], out.image_embeds[1], atol=0.05)
    assert not torch.allclose(out.text_embeds[0], out.text_embeds[1], atol=0.05)


@pytest.mark.parametrize(("act", "eps"), [("quick_gelu", 1e-5), ("gelu", 1e-2)])
def test_tiny_clip(tmp_path: Path, act: str, eps: float) -> None:
    theirs = clip_folder(tmp_path, hf_config(act, layer_norm_eps=eps))
    ours = load_clip(tmp_path)
    assert is_clip(tmp_path) and weights_place(tmp_path) == tmp_path
    assert ours.log_scale.item() == pytest.approx(1.3) and ours.tokenizer is None
    assert_same(ours, theirs)


def test_what_a_config_leaves_out_has_transformers_default(tmp_path: Path) -> None:
    """ViT-B/32 and a text tower of 77 positions, as openai/clip-vit-base-patch32."""
    transformers.CLIPConfig().save_pretrained(tmp_path)
    whole = weights_clip.of_transformers(tmp_path / "config.json")
    short = put_json(
        tmp_path / "short.json", {"model_type": "clip", "text_config": {}, "vision_config": None}
    )
    assert weights_clip.of_transformers(Path(short)) == whole
    assert (whole.vision.patch_size, whole.vision.depth, whole.text.heads, whole.embed) == (32, 12, 8, 512)


def test_images_of_another_size(tmp_path: Path) -> None:
    theirs = clip_folder(tmp_path, hf_config())
    ours = load_clip(tmp_path, image_size=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.get_image_features(images, interpolate_pos_encoding=True).pooler_output
        found = ours.encode_images(images)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


# ---- open_clip -----------------------------------------------------------------------------------

BLOCK = {  # transformers -> open_clip; attention's inputs are joined
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OUTSIDE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
}
NORMS = {"vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post"}
NORMS["text_model.final_layer_norm"] = "ln_final"


def open_clip(theirs: transformers.CLIPModel) -> dict[str, Tensor]:
    """As transformers' convert_clip_original_pytorch_to_hf.py, the other way round."""
    state = theirs.state_dict()
    found = {other: state[name] for name, other in OUTSIDE.items()}
    for name, other in NORMS.items():
        found |= {f"{other}.{kind}": state[f"{name}.{kind}"] for kind in ("weight", "bias")}
    for tower, start, depth in (("vision", "visual.transformer", 2), ("text", "transformer", 3)):
        for i in range(depth):
            here, there = f"{tower}_model.encoder.layers.{i}", f"{start}.resblocks.{i}"
            for kind in ("weight", "bias"):
                found |= {f"{there}.{o}.{kind}": state[f"{here}.{n}.{kind}"] for n, o in BLOCK.items()}
                joined = [state[f"{here}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{there}.attn.in_proj_{kind}"] = torch.cat(joined)
    found["visual.proj"] = state["visual_projection.weight"].T
    found["text_projection"] = state["text_projection.weight"].T
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def open_clip_folder(folder: Path, theirs: transformers.CLIPModel, **more: Any) -> Path:
    vision = {
        "image_size": 32,
        "layers": 2,
        "width": 48,
        "head_width": 16,
        "patch_size": 16,
        "mlp_ratio": 100 / 48,
    }
    text = {"context_length": 20, "vocab_size": WORDS, "width": 32, "heads": 2, "layers": 3, "mlp_ratio": 2.5}
    model = {"embed_dim": 24, "quick_gelu": False, "vision_cfg": vision, "text_cfg": text} | more
    preprocess = {"mean": list(MEAN), "std": list(STD)}
    folder.mkdir(exist_ok=True)
    tree = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    save_file(open_clip(theirs), folder / "open_clip_model.safetensors")
    return folder


def test_open_clip(tmp_path: Path) -> None:
    theirs = clip_folder(tmp_path / "hf", hf_config("gelu"))
    folder = open_clip_folder(tmp_path / "open", theirs)
    assert is_clip(folder) and weights_place(folder).name == "open_clip_model.safetensors"
    assert_same(load_clip(folder), theirs)
    torch.save(open_clip(theirs), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()
    assert_same(load_clip(folder), theirs)
    assert len(digest(weights_place(folder))) == 64
    quick = clip_folder(tmp_path / "quick", hf_config("quick_gelu"))
    assert_same(load_clip(open_clip_folder(tmp_path / "open_quick", quick, quick_gelu=True)), quick)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"vision_cfg": {"layers": [3, 4, 6, 3], "width": 64}}, "is a ResNet; only ViT"),
        ({"vision_cfg": {"timm_model_name": "x"}}, "timm_model_name are not those of a plain CLIP"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "hf_model_name are not those"),
        ({"embed_dim": 25}, r"heads\.text_proj\.weight \[24, 32\] instead of \[25, 32\]"),
    ],
)
def test_other_models_of_open_clip_are_refused(tmp_path: Path, more: Any, complaint: str) -> None:
    theirs = clip_folder(tmp_path / "hf", hf_config("gelu"))
    with pytest.raises(ValueError, match=complaint):
        load_clip(open_clip_folder(tmp_path / "open", theirs, **more))


def test_other_weights_are_named(tmp_path: Path) -> None:
    clip_folder(tmp_path, hf_config())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    old = tensors | {"text_model.embeddings.position_ids": torch.arange(20)[None]}
    save_file(old, path)
    load_clip(tmp_path)  # what old files hold besides, and can be computed
    strange = {k: v for k, v in tensors.items() if not k.endswith("1.self_attn.k_proj.weight")}
    save_file(strange | {"extra.weight": torch.zeros(1)}, path)
    missing = (
        r"missing: text_model\.encoder\.layers\.1\.self_attn\.k_proj\.weight, vision_model\..*k_proj.weight; "
        r"unexpected: extra\.weight"
    )
    with pytest.raises(ValueError, match=missing):
        load_clip(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("quick_gelu", "relu"))
    with pytest.raises(ValueError, match="hidden_act 'relu'; only quick_gelu and gelu"):
        load_clip(tmp_path)
    config.write_text(json.dumps({"model_type": "siglip"}))
    assert not is_clip(tmp_path)
    with pytest.raises(ValueError, match="model_type 'siglip'; only 'clip'"):
        load_clip(tmp_path)
    assert not is_clip(path)
    with pytest.raises(ValueError, match="is a file; a CLIP is read from a folder"):
        load_clip(path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no weights; expected open_clip_model\.safetensors"):
        load_clip(tmp_path / "empty")


# ---- the loss, the text, the image ---------------------------------------------------------------


def tiny_clip() -> Clip:
    text = ClipTextConfig(WORDS, width=32, depth=2, heads=2, hidden=64, max_positions=20)
    vision = VisionConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3, pre_norm=True)
    return randomize(Clip(ClipConfig(vision, text, embed=16))).double()


def test_the_loss_is_that_of_a_double_loop() -> None:
    """Texts of the same image share the mass; else it is the pseudocode of the paper's figure 3."""
    clip, (ids, mask) = tiny_clip(), texts()
    for image_ids in ([0, 1, 2], [5, 5, 7]):
        batch = Batch(pixels(3).double(), ids, mask, torch.tensor(image_ids))
        images, words = clip.encode_images(batch.pixels), clip.encode_texts(ids, mask)
        expected = torch.zeros((), dtype=torch.float64)
        for i in range(3):
            same = [j for j in range(3) if image_ids[j] == image_ids[i]]
            for one, others in ((images[i], words), (words[i], images)):
                logits = torch.stack([clip.log_scale.exp() * (one * other).sum() for other in others])
                expected -= logits.log_softmax(0)[same].mean() / 6
        torch.testing.assert_close(clip(batch)["itc"], expected)


def test_every_weight_learns_and_the_scale_stops_at_100() -> None:
    clip, (ids, mask) = tiny_clip(), texts()
    sum(clip(Batch(pixels(3).double(), ids, mask, torch.arange(3))).values()).backward()
    assert [name for name, weight in clip.named_parameters() if weight.grad is None] == []
    with torch.no_grad():
        clip.log_scale.fill_(9.0)
    clip.after_step()
    assert clip.log_scale.exp().item() == pytest.approx(100)
    fresh = Clip(ClipConfig(clip.config.vision, clip.config.text, 16))
    assert fresh.log_scale.exp().item() == pytest.approx(1 / 0.07)


def test_no_word_sees_a_later_one() -> None:
    clip, (ids, _) = tiny_clip(), texts()
    later = ids.clone()
    later[:, 4:] = 7
    assert torch.equal(clip.text(ids)[:, :4], clip.text(later)[:, :4])
    assert not torch.allclose(clip.text(ids)[:, 4:], clip.text(later)[:, 4:])


def write_tokenizer(folder: Path) -> None:
    """WORDS words: letters, two merges, and the two special tokens last, as in CLIP."""
    letters = "abcdefghijklmnoprstuvw"
    names = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "!</w>"]
    names += [f"unused {i}" for i in range(WORDS - 2 - len(names))] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("r", "e"), ("re", "d</w>")]
    transformers.CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


def test_words_come_from_the_folder(tmp_path: Path) -> None:
    clip_folder(tmp_path, hf_config())
    write_tokenizer(tmp_path)
    clip = load_clip(tmp_path)
    assert clip.tokenizer is not None
    ids, mask = clip.tokenizer(["a RED cat", "red", "<|endoftext|>"], 77)
    start, end = END - 1, END
    letters = "abcdefghijklmnoprstuvw"
    a, red, c, t = (22 + letters.index("a"), 45, letters.index("c"), 22 + letters.index("t"))
    assert ids[0].tolist()[:7] == [start, a, red, c, letters.index("a"), t, end]
    assert ids[1].tolist()[:3] == [start, red, end] and mask[1].sum() == 3
    assert mask[2].sum() > 9  # a text is nothing but words: eleven signs or so, not one
    cut, real = clip.tokenizer(["a red cat"], 4)
    assert cut.tolist() == [[start, a, red, end]] and real.sum() == 4
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    assert theirs(["a RED cat"])["input_ids"][0] == ids[0].tolist()[:7]


@pytest.mark.parametrize("shape", [(40, 30), (31, 57), (32, 32), (20, 9)])
def test_images_are_cropped_as_by_openai(shape: tuple[int, int]) -> None:
    """clip/clip.py `_transform`, by torchvision."""
    noise = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    theirs = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    torch.testing.assert_close(crop_transform(image, 32), theirs(image), atol=1e-5, rtol=0)
