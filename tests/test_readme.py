"""What README.md says can be done. A check is a generator of complaints, and is shown below to complain."""

import ast
import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 150
FOLDERS = ("blip", "capfilt", "qformer", "pipelines", "configs", "tests", "docs", "weights", ".ci")

Complaints = Iterator[str]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """What stands in single backticks, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(text: str) -> list[list[str]]:
    """Every shell command as its words: the lines of bash blocks, and spans that begin with make or pip."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(text) if span.startswith(("make ", "pip "))]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def dry_run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """`make -n` and the words after `make`, deaf to the variables of a make that runs these tests."""
    environment = {"PATH": os.environ["PATH"]}
    command = ["make", "-n", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def unknown_targets(text: str) -> Complaints:
    for words in commands(text):
        if words[0] == "make":
            targets = words[2:] if words[1] == "-n" else words[1:]
            if targets == ["TARGET"]:
                continue
            done = dry_run(targets)
            if done.returncode:
                yield f"{shlex.join(words)}: {done.stderr.strip()}"


def unknown_modules(text: str) -> Complaints:
    for module in re.findall(r"python -m ([\w.]+)", text):
        if find_spec(module) is None:
            yield f"there is no module {module}"


def unknown_files(text: str) -> Complaints:
    """Spans that look like files of this repository; what runs make lies elsewhere and is not looked for."""
    names = [word for span in spans(text) for word in span.split()]
    names += re.findall(r"\]\(([^)#:]+)\)", text)  # links
    names += re.findall(r"CONFIG=(\S+)", text)
    for name in names:
        is_ours = name.partition("/")[0] in FOLDERS and "/" in name
        at_the_top = re.fullmatch(r"[\w-]+\.(md|toml|lock)", name)
        if (is_ours or at_the_top) and not (ROOT / name).exists():
            yield f"there is no file {name}"


def snippets_that_cannot_run(text: str) -> Complaints:
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                yield from (f"import {a.name}" for a in node.names if find_spec(a.name) is None)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                yield from (f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name))


CHECKS = (unknown_targets, unknown_modules, unknown_files, snippets_that_cannot_run)


@pytest.mark.parametrize("check", CHECKS)
def test_readme_tells_the_truth(check) -> None:  # type: ignore[no-untyped-def]
    assert list(check(README)) == []


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_readme_shows_what_is_checked() -> None:
    assert {"demo", "test", "capfilt", "select"} <= {w[1] for w in commands(README) if w[0] == "make"}
    assert len(blocks(README, "python")) >= 2
    assert "blip/med.py" in spans(README)


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        (unknown_targets, "```bash\nmake nonsense\n```"),
        (unknown_targets, "`make capfilt IN=shards`"),
        (unknown_modules, "`python -m pipelines.nonsense`"),
        (unknown_files, "`blip/nonsense.py`"),
        (unknown_files, "read `NONSENSE.md`"),
        (unknown_files, "[this](docs/nonsense.png)"),
        (unknown_files, "```bash\nmake pretrain CONFIG=configs/nonsense.yaml\n```"),
        (snippets_that_cannot_run, "```python\nfrom blip import nonsense\n```"),
        (snippets_that_cannot_run, "```python\nimport nonsense_of_ours\n```"),
    ],
)
def test_a_check_can_fail(check, broken: str) -> None:  # type: ignore[no-untyped-def]
    assert list(check(broken)) != []


def test_make_stops_in_one_line_where_a_variable_is_missing() -> None:
    done = dry_run(["capfilt", "IN=shards", "OUT=runs/mine", "FILTER=runs/filter/model"])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "make capfilt needs CAPTIONER=" in done.stderr


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_entry_that_make_starts_exists() -> None:
    entries = set(re.findall(r"\$\(RUN\) (pipelines\.\w+)", MAKEFILE))
    assert [entry for entry in sorted(entries) if find_spec(entry) is None] == []


def test_help_names_every_target() -> None:
    declared = re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)
    assert declared is not None
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    told = re.findall(r"^  make ([a-z0-9-]+) {2,}\S", done.stdout, re.MULTILINE)
    assert set(declared[1].split()) == set(told)
