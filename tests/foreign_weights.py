"""Weights as others write them, tiny and random: salesforce's files, Hugging Face folders, BERT."""

import json
import re
from pathlib import Path

import torch
import transformers
from test_blip_parity import WORDS, hf_config
from tiny import randomize
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

Tensors = dict[str, Tensor]
Theirs = BlipForConditionalGeneration | BlipForImageTextRetrieval | BlipForQuestionAnswering

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


def salesforce_config() -> transformers.BlipConfig:
    """64 channels per head: 3 and 2 heads. LayerNorm's eps as in salesforce's code."""
    return hf_config(192, 128, layer_norm_eps=1e-6)


def pair() -> tuple[BlipForConditionalGeneration, BlipForImageTextRetrieval]:
    """A captioner and a filter that share all but text self-attention, as a pretrained MED does."""
    captioner = randomize(BlipForConditionalGeneration(salesforce_config()), 1)
    retrieval = randomize(BlipForImageTextRetrieval(salesforce_config()), 2)
    retrieval.vision_model.load_state_dict(captioner.vision_model.state_dict())
    shared = {k: v for k, v in captioner.text_decoder.bert.state_dict().items() if ".attention." not in k}
    retrieval.text_encoder.load_state_dict(retrieval.text_encoder.state_dict() | shared)
    return captioner, retrieval


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


def hf_folder(folder: Path, **config: object) -> Path:
    randomize(BlipForConditionalGeneration(hf_config())).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


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
