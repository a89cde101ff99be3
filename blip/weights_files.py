"""Where outside weights lie, and reading them: a folder, a Hugging Face hub name or a `.pth` file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from blip.checkpoint import CONFIG_FILE, load_state, read_json, read_safetensors, weights_files

PICKLES = (".pth", ".pt", ".bin")
_SMALL = ["*.json", "*.txt", "*.model"]  # merges.txt, spiece.model: of language models


def locate(source: str | Path) -> Path:
    """The local file or folder of `source`; the name of a repository on the hub is downloaded."""
    path = Path(source)
    if path.exists():
        return path
    if path.is_absolute() or path.suffix in PICKLES or len(path.parts) > 2:
        raise ValueError(
            f"{source} does not exist; give a folder, a .pth file or a name on the Hugging Face hub"
        )
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=[*_SMALL, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(source), allow_patterns=[*_SMALL, "pytorch_model*.bin"])
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source} is no local file or folder, and cannot be had from the Hugging Face hub: {reason}"
        ) from error
    return folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All weights of a file or folder by the names they have there."""
    tensors: dict[str, Tensor] = {}
    for file in weights_files(path) if path.is_dir() else [path]:
        found = _read_pickle(file) if file.suffix in PICKLES else read_safetensors(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{file} holds {twice[0]}, which another file of {path} holds too")
        tensors.update(found)
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """torch.save({"model": state dict, ...}), as salesforce and DeiT do, or the bare state dict."""
    state = load_state(path)
    tensors = state.get("model", state)
    strange = (
        [k for k, v in tensors.items() if not isinstance(v, Tensor)]
        if isinstance(tensors, dict)
        else ["model"]
    )
    if strange:
        raise ValueError(f"{path} must hold a state dict, bare or under 'model'; {strange[0]} is no tensor")
    return dict(tensors)


@dataclass(frozen=True)
class Settings:
    """What shapes do not tell. Defaults are those of salesforce/BLIP: 64 channels per head, eps 1e-6."""

    vision_heads: int | None = None
    vision_depth: int | None = None
    vision_eps: float = 1e-6
    text_heads: int | None = None
    text_depth: int | None = None
    dec_id: int | None = None


def read_settings(folder: Path) -> Settings:
    """Of a transformers BLIP folder. What its config.json leaves out has the default that it has there."""
    path = folder / CONFIG_FILE
    found = read_json(path)
    kind, names = found.get("model_type"), found.get("architectures") or []
    if kind != "blip" or "BlipModel" in names:
        raise ValueError(
            f"{path} describes a {kind} model ({', '.join(names) or 'nameless'}); wanted is transformers' "
            "BlipForConditionalGeneration, BlipForImageTextRetrieval or BlipForQuestionAnswering"
        )
    vision, text = found.get("vision_config") or {}, found.get("text_config") or {}
    demand(path, "vision_config", vision, {"hidden_act": "gelu"})
    demand(path, "text_config", text, {"hidden_act": "gelu", "layer_norm_eps": 1e-12})
    return Settings(
        vision_heads=vision.get("num_attention_heads", 12),
        vision_depth=vision.get("num_hidden_layers", 12),
        vision_eps=vision.get("layer_norm_eps", 1e-5),
        text_heads=text.get("num_attention_heads", 8),
        text_depth=text.get("num_hidden_layers", 12),
        dec_id=text.get("bos_token_id", 30522),
    )


def demand(path: Path, section: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where a setting that we cannot follow asks for something else."""
    for key, value in wanted.items():
        if found.get(key, value) != value:
            raise ValueError(f"{path}: {section} has {key} {found[key]!r}; only {value!r} is supported")
