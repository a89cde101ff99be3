"""THE RULE: which texts of a scored row are kept. Scores and a threshold in, verdicts out; no model.

The paper drops a text, from the web or synthetic, that the ITM head predicts as unmatched: its softmax
probability of a match is below 0.5. `select` applies this to `scored/` and writes `clean/`, without a
model, so another threshold costs no more than copying the images.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.parquet import READ_ROWS, open_parquet
from capfilt.schema import CLEAN, ColumnMap, Columns, Row, ShardError, scored_columns
from capfilt.shards import (
    Done,
    done_splits,
    input_fingerprint,
    missing_files,
    open_split,
    scored_path,
    write_json_atomically,
    writing_shard,
)

DEFAULT_THRESHOLD = 0.5
SOURCES = ("web", "synthetic")
_SCORE_COLUMNS = ["capfilt_key", "caption_web", "itm_web", "captions_synthetic", "itms_synthetic"]


@dataclass(frozen=True)
class Caption:
    """A kept text."""

    text: str
    source: str  # 'web' or 'synthetic'
    itm: float


@dataclass(frozen=True)
class Rejected:
    """A dropped text and why: empty, not_wanted, not_scored, below_threshold, duplicate_of_{web,synthetic}.

    not_wanted: texts of its source were not asked for.
    """

    text: str | None
    source: str
    itm: float | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of the texts of one image; every text is in exactly one of the two."""

    kept: tuple[Caption, ...]
    rejected: tuple[Rejected, ...]


def keep(score: float | None, threshold: float) -> bool:
    """The paper's rule: P(match) >= threshold. What was not scored, or scored NaN, is not kept."""
    return score is not None and score >= threshold


def verdict(
    web: tuple[str | None, float | None],
    synthetic: Sequence[tuple[str | None, float | None]],
    threshold: float,
    sources: Collection[str] = SOURCES,
) -> Verdict:
    """Judge the web text and the synthetic texts of one image, each given as (text, ITM score).

    Kept texts are of `sources` and come in this order, the web text first. A synthetic text with the words of
    a text that was kept before it is a duplicate, whatever its case and punctuation.
    """
    kept: list[Caption] = []
    rejected: list[Rejected] = []
    seen: dict[str, str] = {}  # words of a kept text -> where it came from
    for source, (text, itm) in [("web", web), *(("synthetic", pair) for pair in synthetic)]:
        words = _words(text or "")
        if text is None or not text.strip():
            rejected.append(Rejected(text, source, itm, "empty"))
        elif source not in sources:
            rejected.append(Rejected(text, source, itm, "not_wanted"))
        elif itm is None or math.isnan(itm):
            rejected.append(Rejected(text, source, None, "not_scored"))
        elif not keep(itm, threshold):
            rejected.append(Rejected(text, source, itm, "below_threshold"))
        elif words in seen:
            rejected.append(Rejected(text, source, itm, f"duplicate_of_{seen[words]}"))
        else:
            seen[words] = source
            kept.append(Caption(text, source, itm))
    return Verdict(tuple(kept), tuple(rejected))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def threshold_for_fraction(scores: Sequence[float | None] | np.ndarray, fraction: float) -> float:
    """The highest threshold that keeps at least `fraction` of the scored texts.

    It is the score of the last text that must be kept, so texts that tie with it are kept too: ITM scores
    pile up at 1.0, and keeping at most that share could mean keeping nothing. None and NaN do not count.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it is the share of texts to keep, above 0 and at most 1")
    values = np.asarray(scores, dtype=float)
    ranked = np.sort(values[~np.isnan(values)])[::-1]
    if not len(ranked):
        raise ValueError("no text was scored, so no threshold keeps a fraction of them; give a threshold")
    must_keep = math.ceil(fraction * len(ranked) - 1e-9)  # 0.7 * 10 is a little more than 7
    return float(ranked[max(must_keep, 1) - 1])


# ---- over a folder -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelectSummary:
    """What `select` did. `texts[source]` counts 'kept' and each reason, which add up to all its texts."""

    threshold: float
    fraction: float | None
    splits: int
    rows: int
    rows_kept: int
    texts: Mapping[str, Mapping[str, int]]


def select(
    out: Path,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    sources: Collection[str] = SOURCES,
    clean: Path | None = None,
) -> SelectSummary:
    """Apply the rule to all done splits of `out`; write `clean/<split>.parquet` and `clean/_select.json`.

    Give `threshold` (default 0.5) or `fraction`, the share of all scored texts to keep. Images come from the
    scored shard, or, if it did not keep them, from the input. Running it again gives the same bytes; clean
    files of splits that are not done are removed. `_select.json`, the summary, is there once all is written.
    Texts of `sources` only are kept. `clean` is another folder to write to, so that several choices can lie
    side by side; nothing is removed from it.
    Errors: ValueError for both or bad numbers, nothing done, damaged shards, an input that has changed, or
    other shards in `clean`.
    """
    if threshold is not None and fraction is not None:
        raise ValueError(f"threshold {threshold} and fraction {fraction} are both given; give only one")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it is a probability, from 0 to 1")
    marks = whole_splits(out)
    if fraction is not None:
        threshold = threshold_for_fraction(_all_scores(out, marks), fraction)
    elif threshold is None:
        threshold = DEFAULT_THRESHOLD
    folder = clean or out / "clean"
    names = {f"{mark.split.id}.parquet" for mark in marks}
    stale = sorted(path for path in folder.glob("*.parquet") if path.name not in names)
    if stale and clean is not None:
        raise ValueError(f"{clean}: holds {stale[0].name}, which is not of {out}; choose an empty folder")
    summary_path = folder / "_select.json"
    summary_path.unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    counts: Counter[tuple[str, str]] = Counter()
    for mark in marks:
        counts += _write_clean(out, mark, folder, threshold, sources)
    texts = {
        name: {what: n for (source, what), n in sorted(counts.items()) if source == name} for name in SOURCES
    }
    rows = (counts["row", "seen"], counts["row", "kept"])
    summary = SelectSummary(threshold, fraction, len(marks), *rows, texts)
    write_json_atomically(summary_path, asdict(summary))
    return summary


def whole_splits(out: Path) -> list[Done]:
    """Every done split. Errors: ValueError when there is none, or a file of one is gone or damaged."""
    marks = done_splits(out)
    if not marks:
        raise ValueError(f"{out}: holds no finished split; run `make capfilt` with this OUT first")
    for mark in marks:
        if missing := missing_files(out, mark):
            raise ShardError(
                f"{out}: {missing[0]} is gone or not as it was written; run `make capfilt` again to redo it"
            )
    return marks


def _all_scores(out: Path, marks: Sequence[Done]) -> np.ndarray:
    """ITM of every text of every row, NaN where it was not scored."""
    found = []
    for mark in marks:
        with open_parquet(scored_path(out, mark.split.id)) as file:
            table = file.read(["itm_web", "itms_synthetic"], use_threads=False)
        for column in (table["itm_web"], pc.list_flatten(table["itms_synthetic"])):
            found.append(column.to_numpy())
    return np.concatenate(found)


def _write_clean(
    out: Path, mark: Done, folder: Path, threshold: float, sources: Collection[str]
) -> Counter[tuple[str, str]]:
    """Write one clean shard. Returns how many rows and texts met which end."""
    counts: Counter[tuple[str, str]] = Counter()
    record = mark.files[scored_path(out, mark.split.id).relative_to(out).as_posix()]
    note = json.dumps({"threshold": threshold, "scored_sha256": record["sha256"]}, sort_keys=True)
    schema = CLEAN.with_metadata({**CLEAN.metadata, b"capfilt": note.encode()})
    with writing_shard(folder / f"{mark.split.id}.parquet", schema) as writer:
        for scored, image in _scored_rows(out, mark):
            synthetic = zip(scored["captions_synthetic"], scored["itms_synthetic"], strict=True)
            web = scored["caption_web"], scored["itm_web"]
            judged = verdict(web, list(synthetic), threshold, sources)
            counts["row", "seen"] += 1
            counts.update([(text.source, "kept") for text in judged.kept])
            counts.update([(text.source, text.reason) for text in judged.rejected])
            if judged.kept:
                counts["row", "kept"] += 1
                key = scored["capfilt_key"]
                if not image:
                    raise ShardError(f"{out}: row {key!r} of {mark.split.id} is scored but has no image")
                captions = [asdict(caption) for caption in judged.kept]
                row = {
                    "key": key,
                    "image": {"bytes": image, "path": _file_name(key, image)},
                    "captions": captions,
                }
                writer.append(pa.Table.from_pylist([row], schema=schema))
    return counts


def _scored_rows(out: Path, mark: Done) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    """The rows of a scored shard, each with its image."""
    path = scored_path(out, mark.split.id)
    with open_parquet(path) as file:
        found, has_images = scored_columns(file.schema_arrow, path)
        images = None if has_images else _input_images(mark, found)
        columns = [*_SCORE_COLUMNS, found.image] if has_images else _SCORE_COLUMNS
        for batch in file.iter_batches(READ_ROWS, columns=columns, use_threads=False):
            for scored in batch.to_pylist():
                if images is None:
                    image = scored[found.image]
                    yield scored, image["bytes"] if isinstance(image, dict) else image
                    continue
                row = next(images, None)
                if row is None or row.key != scored["capfilt_key"]:
                    raise ShardError(
                        f"{mark.split.path}: has no row {scored['capfilt_key']!r} where {path} has it, so it "
                        "has changed; put the old file back, or run `make capfilt` into a new OUT"
                    )
                yield scored, row.image


def _input_images(mark: Done, found: ColumnMap) -> Iterator[Row]:
    """The rows of the input again, for scored shards that did not keep their images."""
    path = mark.split.path
    if not path.is_file():
        raise ShardError(
            f"{path}: is gone, and the scored shard did not keep its images; put it back, or run "
            "`make capfilt` into a new OUT with images kept"
        )
    if mark.fingerprint.get("input", input_fingerprint(path)) != input_fingerprint(path):
        raise ShardError(f"{path}: has changed since it was scored; put the old file back, or use a new OUT")
    return (row for chunk in open_split(mark.split, Columns(**asdict(found))).chunks for row in chunk.rows)


def _file_name(key: str, image: bytes) -> str:
    """A plain file name; the key may hold anything."""
    starts = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}
    suffix = next((suffix for start, suffix in starts.items() if image.startswith(start)), "bin")
    return f"{re.sub('[^A-Za-z0-9_-]', '_', key)[:128]}.{suffix}"
