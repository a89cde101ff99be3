"""Folders of real evaluations by tiny models of random weights, and of strangers' words, for tests."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from image_files import jpeg
from small_run import save_models

from capfilt.schema import CLEAN
from pipelines import eval_captions, eval_retrieval, eval_vqa
from pipelines.testset import fingerprint, read_questions
from pipelines.world import WorldConfig, write_world
from pipelines.world_questions import QuestionsRun, write_questions

IMAGES, TEXTS, K = 9, 18, 6
WORLD = WorldConfig(
    seed=5, noisy_rows=0, clean_rows=0, test_rows=IMAGES, shard_rows=4, captions_per_image=2, side=48
)


@cache
def evaluate(folder: Path) -> dict[str, Path]:
    """Task -> OUT folder, of three tasks, on the test pictures of a generated world. Made once."""
    captioner, judge = save_models(folder / "models")
    write_world(WORLD, folder / "world")
    write_questions(QuestionsRun(str(folder / "world"), str(folder / "asked"), questions_per_image=3))
    pictures, asked = str(folder / "world/test"), str(folder / "asked/test")
    decoding = {"beams": 1, "top_p": 0.9, "min_length": 5, "max_length": 14}
    captions = {"model": str(captioner), "shards": [pictures], "protocol": {"decoding": decoding}}
    retrieval = {"model": str(judge), "shards": [pictures], "protocol": {"k": K}}
    answers = write_answers(folder / "given.json", asked)
    vqa = {"answers": answers, "shards": [asked]}
    runs = {
        "captions": (eval_captions, captions),
        "retrieval": (eval_retrieval, retrieval),
        "vqa": (eval_vqa, vqa),
    }
    for name, (entry, tree) in runs.items():
        config = folder / f"{name}.yaml"  # JSON is YAML
        config.write_text(json.dumps({"out": str(folder / name), "device": "cpu", **tree}))
        assert entry.main([str(config)]) == 0
    return {name: folder / name for name in runs}


def write_answers(path: Path, shards: str) -> str:
    """Every third question is answered as most people did, the others by nonsense."""
    questions = [question for image in read_questions([shards]) for question in image.questions]
    right = [max(question.answers, key=lambda one: one.weight).text for question in questions]
    rows = [
        {"question_id": question.id, "answer": right[i] if i % 3 == 0 else "nonsense"}
        for i, question in enumerate(questions)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def write_clean(path: Path, rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """(key, captions) -> a clean shard; the pictures are noise, and the last one cannot be decoded."""
    images = [jpeg(i) for i in range(len(rows) - 1)] + [b"<svg onload=window.hacked=1>"]
    found = [
        {
            "key": key,
            "image": {"bytes": image, "path": None},
            "captions": [{"text": text, "source": "human", "itm": None} for text in texts],
        }
        for (key, texts), image in zip(rows, images, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found, CLEAN), path)


def write_metrics(out: Path, shards: Path, source: str, **found: Any) -> Path:
    """metrics.json as an evaluation of these shards leaves it."""
    out.mkdir(parents=True, exist_ok=True)
    data = {"shards": [str(shards)], "fingerprint": fingerprint([str(shards)])}
    whole = {"protocol": {}, "weights": {"source": source, "sha256": "f" * 64}, "data": data} | found
    (out / "metrics.json").write_text(json.dumps(whole))
    return out
