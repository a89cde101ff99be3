"""The numbers of the papers, from papers.yaml, that stand beside ours."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.config import load_config

PAPERS = Path(__file__).with_name("papers.yaml")


@dataclass(frozen=True)
class PaperRow:
    """`scores` are as printed, in the order of the columns; None is not told."""

    model: str
    how: str  # fine-tuned, zero-shot, ...
    scores: tuple[float | None, ...]
    source: str  # "BLIP, Table 5": one of the sources, a comma, the place


@dataclass(frozen=True)
class Benchmark:
    """A test set and what papers tell of it. `size` counts its images, or questions."""

    title: str
    size: int
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.scores) != len(self.columns):
                raise ValueError(f"{row.model} has {len(row.scores)} scores for {len(self.columns)} columns")


@dataclass(frozen=True)
class Papers:
    """Test sets by task and name."""

    sources: dict[str, str]
    retrieval: dict[str, Benchmark]
    captions: dict[str, Benchmark]
    vqa: dict[str, Benchmark]
    zeroshot: dict[str, Benchmark]

    def __post_init__(self) -> None:
        for tables in self.tasks.values():
            for row in (row for table in tables.values() for row in table.rows):
                if source_of(row) not in self.sources:
                    known = ", ".join(self.sources)
                    raise ValueError(f"{row.model}: the source {row.source!r} begins with none of {known}")

    @property
    def tasks(self) -> dict[str, dict[str, Benchmark]]:
        return {
            "retrieval": self.retrieval,
            "captions": self.captions,
            "vqa": self.vqa,
            "zeroshot": self.zeroshot,
        }


def source_of(row: PaperRow) -> str:
    return row.source.partition(",")[0]


def read_papers(path: Path = PAPERS) -> Papers:
    """Errors: ConfigError with the place of what is wrong."""
    return load_config(Papers, path)
