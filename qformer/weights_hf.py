"""Export to transformers: a folder that Blip2ForImageTextRetrieval and Blip2Processor load."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from blip.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from blip.layers import BERT_EPS
from blip.weights_hf import preprocessor, write_json
from qformer.encoder import encoder_of
from qformer.stage1 import Stage1, Stage1Config
from qformer.weights_names import QUERIES, outside_name, tower_outside
from qformer.weights_vision import VISION


def export_stage1(model: Stage1, folder: str | Path) -> None:
    """Write a stage 1, its encoder included, as transformers' Blip2ForImageTextRetrieval.

    The LM head of ITG and the temperature of ITC have no place there, nor has an eps of the norm of image
    tokens (LAVIS: 1e-5): it is the encoder's 1e-6, as in transformers' own conversions. Raises ValueError for
    an encoder that transformers cannot have.
    """
    description = hf_config(model.config)
    vit = encoder_of(model.vision).state_dict()
    tensors = {tower_outside(k): v.float().contiguous() for k, v in vit.items()}
    for name, tensor in model.state_dict().items():
        outside = None if name.startswith(VISION) else outside_name(name, hugging_face=True)
        if outside is not None:
            tensors[outside] = tensor[None].contiguous() if outside == QUERIES else tensor.contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, description)
    write_json(
        folder / "preprocessor_config.json", preprocessor(model.config.vision.image_size, "Blip2Processor")
    )
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def hf_config(config: Stage1Config) -> dict[str, Any]:
    vision, qformer = config.vision, config.qformer
    if vision.stem or vision.pre_norm or vision.quick_gelu or vision.final_norm:
        raise ValueError(
            "transformers' BLIP-2 has a plain ViT without a final norm of its own; one with stem, pre_norm, "
            "quick_gelu or final_norm cannot be exported"
        )
    return {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "dtype": "float32",
        "image_text_hidden_size": config.embed,
        "num_query_tokens": qformer.queries,
        "text_config": {"model_type": "opt"},  # of no use there, but asked for
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "use_qformer_text_input": True,
            "vocab_size": qformer.vocab_size,
            "hidden_size": qformer.width,
            "num_hidden_layers": qformer.depth,
            "num_attention_heads": qformer.heads,
            "intermediate_size": qformer.hidden,
            "max_position_embeddings": qformer.max_positions,
            "cross_attention_frequency": qformer.cross_every,
            "encoder_hidden_size": qformer.image_width,
            "hidden_dropout_prob": qformer.dropout,
            "attention_probs_dropout_prob": qformer.dropout,
            "layer_norm_eps": BERT_EPS,
            "hidden_act": "gelu",
            "bos_token_id": config.dec_id,
        },
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden or 4 * vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": vision.eps,
            "qkv_bias": True,
        },
    }
