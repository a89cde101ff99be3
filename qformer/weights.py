"""Stage 1 from weights: our folders, transformers' BLIP-2, LAVIS' files; BERT and a ViT to start from.

As in blip/weights.py nothing is skipped in silence. A frozen vision encoder, the tower, lies elsewhere:
LAVIS' files mostly hold nothing of it, folders of ours its sha256. One that was trained is among the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from blip.checkpoint import CONFIG_FILE, check_fit, fill, is_ours, read_config, read_json
from blip.tokenizer import Tokenizer
from blip.vision import CLIP_VIT_L, EVA_VIT_G, VisionConfig
from blip.weights import bert_weights, tokenizer_for
from blip.weights_files import demand, locate, read_tensors
from blip.weights_shapes import depth_of, has, heads_of, image_size_of, shape_of, vision_of
from qformer.qformer import QFormer, QFormerConfig
from qformer.stage1 import Stage1, Stage1Config, make_heads
from qformer.weights_names import (
    HF_TOWER,
    HUGGING_FACE,
    LAVIS,
    LAVIS_TOWER,
    QUERIES,
    TEXT_PROJECTIONS,
    bert_of,
    outside_name,
    projection_of,
    to_ours,
    tower_of,
    without_tower,
)
from qformer.weights_vision import changed, find_tower, read_vision, split_tower, take_tower


@dataclass(frozen=True)
class Parts:
    """What looks at images, of weights that are not ours, and for stage 1 what reads and writes."""

    vision: VisionConfig
    qformer: QFormerConfig
    norm_eps: float
    dec_id: int
    tensors: dict[str, Tensor]  # by our names, of all that is trained; for stage 2 with its projection
    tower: dict[str, Tensor]  # of the frozen encoder, in timm's or transformers' names; {} = not there


def load_stage1(
    source: str | Path,
    *,
    vision: str | Path | None = None,
    image_size: int | None = None,
    dropout: float | None = None,
    trains_vision: bool | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
) -> Stage1:
    """The stage 1 of `source`, in eval mode.

    source: a folder of `save_pretrained`, a transformers folder of Blip2ForImageTextRetrieval or its name on
        the hub, or a LAVIS .pth.
    vision: where the frozen encoder's weights are, see `read_vision`; else `source`, or where it says.
    image_size: resample the position embeddings to images of this size.
    dropout: for training; else what a folder of ours says, or BLIP-2's 0.1.
    trains_vision: whether the encoder is to be trained, or frozen; else as in a folder of ours, or frozen.
    tokenizer: or where its files lie; else those of the folder, or for outside weights bert-base-uncased.
    Raises ValueError where the weights are not exactly those of a stage 1, or the frozen ones not those that
    it was trained with.
    """
    path = locate(source)
    tower: dict[str, Tensor] = {}
    if is_ours(path):
        config, tensors = read_config(path, Stage1.__name__, Stage1Config), read_tensors(path)
    else:
        parts = read_parts(source)
        tensors, tower = parts.tensors, parts.tower
        embed, where = len(tensors["heads.vision_proj.weight"]), str(source) if tower else ""
        config = Stage1Config(
            parts.vision, parts.qformer, embed, parts.dec_id, parts.norm_eps, vision_source=where
        )
    config, tower = find_tower(config, tower, vision, source)
    words = tokenizer_for(path, tokenizer)
    model = _build(config, words, tensors, tower, str(source))
    wanted = changed(config, image_size, dropout, trains_vision, source)
    if wanted == config:
        return model
    rest, tower = split_tower(model.state_dict(), tower)
    return _build(wanted, words, rest, tower, str(source))


def is_blip2(source: str | Path) -> bool:
    """Whether these are a stage's weights, and not a MED's. A name on the hub is downloaded."""
    path = locate(source)
    if not path.is_dir():
        return QUERIES in read_tensors(path)
    found = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    return found.get("model") in ("Stage1", "Stage2") or found.get("model_type") == "blip-2"


def start_stage1(
    config: Stage1Config, vision: str | Path, text: str | Path | None, tokenizer: Tokenizer | None = None
) -> Stage1:
    """A Stage1 to be trained: the encoder of `vision`, see `read_vision`, and the BERT of `text`.

    A BERT is a Hugging Face folder or hub name, bert-base-uncased in BLIP-2; None = none. Both MLPs of a
    block start as BERT's one; queries, cross-attention, heads and the row of [DEC] stay as they were drawn.
    """
    model = Stage1(replace(config, vision_source="" if config.trains_vision else str(vision)), tokenizer)
    seen = take_tower(model.vision, read_vision(vision), config.vision, str(vision))
    model.load_state_dict(model.state_dict() | seen)
    if text is None:
        return model
    weights = model.qformer.state_dict()
    berts = {name: bert_of(name) for name in weights}
    started = bert_weights(text, weights, berts, config.dec_id, config.qformer.heads)
    model.qformer.load_state_dict(started)
    return model


def load_qformer(source: str | Path) -> QFormer:
    """The Q-Former of a folder of transformers' Blip2QFormerModel, in eval mode.

    It has no queries and no words of its own: 32 queries are drawn, and it only looks at images.
    """
    path = locate(source)
    theirs = {HUGGING_FACE + name: tensor for name, tensor in read_tensors(path).items()}
    model = QFormer(_qformer_config(theirs, _settings(path), False, source))
    names = [f"qformer.{name}" for name in model.state_dict() if name != "queries"]
    found = to_ours(names, theirs, str(source), text=False)
    ours = {name.removeprefix("qformer."): tensor for name, tensor in found.items()}
    return fill(model, model.state_dict() | ours, str(source))


def read_parts(source: str | Path, text: bool = True) -> Parts:
    """The parts of weights by transformers or LAVIS: of a stage 1, or without `text` of a stage 1 or 2.

    Raises ValueError where weights are missing or left over; a language model's are not looked at.
    """
    path = locate(source)
    theirs = read_tensors(path)
    if QUERIES not in theirs:
        raise ValueError(
            f"{source} holds no BLIP-2, which has {QUERIES}; it has "
            f"{', '.join(sorted({name.split('.')[0] for name in theirs})[:8])}"
        )
    if text and not has(theirs, "itm_head."):
        raise ValueError(f"{source} has no itm_head: it is no stage 1 but a stage 2, for load_stage2")
    settings = _settings(path) if path.is_dir() else _Settings()
    qformer = _qformer_config(theirs, settings, text, source)
    vision = _vision_config(theirs, settings, qformer.image_width, source)
    wanted = _trained(qformer, _embed(theirs))
    tensors = to_ours(wanted, without_tower(theirs), str(source), text)
    check_fit(wanted, tensors, str(source))
    if not text:
        tensors |= projection_of(theirs)
    return Parts(
        vision=vision,
        qformer=qformer,
        norm_eps=settings.norm_eps,
        dec_id=qformer.vocab_size - 1 if settings.dec_id is None else settings.dec_id,
        tensors=tensors,
        tower=tower_of(theirs),
    )


def _embed(theirs: Mapping[str, Tensor]) -> int:
    """E of ITC, 0 where there is none."""
    return next((len(theirs[name]) for name in TEXT_PROJECTIONS if name in theirs), 0)


def _trained(qformer: QFormerConfig, embed: int) -> dict[str, Tensor]:
    """Names and shapes of all that is trained, the projection of stage 2 aside, without the weights."""
    with torch.device("meta"):
        parts = nn.ModuleDict({"ln_vision": nn.LayerNorm(qformer.image_width), "qformer": QFormer(qformer)})
        if not qformer.text:
            return parts.state_dict()
        parts["heads"] = make_heads(qformer.width, embed)
        return parts.state_dict() | {"temperature": torch.empty(())}


def _build(
    config: Stage1Config,
    tokenizer: Tokenizer | None,
    tensors: Mapping[str, Tensor],
    tower: Mapping[str, Tensor],
    source: str,
) -> Stage1:
    """A Stage1 in eval mode, made of these weights. A digest among them must be the tower's."""
    with torch.device("meta"):
        model = Stage1(config, tokenizer)
    seen = take_tower(model.vision, tower, config.vision, source)
    return fill(model, seen | dict(tensors), source)


@dataclass(frozen=True)
class _Settings:
    """What shapes do not tell. Defaults are LAVIS'."""

    vision_heads: int | None = None
    vision_depth: int | None = None
    vision_eps: float = 1e-6
    norm_eps: float = 1e-5
    heads: int | None = None
    depth: int | None = None
    cross_every: int | None = None
    dec_id: int | None = None


def _settings(folder: Path) -> _Settings:
    """Of a transformers folder. What its config.json leaves out has the default that it has there."""
    path = folder / CONFIG_FILE
    found = read_json(path)
    if found.get("model_type") == "blip_2_qformer":
        found = {"model_type": "blip-2", "qformer_config": found}
    demand(path, "it", {"model_type": None} | found, {"model_type": "blip-2"})
    vision, qformer = found.get("vision_config") or {}, found.get("qformer_config") or {}
    demand(path, "vision_config", vision, {"hidden_act": "gelu", "qkv_bias": True})
    demand(path, "qformer_config", qformer, {"hidden_act": "gelu", "layer_norm_eps": 1e-12})
    eps = vision.get("layer_norm_eps", 1e-6)
    return _Settings(
        vision_heads=vision.get("num_attention_heads", 16),
        vision_depth=vision.get("num_hidden_layers", 39),
        vision_eps=eps,
        norm_eps=eps,
        heads=qformer.get("num_attention_heads", 12),
        depth=qformer.get("num_hidden_layers", 12),
        cross_every=qformer.get("cross_attention_frequency", 2),
        dec_id=qformer.get("bos_token_id"),  # as `export_stage1` writes it; the last word in all others
    )


def _qformer_config(
    theirs: Mapping[str, Tensor], settings: _Settings, text: bool, source: str | Path
) -> QFormerConfig:
    """The config that shapes imply, with BLIP-2's dropout."""
    hugging_face = not has(theirs, LAVIS)

    def shape(name: str) -> torch.Size:
        outside = outside_name(name, hugging_face)
        assert outside is not None, f"{name} is in no file of transformers"
        return shape_of(theirs, outside, source)

    blocks = f"{HUGGING_FACE if hugging_face else LAVIS + 'bert.'}encoder.layer"
    depth = settings.depth or depth_of(theirs, blocks)
    looking = [i for i in range(depth) if has(theirs, f"{blocks}.{i}.crossattention.")]
    width, image_width = shape("qformer.blocks.0.look.key.weight")
    default = QFormerConfig()
    return QFormerConfig(
        vocab_size=shape("qformer.words.weight")[0] if text else default.vocab_size,
        width=width,
        depth=depth,
        heads=settings.heads or heads_of(width, source),
        hidden=shape("qformer.blocks.0.query_mlp.up.weight")[0],
        queries=theirs[QUERIES].size(1) if QUERIES in theirs else default.queries,
        cross_every=settings.cross_every or (looking[1] if len(looking) > 1 else depth),
        max_positions=shape("qformer.positions.weight")[0] if text else default.max_positions,
        image_width=image_width,
        text=text,
        writes=has(theirs, f"{LAVIS}cls."),
    )


def _vision_config(
    theirs: Mapping[str, Tensor], settings: _Settings, width: int, source: str | Path
) -> VisionConfig:
    """Of the tower under transformers' names; LAVIS has one of two, told by the width of what is seen."""
    if has(theirs, HF_TOWER):
        found = vision_of(
            theirs, source, heads=settings.vision_heads, depth=settings.vision_depth, eps=settings.vision_eps
        )
        return replace(found, final_norm=False)
    known = {config.width: config for config in (EVA_VIT_G, CLIP_VIT_L)}
    if width not in known:
        raise ValueError(
            f"the Q-Former of {source} looks at images of width {width}; LAVIS' vision encoders have "
            f"{' or '.join(map(str, known))}"
        )
    positions = f"{LAVIS_TOWER}pos_embed"  # there where the encoder was trained, too: at a larger size
    if positions not in theirs:
        return known[width]
    tokens = theirs[positions].size(1)
    return replace(known[width], image_size=image_size_of(tokens, known[width].patch_size, source))
