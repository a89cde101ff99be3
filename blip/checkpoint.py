"""Weights on disk. A model is a folder: config.json, model.safetensors and the tokenizer's files.

Whatever is written appears whole or not at all, and nothing that is read can run code. Models are not
imported here: a model is anything with a config dataclass, a tokenizer and a state dict.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import typing
import zipfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip.tokenizer import VOCABULARY_FILES, Tokenizer

FORMAT = "med-1"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WEIGHTS_FILES = (WEIGHTS_FILE, "pytorch_model.bin")
TRAINING_ONLY = "teacher."  # the momentum teacher belongs to the trainer's state, not to the model
MOST_NAMES = 8  # shown in an error

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")


class Model(Protocol):
    """What `save_model` needs; `Blip` and `BlipVQA` have it."""

    config: Any  # a dataclass
    tokenizer: Tokenizer | None

    def state_dict(self) -> Mapping[str, Tensor]: ...


def save_model(model: Model, folder: str | Path) -> None:
    """Write a model as a folder, atomically; a folder that holds a model is replaced.

    The momentum teacher is left out. Raises ValueError where the folder holds anything else.
    """
    folder = Path(folder)
    _refuse_to_lose_files(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    new = Path(tempfile.mkdtemp(prefix=_temporary(folder), dir=folder.parent))
    try:
        new.chmod(0o755)  # mkdtemp's own is for its user alone
        description = {"format": FORMAT, "model": type(model).__name__, "config": asdict(model.config)}
        (new / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        weights = model.state_dict()
        tensors = {k: v.contiguous() for k, v in weights.items() if not k.startswith(TRAINING_ONLY)}
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        (new / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for its user alone, too
        if model.tokenizer is not None:
            model.tokenizer.save(new)
        for path in [*new.iterdir(), new]:
            _sync(path)
        _replace(folder, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_model(folder: str | Path, model_class: type[M], config_class: type) -> M:
    """The model of a folder that `save_model` wrote, e.g. `load_model(folder, Blip, BlipConfig)`.

    In eval mode. Raises ValueError where a weight is missing, left over or of another shape, naming each.
    """
    config: object = read_config(folder, model_class.__name__, config_class)
    tensors = read_safetensors(Path(folder, WEIGHTS_FILE))
    return build(model_class, config, read_tokenizer(folder), tensors, str(folder))


def build(
    model_class: type[M],
    config: object,
    tokenizer: Tokenizer | None,
    tensors: Mapping[str, Tensor],
    source: str,
) -> M:
    """A model in eval mode, made of these weights. Raises ValueError as `check_fit` does."""
    with torch.device("meta"):  # drawing random weights, only to overwrite them, takes seconds
        model = model_class(config, tokenizer)
    return fill(model, tensors, source)


def fill(model: M, tensors: Mapping[str, Tensor], source: str) -> M:
    """The model, on the meta device or not, in eval mode with these weights for all of its own."""
    wanted = model.state_dict()
    check_fit(wanted, tensors, source)
    model.load_state_dict(
        {name: tensors[name].to(weight.dtype) for name, weight in wanted.items()}, assign=True
    )
    return model.eval()


def is_ours(folder: str | Path) -> bool:
    """Whether `save_model` wrote this folder (in this or another version)."""
    return "format" in read_json(Path(folder, CONFIG_FILE)) if Path(folder, CONFIG_FILE).is_file() else False


def read_config(folder: str | Path, model: str, config_class: type[C]) -> C:
    """The config dataclass of a folder that `save_model` wrote for a model class of this name."""
    path = Path(folder, CONFIG_FILE)
    if not path.is_file():
        former = _former(Path(folder))
        hint = f"; the run that replaced it died, rename {former} to get the former model back"
        raise ValueError(f"{folder} holds no {CONFIG_FILE}{hint if former.exists() else ''}")
    found = read_json(path)
    if (found.get("format"), found.get("model")) != (FORMAT, model):
        given = f"a {found.get('model')} of format {found.get('format')}"
        raise ValueError(f"{path} describes {given}; a {model} of format {FORMAT} is wanted here")
    return _dataclass(config_class, found["config"], f"{path}: config")


def read_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a folder, None where it has none."""
    return Tokenizer(folder) if any(Path(folder, name).is_file() for name in VOCABULARY_FILES) else None


def read_json(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(found).__name__}")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged, not safetensors: {error}") from error


def check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raise one ValueError that names every weight that is missing, left over or of another shape."""
    wrong = [
        f"{name} {list(given[name].shape)} instead of {list(weight.shape)}"
        for name, weight in sorted(wanted.items())
        if name in given and given[name].shape != weight.shape
    ]
    check_names(source, wanted.keys() - given.keys(), given.keys() - wanted.keys(), wrong)


def check_names(
    source: str, missing: Collection[str], unexpected: Collection[str], wrong: Collection[str] = ()
) -> None:
    """Raise one ValueError that names all weights that do not fit."""
    kinds = {"missing": missing, "unexpected": unexpected, "not as expected": wrong}
    found = [f"{kind}: {_some(sorted(names))}" for kind, names in kinds.items() if names]
    if found:
        raise ValueError(f"the weights of {source} do not fit the model: {'; '.join(found)}")


def digest(source: str | Path) -> str:
    """sha256 of a weights file, or of a folder's weights files (of their digests, if several)."""
    path = Path(source)
    files = [path] if path.is_file() else weights_files(path)
    found = []
    for file in files:
        with file.open("rb") as opened:
            found.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def weights_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: the first kind there is, as in transformers; shards by name."""
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            if not shards or any(Path(shard).name != shard for shard in shards):
                raise ValueError(
                    f"{index} must name files of its own folder, but names {_some(shards) or 'none'}"
                )
            return [folder / shard for shard in shards]
    raise ValueError(
        f"{folder} holds no weights; expected {' or '.join(WEIGHTS_FILES)}, or an index of shards"
    )


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a trainer's state (tensors, numbers, strings, None in dicts, lists, tuples), atomically.

    What could not be loaded again is refused here, not on the day it is needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    handle, name = tempfile.mkstemp(prefix=_temporary(path), dir=path.parent)
    os.close(handle)
    try:
        torch.save(state, name)
        try:
            load_state(name)
        except ValueError as error:
            raise ValueError(f"{path} is not written, it could not be loaded again: {error}") from error
        _sync(Path(name))
        os.replace(name, path)
        _sync(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def load_state(path: str | Path, device: str = "cpu") -> dict[str, Any]:
    """Read what torch.save wrote: tensors and plain values only, a pickle with code is refused, never run."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file")
    mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not zip files and cannot be mapped
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors, numbers, strings, dicts, lists "
            f"and tuples, and unpickling anything else can run code ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged and cannot be read: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dict, but holds a {type(state).__name__}")
    return state


def _refuse_to_lose_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model is saved as a folder, choose another name")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if foreign := sorted(names - {CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES}):
        raise ValueError(f"saving to {folder} would delete {_some(foreign)}; choose another folder")


def _former(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.former"


def _replace(folder: Path, new: Path) -> None:
    """Move `new` to `folder`. It cannot be renamed over a full folder, so that one steps aside first."""
    former = _former(folder)
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _temporary(path: Path) -> str:
    """How the name begins under which this process writes `path`."""
    return f".{path.name}.new-{os.getpid()}-"


def _sweep(path: Path) -> None:
    """Remove what killed writers of `path` left beside it, each as large as `path` itself.

    What a running process writes is left alone. One on another machine cannot be told from a dead one, but a
    path has one writer; were there a second, it would fail with an error and lose nothing that is saved.
    """
    temporary = re.compile(rf"\.{re.escape(path.name)}\.new-(\d{{1,9}})-\w+")
    for left in path.parent.iterdir():
        found = temporary.fullmatch(left.name)
        if found is None or _is_another_process(int(found[1])):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):  # tidying up may not be what makes a save fail
                left.unlink()


def _is_another_process(pid: int) -> bool:
    """Whether a process other than this one runs under `pid`.

    Ours does not count: it has not begun to write yet, and in a container every life gets the same pid.
    """
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, for another user
        return True
    return pid != os.getpid()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dataclass(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """Nested dicts -> nested dataclasses. An absent field keeps its default, an unknown one is an error."""
    types = typing.get_type_hints(kind)
    if unknown := sorted(values.keys() - {field.name for field in fields(kind)}):  # type: ignore[arg-type]
        raise ValueError(f"{where} has unknown entries {', '.join(unknown)}; allowed: {', '.join(types)}")
    given = dict(values)
    for name in given:
        if is_dataclass(types[name]):
            given[name] = _dataclass(types[name], given[name], f"{where}.{name}")
        elif isinstance(given[name], list):  # JSON has no tuples
            given[name] = tuple(given[name])
    return kind(**given)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
