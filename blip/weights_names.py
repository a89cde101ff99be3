"""Our names of weights -> the names that salesforce/BLIP, LAVIS and transformers give them.

salesforce/BLIP (and LAVIS) and transformers agree on text, in BERT's names, and differ on vision only.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from blip.checkpoint import check_names

ENCODER, DECODER = "text_encoder.", "text_decoder."
TEMPERATURE = "temp"  # not in transformers' files

_EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings", "norm": "LayerNorm"}
_ATTENTION = {"read": "attention", "write": "attention", "look": "crossattention"}
_PIECES = {
    "query": "self.query",
    "key": "self.key",
    "value": "self.value",
    "out": "output.dense",
    "norm": "output.LayerNorm",
}
_MLP = {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}
_LM_HEAD = {"dense": "dense", "norm": "LayerNorm"}
_HEADS = {"vision_proj": "vision_proj", "text_proj": "text_proj", "itm": "itm_head"}
_HF_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_HF_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

# What training leaves behind in a checkpoint: buffers that can be computed, momentum teachers, their queues.
LEFTOVERS = re.compile(
    r".*\.position_ids|(visual_encoder|vision_proj|text_encoder|text_proj)_m\..*"
    r"|image_queue|text_queue|idx_queue|queue_ptr|ptr_queue"
)
_PREDICTIONS = "cls.predictions."
COPIES = {"decoder.weight": "{bert}embeddings.word_embeddings.weight", "decoder.bias": "{head}bias"}


def bert_name(name: str) -> str:
    """A weight of the MED by its name in BERT, e.g. blocks.0.read.query.weight, embeddings.norm.bias."""
    match name.split("."):
        case ["embeddings", part, kind]:
            return f"embeddings.{_EMBEDDINGS[part]}.{kind}"
        case ["blocks", i, "mlp", part, kind]:
            return f"encoder.layer.{i}.{_MLP[part]}.{kind}"
        case ["blocks", i, attention, part, kind]:
            return f"encoder.layer.{i}.{_ATTENTION[attention]}.{_PIECES[part]}.{kind}"
        case ["lm_head", "bias"]:
            return f"{_PREDICTIONS}bias"
        case ["lm_head", part, kind]:
            return f"{_PREDICTIONS}transform.{_LM_HEAD[part]}.{kind}"
    raise ValueError(f"{name} is not the name of a MED weight")


def vision_name(name: str, hugging_face: bool) -> str:
    """A weight of timm's ViT by its outside name; salesforce/BLIP keeps timm's."""
    if not hugging_face:
        return f"visual_encoder.{name}"
    if name in _HF_VISION:
        return f"vision_model.{_HF_VISION[name]}"
    module, kind = name.rsplit(".", 1)
    if module in _HF_VISION:
        return f"vision_model.{_HF_VISION[module]}.{kind}"
    _, i, part = module.split(".", 2)
    return f"vision_model.encoder.layers.{i}.{_HF_BLOCK[part]}.{kind}"


def outside_names(name: str, hugging_face: bool) -> list[str]:
    """All outside names of one weight of Blip or BlipVQA: a pretrained MED's shared weights have two."""
    if name == "temperature":
        return [TEMPERATURE]
    module, rest = name.split(".", 1)
    if module == "vision":
        return [vision_name(rest.removeprefix("vit."), hugging_face)]
    if module == "heads":
        head, kind = rest.split(".")
        return [f"{_HEADS[head]}.{kind}"]
    theirs = bert_name(rest)
    if theirs.startswith(_PREDICTIONS):
        return [DECODER + theirs]
    encoder, decoder = ENCODER + theirs, f"{DECODER}bert.{theirs}"
    if module == "reader" or ".read." in rest:
        return [encoder]
    if module == "writer" or ".write." in rest:
        return [decoder]
    return [encoder, decoder]


def to_ours(names: Iterable[str], theirs: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Their weights by our `names`. Every one of theirs is used or a known leftover, or ValueError names it.

    A weight that the file holds twice because two stacks share it must be the same twice.
    """
    hugging_face = any(name.startswith("vision_model.") for name in theirs)
    stacks = [stack for stack in (ENCODER, DECODER) if any(name.startswith(stack) for name in theirs)]
    found: dict[str, Tensor] = {}
    missing, differing, used = [], [], set()
    for name in names:
        outside = outside_names(name, hugging_face)
        if len(outside) > 1:
            outside = [other for other in outside if other.startswith(tuple(stacks))]
        used.update(outside)
        absent = [other for other in outside if other not in theirs]
        if name == "temperature" and absent:
            found[name] = torch.tensor(0.07)  # where training starts; transformers does not keep it
        elif absent:
            missing += absent
        else:
            first, *others = outside
            found[name] = theirs[first]
            differing += [
                f"{other} differs from {first}" for other in others if not _equal(theirs, first, other)
            ]
    unexpected = {name for name in theirs.keys() - used if not LEFTOVERS.fullmatch(name)}
    copies, unequal = tied_copies(theirs, DECODER + "bert.", DECODER + _PREDICTIONS)
    check_names(source, missing, unexpected - copies, differing + unequal)
    return found


def tied_copies(theirs: Mapping[str, Tensor], bert: str, head: str) -> tuple[set[str], list[str]]:
    """Names under which an LM head repeats weights that it shares, and complaints about those that differ."""
    pairs = {head + copy: name.format(bert=bert, head=head) for copy, name in COPIES.items()}
    copies = {copy: name for copy, name in pairs.items() if copy in theirs}
    unequal = [
        f"{copy} differs from {name}" for copy, name in copies.items() if not _equal(theirs, copy, name)
    ]
    return set(copies), unequal


def _equal(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    return other in tensors and torch.equal(tensors[one], tensors[other])
