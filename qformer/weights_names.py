"""Our names of weights -> the names that LAVIS and transformers give them.

Both name the Q-Former after BERT. transformers keeps the words outside of it, has neither LM head nor
temperature, and calls the norm of image tokens the vision encoder's last.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from blip.checkpoint import check_names
from blip.vision import VisionConfig, interpolate_position_embedding
from blip.weights_names import bert_name, tied_copies, vision_name
from qformer.frozen import DIGEST

QUERIES, TEMPERATURE = "query_tokens", "temp"
FROZEN = f"vision.{DIGEST}"  # of the frozen encoder, in a state dict of ours
LAVIS, HUGGING_FACE = "Qformer.", "qformer."
HF_TOWER, LAVIS_TOWER = "vision_model.", "visual_encoder."
OUR_TOWER = "vision.vit."  # of a folder that a Blip was saved to

_MED = {"words": "embeddings.word", "positions": "embeddings.position", "norm": "embeddings.norm"}
_PARTS = {"attend": "read", "look": "look", "text_mlp": "mlp", "query_mlp": "mlp"}
_HF_HEADS = {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm": "itm_head"}
_LAVIS_HEADS = _HF_HEADS | {"vision_proj": "vision_proj", "text_proj": "text_proj"}
TEXT_PROJECTIONS = tuple(f"{heads['text_proj']}.weight" for heads in (_HF_HEADS, _LAVIS_HEADS))
_LN = {True: f"{HF_TOWER}post_layernorm", False: "ln_vision"}

_PROJECTIONS = ("language_projection", "opt_proj", "t5_proj")  # of transformers, of LAVIS for OPT and T5
LEFTOVERS = re.compile(  # buffers that can be computed, and the language model of a stage 2
    r"((Qformer\.bert|qformer)\.)?embeddings\.position_ids"
    r"|(language_projection|language_model|opt_proj|opt_model|t5_proj|t5_model)\..*"
)
ONLY_TEXT = re.compile(  # what a Q-Former that only looks is without, and the heads of stage 1
    r"(Qformer\.bert\.)?embeddings\.(word|position)_embeddings\.weight|Qformer\.cls\..*"
    r"|(Qformer\.bert|qformer)\.encoder\.layer\.\d+\.(intermediate|output)\..*"
    r"|(vision_proj(ection)?|text_proj(ection)?|itm_head)\..*|temp"
)
_AFTER_THE_BLOCKS = re.compile(r"vit\.(norm|fc_norm|head)\..*")


def bert_of(name: str) -> str | None:
    """A weight of the QFormer by its name in BERT, which has one MLP a block; None = BERT has it not."""
    if name == "queries" or ".look." in name:
        return None
    return _bert(name)


def _bert(name: str) -> str:
    match name.split("."):
        case ["blocks", i, part, *rest]:
            return bert_name(".".join(["blocks", i, _PARTS[part], *rest]))
        case ["lm_head", *_]:
            return bert_name(name)
        case [part, kind]:
            return bert_name(f"{_MED[part]}.{kind}")
    raise ValueError(f"{name} is not the name of a Q-Former weight")


def outside_name(name: str, hugging_face: bool) -> str | None:
    """The outside name of a weight of Stage1, its tower aside; None where transformers has none."""
    module, _, rest = name.partition(".")
    if module == "temperature":
        return None if hugging_face else TEMPERATURE
    if module == "ln_vision":
        return f"{_LN[hugging_face]}.{rest}"
    if module == "heads":
        head, kind = rest.split(".")
        return f"{(_HF_HEADS if hugging_face else _LAVIS_HEADS)[head]}.{kind}"
    if rest == "queries":
        return QUERIES
    theirs = _bert(rest)
    if ".query_mlp." in rest:
        theirs = theirs.replace("intermediate.", "intermediate_query.").replace("output.", "output_query.")
    if rest.startswith("lm_head."):
        return None if hugging_face else LAVIS + theirs
    if not hugging_face:
        return f"{LAVIS}bert.{theirs}"
    if rest.startswith("norm."):
        return theirs.replace("embeddings.LayerNorm", f"{HUGGING_FACE}layernorm")
    return HUGGING_FACE + theirs.replace(".self.", ".attention.") if rest.startswith("blocks.") else theirs


def to_ours(names: Iterable[str], theirs: Mapping[str, Tensor], source: str, text: bool) -> dict[str, Tensor]:
    """Their weights, the tower's aside, by our `names`. Every one of theirs is used or a known leftover, or
    ValueError names it; what only `text` uses may be left where none is wanted."""
    hugging_face = not any(name.startswith(LAVIS) for name in theirs)
    found: dict[str, Tensor] = {}
    missing, used = [], set()
    for name in names:
        outside = outside_name(name, hugging_face)
        if outside is None:
            found[name] = torch.tensor(0.07)  # the temperature; no other weight that is asked for is absent
        elif outside not in theirs:
            missing.append(outside)
        else:
            found[name] = theirs[outside][0] if outside == QUERIES else theirs[outside]
            used.add(outside)
    copies, unequal = tied_copies(theirs, f"{LAVIS}bert.", f"{LAVIS}cls.predictions.")
    left = {name for name in theirs.keys() - used - copies if not LEFTOVERS.fullmatch(name)}
    check_names(source, missing, {k for k in left if text or not ONLY_TEXT.fullmatch(k)}, unequal)
    return found


def projection_of(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stage 2's way into the language model, as projection.weight and .bias; {} where there is none."""
    split = {name: name.partition(".") for name in theirs}
    return {
        f"projection.{kind}": theirs[name]
        for name, (first, _, kind) in split.items()
        if first in _PROJECTIONS
    }


def without_tower(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the vision encoder's weights, which belong to who freezes it."""
    towers = (HF_TOWER, LAVIS_TOWER)
    return {k: v for k, v in theirs.items() if not k.startswith(towers) or k.startswith(_LN[True])}


def tower_of(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the vision encoder in timm's or transformers' names, {} where there is none."""
    found = {k: v for k, v in theirs.items() if k.startswith(HF_TOWER) and not k.startswith(_LN[True])}
    for prefix in (LAVIS_TOWER, OUR_TOWER):
        found |= {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
    return found


def tower_to_ours(
    names: Collection[str], theirs: Mapping[str, Tensor], config: VisionConfig
) -> dict[str, Tensor]:
    """Weights of a ViT in transformers', timm's or EVA's names by our `names`, at the image size of `config`.

    Of a deeper ViT the first blocks are taken; a classifier, and a final norm that `config` is without, are
    left. What else is missing or too much stays so, for `Frozen.fill` to complain.
    """
    found = dict(theirs)
    if any(name.startswith(HF_TOWER) for name in theirs):
        found |= {name[4:]: found.pop(hf) for name in names if (hf := tower_outside(name)) in found}
    for query in [name for name in found if name.endswith(".attn.q_bias")]:  # EVA has none for keys
        value = query.replace("q_bias", "v_bias")
        if value in found:
            biases = [found[query], torch.zeros_like(found[query]), found.pop(value)]
            found[query.replace("q_bias", "qkv.bias")] = torch.cat(biases)
            del found[query]
    if "pos_embed" in found:
        found["pos_embed"] = interpolate_position_embedding(found["pos_embed"], config.tokens)
    ours = {f"vit.{name}": tensor for name, tensor in found.items()}
    return {k: v for k, v in ours.items() if k in names or not _is_surplus(k, config.depth)}


def _is_surplus(name: str, depth: int) -> bool:
    block = re.match(r"vit\.blocks\.(\d+)\.", name)
    return bool(_AFTER_THE_BLOCKS.fullmatch(name)) or (block is not None and int(block[1]) >= depth)


def tower_outside(name: str) -> str:
    """A weight of our tower, such as vit.cls_token, by its name in transformers."""
    return vision_name(name.removeprefix("vit."), hugging_face=True)
