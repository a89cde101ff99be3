"""YAML in, frozen dataclasses out. The only place in the house that reads a config file.

`load_config` is strict: an unknown key names its nearest neighbour, `3.0` is not an int, `yes` is not a bool,
and a key written twice is an error. Overrides have the form `section.key=value`.
"""

import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

# The scalars of YAML 1.2. PyYAML speaks YAML 1.1: `1e-4` is a string, `no` a bool, `010` is 8, `1:30` is 90.
BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|^\.(?:nan|NaN|NAN)$"
)


class ConfigError(ValueError):
    """The command line or the config file is wrong; the message says where and how to mend it."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1.2 scalars and no silent duplicate keys."""

    # An own table: the 1.1 rules for bool, int, float and dates are left out, null and merge (<<) stay.
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] in ("null", "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the base class refuses keys that are lists
            if key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would misread, so that `load(dump(x)) == x`."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read the YAML file `path`, apply `section.key=value` overrides, and build the dataclass `cls`.

    Raises ConfigError with the file, the dotted key, the value found and what is allowed.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    where = f"{path} (with {' '.join(overrides)})" if overrides else str(path)
    _check_keys(cls, tree, "", where)
    return _validate(cls, _fill_defaults(cls, tree), where)


def as_tree(value: Any) -> Any:
    """A config as nested dicts: dataclasses, tuples and paths become what YAML and JSON know."""
    if is_dataclass(value):
        return {field.name: as_tree(getattr(value, field.name)) for field in _init_fields(value)}
    if isinstance(value, dict):
        return {key: as_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_tree(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def save_config(config: Any, folder: str | Path) -> Path:
    """Write the resolved config as `folder/config.yaml`, atomically: it is there whole or not at all."""
    target = Path(folder) / "config.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".config.yaml.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yaml.dump(as_tree(config), file, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    return target


def config_hash(config: Any) -> str:
    """16 hex characters that change when any value of the config changes."""
    canonical = json.dumps(as_tree(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def parse_args(argv: Sequence[str], cls: type[T], doc: str | None = None) -> T:
    """`configs/<file>.yaml [section.key=value ...]` -> config; `--help` prints and leaves with status 0.

    `doc` heads the help; by default it is the docstring of the module that defines `cls`, the entry point.
    """
    module = sys.modules[cls.__module__]
    name = module.__spec__.name if module.__spec__ else cls.__module__
    usage = f"python -m {name} configs/<file>.yaml [section.key=value ...]"
    if "-h" in argv or "--help" in argv:
        keys = "\n".join(f"  {line}" for line in _describe(cls, ""))
        print(f"{(doc or module.__doc__ or '').strip()}\n\nusage: {usage}\n\nkeys:\n{keys}")
        raise SystemExit(0)
    for arg in argv:
        if arg.startswith("-"):
            raise ConfigError(f"unknown option {arg!r}; usage: {usage}")
    if not argv or "=" in argv[0]:
        raise ConfigError(f"the first argument must be a config file; usage: {usage}")
    return load_config(cls, argv[0], argv[1:])


def run_main(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run an entry point and leave: 2 for ConfigError, 1 for ValueError and OSError, 130 for ctrl-C.

    These are the user's errors and take one line on stderr. Anything else is ours and keeps its traceback.
    """
    try:
        sys.exit(main(list(sys.argv[1:] if argv is None else argv)))
    except ConfigError as error:
        message, status = str(error), 2
    except (ValueError, OSError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]  # one line, yet the place is not lost
        spot = "/".join(Path(frame.filename).parts[-2:])
        message, status = f"{type(error).__name__}: {error} (raised at {spot}:{frame.lineno})", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this config file: {error}") from None
    try:
        # Safe: _Loader is a SafeLoader, it builds plain values only.
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}:{line} not valid YAML: {problem}") from None
    if tree is None:  # an empty file: all defaults
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, found {_show(tree)}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, leaf = key.split(".")
    if not equals or not all([*sections, leaf]):
        raise ConfigError(f"override {override!r} must look like section.key=value")
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    node[leaf] = _parse_value(text)


def _parse_value(text: str) -> Any:
    """`3` `1e-4` `true` `null` `[1, 2]` `{a: 1}` and quoted text are YAML, the rest is the string itself."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text  # `*.parquet` is an alias to YAML and a pattern to a person
    is_yaml = text.lstrip()[:1] in ("[", "{", "'", '"') or isinstance(value, int | float | NoneType)
    return value if is_yaml else text


def _check_keys(hint: Any, node: Any, prefix: str, where: str) -> None:
    """Raise ConfigError for the first key of `node` that no dataclass under `hint` knows."""
    if is_dataclass(hint) and isinstance(node, dict):
        known = [field.name for field in _init_fields(hint)]
        hints = get_type_hints(hint)
        for key, value in node.items():
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                advice = f"did you mean {prefix + near[0]!r}?" if near else f"known keys: {', '.join(known)}"
                raise ConfigError(f"{where}: unknown key {f'{prefix}{key}'!r}; {advice}")
            _check_keys(hints[key], value, f"{prefix}{key}.", where)
    elif get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            _check_keys(option, node, prefix, where)
    elif get_origin(hint) in (list, tuple) and isinstance(node, list):
        for index, item in enumerate(node):
            _check_keys(get_args(hint)[0], item, f"{prefix}{index}.", where)
    elif get_origin(hint) is dict and isinstance(node, dict):
        for key, value in node.items():
            _check_keys(get_args(hint)[1], value, f"{prefix}{key}.", where)


def _fill_defaults(owner: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """A section given in part keeps the rest of its default *instance*, which is what --help shows.

    `owner` is a dataclass, or an instance whose values are the defaults.
    """
    filled = {} if isinstance(owner, type) else as_tree(owner)
    for key, given in tree.items():
        section = _sections(owner).get(key)
        filled[key] = _fill_defaults(section, given) if section and isinstance(given, dict) else given
    return filled


def _validate(cls: type[T], tree: dict[str, Any], where: str) -> T:
    try:
        text = json.dumps(tree)
    except (TypeError, ValueError) as error:  # !!set, !!binary, an alias to itself
        raise ConfigError(f"{where}: a value is no number, text, list or section: {error}") from None
    try:
        # Strict JSON is the wanted rule: int -> float, list -> tuple, str -> Path, and nothing else converts.
        return TypeAdapter(cls).validate_json(text, strict=True)
    except ValidationError as errors:
        found = "; ".join(_explain(error, tree) for error in errors.errors())
        raise ConfigError(f"{where}: {found}") from None


def _explain(error: Any, tree: Any) -> str:
    """One pydantic error as `section.key = value: expected ...`."""
    keys: list[str] = []
    for part in error["loc"]:  # drop pydantic's own steps, such as the branch of a union
        inside = part in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(part, int)
        if inside or error["type"] == "missing":
            keys.append(str(part))
            tree = tree[part] if inside and (isinstance(tree, dict) or part < len(tree)) else None
    key, message = ".".join(keys), error["msg"]
    if error["type"] == "missing":
        return f"{key} is missing; add it to the file or give {key}=<value>"
    if error["type"] in ("value_error", "assertion_error"):  # raised by a __post_init__
        message = message.partition(", ")[2]
        return f"{key}: {message}" if key else message
    if error["type"] == "dataclass_type":
        message = "expected a section of keys"
    return f"{key} = {_show(error['input'])}: {message.replace('Input should be', 'expected')}"


def _describe(owner: Any, prefix: str) -> Iterator[str]:
    """One line per key of `owner`, as for `_fill_defaults`: `section.key: type = default`."""
    hints = get_type_hints(owner if isinstance(owner, type) else type(owner))
    sections = _sections(owner)
    for field in _init_fields(owner):
        key, default = prefix + field.name, _default(owner, field)
        if field.name in sections:
            yield from _describe(sections[field.name], f"{key}.")
        else:
            value = "(required)" if default is MISSING else f"= {_show(as_tree(default))}"
            yield f"{key}: {_type_name(hints[field.name])} {value}"


def _type_name(hint: Any) -> str:
    if hint is NoneType:
        return "null"
    if get_origin(hint) is Literal:
        return " | ".join(json.dumps(option) for option in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(_type_name(option) for option in get_args(hint))
    if get_origin(hint) is not None:
        inner = ", ".join("..." if arg is Ellipsis else _type_name(arg) for arg in get_args(hint))
        return f"{get_origin(hint).__name__}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def _init_fields(cls: Any) -> list[Field[Any]]:
    return [field for field in fields(cls) if field.init]


def _default(owner: Any, field: Field[Any]) -> Any:
    """The value that `field` takes when it is not given, or MISSING."""
    if not isinstance(owner, type):
        return getattr(owner, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _sections(owner: Any) -> dict[str, Any]:
    """The fields of `owner` that are sections: their default instance, or the class where one is required."""
    hints = get_type_hints(owner if isinstance(owner, type) else type(owner))
    defaults = {field.name: _default(owner, field) for field in _init_fields(owner)}
    candidates = {name: hints[name] if value is MISSING else value for name, value in defaults.items()}
    return {name: value for name, value in candidates.items() if is_dataclass(value)}


def _show(value: Any) -> str:
    """A value as it would stand in the file, cut to one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
