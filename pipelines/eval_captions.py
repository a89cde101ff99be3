"""Captions for the images of clean shards, beside their references: BLEU, ROUGE-L, CIDEr-D, and how diverse.

OUT holds captions.json ([{"image_id", "caption"}], what the COCO and NoCaps servers take) and metrics.json:
the numbers, the protocol, the digest of the weights and the fingerprint of the test set. A set without any
reference, such as NoCaps' test set, gets captions and no score. Where the shards tell the domains of images,
as those of NoCaps do, each domain is scored by itself too.

In place of a model, `results` may name such a file of captions, which is only scored: it must have one
caption for every image, or with `subset` for some of them. Several processes (torchrun) share the images of a
model and find the same numbers as one.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.distributed import rank
from blip.generate import BEAM_SEARCH, Decoding
from blip.model import Blip
from blip.weights import load_blip
from capfilt.captioner import Captioner, caption_seed
from capfilt.shards import write_json_atomically
from pipelines.annotations import read_results
from pipelines.config import parse_args, run_main, save_config
from pipelines.grounding import grounding_gap, hallucination, read_objects, read_synonyms
from pipelines.java_metrics import Extra, meteor, refuse_absent, spice
from pipelines.metrics import TOKENIZER, bleu, cider_d, distinct_n, rouge_l, unique_share
from pipelines.parallel import DTYPE, Precision, autocast, processes
from pipelines.testset import (
    TestImage,
    batches_of_pixels,
    domains_of,
    provenance,
    read_testset,
    refuse_doubles,
    refuse_gaps,
    server_id,
    some,
)
from pipelines.turns import all_turns
from qformer import Stage2, load_stage2
from qformer.weights import is_blip2

NOTHING = "the test set has no image; shards must name clean shards with rows"


@dataclass(frozen=True)
class CaptionProtocol:
    """What decides the numbers. BLIP: 3 beams, 5 to 20 tokens, 384 px; on NoCaps repetition_penalty 1.1."""

    prompt: str = "a picture of "
    decoding: Decoding = BEAM_SEARCH
    image_size: int | None = None  # pixels; null: the model's


@dataclass(frozen=True)
class CaptionRun:
    out: str
    shards: tuple[str, ...]  # clean shards of the test set
    model: str | None = None  # that writes: a MED, pre-trained or a captioner, or a stage 2 of BLIP-2
    results: str | None = None  # or a file of captions
    protocol: CaptionProtocol = field(default_factory=CaptionProtocol)
    extra: tuple[Extra, ...] = ()  # metrics in Java, see pipelines.java_metrics
    objects: str | None = None  # a file with the objects of each image: which captions name others?
    synonyms: str | None = None  # a file with other words for objects, see pipelines.grounding
    grounding_gap: bool = False  # of a MED: what its words owe to the image, in nats a word
    limit: int | None = None  # the first so many images; null: all
    subset: bool = False  # true: also where images are missing in the shards, or captions in results
    batch_size: int = 32
    precision: Precision = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.results is None):
            raise ValueError("give one of model and results: what is to write, or a file of captions")
        if self.grounding_gap and self.model is None:
            raise ValueError("grounding_gap needs a model, and results hold captions alone")
        if self.synonyms and not self.objects:
            raise ValueError("synonyms are other words for the objects of images; give objects too")


@dataclass(frozen=True)
class Found:
    """What is to be scored, by key, and what it is."""

    captions: Mapping[str, str]
    references: Mapping[str, Sequence[str]]  # of the same images
    protocol: Mapping[str, Any]
    left_out: int = 0  # images without a caption
    gap: float | None = None


def main(argv: list[str]) -> int:
    run = parse_args(argv, CaptionRun)
    refuse_absent(run.extra)  # now, and not when all captions are written
    lacking = refuse_gaps(run.shards, run.subset)
    with processes(run.device) as device:
        found = from_model(run, run.model, device) if run.model else from_file(run, str(run.results))
        if rank() == 0:
            save(run, found, lacking + found.left_out)
    return 0


def from_model(run: CaptionRun, source: str, device: torch.device) -> Found:
    """Errors: ValueError as `write_captions`, or for a grounding gap of another model than a MED."""
    size = run.protocol.image_size
    if is_blip2(source):
        model: Blip | Stage2 = load_stage2(source, image_size=size, dtype=DTYPE[run.precision])
    else:
        model = load_blip(source, image_size=size)
    model.to(device)
    if run.grounding_gap and not isinstance(model, Blip):
        raise ValueError("grounding_gap is measured of a MED, and this is a stage 2; leave it out")
    gap = None
    with torch.inference_mode(), autocast(device, run.precision):
        images = read_testset(run.shards, run.limit)
        captions, references = write_captions(model, images, run.protocol, run.batch_size)
        if run.grounding_gap and isinstance(model, Blip):
            images = read_testset(run.shards, run.limit)
            gap = grounding_gap(model, images, run.protocol.prompt, run.batch_size)
    protocol = asdict(run.protocol) | {"precision": run.precision}
    protocol |= {"image_size": model.config.vision.image_size}
    return Found(captions, references, protocol, gap=gap)


def from_file(run: CaptionRun, file: str) -> Found:
    """Captions of a file, in the order of the test set.

    Errors: ValueError that lists the ids which come twice or are not in the test set, and the images without
    a caption unless a subset is wanted.
    """
    rows = read_results(file)
    refuse_doubles(f"{file} captions", [key for key, _ in rows])
    given = dict(rows)
    whole = {image.key: image.texts for image in read_testset(run.shards, with_images=False)}
    if strange := [key for key in given if key not in whole]:
        raise ValueError(
            f"{file} has captions of {len(strange)} images that are not in shards: {some(strange)}"
        )
    asked = dict(islice(whole.items(), run.limit))
    missing = [key for key in asked if key not in given]
    if missing and not run.subset:
        raise ValueError(
            f"{file} has no caption of {len(missing)} images in shards: {some(missing)}. Scores of a part "
            "are not those of the whole; add them, or set subset=true to score the others"
        )
    references = {key: texts for key, texts in asked.items() if key in given}
    if not references:
        raise ValueError(NOTHING)
    return Found({key: given[key] for key in references}, references, {}, len(missing))


def save(run: CaptionRun, found: Found, left_out: int) -> None:
    """Write the captions, score them, and tell a person."""
    captions, references = found.captions, found.references
    out = Path(run.out)
    save_config(run, out)
    if run.model:
        rows = [{"image_id": server_id(key), "caption": text} for key, text in captions.items()]
        write_json_atomically(out / "captions.json", rows)
    result: dict[str, Any] = {"task": "captions"}
    result["protocol"] = {**found.protocol, "tokenizer": TOKENIZER, "limit": run.limit}
    result |= {"images": len(captions), "left_out": left_out}
    metrics = score_captions(captions, references, run.extra)
    if run.objects:
        synonyms = read_synonyms(run.synonyms) if run.synonyms else {}
        metrics |= hallucination(captions, read_objects(run.objects), synonyms)
    result["metrics"] = metrics
    if domains := domains_of(run.shards):
        result["domains"] = score_domains(captions, references, domains, run.extra)
    if found.gap is not None:
        result["grounding_gap"] = found.gap
    source = provenance(str(run.model or run.results), run.shards)
    if run.results:
        source["results"] = source.pop("weights")
    write_json_atomically(out / "metrics.json", result | source)
    print(f"{len(captions)} images, {sum(map(len, references.values()))} references")
    if run.limit or left_out:
        print(f"a part: limit {run.limit}, {left_out} images left out; CIDEr-D is not that of the whole set")
    print(describe(result))
    print(f"written to {run.out}/metrics.json" + (f" and {run.out}/captions.json" if run.model else ""))


def write_captions(
    model: Blip | Stage2, images: Iterable[TestImage], protocol: CaptionProtocol, batch_size: int
) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    """(key -> caption, key -> references), in order; every process gets those of all.

    Errors: ValueError for an image that cannot be decoded, or where there is none.
    """
    caption = captioner_of(model, protocol)
    device = next(model.parameters()).device
    own = []
    for chosen, pixels in batches_of_pixels(images, model.config.vision.image_size, batch_size, device):
        keys = [image.key for image in chosen]
        texts = [image.texts for image in chosen]
        own.append(list(zip(keys, caption(pixels, keys), texts, strict=True)))
    found = [row for batch in all_turns(own) for row in batch]
    if not found:
        raise ValueError(NOTHING)
    return {key: text for key, text, _ in found}, {key: texts for key, _, texts in found}


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


def score_captions(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], extra: Sequence[Extra] = ()
) -> dict[str, float]:
    """Corpus scores, where there are references, and the diversity of the captions.

    Errors: ValueError where some images have references and others have none.
    """
    found: dict[str, float] = {}
    if any(references.values()):
        found |= {f"bleu{n}": value for n, value in enumerate(bleu(captions, references)[0], start=1)}
        found |= {"rouge_l": rouge_l(captions, references)[0], "cider_d": cider_d(captions, references)[0]}
        java = {"meteor": meteor, "spice": spice}
        found |= {name: java[name](captions, references)[0] for name in extra}
    texts = list(captions.values())
    return found | {
        "unique_captions": unique_share(texts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
    }


def score_domains(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    domains: Mapping[str, str],
    extra: Sequence[Extra] = (),
) -> dict[str, dict[str, float]]:
    """{domain: {"images", ...}}, each domain a corpus of its own, as in BLIP's evaluation of NoCaps.

    Errors: ValueError that lists the images without a domain.
    """
    if absent := [key for key in captions if key not in domains]:
        raise ValueError(f"the shards tell no domain of the images {some(absent)}; run make shards again")
    found: dict[str, dict[str, float]] = {}
    for name in sorted({domains[key] for key in captions}):
        keys = [key for key in captions if domains[key] == name]
        parts = {key: captions[key] for key in keys}, {key: references[key] for key in keys}
        found[name] = {"images": len(keys), **score_captions(*parts, extra)}
    return found


def describe(result: Mapping[str, Any]) -> str:
    """Lines for a person, times 100, as papers print it; a column for each domain and one for all."""
    columns = {**result.get("domains", {}), "overall" if "domains" in result else "": result["metrics"]}
    lines = [" " * 24 + "".join(f"{name:>12}" for name in columns)] if len(columns) > 1 else []
    for name in result["metrics"]:
        values = (f"{100 * one[name]:12.1f}" if name in one else f"{'':12}" for one in columns.values())
        lines.append(f"  {name:<22}" + "".join(values))
    if "grounding_gap" in result:
        lines.append(f"  {'grounding_gap':<22}{result['grounding_gap']:12.3f} nats a word")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
