"""Evaluations and papers' rows -> results.md: a table for each task and test set, in per cent.

Names come from configs and folders, so every cell is escaped: it can neither end its cell nor become markup.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from pipelines.results_papers import Benchmark, Papers, source_of
from pipelines.results_runs import Evaluation, protocol_of

COLUMNS = {  # task -> column -> its name in metrics.json
    "retrieval": {f"{side}@{cut}": f"{side.lower()}@{cut}" for side in ("TR", "IR") for cut in (1, 5, 10)},
    "captions": {
        "BLEU-4": "bleu4",
        "METEOR": "meteor",
        "ROUGE-L": "rouge_l",
        "CIDEr": "cider_d",
        "SPICE": "spice",
    },
    "vqa": {"accuracy": "accuracy"},
}
TITLES = {
    "retrieval": "Image-text retrieval",
    "captions": "Captions",
    "vqa": "Visual question answering",
    "zeroshot": "Zero-shot classes",
}
DECIMALS = {"vqa": 2}  # as papers print it; else 1
_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")  # of GitHub's Markdown
_HEAD = """\
# Results

In per cent. **Bold** rows are our runs, each with its protocol and the first 12 digits of the sha256 of its
weights and of the fingerprint of its test set; the others are as papers print them."""


@dataclass(frozen=True)
class Row:
    """`scores` by column, in per cent; None is not told. The texts are Markdown."""

    model: str
    how: str
    scores: Mapping[str, float | None]
    source: str


def results_page(runs: Sequence[Evaluation], papers: Papers, notes: Sequence[str] = ()) -> str:
    """results.md; `notes`, which are Markdown, stand below the tables."""
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for run in runs:
        groups.setdefault((run.task, run.dataset or f"data {run.data}"), []).append(run)
    parts, used = [_HEAD], set[str]()
    for (task, name), members in groups.items():
        benchmark = papers.tasks[task].get(name)
        title = cell(benchmark.title) if benchmark else ", ".join(map(code, _places(members[0])))
        parts += [f"## {TITLES[task]}: {title}", *_table(task, benchmark, members)]
        used |= {source_of(row) for row in benchmark.rows} if benchmark else set()
    parts += notes
    if used:
        listed = [f"- {name}: {cell(what)}" for name, what in papers.sources.items() if name in used]
        parts += ["## Sources", "\n".join(listed)]
    return "\n\n".join(parts) + "\n"


def rows_of(run: Evaluation) -> list[Row]:
    """The rows of one of our runs: one for each way that it scores."""
    made = f"{cell(protocol_of(run))}; weights {code(run.weights)}, data {code(run.data)}"
    model, source = f"**{code(run.model)}**", f"{code(str(run.folder))}: {made}"
    return [Row(model, cell(how), scores, source) for how, scores in scores_of(run)]


def scores_of(run: Evaluation) -> list[tuple[str, dict[str, float]]]:
    """(how, scores in per cent by column) of each way that a run scores; nothing where there is no truth."""
    found = run.found
    if run.task == "zeroshot":
        ways = {"zeroshot": "zero-shot", "probe": "linear probe"}
        return [
            (how, {name: 100 * one["top1"] for name, one in found[way]["sets"].items()})
            for way, how in ways.items()
            if way in found
        ]
    columns = COLUMNS[run.task]
    if run.task == "retrieval":
        k = found["protocol"].get("k")
        ways = {"itc": "ITC alone", "itm": f"best {k} of ITC ranked again by ITM"}
        return [(how, _picked(found[way], columns)) for way, how in ways.items() if way in found]
    scores = _picked(found["metrics"], columns)
    for domain, metrics in found.get("domains", {}).items():
        short = {
            f"{domain.removesuffix('-domain')} {column[0]}": columns[column] for column in ("CIDEr", "SPICE")
        }
        scores |= _picked(metrics, short)
    return [("", scores)]


def _picked(metrics: Mapping[str, float], columns: Mapping[str, str]) -> dict[str, float]:
    return {column: 100 * metrics[name] for column, name in columns.items() if name in metrics}


def _places(run: Evaluation) -> list[str]:
    data = run.found["data"]
    return list(data.get("shards") or data["sets"])


def _table(task: str, benchmark: Benchmark | None, runs: Sequence[Evaluation]) -> list[str]:
    """The table, and a line for each run that is no match for the papers."""
    rows, told = [], benchmark.columns if benchmark else ()
    for paper in benchmark.rows if benchmark else ():
        scores = dict(zip(told, paper.scores, strict=True))
        rows.append(Row(cell(paper.model), cell(paper.how), scores, cell(paper.source)))
    rows += [row for run in runs for row in rows_of(run)]
    columns = list(dict.fromkeys([*told, *(name for row in rows for name in row.scores)]))
    lines = [_line("model", "how", *map(cell, columns), "source, or run and protocol")]
    lines.append(f"|---|---|{'---:|' * len(columns)}---|")
    for row in rows:
        found = [_number(row.scores.get(column), DECIMALS.get(task, 1)) for column in columns]
        lines.append(_line(row.model, row.how, *found, row.source))
    short = [
        f"No match for the papers: {code(str(run.folder))} has {run.size:,} of {benchmark.size:,}."
        for run in runs
        if benchmark and run.size != benchmark.size
    ]
    return ["\n".join(lines), *short]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(score: float | None, digits: int) -> str:
    return "-" if score is None else f"{score:.{digits}f}"


def cell(text: str) -> str:
    """A text of anyone's, on one line, as words of Markdown and never as its markup."""
    return _SPECIAL.sub(r"\\\1", escape(_line_of(text), quote=False))


def code(text: str) -> str:
    """A name of anyone's as code, inside a table too."""
    seen = _line_of(text).replace("`", "'").replace("|", "\\|")
    return f"`{seen or '-'}`"


def _line_of(text: str) -> str:
    """On one line; what cannot be seen, or turns the direction, becomes U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
