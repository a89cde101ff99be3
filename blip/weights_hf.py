"""Export to transformers: folders that its BLIP classes, `BlipProcessor` and `pipeline` load."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from blip.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from blip.image import MEAN, STD
from blip.layers import BERT_EPS
from blip.model import Blip
from blip.weights_names import DECODER, ENCODER, TEMPERATURE, outside_names

BICUBIC = 3  # Pillow's number
BERT_PAD, BERT_SEP = 0, 102  # bert-base-uncased, for a model that carries no tokenizer


def export_hf(model: Blip, folder: str | Path) -> None:
    """Write what transformers loads, straight into `folder` if it is one model there.

    A captioner is BlipForConditionalGeneration, a filter BlipForImageTextRetrieval; a pretrained MED is both,
    in `folder`/captioner and `folder`/retrieval. The temperature of ITC has no place there. transformers
    matches with [CLS] where it should be [ENC]: its callers must put [ENC] first themselves.
    """
    vision = model.config.vision
    if vision.stem:
        raise ValueError(
            "transformers' BLIP has no convolutional stem; only a model with stem () can be exported"
        )
    if vision.pre_norm or vision.quick_gelu or not vision.final_norm:
        raise ValueError(
            "transformers' BLIP has a plain ViT with a final norm; one with pre_norm, with quick_gelu or "
            "without final_norm cannot be exported"
        )
    folder = Path(folder)
    both = model.config.text.reads and model.config.text.writes
    if model.config.text.writes:
        _export(model, folder / "captioner" if both else folder, "BlipForConditionalGeneration", DECODER)
    if model.config.text.reads:
        _export(model, folder / "retrieval" if both else folder, "BlipForImageTextRetrieval", ENCODER)


def _export(model: Blip, folder: Path, architecture: str, stack: str) -> None:
    other = ENCODER if stack == DECODER else DECODER
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("vision.", "med.", "heads.")) and not (
            stack == DECODER and name.startswith("heads.")
        ):
            for outside in outside_names(name, hugging_face=True):
                if not outside.startswith(other) and outside != TEMPERATURE:
                    tensors[outside] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, _config(model, architecture))
    write_json(
        folder / "preprocessor_config.json", preprocessor(model.config.vision.image_size, "BlipProcessor")
    )
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def _config(model: Blip, architecture: str) -> dict[str, Any]:
    config, tokenizer = model.config, model.tokenizer
    vision, text = config.vision, config.text
    end = tokenizer.sep if tokenizer else BERT_SEP
    return {
        "architectures": [architecture],
        "model_type": "blip",
        "dtype": "float32",
        "image_text_hidden_size": config.embed,
        "label_smoothing": config.label_smoothing,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "blip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "encoder_hidden_size": vision.width,
            "intermediate_size": text.hidden,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions,
            "hidden_act": "gelu",
            "layer_norm_eps": BERT_EPS,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout,
            "label_smoothing": config.label_smoothing,
            "bos_token_id": config.dec_id,
            "eos_token_id": end,
            "sep_token_id": end,
            "pad_token_id": tokenizer.pad if tokenizer else BERT_PAD,
            "is_decoder": True,  # there: has cross-attention
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "blip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden or 4 * vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": vision.eps,
            "attention_dropout": 0.0,
        },
    }


def preprocessor(size: int, processor: str) -> dict[str, Any]:
    """What transformers does to an image before it is a BLIP's, as `blip.image` does."""
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
