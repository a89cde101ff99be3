"""Zero-shot classification by class names, on several sets of the same classes, and a linear probe: as CLIP.

The model is a MED that reads, a CLIP, or a stage 1 of BLIP-2, whose query most like the class counts.
The files of classes and templates hold one a line ("a photo of a {}."); a set is a folder with a folder for
each class, or parquet with a label column (pipelines.labelled). The drop of a set is measured from the first.
With `probe.train`, a set too, logistic regression on the features of the class token is fitted to that set
and judged on the others. OUT holds metrics.json: results by set and by class, the protocol, the digest of the
weights and the fingerprints of the sets. Several processes (torchrun) share the images and find the same
numbers as one.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.checkpoint import digest
from blip.clip import Clip
from blip.distributed import rank
from blip.image import crop_transform, image_transform
from blip.model import Blip
from blip.tokenizer import clean_caption
from blip.weights import load_blip
from blip.weights_clip import is_clip, load_clip, weights_place
from capfilt.shards import write_json_atomically
from pipelines.config import parse_args, run_main, save_config
from pipelines.labelled import (
    Class,
    ImageSet,
    LabelColumns,
    class_numbers,
    fingerprint,
    read_classes,
    read_images,
    read_templates,
)
from pipelines.parallel import Precision, autocast, processes
from pipelines.testset import batches_of_pixels, some
from pipelines.turns import batched, own_turns, rows_of_turns
from pipelines.zeroshot import (
    best_strength,
    class_embeddings,
    class_results,
    fit_probe,
    places_of_truth,
    prompts,
    set_results,
    validation_rows,
    with_drops,
)
from qformer import Stage1, load_stage1
from qformer.weights import is_blip2

Encoder = Blip | Clip | Stage1
TRAIN = "probe.train"  # what the training set of the probe is called among the sets
TEXTS = 256  # prompts in a batch


@dataclass(frozen=True)
class ProbeConfig:
    train: ImageSet | None = None  # null: no probe
    strength: float | None = None  # scikit-learn's C; null: the best on a fifth of the training set
    iterations: int = 1000  # of L-BFGS, at most


@dataclass(frozen=True)
class ZeroshotRun:
    out: str
    model: str  # a MED that reads (ITC), a stage 1, or a CLIP of transformers or open_clip
    classes: str  # a file with a class a line
    templates: str  # a file with a template a line
    sets: dict[str, ImageSet]  # the first is what the others are compared with
    columns: LabelColumns = field(default_factory=LabelColumns)  # of sets in parquet
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    image_size: int | None = None  # pixels; null: the model's
    max_length: int = 35  # tokens; CLIP cuts at 77
    batch_size: int = 64
    precision: Precision = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.sets or TRAIN in self.sets:
            raise ValueError(
                f"sets must name a set or more, as in sets={{test: {{images: x}}}}, but not {TRAIN}"
            )


def main(argv: list[str]) -> int:
    run = parse_args(argv, ZeroshotRun)
    classes, templates = read_classes(run.classes), read_templates(run.templates)
    numbers = {name: class_numbers(name, one, classes, run.columns) for name, one in sets_of(run).items()}
    with processes(run.device) as device:
        model = load_encoder(run.model, run.image_size).to(device)
        if run.probe.train and isinstance(model, Stage1):
            raise ValueError(
                "probe.train asks for the class token of a stage 1, which is that of its frozen vision "
                "encoder: there is nothing of the training in it; leave probe out"
            )
        if (same := read_alike(model, run, classes)) and rank() == 0:
            print(f"the model reads {len(same)} classes like another one: {some(same)}", flush=True)
        labels = {name: torch.tensor(found, device=device) for name, found in numbers.items()}
        result = {"zeroshot": zeroshot(model, run, classes, templates, labels)}
        if run.probe.train:
            result["probe"] = probe(model, run, run.probe.train, classes, labels)
        if rank() == 0:
            save(run, result, classes, templates, model.config.vision.image_size)
    return 0


def save(
    run: ZeroshotRun,
    result: dict[str, Any],
    classes: Sequence[Class],
    templates: Sequence[str],
    image_size: int,
) -> None:
    """Write what was found, and tell a person."""
    sets = sets_of(run)
    save_config(run, run.out)
    protocol: dict[str, Any] = {"image_size": image_size, "max_length": run.max_length}
    protocol |= {"templates": templates, "classes": len(classes), "precision": run.precision}
    data: dict[str, Any] = {
        "sets": {name: asdict(one) | {"fingerprint": fingerprint(one)} for name, one in sets.items()}
    }
    data["classes"] = {"source": run.classes, "sha256": digest(run.classes)}
    source = {"weights": {"source": run.model, "sha256": digest(weights_place(run.model))}, "data": data}
    whole = {"task": "zeroshot", "protocol": protocol} | result | source
    write_json_atomically(Path(run.out) / "metrics.json", whole)
    print(f"{len(classes)} classes, {len(templates)} templates")
    for name, found in result.items():
        print(describe(name, found["sets"]))
    print(f"written to {run.out}/metrics.json")


def sets_of(run: ZeroshotRun) -> dict[str, ImageSet]:
    """All that are read."""
    return run.sets | ({TRAIN: run.probe.train} if run.probe.train else {})


def load_encoder(source: str, image_size: int | None) -> Encoder:
    """In eval mode. Errors: ValueError as the loaders, or where texts cannot be encoded."""
    load = load_clip if is_clip(source) else load_stage1 if is_blip2(source) else load_blip
    model: Encoder = load(source, image_size=image_size)
    if model.tokenizer is None or (isinstance(model, Blip) and not model.config.text.reads):
        raise ValueError("this needs a model that reads texts (ITC) and its vocabulary")
    return model


def zeroshot(
    model: Encoder,
    run: ZeroshotRun,
    classes: Sequence[Class],
    templates: Sequence[str],
    labels: Mapping[str, Tensor],
) -> dict[str, Any]:
    """{"sets": {set: results}, "classes": {set: {class: results}}}; labels [I] of each set."""
    texts = prompts([one.name for one in classes], templates)
    embeddings = class_embeddings(encode_texts(model, run, texts), len(templates))  # [C, E]

    def cosines(pixels: Tensor) -> Tensor:
        return similarity(model, model.encode_images(pixels).float(), embeddings)

    scores = {name: encode_images(cosines, model, run, one) for name, one in run.sets.items()}
    return judge(scores, labels, classes)


def similarity(model: Encoder, images: Tensor, classes: Tensor) -> Tensor:
    """Cosines [B, C] of image features, [B, E] or [B, Q, E] of a stage 1's queries, and classes [C, E]."""
    with torch.autocast(images.device.type, enabled=False):  # bf16 would make ties of what differs
        return images @ classes.T if isinstance(model, Clip) else model.similarity(images, classes)


def probe(
    model: Encoder, run: ZeroshotRun, train: ImageSet, classes: Sequence[Class], labels: Mapping[str, Tensor]
) -> dict[str, Any]:
    """{"strength"} and what `zeroshot` gives. Errors: ValueError where there is nothing to choose it by."""

    def class_token(pixels: Tensor) -> Tensor:
        return model.image_tokens(pixels)[:, 0]

    features, truth = encode_images(class_token, model, run, train), labels[TRAIN]
    held = validation_rows(truth)

    def held_out(strength: float) -> float:
        fitted = fit_probe(features[~held], truth[~held], len(classes), strength, run.probe.iterations)
        return (fitted(features[held]).argmax(1) == truth[held]).double().mean().item()

    if run.probe.strength is None and not held.any():
        raise ValueError(f"{train.images}: no class has two images to choose probe.strength by; give it")
    strength = best_strength(held_out) if run.probe.strength is None else run.probe.strength
    fitted = fit_probe(features, truth, len(classes), strength, run.probe.iterations)
    sets = {name: fitted(encode_images(class_token, model, run, one)) for name, one in run.sets.items()}
    return {"strength": strength} | judge(sets, labels, classes)


def judge(
    scores: Mapping[str, Tensor], labels: Mapping[str, Tensor], classes: Sequence[Class]
) -> dict[str, Any]:
    """Of each set its results and those of its classes, among which alone it is judged.

    Scores [I, C] and labels [I] by set.
    """
    sets, each = {}, {}
    for name, found in scores.items():
        own = labels[name].unique()  # sorted
        places = places_of_truth(found[:, own], torch.searchsorted(own, labels[name]))
        each[name] = class_results(places, labels[name], {i: classes[i].name for i in own.tolist()})
        sets[name] = set_results(places, each[name])
    return {"sets": with_drops(sets), "classes": each}


def read_alike(model: Encoder, run: ZeroshotRun, classes: Sequence[Class]) -> list[str]:
    """Names that the model cannot tell from another's, mostly since its vocabulary lacks their words."""
    names = [one.name for one in classes]
    rows = [tuple(row) for row in tokenize(model, run, names)[0].tolist()]
    counts = Counter(rows)
    return [name for name, row in zip(names, rows, strict=True) if counts[row] > 1]


def tokenize(model: Encoder, run: ZeroshotRun, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """ids and mask [R, T], of texts cleaned up as the model's were in training."""
    assert model.tokenizer is not None
    cleaned = texts if isinstance(model, Clip) else [clean_caption(text) for text in texts]
    return model.tokenizer(cleaned, run.max_length)


@torch.no_grad()
def encode_texts(model: Encoder, run: ZeroshotRun, texts: Sequence[str]) -> Tensor:
    """Unit features [R, E] of R texts."""
    device = next(model.parameters()).device
    found = []
    with autocast(device, run.precision):
        for few in own_turns(batched(texts, TEXTS)):
            ids, mask = tokenize(model, run, few)
            found.append(model.encode_texts(ids.to(device), mask.to(device)).float())
    return rows_of_turns(found, device)


@torch.no_grad()
def encode_images(
    encode: Callable[[Tensor], Tensor], model: Encoder, run: ZeroshotRun, given: ImageSet
) -> Tensor:
    """What `encode` gives for all images of a set, [I, ...]; it takes pixels [B, 3, S, S] to [B, ...]."""
    device = next(model.parameters()).device
    size = model.config.vision.image_size
    transform = crop_transform if isinstance(model, Clip) else image_transform
    batches = batches_of_pixels(read_images(given, run.columns), size, run.batch_size, device, transform)
    with autocast(device, run.precision):
        return rows_of_turns([encode(pixels).float() for _, pixels in batches], device)


def describe(name: str, sets: Mapping[str, Mapping[str, float]]) -> str:
    """A table for a person, in per cent."""
    lines = [f"  {name:<20}{'images':>8}{'top-1':>8}{'top-5':>8}{'by class':>10}{'drop':>8}"]
    for title, found in sets.items():
        numbers = [100 * found[key] for key in ("top1", "top5", "mean_per_class")]
        drop = f"{100 * found['drop']:8.1f}" if "drop" in found else ""
        lines.append("  {:<20}{:>8}{:8.1f}{:8.1f}{:10.1f}".format(title, found["images"], *numbers) + drop)
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
