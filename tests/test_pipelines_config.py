"""pipelines.config: what a file may say, and how a person is told that it may not."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pipelines.config import (
    ConfigError,
    as_tree,
    config_hash,
    load_config,
    parse_args,
    run_main,
    save_config,
)


@dataclass(frozen=True)
class Source:
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Optim:
    lr: float = 3e-4
    warmup: int = 0
    schedule: Literal["cosine", "step"] = "cosine"
    clip: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


@dataclass(frozen=True)
class Inner:
    optim: Optim = field(default_factory=lambda: Optim(lr=7e-6, warmup=9))


@dataclass(frozen=True)
class Run:
    steps: int
    inner: Inner
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5))
    betas: tuple[float, float] = (0.9, 0.999)
    names: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    folder: Path = Path("runs/x")
    fast: bool = False
    note: str | None = None
    extra: Source | None = None
    weights: dict[str, float] = field(default_factory=dict)
    computed: int = field(init=False, default=4)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


BASE = "steps: 10\ninner: {}\n"


def test_values_reach_their_types(write: Any) -> None:
    text = """
steps: 1_000
inner: {}
optim: {lr: 1e-4, clip: 1}
betas: [0, .98]
names: [no, 2024-01-02, "1e-4", 1:30]
sources: [{path: a/b.parquet, weight: 2}]
fast: true
note: null
weights: {coco: 3, web: 5E-1}
"""
    run = load_config(Run, write(text))
    assert (run.steps, run.optim.lr, run.optim.clip) == (1000, 0.0001, 1.0)
    assert type(run.optim.clip) is float and type(run.betas[0]) is float
    assert run.betas == (0.0, 0.98)
    assert run.names == ("no", "2024-01-02", "1e-4", "1:30")  # YAML 1.1 would give False, a date, and 90
    assert run.sources == (Source(Path("a/b.parquet"), 2.0),)
    assert run.fast is True and run.note is None and run.extra is None
    assert run.weights == {"coco": 3.0, "web": 0.5}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.0e-04", ".0001", "0.1e-3"])
def test_every_spelling_of_a_small_number_is_a_float(write: Any, text: str) -> None:
    assert load_config(Run, write(BASE + f"optim: {{lr: {text}}}")).optim.lr == pytest.approx(0.0001)


def test_a_section_given_in_part_keeps_its_default_instance(write: Any) -> None:
    run = load_config(Run, write("steps: 1\ninner: {optim: {clip: 2.0}}\noptim: {warmup: 5}"))
    assert run.optim == Optim(lr=1e-5, warmup=5)  # 1e-5 is Run's default, 3e-4 would be Optim's
    assert run.inner.optim == Optim(lr=7e-6, warmup=9, clip=2.0)
    run = load_config(Run, write(BASE), ["optim.warmup=5"])
    assert run.optim == Optim(lr=1e-5, warmup=5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("opitm: {lr: 1}", ["unknown key 'opitm'", "did you mean 'optim'"]),
        ("optim: {lrr: 1}", ["unknown key 'optim.lrr'", "did you mean 'optim.lr'"]),
        ("optim: {zzz: 1}", ["'optim.zzz'", "known keys: lr, warmup, schedule, clip"]),
        ("sources: [{path: a}, {pth: b}]", ["'sources.1.pth'", "did you mean 'sources.1.path'"]),
        ("extra: {pth: b}", ["'extra.pth'", "did you mean 'extra.path'"]),
        ("computed: 5", ["unknown key 'computed'"]),
        ("3: 5", ["unknown key '3'"]),
        ("optim: {schedule: cos}", ['optim.schedule = "cos"', "'cosine' or 'step'"]),
        ("optim: {warmup: 3.0}", ["optim.warmup = 3.0", "integer"]),
        ("optim: {warmup: true}", ["optim.warmup = true", "integer"]),
        ("optim: {warmup: 010}", ['optim.warmup = "010"', "integer"]),
        ("optim: {lr: fast}", ['optim.lr = "fast"', "number"]),
        ("optim: {lr: true}", ["optim.lr = true", "number"]),
        ("optim: {lr: 0}", ["optim: lr must be above 0, got 0.0"]),
        ("optim: 3", ["optim = 3", "section"]),
        ("fast: yes", ['fast = "yes"', "boolean"]),
        ("note: 3", ["note = 3", "string"]),
        ("betas: [0.9]", ["betas.1 is missing"]),
        ("betas: [1, 2, 3]", ["betas = [1, 2, 3]", "at most 2"]),
        ("sources: [{weight: 1}]", ["sources.0.path is missing"]),
        ("names: !!set {a}", ["no number, text, list or section"]),
        ("note: a: b", ["line 3", "not valid YAML"]),
        ("steps: 4", ["line 3", "key 'steps' twice"]),
        ("optim: {lr: 1, lr: 2}", ["line 3", "key 'lr' twice"]),
        ("? [a]\n: 3", ["line 3", "unhashable key"]),
        ("note: !!python/object/apply:os.getcwd []", ["not valid YAML", "python/object"]),
    ],
)
def test_a_wrong_file_is_refused_with_key_value_and_rule(write: Any, text: str, expected: list[str]) -> None:
    path = write(BASE + text)
    with pytest.raises(ConfigError) as error:
        load_config(Run, path)
    message = str(error.value)
    assert message.startswith(f"{path}:")
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_all_wrong_values_are_told_at_once(write: Any) -> None:
    with pytest.raises(ConfigError, match=r"inner is missing.*fast = 3.*note = 4"):
        load_config(Run, write("steps: 1\nfast: 3\nnote: 4"))


def test_a_missing_key_is_named_with_the_ways_to_give_it(write: Any) -> None:
    with pytest.raises(ConfigError, match="steps is missing; add it to the file or give steps=<value>"):
        load_config(Run, write("inner: {}"))


def test_files_that_are_not_configs(tmp_path: Path, write: Any) -> None:
    path = write("[1, 2]")
    with pytest.raises(ConfigError, match=r"expected `key: value` lines at the top, found \[1, 2\]"):
        load_config(Run, path)
    with pytest.raises(ConfigError, match=r"rum.yaml: no such config file; did you mean .*run\.yaml\?"):
        load_config(Run, tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match="cannot read this config file"):
        load_config(Run, tmp_path)
    path.write_bytes(b"note: \xff")
    with pytest.raises(ConfigError, match="cannot read this config file"):
        load_config(Run, path)
    with pytest.raises(ConfigError, match="steps is missing"):  # empty: nothing given
        load_config(Run, write(""))
    assert load_config(Optim, write("# only a comment\n")) == Optim()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain words", "plain words"),
        ("a photo of: a dog # 3", "a photo of: a dog # 3"),
        ("*.parquet", "*.parquet"),
        ("@here", "@here"),
        ("no", "no"),
        ("a=b", "a=b"),
        ("'3'", "3"),
        ("null", None),
    ],
)
def test_override_text_is_what_a_person_means(write: Any, text: str, value: str | None) -> None:
    assert load_config(Run, write(BASE), [f"note={text}"]).note == value


def test_overrides_win_over_the_file_and_the_last_one_wins(write: Any) -> None:
    overrides = ["steps=3", "optim.lr=2e-3", "betas=[0.5, 0.6]", "weights.coco=2", "steps=4", "extra.path=x"]
    run = load_config(Run, write(BASE + "optim: {lr: 1.0, warmup: 2}"), overrides)
    assert (run.steps, run.optim, run.betas) == (4, Optim(lr=2e-3, warmup=2), (0.5, 0.6))
    assert run.weights == {"coco": 2.0}
    assert run.extra == Source(Path("x"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "override 'steps' must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("optim.=3", "must look like section.key=value"),
        ("optm.lr=3", r"with optm.lr=3\): unknown key 'optm'; did you mean 'optim'"),
        ("optim.lrr=3", r"with optim.lrr=3\): unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("steps.x=3", "'steps' is a value, not a section"),
        ("steps=[3", r'steps = "\[3": expected a valid integer'),
    ],
)
def test_a_wrong_override_is_refused(write: Any, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(Run, write(BASE), [override])


def test_a_saved_config_loads_to_the_same_config(write: Any, tmp_path: Path) -> None:
    tricky = (
        "1e-4",
        "no",
        "2024-01-02",
        "1:30",
        "",
        " a",
        "null",
        "true",
        "0x1f",
        "1_000",
        "caf\u00e9",
        "a: b",
    )
    run = load_config(Run, write(BASE))
    run = replace(run, names=tricky, optim=Optim(lr=1e-6, clip=1e22), extra=Source(Path("p"), float("inf")))
    path = save_config(run, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "config.yaml"
    assert load_config(Run, path) == run
    other = yaml.safe_load(path.read_text(encoding="utf-8"))  # another program's YAML reads the same values
    assert tuple(other["names"]) == tricky and other["optim"]["lr"] == 1e-6
    save_config(replace(run, steps=99), path.parent)
    assert load_config(Run, path).steps == 99
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_the_tree_of_a_config() -> None:
    tree = as_tree(Run(steps=1, inner=Inner(), sources=(Source(Path("a")),)))
    assert tree["sources"] == [{"path": "a", "weight": 1.0}]
    assert tree["inner"] == {"optim": {"lr": 7e-6, "warmup": 9, "schedule": "cosine", "clip": None}}
    assert "computed" not in tree


def test_hash_is_of_the_values_alone() -> None:
    # printf '{"clip":null,"lr":0.5,"schedule":"cosine","warmup":0}' | sha256sum
    assert config_hash(Optim(lr=0.5)) == "e87db9fb949455b6"
    assert config_hash(Optim(lr=0.5, warmup=1)) != config_hash(Optim(lr=0.5))


def test_parse_args(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(BASE)
    assert parse_args([str(path), "steps=7"], Run).steps == 7
    with pytest.raises(ConfigError, match="the first argument must be a config file; usage: python -m"):
        parse_args([], Run)
    with pytest.raises(ConfigError, match="the first argument must be a config file"):
        parse_args(["steps=7"], Run)
    with pytest.raises(ConfigError, match="unknown option '--steps'"):
        parse_args([str(path), "--steps", "7"], Run)
    with pytest.raises(SystemExit) as leave:
        parse_args(["--help"], Run)
    assert leave.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == __doc__
    for expected in (
        "  steps: int (required)",
        "  inner.optim.lr: float = 7e-06",
        "  optim.lr: float = 1e-05",
        '  optim.schedule: "cosine" | "step" = "cosine"',
        "  optim.clip: float | null = null",
        "  betas: tuple[float, float] = [0.9, 0.999]",
        '  folder: Path = "runs/x"',
    ):
        assert expected in lines


ENTRY = '''"""Says what it does."""

from dataclasses import dataclass

from pipelines.config import parse_args, run_main


@dataclass(frozen=True)
class Run:
    steps: int = 1


def main(argv: list[str]) -> int:
    parse_args(argv, Run)
    return 0


if __name__ == "__main__":
    run_main(main)
'''


def test_an_entry_point_from_the_shell(tmp_path: Path) -> None:
    (tmp_path / "entry.py").write_text(ENTRY)
    root = Path(__file__).resolve().parent.parent

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "entry", *args]
        environment = {"PYTHONPATH": f"{tmp_path}:{root}"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Says what it does.\n\nusage: python -m entry configs/<file>.yaml")
    missing = run("nowhere.yaml")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "error: nowhere.yaml: no such config file\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (ConfigError("a\nb"), 2, "error: a b\n"),
        (ValueError("shard a has\nno rows"), 1, "error: ValueError: shard a has no rows (raised at tests/"),
        (
            FileNotFoundError(2, "No such file", "a.tar"),
            1,
            "error: FileNotFoundError: [Errno 2] No such file",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_exit_status(error: Any, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        assert argv == ["x"]
        if isinstance(error, BaseException):
            raise error
        return error or 0

    with pytest.raises(SystemExit) as leave:
        run_main(main, ["x"])
    shown = capsys.readouterr().err
    assert (leave.value.code or 0) == status
    assert shown.startswith(line) and shown.count("\n") == (1 if line else 0)


def test_a_bug_keeps_its_traceback() -> None:
    def main(argv: list[str]) -> int:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run_main(main, [])
