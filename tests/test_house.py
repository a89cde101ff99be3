"""The house rules, executed. A rule that is not a test is a wish.

Every rule is a generator of complaints about one file, and is shown below to be able to complain.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "blip": set(),
    "capfilt": {"blip"},
    "qformer": {"blip"},
    "pipelines": {"blip", "capfilt", "qformer"},
}
DOORS = {  # library -> the files it may enter by, so that replacing it is one file
    "PIL": ["blip/image.py", "pipelines/world_picture.py"],
    "fairscale": ["pipelines/parallel.py"],
    "matplotlib": ["pipelines/curves*.py"],
    "pyarrow": [
        "capfilt/*.py",
        *("pipelines/data.py", "pipelines/demo.py", "pipelines/image_shards.py", "pipelines/questions.py"),
        *("pipelines/vqa_data.py", "pipelines/world*.py"),
    ],
    "pycocoevalcap": ["pipelines/java_metrics.py"],
    "pydantic": ["pipelines/config.py"],
    "ray": ["capfilt/cluster.py"],
    "timm": ["blip/vision.py"],
    "torch.distributed": ["blip/distributed.py", "pipelines/parallel.py"],
    "torch.nn.parallel": ["pipelines/parallel.py"],
    # the bench measures our models beside those of transformers
    "transformers": [
        "blip/tokenizer.py",
        "qformer/language.py",
        "pipelines/bench*.py",
        "pipelines/train_language.py",
    ],
    "yaml": ["pipelines/config.py"],
}
LIBRARIES = ("blip", "capfilt", "qformer")  # these use logging, an entry point may print
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 59
TEST_NAME = re.compile(r"test_(blip|capfilt|qformer|pipelines)_[a-z0-9_]+|test_(house|readme|configs)")

FILES = sorted(
    path.relative_to(ROOT).as_posix() for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")
)
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


def imports(node: ast.AST) -> set[str]:
    """Every dotted name that the code under `node` may import, inside functions too.

    `from a import b` gives both `a` and `a.b`: whether b is a module cannot be seen from here.
    """
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom) and part.module and not part.level:
            found |= {part.module, *(f"{part.module}.{alias.name}" for alias in part.names)}
        elif isinstance(part, ast.Attribute):  # `torch.distributed` after a plain `import torch`
            found |= {ast.unparse(part)} & set(DOORS)
        elif isinstance(part, ast.Call) and ast.unparse(part.func).endswith(("import_module", "__import__")):
            found |= {str(arg.value) for arg in part.args[:1] if isinstance(arg, ast.Constant)}
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def package_of(path: str) -> str:
    return path.partition("/")[0]


Complaints = Iterator[str]


def imports_go_down(path: str, tree: ast.Module) -> Complaints:
    package = package_of(path)
    for name in imports(tree):
        if top(name) in MAY_IMPORT and top(name) not in MAY_IMPORT[package] | {package}:
            yield f"{package} may not import {name}"


def imports_are_absolute_and_named(path: str, tree: ast.Module) -> Complaints:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"line {node.lineno}: relative import"
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            yield f"line {node.lineno}: star import"


def imports_are_not_deferred(path: str, tree: ast.Module) -> Complaints:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == "__getattr__" and path.endswith("/__init__.py"):
                continue  # PEP 562: how a package offers what needs a library that may be missing
            for name in imports(node):
                if top(name) in MAY_IMPORT:
                    yield f"{node.name} imports {name}: move it to the top of the file"


def libraries_use_their_door(path: str, tree: ast.Module) -> Complaints:
    used = imports(tree)
    for library, doors in DOORS.items():
        enters = any(name == library or name.startswith(library + ".") for name in used)
        if enters and not any(fnmatch(path, door) for door in doors):
            yield f"{library} may only enter by {', '.join(doors)}"


def functions_fit_a_screen(path: str, tree: ast.Module) -> Complaints:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines, allowed are {MAX_FUNCTION_LINES}"


def no_bare_except(path: str, tree: ast.Module) -> Complaints:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: bare except"


def libraries_do_not_print(path: str, tree: ast.Module) -> Complaints:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and package_of(path) in LIBRARIES:
            yield f"line {node.lineno}: print; use logging.getLogger(__name__)"


def no_code_from_files(path: str, tree: ast.Module) -> Complaints:
    """A checkpoint, a model folder or a config may never run code of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "weights_only" and ast.unparse(node.value) != "True":
            yield f"line {node.lineno}: weights_only={ast.unparse(node.value)}"
        given = [node.arg] if isinstance(node, ast.keyword) else []
        if isinstance(node, ast.Dict):  # keywords on their way through **
            given = [ast.unparse(key).strip("'") for key in node.keys if key]
        if "trust_remote_code" in given:
            yield "trust_remote_code"


def yaml_is_safe(path: str, tree: ast.Module) -> Complaints:
    """`yaml.safe_load`, or `yaml.load` with yaml's safe loader or a subclass of it in this file."""
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) in safe for base in node.bases] == [True]:
            safe.add(node.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "yaml":
            yield f"line {node.lineno}: write `import yaml`, so that its calls can be told"
        if not isinstance(node, ast.Call) or not re.fullmatch(
            r"yaml\.(?!safe_)\w*load\w*", ast.unparse(node.func)
        ):
            continue
        loaders = [*node.args[1:], *(word.value for word in node.keywords if word.arg == "Loader")]
        is_safe = len(loaders) == 1 and ast.unparse(loaders[0]) in safe
        if ast.unparse(node.func) not in ("yaml.load", "yaml.load_all") or not is_safe:
            yield f"line {node.lineno}: {ast.unparse(node)} is not a safe loader"


def file_fits_a_sitting(path: str, text: str) -> Complaints:
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path} has {lines} lines, allowed are {MAX_FILE_LINES}"


RULES_OF_ALL = (imports_are_absolute_and_named, no_bare_except, no_code_from_files)
RULES_OF_PACKAGES = (
    *RULES_OF_ALL,
    imports_go_down,
    imports_are_not_deferred,
    libraries_use_their_door,
    functions_fit_a_screen,
    libraries_do_not_print,
    yaml_is_safe,
)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def cycle(sources: dict[str, str]) -> list[str]:
    """One ring of modules that import each other, deferred imports included; [] where there is none."""
    modules = {module_of(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, text in sources.items():
        used: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # `from blip import losses` needs blip.losses, `from blip import Blip` needs blip/__init__
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                used |= {part if part in modules else node.module or "" for part in parts}
        graph[module_of(path)] = used & modules - {module_of(path)}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def fail_without(library: str, modules: list[str], root: Path) -> dict[str, str]:
    """The modules that cannot be imported where `library` is not installed, each with the reason."""
    code = f"""
import importlib, sys
sys.modules[{library!r}] = None
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except Exception as error:  # others are the business of other tests
        if (getattr(error, "name", None) or "").partition(".")[0] == {library!r}:
            print("FAILED", module, error)
"""
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=True)
    lines = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return {module: reason for _, module, reason in lines}


def strangers(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/__init__.py")} - MAY_IMPORT.keys()


def misplaced_tests(paths: list[str]) -> list[str]:
    """Test files that are not flat or not named after what they test; helpers are free, `__init__.py` is not.

    With `tests/blip/__init__.py` pytest would import that folder for `import blip`.
    """
    wrong = []
    for path in paths:
        _, *folders, name = path.split("/")
        is_test = name.startswith("test_")
        is_flat_and_named = not folders and TEST_NAME.fullmatch(name.removesuffix(".py"))
        if (is_test and not is_flat_and_named) or name == "__init__.py":
            wrong.append(path)
    return wrong


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_house_rules(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    complaints = [complaint for rule in RULES_OF_PACKAGES for complaint in rule(path, tree)]
    assert [*complaints, *file_fits_a_sitting(path, text)] == []


@pytest.mark.parametrize("path", TESTS)
def test_test_file_keeps_the_house_rules(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert [complaint for rule in RULES_OF_ALL for complaint in rule(path, tree)] == []


def test_no_import_cycle() -> None:
    assert cycle({path: (ROOT / path).read_text(encoding="utf-8") for path in FILES}) == []


def test_tests_are_flat_and_named_after_what_they_test() -> None:
    assert misplaced_tests(TESTS) == []


def test_there_is_no_fifth_package() -> None:
    assert strangers(ROOT) == set(), "every shared thing has an owner in one of the four packages"


def test_only_the_cluster_needs_ray() -> None:
    modules = [module_of(path) for path in FILES if path != "capfilt/cluster.py"]
    assert fail_without("ray", modules, ROOT) == {}


LONG = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES

BROKEN = [  # rule, file, source that breaks it, the same done right
    (imports_go_down, "blip/losses.py", "import capfilt", "import blip.med"),
    (imports_go_down, "blip/losses.py", "def f():\n    from pipelines.log import plain", "import torch"),
    (imports_go_down, "capfilt/worker.py", "from qformer.stage1 import Stage1", "from blip import Blip"),
    (imports_go_down, "qformer/stage1.py", "import capfilt.select", "import qformer.frozen"),
    (imports_go_down, "capfilt/worker.py", "import_module('pipelines.log')", "import_module('blip.med')"),
    (imports_are_absolute_and_named, "blip/med.py", "from . import layers", "from blip import layers"),
    (imports_are_absolute_and_named, "blip/med.py", "from torch import *", "from torch import nn"),
    (imports_are_not_deferred, "blip/med.py", "def f():\n    import blip.layers", "import blip.layers"),
    (imports_are_not_deferred, "blip/x.py", "def f():\n    from blip import y", "def f():\n    import ray"),
    (libraries_use_their_door, "capfilt/worker.py", "import ray", "import rayon"),
    (libraries_use_their_door, "pipelines/x.py", "def f():\n    from ray.util import x", "import io"),
    (libraries_use_their_door, "blip/med.py", "from torch import distributed", "from torch import nn"),
    (libraries_use_their_door, "blip/med.py", "import torch\ntorch.distributed.barrier()", "import torch"),
    (libraries_use_their_door, "blip/model.py", "import timm.models", "import blip.vision"),
    (libraries_use_their_door, "pipelines/trainer.py", "import fairscale", "import pipelines.parallel"),
    (libraries_use_their_door, "capfilt/captioner.py", "import transformers", "import blip.tokenizer"),
    (libraries_use_their_door, "capfilt/schema.py", "import yaml", "import pyarrow as pa"),
    (libraries_use_their_door, "blip/model.py", "from pyarrow import parquet", "import torch"),
    (libraries_use_their_door, "capfilt/report.py", "import PIL.Image", "import json"),
    (functions_fit_a_screen, "blip/med.py", LONG, LONG.removesuffix("    x = 1\n")),
    (functions_fit_a_screen, "blip/med.py", "async " + LONG, "x = 1\n" * 99),
    (no_bare_except, "blip/x.py", "try: f()\nexcept: g()", "try: f()\nexcept OSError: g()"),
    (libraries_do_not_print, "capfilt/worker.py", "def f():\n    print(1)", "log.info(1)"),
    (no_code_from_files, "blip/x.py", "load(p, weights_only=False)", "load(p, weights_only=True)"),
    (no_code_from_files, "blip/x.py", "torch.load(p, weights_only=safe)", "torch.load(p)"),
    (no_code_from_files, "blip/x.py", "f(trust_remote_code=True)", "f(revision='main')"),
    (no_code_from_files, "blip/x.py", "f(**{'trust_remote_code': True})", "f(**{'revision': 'main'})"),
    (yaml_is_safe, "pipelines/x.py", "yaml.load(text)", "yaml.safe_load(text)"),
    (yaml_is_safe, "pipelines/x.py", "yaml.load(t, Loader=Loader)", "yaml.load(t, Loader=yaml.SafeLoader)"),
    (yaml_is_safe, "pipelines/x.py", "yaml.load(t, yaml.FullLoader)", "yaml.load(t, yaml.CSafeLoader)"),
    (yaml_is_safe, "pipelines/x.py", "yaml.unsafe_load(t)", "yaml.safe_load_all(t)"),
    (yaml_is_safe, "pipelines/x.py", "from yaml import load", "import yaml"),
    (
        yaml_is_safe,
        "pipelines/x.py",
        "class L(yaml.Loader): ...\nyaml.load(t, Loader=L)",
        "class L(yaml.SafeLoader): ...\nyaml.load(t, Loader=L)",
    ),
]


@pytest.mark.parametrize(("rule", "path", "broken", "right"), BROKEN)
def test_a_rule_can_fail(rule, path: str, broken: str, right: str) -> None:  # type: ignore[no-untyped-def]
    assert list(rule(path, ast.parse(broken))) != []
    assert list(rule(path, ast.parse(right))) == []


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule for rule, *_ in BROKEN} == set(RULES_OF_PACKAGES)


def test_a_printing_entry_point_is_fine() -> None:
    assert list(libraries_do_not_print("pipelines/world.py", ast.parse("print(1)"))) == []


@pytest.mark.parametrize(
    ("sources", "ring"),
    [
        ({"blip/a.py": "import blip.b", "blip/b.py": "from blip.a import f"}, {"blip.a", "blip.b"}),
        (
            {"blip/a.py": "from blip import b", "blip/b.py": "def f():\n    from blip import a"},
            {"blip.a", "blip.b"},
        ),
        ({"blip/__init__.py": "from blip.a import A", "blip/a.py": "from blip import A"}, {"blip", "blip.a"}),
        (
            {"blip/__init__.py": "from blip.a import A", "blip/a.py": "from blip import b", "blip/b.py": ""},
            set(),
        ),
        ({"blip/a.py": "import blip.b", "blip/b.py": "import torch", "blip/c.py": "import blip.a"}, set()),
        (
            {
                "blip/__init__.py": "from blip.a import A",
                "blip/a.py": "from blip import Blip, b",
                "blip/b.py": "",
            },
            {"blip", "blip.a"},
        ),
    ],
)
def test_a_cycle_is_found(sources: dict[str, str], ring: set[str]) -> None:
    assert set(cycle(sources)) == ring


def test_a_long_file_is_found() -> None:
    assert list(file_fits_a_sitting("blip/med.py", "x = 1\n" * MAX_FILE_LINES)) == []
    assert list(file_fits_a_sitting("blip/med.py", "x = 1\n" * (MAX_FILE_LINES + 1))) != []


def test_a_fifth_package_is_found(tmp_path: Path) -> None:
    for name in ("blip", "utils", "docs"):
        (tmp_path / name).mkdir()
    for name in ("blip", "utils"):
        (tmp_path / name / "__init__.py").touch()
    assert strangers(tmp_path) == {"utils"}


def test_misplaced_tests_are_found() -> None:
    good = ["tests/test_blip_med.py", "tests/test_house.py", "tests/tiny.py", "tests/hostile/images.py"]
    bad = [
        "tests/blip/test_blip_med.py",
        "tests/test_med.py",
        "tests/test_blip.py",
        "tests/hostile/__init__.py",
    ]
    assert misplaced_tests(good + bad) == bad


def test_a_module_that_needs_a_library_is_found(tmp_path: Path) -> None:
    (tmp_path / "needs.py").write_text("import absent_library.part")
    (tmp_path / "defers.py").write_text("def f():\n    import absent_library")
    (tmp_path / "broken.py").write_text("import another_library")
    modules = ["needs", "defers", "broken"]
    assert fail_without("absent_library", modules, tmp_path).keys() == {"needs"}
