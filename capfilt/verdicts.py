"""What people say about scored texts: read a file of verdicts and set it beside the scores they are about.

A verdict is {"key", "source", "verdict"} and, if wanted, "text": `key` is `capfilt_key`, `source` is web or
synthetic, `verdict` is keep (the text describes the image), drop or unsure. `text` tells which of several
synthetic texts is meant; without it, it is `caption_synthetic`, the best.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.calibrate import Labels
from capfilt.parquet import open_parquet
from capfilt.schema import scored_columns, short_reason
from capfilt.select import SOURCES, whole_splits
from capfilt.shards import scored_path

WORDS = ("keep", "drop", "unsure")
FORMATS = (".json", ".jsonl", ".csv", ".parquet")
_ROW_COLUMNS = [
    "capfilt_key",
    "caption_web",
    "itm_web",
    "caption_synthetic",
    "captions_synthetic",
    "itms_synthetic",
]
_SHOWN = 3  # problems that an error lists


@dataclass(frozen=True)
class Verdict:
    """One person's word about one text; `text` None is the web text or the best synthetic one."""

    key: str
    source: str
    verdict: str
    text: str | None = None


# ---- the file ------------------------------------------------------------------------------------


def read_verdicts(path: Path) -> list[Verdict]:
    """Read a .json list, .jsonl, .csv or .parquet with the columns key, source, verdict and perhaps text.

    Errors: ValueError when the file is missing or of another kind, or for entries that are no verdicts.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: is no file of verdicts; its name must end in {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; label some texts first, 100 of each source or more")
    entries = _entries(path)
    bad = [
        f"entry {number}: {short_reason(entry)}"
        for number, entry in enumerate(entries, 1)
        if not isinstance(entry, dict)
        or any(_clean(entry.get(name)) is None for name in ("key", "source", "verdict"))
    ]
    _refuse(path, "entries without key, source and verdict", bad, "give every verdict all three")
    verdicts = [
        Verdict(
            str(entry["key"]), str(entry["source"]), str(entry["verdict"]).strip(), _clean(entry.get("text"))
        )
        for entry in entries
    ]
    for name, allowed in (("source", SOURCES), ("verdict", WORDS)):
        bad = [f"{v.key!r}: {getattr(v, name)!r}" for v in verdicts if getattr(v, name) not in allowed]
        _refuse(path, f"verdicts with an unknown {name}", bad, f"write one of {', '.join(allowed)}")
    if not verdicts:
        raise ValueError(f"{path}: holds no verdicts")
    return verdicts


def _entries(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            names = [name for name in ("key", "source", "verdict", "text") if name in file.schema_arrow.names]
            rows: list[Any] = file.read(names, use_threads=False).to_pylist()
            return rows
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in file if line.strip()]
            entries = json.load(file)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}: cannot be read as {path.suffix[1:]} ({short_reason(error)}); write it again"
        ) from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: holds no list of verdicts; expected [{{'key': ..., 'source': ..., ...}}]")
    return entries


def _clean(value: object) -> str | None:
    """An empty cell is none."""
    return None if value is None or not str(value).strip() else str(value)


def _refuse(where: str | Path, what: str, bad: Sequence[str], advice: str) -> None:
    if bad:
        more = ", ..." if len(bad) > _SHOWN else ""
        raise ValueError(f"{where}: {len(bad)} {what}: {', '.join(bad[:_SHOWN])}{more}; {advice}")


# ---- beside the scores -----------------------------------------------------------------------------


def join_scores(
    verdicts: Sequence[Verdict], rows: Mapping[str, Sequence[Mapping[str, Any]]], where: str | Path
) -> dict[str, Labels]:
    """Source -> its labelled texts. `rows` is of `rows_of_keys`; `where` names the file in errors.

    The same verdict twice counts once. Errors: ValueError for keys that no row or several scored rows have,
    texts that the row does not have, and different verdicts about one text.
    """
    keys = dict.fromkeys(verdict.key for verdict in verdicts)
    unknown = [repr(key) for key in keys if not rows.get(key)]
    _refuse(where, "keys that no scored row has", unknown, "was this file made for another OUT?")
    shared = [repr(key) for key in keys if len(rows[key]) > 1]
    _refuse(where, "keys that several scored rows have", shared, "a verdict needs a key of its own")
    found: dict[tuple[str, str, int], tuple[float | None, str]] = {}
    strange, torn = [], []
    for verdict in verdicts:
        place = _find_text(verdict, rows[verdict.key][0])
        if place is None:
            strange.append(f"{verdict.key!r} {verdict.source}: {short_reason(verdict.text or 'no text')!r}")
            continue
        position, score = place
        _, before = found.setdefault((verdict.key, verdict.source, position), (score, verdict.verdict))
        if before != verdict.verdict:
            torn.append(f"{verdict.key!r} {verdict.source}: {before} and {verdict.verdict}")
    _refuse(
        where, "verdicts about texts that their row does not have", strange, "label the texts of this OUT"
    )
    _refuse(where, "texts with different verdicts", torn, "keep one of each")
    return {source: _labels([pair for key, pair in found.items() if key[1] == source]) for source in SOURCES}


def _find_text(verdict: Verdict, row: Mapping[str, Any]) -> tuple[int, float | None] | None:
    """Position and score of the text that is meant, None if the row has no such text."""
    if verdict.source == "web":
        texts, scores, best = [row["caption_web"]], [row["itm_web"]], row["caption_web"]
    else:
        texts, scores, best = row["captions_synthetic"], row["itms_synthetic"], row["caption_synthetic"]
    wanted = _folded(best if verdict.text is None else verdict.text)
    return next(
        (
            (position, scores[position])
            for position, text in enumerate(texts or [])
            if wanted and _folded(text) == wanted
        ),
        None,
    )


def _folded(text: str | None) -> str:
    """White space does not survive every spreadsheet."""
    return " ".join((text or "").split())


def _labels(pairs: Sequence[tuple[float | None, str]]) -> Labels:
    sure = [(score, word) for score, word in pairs if word != "unsure"]
    known = [(score, word) for score, word in sure if score is not None]
    return Labels(
        scores=np.array([score for score, _ in known], dtype=float),
        right=np.array([word == "keep" for _, word in known], dtype=bool),
        unsure=len(pairs) - len(sure),
        not_scored=len(sure) - len(known),
    )


# ---- the scored shards -----------------------------------------------------------------------------


def rows_of_keys(out: Path, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Key -> its scored rows; where there are none, a row with that key that was not scored."""
    wanted = pa.array(sorted(set(keys)), pa.string())
    found: dict[str, list[dict[str, Any]]] = {}
    for table in scored_tables(out, [*_ROW_COLUMNS, "capfilt_status"]):
        for row in table.filter(pc.is_in(table["capfilt_key"], wanted)).to_pylist():
            found.setdefault(row["capfilt_key"], []).append(row)
    for key, rows in found.items():
        found[key] = [row for row in rows if row["capfilt_status"] == "ok"] or rows[:1]
    return found


def all_scores(out: Path) -> dict[str, np.ndarray]:
    """Source -> ITM of all its scored texts, every synthetic text of a row being one."""
    found: dict[str, list[np.ndarray]] = {source: [] for source in SOURCES}
    for table in scored_tables(out, ["itm_web", "itms_synthetic"]):
        columns = {"web": table["itm_web"], "synthetic": pc.list_flatten(table["itms_synthetic"])}
        for source, column in columns.items():
            found[source].append(column.drop_null().to_numpy().astype(float))
    return {source: np.concatenate(parts) for source, parts in found.items()}


def web_texts(out: Path) -> dict[str, tuple[str | None, float | None]]:
    """Key -> web text and its ITM, for every row that was scored."""
    return {
        row["capfilt_key"]: (row["caption_web"], row["itm_web"])
        for table in scored_tables(out, ["capfilt_key", "caption_web", "itm_web"])
        for row in table.to_pylist()
        if row["itm_web"] is not None
    }


def scored_tables(out: Path, columns: list[str]) -> Iterator[pa.Table]:
    """These columns of every done split. Errors: ValueError when nothing is done or a file is damaged."""
    for mark in whole_splits(out):
        path = scored_path(out, mark.split.id)
        with open_parquet(path) as file:
            scored_columns(file.schema_arrow, path)
            yield file.read(columns, use_threads=False)
