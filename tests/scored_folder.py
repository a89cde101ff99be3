"""A CapFilt output folder without models: real shards, splits, scored files and done-marks, given scores."""

from collections.abc import Callable
from pathlib import Path

from capfilt import shards
from capfilt.schema import Columns, Row, Scores, scored_schema, scored_table
from capfilt.shards import input_fingerprint, open_split, plan_splits, scored_path


def score_shards(source: Path, out: Path, score: Callable[[Row], Scores], rows_per_split: int = 100) -> None:
    """What a worker does, with `score` for its models."""
    for split in plan_splits(source, rows_per_split):
        opened = open_split(split, Columns())
        schema = scored_schema(opened.schema, opened.found)
        with shards.writing_shard(scored_path(out, split.id), schema) as writer:
            for chunk in opened.chunks:
                writer.append(scored_table(chunk, [score(row) for row in chunk.rows], schema))
        fingerprint = {"input": input_fingerprint(split.path), "config": "c"}
        shards.mark_done(out, split, fingerprint, {}, [scored_path(out, split.id)])
