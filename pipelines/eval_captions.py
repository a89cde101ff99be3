"""Captions for the images of clean shards, beside their references: BLEU, ROUGE-L, CIDEr-D, and how diverse.

OUT holds captions.json ([{"image_id", "caption"}], what the COCO and NoCaps servers take) and metrics.json:
the numbers, the protocol, the digest of the weights and the fingerprint of the test set. A set without any
reference, such as NoCaps' test set, gets captions and no score.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from blip.generate import BEAM_SEARCH, Decoding
from blip.model import Blip
from blip.weights import load_blip
from capfilt.captioner import Captioner, caption_seed
from capfilt.shards import write_json_atomically
from pipelines.config import parse_args, run_main, save_config
from pipelines.metrics import TOKENIZER, bleu, cider_d, distinct_n, rouge_l, unique_share
from pipelines.parallel import DTYPE, Precision, autocast, pick_device
from pipelines.testset import TestImage, batches_of_pixels, provenance, read_testset, server_id
from qformer import Stage2, load_stage2
from qformer.weights import is_blip2


@dataclass(frozen=True)
class CaptionProtocol:
    """What decides the numbers. BLIP: 3 beams, 5 to 20 tokens, 384 px; on NoCaps repetition_penalty 1.1."""

    prompt: str = "a picture of "
    decoding: Decoding = BEAM_SEARCH
    image_size: int | None = None  # pixels; null: the model's


@dataclass(frozen=True)
class CaptionRun:
    out: str
    model: str  # that writes: a MED, pre-trained or a captioner, or a stage 2 of BLIP-2
    shards: tuple[str, ...]  # clean shards of the test set
    protocol: CaptionProtocol = field(default_factory=CaptionProtocol)
    limit: int | None = None  # the first so many images; null: all
    batch_size: int = 32
    precision: Precision = "fp32"
    device: str = "auto"


def main(argv: list[str]) -> int:
    run = parse_args(argv, CaptionRun)
    device = pick_device(run.device)
    size = run.protocol.image_size
    if is_blip2(run.model):
        model: Blip | Stage2 = load_stage2(run.model, image_size=size, dtype=DTYPE[run.precision])
    else:
        model = load_blip(run.model, image_size=size)
    model.to(device)
    with torch.inference_mode(), autocast(device, run.precision):
        images = read_testset(run.shards, run.limit)
        captions, references = write_captions(model, images, run.protocol, run.batch_size)
    out = Path(run.out)
    save_config(run, out)
    rows = [{"image_id": server_id(key), "caption": text} for key, text in captions.items()]
    write_json_atomically(out / "captions.json", rows)
    protocol = asdict(run.protocol) | {"tokenizer": TOKENIZER, "precision": run.precision}
    protocol["image_size"] = model.config.vision.image_size
    metrics = score_captions(captions, references)
    result = {"task": "captions", "protocol": protocol, "images": len(captions), "metrics": metrics}
    write_json_atomically(out / "metrics.json", result | provenance(run.model, run.shards))
    print(f"{len(captions)} images, {sum(map(len, references.values()))} references")
    print(describe(metrics))
    print(f"written to {run.out}/metrics.json and {run.out}/captions.json")
    return 0


def write_captions(
    model: Blip | Stage2, images: Iterable[TestImage], protocol: CaptionProtocol, batch_size: int
) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    """(key -> caption, key -> references), in order.

    Errors: ValueError for an image that cannot be decoded, or where there is none.
    """
    caption = captioner_of(model, protocol)
    device = next(model.parameters()).device
    captions: dict[str, str] = {}
    references: dict[str, Sequence[str]] = {}
    for chosen, pixels in batches_of_pixels(images, model.config.vision.image_size, batch_size, device):
        keys = [image.key for image in chosen]
        captions |= dict(zip(keys, caption(pixels, keys), strict=True))
        references |= {image.key: image.texts for image in chosen}
    if not captions:
        raise ValueError("the test set has no image; shards must name clean shards with rows")
    return captions, references


def captioner_of(
    model: Blip | Stage2, protocol: CaptionProtocol
) -> Callable[[Tensor, Sequence[str]], list[str]]:
    """[B, 3, S, S] and the keys of B images -> a caption of each, the prompt not repeated."""
    decoding, prompt = protocol.decoding, protocol.prompt
    if isinstance(model, Stage2):
        write = model.caption
        return lambda pixels, keys: write(pixels, prompt, decoding, [caption_seed(0, key, 0) for key in keys])
    several = Captioner(model, decoding, prompt, captions=1, seed=0)
    return lambda pixels, keys: [texts[0] for texts in several(pixels, keys)]


def score_captions(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Corpus scores, where there are references, and the diversity of the captions.

    Errors: ValueError where some images have references and others have none.
    """
    found: dict[str, float] = {}
    if any(references.values()):
        found |= {f"bleu{n}": value for n, value in enumerate(bleu(captions, references)[0], start=1)}
        found |= {"rouge_l": rouge_l(captions, references)[0], "cider_d": cider_d(captions, references)[0]}
    texts = list(captions.values())
    return found | {
        "unique_captions": unique_share(texts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
    }


def describe(metrics: Mapping[str, float]) -> str:
    """Lines for a person, times 100, as papers print it."""
    return "\n".join(f"  {name:<16}{100 * value:6.1f}" for name, value in metrics.items())


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
