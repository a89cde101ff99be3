"""Clip from the weights of others: transformers' CLIPModel folders, and the folders of open_clip on the hub.

As strict as `blip.weights`: a weight that is missing, left over or misshapen is named in a ValueError.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.checkpoint import CONFIG_FILE, check_names, fill, read_json
from blip.clip import Clip, ClipConfig, ClipTextConfig
from blip.image import MEAN, STD
from blip.tokenizer import ClipTokenizer
from blip.vision import VisionConfig, interpolate_position_embedding
from blip.weights_files import demand, locate, read_tensors

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
POSITIONS = "vision.vit.pos_embed"
LEFTOVERS = re.compile(r"(text|vision)_model\.embeddings\.position_ids|attn_mask")  # can be computed
ACTIVATIONS = ("quick_gelu", "gelu")

# Ours -> theirs, of what is not in a block. An asterisk: theirs is transposed.
_HUGGING_FACE = {
    "vision.vit.cls_token": "vision_model.embeddings.class_embedding",
    POSITIONS: "vision_model.embeddings.position_embedding.weight",
    "vision.vit.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "vision.vit.norm_pre": "vision_model.pre_layrnorm",
    "vision.vit.norm": "vision_model.post_layernorm",
    "text.word": "text_model.embeddings.token_embedding",
    "text.position": "text_model.embeddings.position_embedding",
    "text.norm": "text_model.final_layer_norm",
    "heads.vision_proj": "visual_projection",
    "heads.text_proj": "text_projection",
    "log_scale": "logit_scale",
}
_OPEN_CLIP = {
    "vision.vit.cls_token": "visual.class_embedding",
    POSITIONS: "visual.positional_embedding",
    "vision.vit.patch_embed.proj": "visual.conv1",
    "vision.vit.norm_pre": "visual.ln_pre",
    "vision.vit.norm": "visual.ln_post",
    "text.word": "token_embedding",
    "text.position.weight": "positional_embedding",
    "text.norm": "ln_final",
    "heads.vision_proj.weight": "visual.proj*",
    "heads.text_proj.weight": "text_projection*",
    "log_scale": "logit_scale",
}
_HUGGING_FACE_BLOCK = {
    "norm1": ("layer_norm1",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "proj": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
_OPEN_CLIP_BLOCK = {
    "norm1": "ln_1.",
    "qkv": "attn.in_proj_",
    "proj": "attn.out_proj.",
    "norm2": "ln_2.",
    "fc1": "mlp.c_fc.",
    "fc2": "mlp.c_proj.",
}


def is_clip(source: str | Path) -> bool:
    """Whether `load_clip` is the one to load this. A name on the hub is downloaded."""
    path = locate(source)
    if not path.is_dir():
        return False
    found = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    return found.get("model_type") == "clip" or (path / OPEN_CLIP_CONFIG).is_file()


def weights_place(source: str | Path) -> Path:
    """The folder, or the file of open_clip, weights are read from; transformers' where there are both."""
    path = locate(source)
    if (path / CONFIG_FILE).is_file() or not (path / OPEN_CLIP_CONFIG).is_file():
        return path
    for name in OPEN_CLIP_WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds no weights; expected {' or '.join(OPEN_CLIP_WEIGHTS)}")


def load_clip(
    source: str | Path, *, image_size: int | None = None, tokenizer: ClipTokenizer | None = None
) -> Clip:
    """The model of a transformers or open_clip folder, or of its name on the hub, in eval mode.

    image_size: resample the position embeddings to images of this size. tokenizer: else that of the folder.
    Raises ValueError where the weights are not exactly those of a CLIP with a ViT.
    """
    place = weights_place(source)
    if not locate(source).is_dir():
        raise ValueError(f"{source} is a file; a CLIP is read from a folder of transformers or of open_clip")
    hugging_face = place.is_dir()
    folder = place if hugging_face else place.parent
    config = (
        of_transformers(folder / CONFIG_FILE) if hugging_face else of_open_clip(folder / OPEN_CLIP_CONFIG)
    )
    if image_size is not None:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
    with torch.device("meta"):
        model = Clip(config, tokenizer or ClipTokenizer.of(folder))
    tensors = _to_ours(model.state_dict(), read_tensors(place), hugging_face, str(source))
    if image_size is not None:
        tensors[POSITIONS] = interpolate_position_embedding(tensors[POSITIONS], config.vision.tokens)
    return fill(model, tensors, str(source))


def _to_ours(
    wanted: Mapping[str, Tensor], theirs: Mapping[str, Tensor], hugging_face: bool, source: str
) -> dict[str, Tensor]:
    """Their weights by our names, each used once."""
    found, missing, used = {}, [], set()
    for name in wanted:
        outside, transposed = outside_names(name, hugging_face)
        used.update(outside)
        absent = [other for other in outside if other not in theirs]
        missing += absent
        if not absent:
            parts = [theirs[other] for other in outside]
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
            if transposed:
                tensor = tensor.T.contiguous()
            if name in (POSITIONS, "vision.vit.cls_token"):
                tensor = tensor.view(1, -1, tensor.size(-1))
            found[name] = tensor
    left = {name for name in theirs.keys() - used if not LEFTOVERS.fullmatch(name)}
    check_names(source, missing, left)
    return found


def outside_names(name: str, hugging_face: bool) -> tuple[list[str], bool]:
    """The weights, one or three after each other, that make up one of Clip; whether they are transposed."""
    names = _HUGGING_FACE if hugging_face else _OPEN_CLIP
    if name in names:
        return [names[name].rstrip("*")], names[name].endswith("*")
    if block := re.fullmatch(r"(vision\.vit|text)\.blocks\.(\d+)\.(?:\w+\.)?(\w+)\.(weight|bias)", name):
        tower, number, part, kind = block.groups()
        if hugging_face:
            start = f"{'text' if tower == 'text' else 'vision'}_model.encoder.layers.{number}"
            return [f"{start}.{other}.{kind}" for other in _HUGGING_FACE_BLOCK[part]], False
        start = f"{'' if tower == 'text' else 'visual.'}transformer.resblocks.{number}"
        return [f"{start}.{_OPEN_CLIP_BLOCK[part]}{kind}"], False
    module, kind = name.rsplit(".", 1)
    return [f"{names[module]}.{kind}"], False


def of_transformers(path: Path) -> ClipConfig:
    """What config.json leaves out has the default that transformers gives it."""
    found = read_json(path)
    demand(path, "it", found, {"model_type": "clip"})
    vision, text = found.get("vision_config") or {}, found.get("text_config") or {}
    return ClipConfig(
        VisionConfig(
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 32),
            width=vision.get("hidden_size", 768),
            depth=vision.get("num_hidden_layers", 12),
            heads=vision.get("num_attention_heads", 12),
            hidden=vision.get("intermediate_size", 3072),
            eps=vision.get("layer_norm_eps", 1e-5),
            pre_norm=True,
            quick_gelu=_is_quick(path, vision),
        ),
        ClipTextConfig(
            vocab_size=text.get("vocab_size", 49408),
            width=text.get("hidden_size", 512),
            depth=text.get("num_hidden_layers", 12),
            heads=text.get("num_attention_heads", 8),
            hidden=text.get("intermediate_size", 2048),
            max_positions=text.get("max_position_embeddings", 77),
            eps=text.get("layer_norm_eps", 1e-5),
            quick_gelu=_is_quick(path, text),
        ),
        embed=found.get("projection_dim", 512),
    )


def _is_quick(path: Path, section: Mapping[str, Any]) -> bool:
    kind = section.get("hidden_act", "quick_gelu")
    if kind not in ACTIVATIONS:
        raise ValueError(f"{path} has hidden_act {kind!r}; only {' and '.join(ACTIVATIONS)} are supported")
    return bool(kind == "quick_gelu")


def of_open_clip(path: Path) -> ClipConfig:
    """Of {"model_cfg": {"embed_dim", "vision_cfg", "text_cfg"}}; what else these say must be the default."""
    whole = read_json(path)
    found: dict[str, Any] = whole.get("model_cfg") or {}
    vision, text = dict(found.get("vision_cfg") or {}), dict(found.get("text_cfg") or {})
    demand(path, "preprocess_cfg", whole.get("preprocess_cfg") or {}, {"mean": list(MEAN), "std": list(STD)})
    quick = bool(found.get("quick_gelu", False))
    known = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
    known_text = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    if strange := sorted([*(vision.keys() - known), *(text.keys() - known_text)]):
        raise ValueError(
            f"{path}: {', '.join(strange)} are not those of a plain CLIP, the only kind that is read"
        )
    if not isinstance(vision.get("layers", 12), int):
        raise ValueError(f"{path}: the image encoder is a ResNet; only ViT is supported")
    width, text_width = vision.get("width", 768), text.get("width", 512)
    return ClipConfig(
        VisionConfig(
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 16),
            width=width,
            depth=vision.get("layers", 12),
            heads=width // vision.get("head_width", 64),
            hidden=int(width * vision.get("mlp_ratio", 4.0)),
            eps=1e-5,
            pre_norm=True,
            quick_gelu=quick,
        ),
        ClipTextConfig(
            vocab_size=text.get("vocab_size", 49408),
            width=text_width,
            depth=text.get("layers", 12),
            heads=text.get("heads", 8),
            hidden=int(text_width * text.get("mlp_ratio", 4.0)),
            max_positions=text.get("context_length", 77),
            quick_gelu=quick,
        ),
        embed=found.get("embed_dim", 512),
    )
