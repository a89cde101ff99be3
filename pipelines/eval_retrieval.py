"""Image-text retrieval on clean shards: TR@1/5/10 and IR@1/5/10, by ITC alone and re-ranked by ITM.

The protocol is ALBEF's and BLIP's (pipelines.retrieval). OUT holds metrics.json: the numbers, the protocol,
the digest of the weights and the fingerprint of the test set; and ranks.json, what became of every query.
Several processes (torchrun) share the images and find the same numbers as one.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.distributed import rank
from blip.model import Blip
from blip.tokenizer import clean_caption
from blip.weights import load_blip
from capfilt.shards import write_json_atomically
from pipelines.config import parse_args, run_main, save_config
from pipelines.log import told
from pipelines.parallel import Precision, autocast, processes
from pipelines.results_ranks import ranks_of
from pipelines.retrieval import Retriever, Texts, rerank, retrieval_metrics, text_features
from pipelines.testset import TestImage, batches_of_pixels, provenance, read_testset, refuse_gaps
from pipelines.turns import all_turns, batched, own_turns, rows_of_turns
from qformer import load_stage1
from qformer.weights import is_blip2

SCORE = {False: "ITC cosine", True: "ITM logit + ITC cosine on the best k, the others behind them"}


@dataclass(frozen=True)
class RetrievalProtocol:
    """What decides the numbers. BLIP: k 256 on COCO, 128 on Flickr30k, captions of 30 words and 35 tokens."""

    k: int = 128  # of each image's texts and each text's images are ranked again by ITM; 0: ITC alone
    image_size: int | None = None  # pixels; null: the model's
    max_words: int = 30
    max_length: int = 35  # tokens

    def __post_init__(self) -> None:
        for name, least in {"k": 0, "max_words": 1, "max_length": 3}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class RetrievalRun:
    out: str
    model: str  # that reads: a MED, pre-trained or fine-tuned with ITC and ITM, or a stage 1 of BLIP-2
    shards: tuple[str, ...]  # clean shards of the test set
    protocol: RetrievalProtocol = RetrievalProtocol()
    limit: int | None = None  # the first so many images; null: all
    subset: bool = False  # true: also where images of the annotations are missing in the shards
    batch_size: int = 64
    precision: Precision = "fp32"
    device: str = "auto"


def main(argv: list[str]) -> int:
    run = parse_args(argv, RetrievalRun)
    left_out = refuse_gaps(run.shards, run.subset)
    with processes(run.device) as device:
        load = load_stage1 if is_blip2(run.model) else load_blip
        model = load(run.model, image_size=run.protocol.image_size).to(device)
        with torch.inference_mode(), autocast(device, run.precision):
            images = read_testset(run.shards, run.limit)
            found = evaluate_retrieval(model, images, run.protocol, run.batch_size)
        if rank() == 0:
            save(run, {**found, "left_out": left_out}, model.config.vision.image_size)
    return 0


def save(run: RetrievalRun, found: dict[str, Any], image_size: int) -> None:
    """Write what was found, and tell a person."""
    save_config(run, run.out)
    found = dict(found)
    write_json_atomically(Path(run.out) / "ranks.json", found.pop("ranks"))
    protocol = asdict(run.protocol) | {"score": SCORE[run.protocol.k > 0], "precision": run.precision}
    protocol |= {"image_size": image_size, "limit": run.limit}
    result = {"task": "retrieval", "protocol": protocol, **found, **provenance(run.model, run.shards)}
    write_json_atomically(Path(run.out) / "metrics.json", result)
    print(f"{found['images']} images, {found['texts']} texts")
    if run.limit or found["left_out"]:
        part = f"a part: limit {run.limit}, {found['left_out']} images left out"
        print(f"{part}; recalls among few are higher than those of the whole set")
    for name in ("itc", "itm"):
        if name in found:
            print(describe(name, found[name]))
    print(f"written to {run.out}/metrics.json")


@dataclass(frozen=True)
class Encoded:
    """A test set as ITC and ITM see it: I images, T texts."""

    tokens: list[Tensor]  # of every image of this process, [1, N, D]
    numbers: list[int]  # of these images among all
    texts: Texts
    cosine: Tensor  # [I, T]


def evaluate_retrieval(
    model: Retriever, images: Iterable[TestImage], protocol: RetrievalProtocol, batch_size: int
) -> dict[str, Any]:
    """{"images": I, "texts": T, "itc": recalls}, and "itm", re-ranked, with k; "ranks", where what is right
    stands, by either. Errors: as `encode`."""
    found = encode(model, images, batch_size, protocol.max_words, protocol.max_length)
    owners = found.texts.image
    result: dict[str, Any] = {"images": len(found.cosine), "texts": len(owners)}
    result["itc"] = retrieval_metrics(found.cosine, found.cosine.T, owners)
    result["ranks"] = {"itc": ranks_of(found.cosine, found.cosine.T, owners)}
    if protocol.k:
        own = zip(found.numbers, found.tokens, strict=True)
        each = told(own, "images ranked again", len(found.numbers))
        ranked = rerank(model, each, found.texts, found.cosine, protocol.k)
        result["itm"] = retrieval_metrics(*ranked, owners)
        result["ranks"]["itm"] = ranks_of(*ranked, owners)
    return result


def encode(
    model: Retriever, images: Iterable[TestImage], batch_size: int, max_words: int, max_length: int
) -> Encoded:
    """Encode every image and text once, in one process.

    The tokens of its images stay with it: 1.8 MB an image for ViT-B at 384 px in fp32, half of that in bf16.
    Errors: ValueError for an image that has no text or cannot be decoded, or where there is none.
    """
    reads = not isinstance(model, Blip) or model.config.text.reads
    if model.tokenizer is None or not reads:
        raise ValueError("this needs a model that reads texts (ITC, ITM) and its vocabulary")
    device = next(model.parameters()).device
    keep = torch.bfloat16 if torch.is_autocast_enabled(device.type) else next(model.parameters()).dtype
    tokens: list[Tensor] = []
    features, captions = [], []
    for chosen, pixels in batches_of_pixels(images, model.config.vision.image_size, batch_size, device):
        for image in chosen:
            if not image.texts:
                raise ValueError(f"test image {image.key} has no caption; every image needs one")
        captions.append([image.texts for image in chosen])
        found = model.image_tokens(pixels)
        features.append(model.image_features(found))
        tokens += found.to(keep).split(1)
    each = [texts for batch in all_turns(captions) for texts in batch]  # of every image
    if not each:
        raise ValueError("the test set has no image; shards must name clean shards with rows")
    numbers = [number for batch in own_turns(batched(range(len(each)), batch_size)) for number in batch]
    words = [clean_caption(text, max_words) for texts in each for text in texts]
    owners = [number for number, texts in enumerate(each) for _ in texts]
    ids, mask = (tensor.to(device) for tensor in model.tokenizer(words, max_length))
    texts = Texts(ids, mask, torch.tensor(owners, device=device))
    written, seen = text_features(model, texts), rows_of_turns(features, device)
    with torch.autocast(device.type, enabled=False):  # bf16 would make ties of what differs
        return Encoded(tokens, numbers, texts, model.similarity(seen, written))


def describe(name: str, metrics: dict[str, float]) -> str:
    """One line for a person, in per cent, as papers print it."""
    return f"  {name}   " + "  ".join(f"{key.upper()} {100 * value:.1f}" for key, value in metrics.items())


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
