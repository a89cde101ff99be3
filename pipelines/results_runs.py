"""One evaluation folder, as `make results` reads it: metrics.json, and what it says of itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = {  # task of metrics.json -> the make target that writes such folders
    "retrieval": "eval-retrieval",
    "captions": "eval-captions",
    "vqa": "eval-vqa",
    "zeroshot": "eval-zeroshot",
}
DIGITS = 12  # of a digest that are shown


@dataclass(frozen=True)
class Evaluation:
    """`found` is metrics.json. `dataset` is a name of papers.yaml, None where nobody said one."""

    folder: Path
    task: str
    found: Mapping[str, Any]
    dataset: str | None = None

    @property
    def model(self) -> str:
        """Where the weights, or the answers, came from."""
        return str(self._source.get("source", "unknown"))

    @property
    def weights(self) -> str:
        return str(self._source.get("sha256", "unknown"))[:DIGITS]

    @property
    def data(self) -> str:
        """The fingerprint of the test set; of several sets the first."""
        data = self.found["data"]
        first = next(iter(data["sets"].values())) if "sets" in data else data
        return str(first["fingerprint"])[:DIGITS]

    @property
    def size(self) -> int:
        """Images, or questions, that were evaluated."""
        if self.task == "zeroshot":
            return int(next(iter(self.found["zeroshot"]["sets"].values()))["images"])
        return int(self.found["questions" if self.task == "vqa" else "images"])

    @property
    def shards(self) -> list[str]:
        return list(self.found["data"]["shards"])

    @property
    def _source(self) -> Mapping[str, Any]:
        scored_alone = next((name for name in ("answers", "results") if name in self.found), "weights")
        source: Mapping[str, Any] = self.found[scored_alone]
        return source


def read_evaluation(folder: str | Path, dataset: str | None = None) -> Evaluation:
    """Errors: ValueError where there is no metrics.json of a known task."""
    path = Path(folder) / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        targets = ", ".join(f"make {target}" for target in TASKS.values())
        raise ValueError(f"{path}: there is no such file; an evaluation writes it: {targets}") from None
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); run the evaluation again") from error
    task = found.get("task") if isinstance(found, dict) else None
    if task not in TASKS:
        raise ValueError(f"{path}: holds the task {task!r}; known are {', '.join(TASKS)}")
    run = Evaluation(Path(folder), task, found, dataset)
    try:
        _ = (run.model, run.weights, run.data, run.size, found["protocol"])
    except (KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{path}: lacks {error}; run `make {TASKS[task]}` again") from error
    return run


def protocol_of(run: Evaluation) -> str:
    """What decided the numbers, in words: "k 256, 384 px, bf16"."""
    protocol = run.found["protocol"]
    words = [] if "weights" in run.found else ["a file, scored as it is"]
    if run.task == "retrieval":
        words.append(f"k {protocol.get('k')}")
    if run.task == "zeroshot":
        words.append(f"{protocol.get('classes')} classes, {len(protocol.get('templates') or ())} templates")
    if run.task == "vqa" and isinstance(protocol.get("answers"), int):
        words.append(f"{protocol['answers']:,} answers, best {protocol.get('k')} ranked")
    elif protocol.get("decoding"):
        words.append(decoding_words(protocol["decoding"]))
    if protocol.get("image_size"):
        words.append(f"{protocol['image_size']} px")
    if protocol.get("precision"):
        words.append(str(protocol["precision"]))
    if protocol.get("limit"):
        words.append(f"first {protocol['limit']} images")
    return ", ".join(words) or "unknown"


def decoding_words(decoding: Mapping[str, Any]) -> str:
    """ "3 beams, 5 to 20 tokens", and whatever else is not usual."""
    beams, top_p = decoding.get("beams", 1), decoding.get("top_p")
    kind = f"nucleus {top_p:g}" if top_p else f"{beams} beams" if beams > 1 else "greedy"
    words = [kind, f"{decoding.get('min_length')} to {decoding.get('max_length')} tokens"]
    for name in ("length_penalty", "repetition_penalty"):
        if decoding.get(name, 1.0) != 1.0:
            words.append(f"{name.replace('_', ' ')} {decoding[name]:g}")
    return ", ".join(words)
