"""How well a filter tells right from wrong on clean shards: precision and recall of P(match) at a threshold.

Every caption of an image is a right text; as many wrong ones are the captions of other images that ITC finds
most alike. Some of these describe the image as well, so the precision is a lower bound, good for comparing
filters. OUT holds metrics.json.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip.model import Blip
from blip.weights import load_blip
from capfilt.select import DEFAULT_THRESHOLD
from capfilt.shards import write_json_atomically
from pipelines.config import parse_args, run_main, save_config
from pipelines.eval_retrieval import encode
from pipelines.parallel import Precision, autocast, pick_device
from pipelines.testset import TestImage, provenance, read_testset


@dataclass(frozen=True)
class FilterProtocol:
    threshold: float = DEFAULT_THRESHOLD
    image_size: int | None = None  # pixels; null: the model's
    max_words: int = 30
    max_length: int = 35  # tokens


@dataclass(frozen=True)
class FilterRun:
    out: str
    model: str  # that reads
    shards: tuple[str, ...]  # clean shards that it was not trained on
    protocol: FilterProtocol = FilterProtocol()
    limit: int | None = None  # the first so many images; null: all
    batch_size: int = 64
    precision: Precision = "fp32"
    device: str = "auto"


def main(argv: list[str]) -> int:
    run = parse_args(argv, FilterRun)
    device = pick_device(run.device)
    model = load_blip(run.model, image_size=run.protocol.image_size).to(device)
    with torch.inference_mode(), autocast(device, run.precision):
        right, wrong = score_texts(model, read_testset(run.shards, run.limit), run.protocol, run.batch_size)
    metrics = judge(right, wrong, run.protocol.threshold)
    save_config(run, run.out)
    protocol = asdict(run.protocol) | {"negatives": "ITC's nearest", "precision": run.precision}
    result = {"task": "filter", "protocol": protocol, "texts": len(right), "metrics": metrics}
    write_json_atomically(Path(run.out) / "metrics.json", result | provenance(run.model, run.shards))
    print(f"{len(right)} right and {len(wrong)} wrong texts, threshold {run.protocol.threshold:g}")
    print("  ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items()))
    print(f"written to {run.out}/metrics.json")
    return 0


def score_texts(
    model: Blip, images: Iterable[TestImage], protocol: FilterProtocol, batch_size: int
) -> tuple[Tensor, Tensor]:
    """P(match) of the right texts and of as many wrong ones, [T] each. Errors: as `encode`."""
    found = encode(model, images, batch_size, protocol.max_words, protocol.max_length)
    texts = found.texts
    right: list[Tensor] = []
    wrong: list[Tensor] = []
    for number, tokens in enumerate(found.tokens):
        own = texts.image == number
        others = found.cosine[number].masked_fill(own, -torch.inf)
        nearest = others.topk(min(int(own.sum()), int((~own).sum()))).indices
        projected = model.med.project_image(tokens)
        for rows, scores in ((own.nonzero()[:, 0], right), (nearest, wrong)):
            logits = model.match_projected(texts.ids[rows], texts.mask[rows], projected)
            scores.append(logits.softmax(-1)[:, 1])
    return torch.cat(right), torch.cat(wrong)


def judge(right: Tensor, wrong: Tensor, threshold: float) -> dict[str, float]:
    """Precision among the kept texts, and the kept shares of right and of wrong ones; P(match) [T] each."""
    kept, leaked = (float((scores >= threshold).double().mean()) for scores in (right, wrong))
    share = len(wrong) / max(1, len(right))
    precision = kept / (kept + share * leaked) if kept + leaked else 0.0
    return {"precision": precision, "right_kept": kept, "wrong_kept": leaked}


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
