"""Stage 2 from weights, and to transformers: our folders, Blip2ForConditionalGeneration, LAVIS' files.

As in weights.py nothing is skipped in silence. A folder of ours holds what was trained, and the sha256 of
frozen parts; LAVIS' files do without even that. The parts then come from where they lie.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip.checkpoint import CONFIG_FILE, WEIGHTS_FILE, fill, is_ours, read_config, read_tokenizer
from blip.tokenizer import Tokenizer
from blip.weights_files import locate, read_tensors
from blip.weights_hf import preprocessor, write_json
from qformer.encoder import encoder_of, new_encoder
from qformer.frozen import DIGEST
from qformer.language import BLIP2_PREFIX, CausalLM, EncoderDecoderLM, LanguageModel, load_language
from qformer.stage1 import Stage1Config
from qformer.stage2 import Stage2, Stage2Config
from qformer.weights import Parts, read_parts
from qformer.weights_hf import hf_config
from qformer.weights_names import QUERIES, outside_name, tower_outside
from qformer.weights_vision import VISION, changed, find_tower, split_tower, take_tower

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
    trains_vision: bool | None = None,
) -> Stage2:
    """The stage 2 of `source`, in eval mode.

    source: a folder of `save_pretrained`, a transformers folder of Blip2ForConditionalGeneration or its name
        on the hub, or a LAVIS .pth such as blip2_pretrained_opt2.7b.pth.
    vision: where the frozen encoder's weights are, see `read_vision`; else `source`, or where it says.
    language: the frozen language model, or where it is, see `load_language`; else `source`, or where it says.
    dtype: of a language model that is loaded.
    image_size: resample the position embeddings to images of this size.
    dropout: for training; else what a folder of ours says, or BLIP-2's 0.1.
    trains_vision: whether the encoder is to be trained, or frozen; else as in a folder of ours, or frozen.
    Raises ValueError where the weights are not exactly those of a stage 2, or a frozen part is not the one
    that they were trained with.
    """
    path = locate(source)
    if is_ours(path):
        config, tensors = read_config(path, Stage2.__name__, Stage2Config), read_tensors(path)
        tower: dict[str, Tensor] = {}
    else:
        parts = read_parts(source, text=False)
        config, tensors, tower = _config_of(parts, path, source), parts.tensors, parts.tower
    config, tower = find_tower(config, tower, vision, source)
    if isinstance(language, str | Path) or language is None:
        config = replace(config, language_source=str(language or config.language_source))
        language = _language(config, dtype, source)
    _check_projection(tensors, language, source)
    words = read_tokenizer(path) if config.reads_question else None
    model = _build(config, language, words, tensors, tower, str(source))
    wanted = changed(config, image_size, dropout, trains_vision, source)
    if wanted == config:
        return model
    rest, tower = split_tower(model.state_dict(), tower)  # now that the sha256 was compared
    return _build(wanted, language, words, rest, tower, str(source))


def export_stage2(model: Stage2, folder: str | Path) -> None:
    """Write all of a stage 2, the frozen parts included, as transformers' Blip2ForConditionalGeneration.

    Blip2Processor loads it, too. Of the norm of image tokens the eps has no place there, see `weights_hf`.
    Raises ValueError for an encoder, a Q-Former or a language model that transformers' BLIP-2 cannot have.
    """
    if model.config.reads_question:
        raise ValueError(
            "transformers' BLIP-2 has no Q-Former that reads the question beside a language model; one that "
            "does cannot be exported"
        )
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
    found = {tower_outside(k): v.float() for k, v in encoder_of(model.vision).state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name.startswith(PROJECTION):
            found[name.replace(PROJECTION, HF_PROJECTION)] = tensor
        elif not name.startswith(VISION) and not name.endswith(DIGEST):
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


def _build(
    config: Stage2Config,
    language: LanguageModel,
    tokenizer: Tokenizer | None,
    tensors: Mapping[str, Tensor],
    tower: Mapping[str, Tensor],
    source: str,
) -> Stage2:
    """A Stage2 in eval mode, made of these weights. Digests among them must be those of the frozen parts."""
    with torch.device("meta"):
        vision = new_encoder(config.vision, config.trains_vision)
    seen = take_tower(vision, tower, config.vision, source)
    with torch.device("meta"):
        model = Stage2(config, vision, language, tokenizer)
    digests = {name: weight for name, weight in model.state_dict().items() if name.endswith(DIGEST)}
    return fill(model, digests | seen | dict(tensors), source)
