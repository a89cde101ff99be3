"""Stage 2 from weights, and to transformers: our folders, Blip2ForConditionalGeneration, LAVIS' files.

As in weights.py nothing is skipped in silence. A folder of ours holds what was trained, and the sha256 of the
frozen parts; LAVIS' files do without even that. The parts then come from where they lie.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip.checkpoint import CONFIG_FILE, WEIGHTS_FILE, fill, is_ours, read_config
from blip.vision import VisionConfig, VisionEncoder
from blip.weights_files import locate, read_tensors
from blip.weights_hf import preprocessor, write_json
from qformer.frozen import DIGEST, Frozen
from qformer.language import BLIP2_PREFIX, CausalLM, EncoderDecoderLM, LanguageModel, load_language
from qformer.stage1 import Stage1Config
from qformer.stage2 import Stage2, Stage2Config
from qformer.weights import Parts, read_parts, read_vision
from qformer.weights_hf import hf_config
from qformer.weights_names import QUERIES, outside_name, tower_outside, tower_to_ours

PROJECTION = "projection."
HF_PROJECTION = "language_projection."
IMAGE_TOKEN = "<image>"  # transformers puts one into the text for each query
LAVIS_T5 = "t5_proj.weight"  # in LAVIS' files for FlanT5
LAVIS_ACTIVATION = "gelu"  # that LAVIS computes FlanT5 with, see `load_language`


def load_stage2(
    source: str | Path,
    *,
    vision: str | Path | None = None,
    language: LanguageModel | str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    image_size: int | None = None,
    dropout: float | None = None,
) -> Stage2:
    """The stage 2 of `source`, in eval mode.

    source: a folder of `save_pretrained`, a transformers folder of Blip2ForConditionalGeneration or its name
        on the hub, or a LAVIS .pth such as blip2_pretrained_opt2.7b.pth.
    vision: where the frozen encoder's weights are, see `read_vision`; else `source`, or where it says.
    language: the frozen language model, or where it is, see `load_language`; else `source`, or where it says.
    dtype: of a language model that is loaded.
    image_size: resample the position embeddings to images of this size.
    dropout: for training; else what a folder of ours says, or BLIP-2's 0.1.
    Raises ValueError where the weights are not exactly those of a stage 2, or a frozen part is not the one
    that they were trained with.
    """
    path = locate(source)
    if is_ours(path):
        config, tensors = read_config(path, Stage2.__name__, Stage2Config), read_tensors(path)
        tower: Mapping[str, Tensor] = {}
    else:
        parts = read_parts(source, text=False)
        config, tensors, tower = _config_of(parts, path, source), parts.tensors, parts.tower
    if vision or not tower:
        config = replace(config, vision_source=str(vision or config.vision_source))
        tower = read_vision(config.vision_source)
    if isinstance(language, str | Path) or language is None:
        config = replace(config, language_source=str(language or config.language_source))
        language = _language(config, dtype, source)
    if dropout is not None:
        config = replace(config, qformer=replace(config.qformer, dropout=dropout))
    _check_projection(tensors, language, source)
    frozen = _frozen(tower, config.vision, str(source))
    with torch.device("meta"):
        model = Stage2(config, frozen, language)
    digests = {name: weight for name, weight in model.state_dict().items() if name.endswith(DIGEST)}
    fill(model, digests | dict(tensors), str(source))
    if image_size is not None and image_size != config.vision.image_size:
        resized = replace(config.vision, image_size=image_size)  # after the sha256 was compared
        model.config, model.vision = replace(config, vision=resized), _frozen(tower, resized, str(source))
    return model


def export_stage2(model: Stage2, folder: str | Path) -> None:
    """Write all of a stage 2, the frozen parts included, as transformers' Blip2ForConditionalGeneration.

    Blip2Processor loads it, too. Of the norm of image tokens the eps has no place there, see `weights_hf`.
    Raises ValueError for an encoder or a language model that transformers' BLIP-2 cannot have.
    """
    language = model.language
    if not isinstance(language, CausalLM | EncoderDecoderLM):
        raise ValueError(f"the language model is a {type(language).__name__}, none of transformers'")
    lm = language.lm.module
    settings = hf_config(_as_stage1(model.config))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    image_token = language.tokenizer.save(folder, IMAGE_TOKEN)
    if image_token >= (rows := lm.get_input_embeddings().num_embeddings):
        raise ValueError(
            f"{IMAGE_TOKEN} would be token {image_token}, but the language model has {rows}, none to spare; "
            "resize its word embedding before stage 2"
        )
    text = lm.config.to_dict() | {"dtype": str(language.lm.dtype).removeprefix("torch.")}
    if isinstance(language, CausalLM):
        text["eos_token_id"] = language.tokenizer.end
    settings["qformer_config"]["use_qformer_text_input"] = False
    settings |= {
        "architectures": ["Blip2ForConditionalGeneration"],
        "dtype": text["dtype"],
        "text_config": text,
        "image_token_index": image_token,
    }
    save_file(_hf_tensors(model, lm.state_dict()), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, settings)
    size = model.config.vision.image_size
    write_json(folder / "preprocessor_config.json", preprocessor(size, "Blip2Processor"))
    queries = model.config.qformer.queries
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": queries}
    write_json(folder / "processor_config.json", processor)


def _hf_tensors(model: Stage2, language: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {tower_outside(k): v.float() for k, v in model.vision.module.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name.startswith(PROJECTION):
            found[name.replace(PROJECTION, HF_PROJECTION)] = tensor
        elif not name.endswith(DIGEST):
            outside = outside_name(name, hugging_face=True)
            assert outside is not None, f"{name} is not of a Q-Former that only looks"
            found[outside] = tensor[None] if outside == QUERIES else tensor
    seen = set()
    for name, tensor in language.items():
        if tensor.data_ptr() not in seen:  # tied weights are written once, as in transformers
            found[BLIP2_PREFIX + name] = tensor
        seen.add(tensor.data_ptr())
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _as_stage1(config: Stage2Config) -> Stage1Config:
    """What the two configs share, as it is described to transformers."""
    text = replace(config.qformer, text=True)
    return Stage1Config(config.vision, text, dec_id=text.vocab_size - 1, norm_eps=config.norm_eps)


def _config_of(parts: Parts, path: Path, source: str | Path) -> Stage2Config:
    """The config of weights that are not ours."""
    if f"{PROJECTION}weight" not in parts.tensors:
        raise ValueError(
            f"{source} has no projection into a language model: it is a stage 1, for load_stage1; "
            "start_stage2 makes a stage 2 of it"
        )
    whole = path.is_dir()  # transformers' folders hold every part
    lavis_t5 = not whole and LAVIS_T5 in read_tensors(path)
    return Stage2Config(
        vision=parts.vision,
        qformer=parts.qformer,
        norm_eps=parts.norm_eps,
        vision_source=str(source) if parts.tower else "",
        language_source=str(source) if whole else "",
        dense_act_fn=LAVIS_ACTIVATION if lavis_t5 else None,
    )


def _language(config: Stage2Config, dtype: torch.dtype, source: str | Path) -> LanguageModel:
    if not config.language_source:
        raise ValueError(
            f"the frozen language model is not among the weights of {source}; give language=, the folder or "
            "hub name of the one that they were trained with, such as facebook/opt-2.7b or google/flan-t5-xl"
        )
    try:
        return load_language(config.language_source, dtype, config.dense_act_fn)
    except ValueError as error:
        raise ValueError(
            f"{error} (the language model of {source}; say where it is with language=)"
        ) from error


def _check_projection(tensors: Mapping[str, Tensor], language: LanguageModel, source: str | Path) -> None:
    weight = tensors.get(f"{PROJECTION}weight")
    if weight is not None and len(weight) != language.width:
        raise ValueError(
            f"{source} was trained with a language model of width {len(weight)}, but the one given has "
            f"{language.width}; give the same as language="
        )


def _frozen(tower: Mapping[str, Tensor], config: VisionConfig, source: str) -> Frozen[VisionEncoder]:
    """The vision encoder with these weights, in timm's or transformers' names."""
    with torch.device("meta"):
        frozen = Frozen(VisionEncoder(config))
    frozen.fill(tower_to_ours(frozen.module.state_dict().keys(), tower, config), source)
    return frozen
