"""The sections of the report about scores and texts: histograms, retention and slider, caption health."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capfilt.report_charts import histogram, lengths, retention, swatch
from capfilt.report_data import HEALTH_ROWS, Folder
from capfilt.report_health import Health
from capfilt.report_markup import Html, clipped, count, join, percent, table, tag
from capfilt.select import SOURCES

_KEPT_NAMES = {"web": "web texts", "synthetic": "synthetic texts", "rows": "images"}


def command(target: str, out: Path, *words: str) -> str:
    """A line for a shell; `make` wants its dollars doubled."""
    return " ".join(["make", target, shlex.quote(f"OUT={out}".replace("$", "$$")), *words])


def shown_threshold(threshold: float) -> str:
    """The shortest way to write it that still means the same number, with two digits at least."""
    return f"{threshold:.2f}" if round(threshold, 2) == threshold else repr(threshold)


def texts_of(folder: Folder, source: str) -> int:
    """Texts of a source that are there, scored or not."""
    return sum(n for (of, fate), n in folder.tally.fates.items() if of == source and fate != "empty")


# ---- scores --------------------------------------------------------------------------------------


def histograms(folder: Folder) -> Html:
    threshold = folder.tally.plan.threshold
    figures = []
    for source in SOURCES:
        counts = folder.tally.scores[source]
        total = sum(counts)
        title = f"{source.capitalize()} texts"
        empty = tag("p", "No text was scored.", class_="empty")
        chart = histogram(counts, threshold, source, title) if total else empty
        rows = [
            [f"{i / 10:.1f} to {(i + 1) / 10:.1f}", count(n), percent(n, total)]
            for i, n in enumerate(sum(counts[5 * i : 5 * i + 5]) for i in range(10))
        ]
        numbers = tag("details", tag("summary", "the numbers"), table(
            ["score", "texts", "share"], rows, f"Scores of {source} texts", numbers=2
        ))  # fmt: skip
        head = tag("h3", title, " ", tag("span", count(total), class_="badge"))
        figures.append(tag("div", head, chart, numbers, class_="figure"))
    return tag("div", *figures, class_="pair")


def retention_section(folder: Folder, state: Mapping[str, Any]) -> Html:
    """The curve, the slider, which needs JavaScript, and what is kept. `state` is that of the page."""
    plan, kept, totals = folder.tally.plan, state["kept"], state["totals"]
    shares = {what: [n / max(1, totals[what]) for n in kept[what]] for what in _KEPT_NAMES}
    legend = [
        swatch(tag("line", class_=f"curve {what}", x1=0, x2=28, y1=7, y2=7), name)
        for what, name in _KEPT_NAMES.items()
    ]
    at, said = plan.grid.index(plan.threshold), shown_threshold(plan.threshold)
    slider = tag("input", type="range", id="threshold", min=0, max=len(plan.grid) - 1, step=1, value=at,
                 autocomplete="off", aria_valuetext=said)  # fmt: skip
    label = tag("label", "Threshold of P(match)", for_="threshold")
    rows = [
        [shown_threshold(t), *(percent(kept[what][i], totals[what]) for what in _KEPT_NAMES)]
        for i, t in enumerate(plan.grid)
        if i % 10 == 0 or i == at
    ]
    numbers = table(["threshold", *_KEPT_NAMES.values()], rows, "Kept share at a threshold", numbers=3)
    left = tag(
        "div",
        retention(shares, plan.grid, plan.threshold),
        tag("p", label, slider, class_="slider", hidden=True),
        tag("ul", *legend, class_="legend"),
        tag("details", tag("summary", "the numbers"), numbers),
    )
    return tag("div", left, _readout(kept, totals, at, said, folder.out), class_="retention")


def _readout(
    kept: Mapping[str, Sequence[int]], totals: Mapping[str, int], at: int, said: str, out: Path
) -> Html:
    """What is kept at threshold `at` of the grid, and the command for it; report_page.js rewrites both."""
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", count(kept[what][at]), data_kept=what, class_="number"),
            tag("td", f"of {count(totals[what])}", class_="number"),
            tag("td", percent(kept[what][at], totals[what]), data_share=what, class_="number"),
        )
        for what, name in _KEPT_NAMES.items()
    ]
    caption = tag("caption", "Kept at the chosen threshold", class_="unseen")
    return tag(
        "div",
        tag("p", "At ", tag("output", said, for_="threshold", id="at"), " you keep", class_="lead"),
        tag("table", caption, tag("tbody", *rows), class_="keeps"),
        tag("p", "To keep just that, run", class_="note"),
        copyable(command("select", out, f"THRESHOLD={said}"), "select-command"),
    )


def copyable(line: str, name: str) -> Html:
    """A command to be copied; the button is shown by report_page.js."""
    button = tag("button", "copy", type="button", data_copy=name, hidden=True)
    return tag("p", tag("code", line, id=name), button, class_="command")


# ---- texts ---------------------------------------------------------------------------------------


def health_section(folder: Folder, found: Mapping[str, Health]) -> Html:
    """`found` is of web and synthetic texts."""
    rows_seen = min(folder.tally.rows, HEALTH_ROWS)
    of = "all rows" if rows_seen == folder.tally.rows else f"{count(rows_seen)} rows drawn at random"
    names: list[tuple[str, Any]] = [
        ("texts", lambda h: count(h.texts)),
        ("unique", lambda h: percent(h.unique, h.texts)),
        ("words a text, mean", lambda h: f"{h.mean_words:.1f}"),
        ("different words", lambda h: count(h.words)),
        ("different word pairs, of all pairs", lambda h: f"{h.distinct_pairs:.1%}"),
        ("say a word twice in a row, or three words twice", lambda h: percent(h.echoed, h.texts)),
        ("begin with the prompt", lambda h: percent(h.prompted, h.texts)),
    ]
    rows = [[name, *(show(found[source]) for source in SOURCES)] for name, show in names]
    columns = []
    for source in SOURCES:
        one = found[source]
        title = f"Words in a {source} text"
        columns.append(tag("div", tag("h3", title), lengths(one.lengths, source, title),
            _frequent("Most frequent texts", one.frequent, one.texts, "No text is there twice."),
            _frequent("Most frequent beginnings", one.beginnings, one.texts, "There is no text."),
            class_="figure"))  # fmt: skip
    return join(
        table(["", *SOURCES], rows, f"Texts of {of}, the best synthetic text of each", numbers=2),
        tag("div", *columns, class_="pair"),
    )


def _frequent(title: str, pairs: Sequence[tuple[str, int]], total: int, none: str) -> Html:
    if not pairs:
        return tag("p", none, class_="note")
    rows: list[list[str]] = [[clipped(text), count(n), percent(n, total)] for text, n in pairs]
    return table(["text", "texts", "share"], rows, title, numbers=2)
