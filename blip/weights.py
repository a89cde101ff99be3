"""Models from weights: our folders, transformers' BLIP, salesforce's files (BLIP, LAVIS); BERT, ViT to start.

The weights decide what a model is: with an encoder it reads (ITC, ITM), with a decoder it writes (LM).
Nothing is skipped in silence: a weight that is missing, left over, misshapen or contradicts its twin is named
in a ValueError. Files are read as safetensors, or as pickles that cannot run code.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blip.checkpoint import (
    CONFIG_FILE,
    build,
    check_fit,
    check_names,
    is_ours,
    read_config,
    read_json,
    read_tokenizer,
)
from blip.layers import bert_init
from blip.med import MEDConfig
from blip.model import SIZES, Blip, BlipConfig
from blip.tokenizer import Tokenizer
from blip.vision import interpolate_position_embedding, pretrained_vit
from blip.vqa import BlipVQA
from blip.weights_files import Settings, demand, locate, read_settings, read_tensors
from blip.weights_names import DECODER, ENCODER, bert_name, tied_copies, to_ours
from blip.weights_shapes import depth_of, has, heads_of, shape_of, vision_of

POSITIONS = "pos_embed"
BERT_WORDS, BERT_BIAS = "embeddings.word_embeddings.weight", "cls.predictions.bias"
NOT_OF_THE_MED = (
    r"embeddings\.(token_type_embeddings\.weight|position_ids)|pooler\..*|cls\.seq_relationship\..*"
)

M = TypeVar("M", Blip, BlipVQA)


def load_blip(
    source: str | Path,
    *,
    image_size: int | None = None,
    reads: bool | None = None,
    writes: bool | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
) -> Blip:
    """The model of `source`, in eval mode.

    source: a folder of `save_pretrained`, a transformers folder or its name on the hub, or a salesforce .pth.
    image_size: resample the position embeddings to images of this size.
    reads, writes: False leaves that part of a pretrained MED out, to make a captioner or a filter of it.
    dropout, drop_path: for training; else what a folder of ours says, or BLIP's own values.
    tokenizer: or where its files lie; else those of the folder, or for outside weights bert-base-uncased.
    Raises ValueError where the weights are not exactly those of a BLIP.
    """
    path, config, tensors = _find(source, Blip)
    for part, wanted in (("reads", reads), ("writes", writes)):
        if wanted and not getattr(config.text, part):
            raise ValueError(f"{source} has no part that {part}; {part}=True needs a pretrained MED")
    vision = replace(config.vision, **_given(image_size=image_size, drop_path=drop_path))
    text = replace(config.text, **_given(reads=reads, writes=writes, dropout=dropout))
    return _build(Blip, path, replace(config, vision=vision, text=text), tensors, tokenizer)


def load_vqa(
    source: str | Path, *, image_size: int | None = None, tokenizer: Tokenizer | str | Path | None = None
) -> BlipVQA:
    """As `load_blip`, for weights fine-tuned on visual question answering."""
    path, config, tensors = _find(source, BlipVQA)
    config = replace(config, vision=replace(config.vision, **_given(image_size=image_size)))
    return _build(BlipVQA, path, config, tensors, tokenizer)


def start_vqa(
    source: str | Path,
    *,
    image_size: int | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
) -> BlipVQA:
    """A BlipVQA to be fine-tuned, made of the pretrained MED of `source`; arguments as for `load_blip`.

    Its reader is the MED's encoder, its writer the decoder; what these share is there twice from now on.
    The writer looks at the reader's states and not at image tokens. Where the two have different widths, as
    in BLIP's large, the keys and values it looks by (their matrices, not their biases) do not fit and are
    drawn anew, as salesforce/BLIP does.
    """
    path, config, tensors = _find(source, Blip)
    for part in ("reads", "writes"):
        if not getattr(config.text, part):
            raise ValueError(
                f"{source} has no part that {part}; VQA starts from a pretrained MED, which has both"
            )
    vision = replace(config.vision, **_given(image_size=image_size, drop_path=drop_path))
    config = replace(config, vision=vision, text=replace(config.text, **_given(dropout=dropout)))
    wanted = _skeleton(BlipVQA, config)
    # Copies, or what reader and writer take from the same weight would stay one weight.
    started = {name: tensors[re.sub(r"^(reader|writer)\.", "med.", name)].clone() for name in wanted}
    if config.vision.width != config.text.width:
        drawn = [name for name in wanted if re.fullmatch(r"writer\..*\.look\.(key|value)\.weight", name)]
        started |= {name: _drawn(config.text.width) for name in drawn}
    return _build(BlipVQA, path, config, started, tokenizer)


def _drawn(width: int) -> Tensor:
    """[D, D], as a new model has it."""
    layer = nn.Linear(width, width)
    bert_init(layer, width)
    return layer.weight.detach()


def init_vision(model: Blip, source: str | Path) -> None:
    """Start the vision encoder from a ViT: timm's name for it, or a file with a state dict in timm's names.

    BLIP: deit_base_patch16_224 for base, vit_large_patch16_224.augreg_in21k for large.
    """
    found = read_tensors(Path(source)) if Path(source).is_file() else pretrained_vit(str(source))
    tensors = {k: v for k, v in found.items() if not k.startswith("head.")}  # its classifier
    if POSITIONS in tensors:
        tensors[POSITIONS] = interpolate_position_embedding(tensors[POSITIONS], model.config.vision.tokens)
    vit = model.vision.vit
    check_fit(vit.state_dict(), tensors, str(source))
    vit.load_state_dict(tensors)


def init_text(model: Blip, source: str | Path) -> None:
    """Start the text stack from BERT, a Hugging Face folder or hub name: bert-base-uncased in BLIP.

    Both self-attentions start from BERT's one. Cross-attention and the rows of [DEC] and [ENC] stay as they
    were drawn, so does the LM head if BERT comes without. BERT's token types have no place in the MED.
    """
    weights, absent = model.med.state_dict(), ".look."
    names = {name: None if absent in name else bert_name(name) for name in weights}
    new = min(model.config.dec_id, model.config.enc_id)
    model.med.load_state_dict(bert_weights(source, weights, names, new, model.config.text.heads))


def bert_weights(
    source: str | Path, weights: Mapping[str, Tensor], names: Mapping[str, str | None], new: int, heads: int
) -> dict[str, Tensor]:
    """`weights` with all that the BERT of `source` has. `names` are BERT's of ours, None = not of BERT.

    BERT knows the first `new` words only, the others stay as they are; so does an LM head if BERT comes
    without. Raises ValueError if it is another BERT.
    """
    path = locate(source)
    if path.is_dir():
        _check_bert(path / CONFIG_FILE, heads)
    theirs = {_modern(name): tensor for name, tensor in read_tensors(path).items()}
    writes = any(name.startswith("lm_head.") for name in names)
    end = next(len(weights[ours]) for ours, outside in names.items() if outside == BERT_WORDS)
    if BERT_WORDS in theirs and len(theirs[BERT_WORDS]) not in (new, end):
        raise ValueError(
            f"{source} has {len(theirs[BERT_WORDS])} words, the model {new} before its own and {end} in all"
        )
    if BERT_BIAS not in theirs:
        names = {ours: None if ours.startswith("lm_head.") else outside for ours, outside in names.items()}
    wanted = {ours: outside for ours, outside in names.items() if outside is not None}
    copies, unequal = tied_copies(theirs, "", "cls.predictions.")
    unused = NOT_OF_THE_MED if writes else rf"{NOT_OF_THE_MED}|cls\..*"
    left = {k for k in theirs.keys() - set(wanted.values()) - copies if not re.fullmatch(unused, k)}
    check_names(str(source), set(wanted.values()) - theirs.keys(), left, unequal)
    started = dict(weights)
    for ours, outside in wanted.items():
        found = theirs[outside]
        if outside in (BERT_WORDS, BERT_BIAS):
            found = torch.cat([found, weights[ours][len(found) :].to(found)])
        started[ours] = found
    check_fit(weights, started, str(source))
    return started


def _find(source: str | Path, wanted: type[M]) -> tuple[Path, BlipConfig, dict[str, Tensor]]:
    """Where the weights lie, the config they imply or carry, and all of them by our names."""
    path = locate(source)
    ours = is_ours(path)
    settings = read_settings(path) if path.is_dir() and not ours else Settings()
    tensors = read_tensors(path)
    kind = read_json(path / CONFIG_FILE).get("model") if ours else _kind(tensors, source)
    if kind != wanted.__name__:
        loader = {"Blip": "load_blip", "BlipVQA": "load_vqa"}.get(str(kind), "what wrote it")
        raise ValueError(
            f"{source} is a {kind}, not a {wanted.__name__}; give weights of that kind, or in Python load it "
            f"with {loader}"
        )
    config = read_config(path, wanted.__name__, BlipConfig) if ours else _config(tensors, settings, source)
    names = _skeleton(wanted, config)
    if not ours:
        tensors = to_ours(names, tensors, str(source))
    check_fit(names, tensors, str(source))
    return path, config, tensors


def _build(
    model: type[M],
    path: Path,
    config: BlipConfig,
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer | str | Path | None,
) -> M:
    """The model of `config`, which may ask for less than `tensors` hold and for images of another size."""
    positions = f"vision.vit.{POSITIONS}"
    resized = interpolate_position_embedding(tensors[positions], config.vision.tokens)
    kept = {name: tensors[name] for name in _skeleton(model, config)} | {positions: resized}
    return build(model, config, _tokenizer(path, config, tokenizer), kept, str(path))


def _skeleton(model: type[M], config: BlipConfig) -> dict[str, Tensor]:
    """Names and shapes of all weights, without the weights."""
    with torch.device("meta"):
        return model(config).state_dict()


def _tokenizer(path: Path, config: BlipConfig, given: Tokenizer | str | Path | None) -> Tokenizer | None:
    tokenizer = tokenizer_for(path, given)
    if tokenizer and (tokenizer.dec, tokenizer.enc) != (config.dec_id, config.enc_id):
        raise ValueError(
            f"the tokenizer for {path} has [DEC] {tokenizer.dec} and [ENC] {tokenizer.enc}, the weights have "
            f"{config.dec_id} and {config.enc_id}; give the vocabulary they were trained with as tokenizer="
        )
    return tokenizer


def tokenizer_for(path: Path, given: Tokenizer | str | Path | None) -> Tokenizer | None:
    """The one given, or where its files lie; else that of the folder, for outside weights BERT's."""
    if given is None:
        found = read_tokenizer(path)
        return Tokenizer() if found is None and not is_ours(path) else found
    return given if isinstance(given, Tokenizer) else Tokenizer(given)


def _kind(theirs: Mapping[str, Tensor], source: str | Path) -> str:
    """Which of our models outside weights are, by the parts they have."""
    if any(".crossattention.self0." in name or name.startswith("cls_head.") for name in theirs):
        raise ValueError(
            f"{source} is an NLVR model; its twin cross-attention to two images is not supported"
        )
    reads, writes = has(theirs, ENCODER), has(theirs, DECODER)
    if not (reads or writes) or not (has(theirs, "visual_encoder.") or has(theirs, "vision_model.")):
        raise ValueError(
            f"{source} holds no BLIP, which has a visual_encoder or vision_model, and a text_encoder or "
            f"text_decoder; it has {', '.join(sorted({name.split('.')[0] for name in theirs})[:8])}"
        )
    return "BlipVQA" if reads and writes and not has(theirs, "itm_head.") else "Blip"


def _config(theirs: Mapping[str, Tensor], settings: Settings, source: str | Path) -> BlipConfig:
    """The config that shapes imply. Training settings (dropout, drop path, smoothing) are BLIP's own."""
    reads, writes = has(theirs, ENCODER), has(theirs, DECODER)
    stack = ENCODER if reads else f"{DECODER}bert."

    def shape(name: str) -> torch.Size:
        return shape_of(theirs, name, source)

    vision = vision_of(
        theirs, source, heads=settings.vision_heads, depth=settings.vision_depth, eps=settings.vision_eps
    )
    words, text_width = shape(f"{stack}embeddings.word_embeddings.weight")
    base = next((size for size in SIZES.values() if size.vision.width == vision.width), BlipConfig())
    dec_id = words - 2 if settings.dec_id is None else settings.dec_id
    return replace(
        base,
        vision=replace(vision, drop_path=base.vision.drop_path),
        text=MEDConfig(
            vocab_size=words,
            width=text_width,
            depth=settings.text_depth or depth_of(theirs, f"{stack}encoder.layer"),
            heads=settings.text_heads or heads_of(text_width, source),
            hidden=shape(f"{stack}encoder.layer.0.intermediate.dense.weight")[0],
            max_positions=shape(f"{stack}embeddings.position_embeddings.weight")[0],
            reads=reads,
            writes=writes,
        ),
        embed=len(theirs["vision_proj.weight"]) if "vision_proj.weight" in theirs else base.embed,
        dec_id=dec_id,
        enc_id=dec_id + 1,
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _modern(name: str) -> str:
    """A name of BERT without the model's prefix; LayerNorm's weights were gamma and beta at first."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _check_bert(path: Path, heads: int) -> None:
    found = read_json(path)
    demand(path, "it", {"model_type": None} | found, {"model_type": "bert"})
    wanted = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": heads}
    demand(path, "it", found, wanted | {"position_embedding_type": "absolute"})
