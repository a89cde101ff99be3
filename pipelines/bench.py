"""How fast this machine writes captions, scores texts and runs CapFilt, each beside what there is to compare it with.

captions, scores   our models beside those of transformers: one process, the same random weights, in turns. Nothing is
                   timed unless both sides write the same ids and give the same P(match).
ray                CapFilt on Ray beside the same workers as plain processes, on the same shards; nothing is told unless
                   both write the same bytes.
capfilt            CapFilt in one process, and where its time goes.

Prints medians, and appends everything that was measured to OUT/bench.json, one JSON object a line.
"""

import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

import capfilt
from blip import Blip, BlipConfig, Tokenizer, export_hf, image_transform
from blip.generate import BEAM_SEARCH, NUCLEUS, Decoding, generate
from blip.image import decode
from blip.tokenizer import SPECIAL, write_vocabulary
from capfilt.filter import Filter
from capfilt.job import RayConfig, Summary
from capfilt.shards import batches, done_path, done_splits, open_split, plan_splits, scored_path, stats_path
from capfilt.worker import CapFiltConfig, CapFiltWorker
from pipelines.config import parse_args, run_main
from pipelines.world import WorldConfig, write_world

T = TypeVar("T")

BERT_WORDS = 30522  # so that the output layer has its real size
PROMPT = "a picture of "
TEXT_WORDS = (10, 8)  # of the two texts of an image: a web text and a synthetic one
CLOSE = 1e-4  # of probabilities
OURS, THEIRS = "here", "transformers"


@dataclass(frozen=True)
class BenchRun:
    out: str
    capfilt: CapFiltConfig  # of the parts ray and capfilt, on the generated world
    parts: tuple[Literal["captions", "scores", "ray", "capfilt"], ...] = ("captions", "scores", "ray", "capfilt")
    model: BlipConfig = field(default_factory=lambda: BlipConfig.of("base", image_size=384))
    batch: int = 8  # images, of the parts captions and scores
    tokens: int = 20  # of every caption, the prompt's included
    seed: int = 0  # of the random weights and images
    repeats: int = 3
    world: WorldConfig = field(default_factory=WorldConfig)
    workers: int = 2  # of the part ray

    def __post_init__(self) -> None:
        for name, least in {"batch": 2, "repeats": 1, "workers": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class Result:
    """The same work on each side: seconds of every repeat, and what else is worth knowing."""

    name: str
    unit: str
    amount: int  # of units in one repeat
    seconds: Mapping[str, Sequence[float]]  # side -> repeats
    more: Mapping[str, float] = field(default_factory=dict)

    def rate(self, side: str) -> float:
        """Units a second, by the median."""
        return self.amount / statistics.median(self.seconds[side])

    def ratio(self) -> float | None:
        """How many times the first side is as fast as the second; None where there is one side only."""
        rates = [self.rate(side) for side in self.seconds]
        return rates[0] / rates[1] if len(rates) == 2 else None


def main(argv: list[str]) -> int:
    run = parse_args(argv, BenchRun)
    Path(run.out).mkdir(parents=True, exist_ok=True)
    where = machine()
    print("  ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    with Path(run.out, "bench.json").open("a", encoding="utf-8") as log:
        for result in measure(run):
            print(row(result), flush=True)
            print(json.dumps(record(result) | {"machine": where, "run": asdict(run)}), file=log, flush=True)
    return 0


def measure(run: BenchRun) -> Iterator[Result]:
    """Every part that is asked for; each frees its models before the next."""
    with TemporaryDirectory(dir=run.out) as folder:
        if "captions" in run.parts:
            yield from measure_captions(run, Path(folder, "captions"))
        if "scores" in run.parts:
            yield measure_scores(run, Path(folder, "scores"))
        if "ray" in run.parts:
            yield measure_ray(run, Path(folder, "ray"))
        if "capfilt" in run.parts:
            yield measure_capfilt(run, Path(folder, "capfilt"))


def in_turns(sides: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each side returns, every time. The order turns round each time, so that warm caches favour no side."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            found[name].append(sides[name]())
    return found


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ---- captions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captioners:
    """The same captioner here and in transformers, and what both are asked to write."""

    ours: Blip
    theirs: Any
    pixels: Tensor  # [B, 3, S, S]
    prompt: Tensor  # [P], [DEC] first
    end: int

    @torch.inference_mode()
    def write(self, decoding: Decoding) -> Tensor:
        """Ids [B, T]."""
        image = self.ours.med.project_image(self.ours.image_tokens(self.pixels))
        return generate(self.ours.med, image, self.prompt, self.end, decoding, range(len(self.pixels)))

    @torch.inference_mode()
    def write_theirs(self, decoding: Decoding) -> Tensor:
        """Ids [B, T]; the image's own forward is a part of their `generate`."""
        start = torch.cat([self.prompt, self.prompt.new_tensor([self.end])])  # their generate cuts the last id
        drawn = {"top_p": decoding.top_p, "top_k": decoding.top_k} if decoding.top_p is not None else {}
        ids: Tensor = self.theirs.generate(
            self.pixels,
            input_ids=start.repeat(len(self.pixels), 1),
            num_beams=decoding.beams,
            do_sample=decoding.top_p is not None,
            min_length=decoding.min_length,
            max_length=decoding.max_length,
            length_penalty=decoding.length_penalty,
            repetition_penalty=decoding.repetition_penalty,
            **drawn,
        )
        return ids


def measure_captions(run: BenchRun, folder: Path) -> Iterator[Result]:
    """Nucleus sampling and beam search, as CapFilt uses them, but for exactly `tokens` tokens each."""
    captioners = make_captioners(run, folder)
    greedy, beams, nucleus = (
        replace(decoding, min_length=run.tokens, max_length=run.tokens)  # so the end comes nowhere too early
        for decoding in (Decoding(), BEAM_SEARCH, NUCLEUS)
    )
    check_captions("greedy decoding", captioners.write(greedy), captioners.write_theirs(greedy))
    check_captions("beam search", captioners.write(beams), captioners.write_theirs(beams))
    for name, decoding in (
        (f"captions, nucleus {nucleus.top_p}", nucleus),
        (f"captions, {beams.beams} beams", beams),
    ):
        sides = {
            OURS: partial(seconds, partial(captioners.write, decoding)),
            THEIRS: partial(seconds, partial(captioners.write_theirs, decoding)),
        }
        yield Result(name, "images", run.batch, in_turns(sides, run.repeats))


def make_captioners(run: BenchRun, folder: Path) -> Captioners:
    config = replace(run.model, text=replace(run.model.text, reads=False))
    tokenizer = bench_tokenizer(folder / "words")
    ours = random_blip(config, tokenizer, run.seed)
    export_hf(ours, folder / "hf")
    theirs = BlipForConditionalGeneration.from_pretrained(folder / "hf", local_files_only=True).eval()
    pixels = pictures(run.batch, config.vision.image_size, run.seed)
    return Captioners(ours, theirs, pixels, tokenizer.prompt(PROMPT), tokenizer.sep)


def check_captions(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raises ValueError where two captions of an image differ, or where all images have the same one."""
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        where = f"at {int((ours != theirs).sum())} places" if ours.shape == theirs.shape else "in their length"
        raise ValueError(
            f"{name}: ids {list(ours.shape)} here and {list(theirs.shape)} of transformers differ {where}, so nothing "
            "is timed; try another seed, and if that differs too, one side is wrong"
        )
    if len(ours.unique(dim=0)) == 1:
        raise ValueError(
            f"{name}: all {len(ours)} images have the same caption, so its equality says little and nothing is timed; "
            "try another seed"
        )


# ---- scores --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filters:
    """The same filter here and in transformers, and the pairs that both score."""

    ours: Filter
    theirs: Any
    pixels: Tensor  # [B, 3, S, S]
    texts: Sequence[Sequence[str]]  # n of each image

    @torch.inference_mode()
    def score(self) -> Tensor:
        """P(match) [B, n]. Does more than the other side: the cosine of ITC comes with it."""
        return self.ours(self.pixels, self.texts)[0]

    @torch.inference_mode()
    def score_theirs(self) -> Tensor:
        """P(match) [B, n], called as it is documented: one image for every text."""
        tokenizer = self.ours.tokenizer
        ids, mask = tokenizer([text for row in self.texts for text in row], self.ours.max_length)
        ids[:, 0] = tokenizer.enc  # they leave [CLS] there; with it they would score something else
        count = len(self.texts[0])
        images = self.pixels.repeat_interleave(count, 0)  # [B * n, 3, S, S]
        found = self.theirs(input_ids=ids, pixel_values=images, attention_mask=mask, use_itm_head=True)
        probabilities: Tensor = found.itm_score.softmax(-1)[:, 1]
        return probabilities.unflatten(0, (-1, count))


def measure_scores(run: BenchRun, folder: Path) -> Result:
    filters = make_filters(run, folder)
    check_scores(filters.score(), filters.score_theirs())
    sides = {OURS: partial(seconds, filters.score), THEIRS: partial(seconds, filters.score_theirs)}
    name = f"scores, {len(TEXT_WORDS)} texts an image"
    return Result(name, "texts", run.batch * len(TEXT_WORDS), in_turns(sides, run.repeats))


def make_filters(run: BenchRun, folder: Path) -> Filters:
    config = replace(run.model, text=replace(run.model.text, writes=False))
    tokenizer = bench_tokenizer(folder / "words")
    blip = random_blip(config, tokenizer, run.seed)
    export_hf(blip, folder / "hf")
    theirs = BlipForImageTextRetrieval.from_pretrained(folder / "hf", local_files_only=True).eval()
    ours = Filter(blip, run.capfilt.max_words, run.capfilt.max_length)
    generator = torch.Generator().manual_seed(run.seed)
    texts = [[random_text(words, generator) for words in TEXT_WORDS] for _ in range(run.batch)]
    return Filters(ours, theirs, pictures(run.batch, config.vision.image_size, run.seed), texts)


def check_scores(ours: Tensor, theirs: Tensor) -> None:
    """Raises ValueError where two P(match) differ by more than 1e-4, or where they are all the same."""
    if not (difference := float((ours - theirs).abs().max())) <= CLOSE:  # so written, NaN is refused too
        raise ValueError(
            f"P(match) here and of transformers differ by {difference:.2g}, allowed is {CLOSE:g}, so nothing is timed; "
            "one side is wrong"
        )
    if float(ours.max() - ours.min()) < 100 * CLOSE:
        raise ValueError("all pairs have the same P(match), so its equality says little and nothing is timed")


# ---- random models, words and images -------------------------------------------------------------


def bench_tokenizer(folder: Path) -> Tokenizer:
    """As many words as BERT has: those of the prompt, and w0, w1, ..."""
    words = PROMPT.split()
    words += [f"w{i}" for i in range(BERT_WORDS - len(SPECIAL) - len(words))]
    write_vocabulary(words, folder)
    return Tokenizer(folder)


def random_text(words: int, generator: torch.Generator) -> str:
    return " ".join(f"w{i}" for i in torch.randint(0, 30_000, (words,), generator=generator).tolist())


def random_blip(config: BlipConfig, tokenizer: Tokenizer, seed: int) -> Blip:
    """In eval mode. Weights so large that words, positions and images all matter: a flat model agrees with anything."""
    if config.text.vocab_size != len(tokenizer):
        raise ValueError(
            f"model.text.vocab_size is {config.text.vocab_size}; here it must be BERT's {len(tokenizer)}, with [DEC] and [ENC]"
        )
    model, generator = Blip(config, tokenizer).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.normal_(0, scale, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1)
            if isinstance(module, nn.Embedding):
                module.weight.mul_(8)
    return model


def pictures(count: int, size: int, seed: int) -> Tensor:
    """[count, 3, size, size] of coarse patches and fine noise, each picture in a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    colour, coarse, fine = (torch.randn(count, 3, side, side, generator=generator) for side in (1, 6, size))
    return 2 * colour + F.interpolate(coarse, size=(size, size), mode="nearest") + 0.5 * fine


# ---- CapFilt -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """When a CapFilt run did what, in seconds, told by its files: the same for every engine."""

    start_up: float  # from the call to the first row: processes, imports, models
    rows: float  # from the first row to the last shard that is done
    late: float  # from the first row until the last worker began
    work: float  # inside the workers, summed over them
    shut_down: float  # from the last shard to the return
    files: Mapping[str, str]  # scored shard -> sha256


def measure_ray(run: BenchRun, folder: Path) -> Result:
    """The time between the first row and the last; how long each engine took to start is in `more`."""
    write_world(run.world, folder / "world")
    source = folder / "world" / "noisy"
    engines: dict[str, Callable[[Path], Summary]] = {
        "Ray": partial(capfilt.run_on_ray, run.capfilt, source, cluster=RayConfig(workers=run.workers)),
        "processes": partial(capfilt.run_local, run.capfilt, source, workers=run.workers),
    }
    found = in_turns({name: partial(clock, engine, folder) for name, engine in engines.items()}, run.repeats)
    check_files([each.files for clocks in found.values() for each in clocks])
    more = {
        f"{name} {part}": statistics.median(getattr(each, part) for each in clocks)
        for part in ("start_up", "late", "work", "shut_down")
        for name, clocks in found.items()
    }
    times = {name: [each.rows for each in clocks] for name, clocks in found.items()}
    return Result(f"CapFilt, {run.workers} workers", "rows", run.world.noisy_rows, times, more)


def clock(engine: Callable[[Path], Summary], folder: Path) -> Clock:
    """Run an engine into an empty folder of its own."""
    out = Path(mkdtemp(dir=folder))
    called = time.time()
    summary = engine(out)
    returned = time.time()
    if summary.failed:
        raise ValueError(f"shards failed, so nothing is told: {'; '.join(summary.failed.values())}")
    ids = [mark.split.id for mark in done_splits(out)]
    spent = [mark.counts["seconds"] for mark in done_splits(out)]
    # A worker writes a shard's stats when its seconds are over, and its done-mark last.
    begun = sorted(stats_path(out, id).stat().st_mtime - each for id, each in zip(ids, spent, strict=True))
    ended = max(done_path(out, id).stat().st_mtime for id in ids)
    workers = min(len(begun), 2)
    return Clock(
        start_up=begun[0] - called,
        rows=ended - begun[0],
        late=begun[workers - 1] - begun[0],
        work=sum(spent),
        shut_down=returned - ended,
        files={id: hashlib.sha256(scored_path(out, id).read_bytes()).hexdigest() for id in ids},
    )


def check_files(runs: Sequence[Mapping[str, str]]) -> None:
    """Raises ValueError where the scored shards of two runs are not the same bytes."""
    differing = sorted({name for files in runs for name in {*files, *runs[0]} if files.get(name) != runs[0].get(name)})
    if differing:
        raise ValueError(f"scored shards differ between runs, so nothing is told: {', '.join(differing)}")


def measure_capfilt(run: BenchRun, folder: Path) -> Result:
    """One process, one shard of the world; `more` holds what each stage alone takes."""
    write_world(run.world, folder / "world")
    source = folder / "world" / "noisy" / "00000.parquet"
    threads = torch.get_num_threads()
    try:
        alone = partial(capfilt.run_local, run.capfilt, source)
        clocks = [clock(alone, folder) for _ in range(run.repeats)]
        amount, more = stages(run.capfilt, source)
    finally:
        torch.set_num_threads(threads)  # a worker sets its own
    times = {f"{run.capfilt.threads} torch threads": [each.rows for each in clocks]}
    return Result("CapFilt, 1 worker", "rows", amount, times, more)


@torch.inference_mode()
def stages(config: CapFiltConfig, source: Path) -> tuple[int, dict[str, float]]:
    """Rows of a shard, and milliseconds a row of each stage, one after the other. In a run, decoding overlaps the rest."""
    worker = CapFiltWorker(config, source.parent, {})
    spent: Counter[str] = Counter()
    rows = 0
    (split,) = plan_splits(source, config.rows_per_split)
    for chunk in batches(open_split(split, config.columns).chunks, config.batch_size):
        begun = time.perf_counter()
        images = [decode(each.image) for each in chunk.rows]
        made = {size: torch.stack([image_transform(image, size) for image in images]) for size in set(worker.sizes)}
        for_captioner, for_filter = (made[size].to(worker.device) for size in worker.sizes)
        decoded = time.perf_counter()
        captions = worker.caption(for_captioner, [each.key for each in chunk.rows])
        captioned = time.perf_counter()
        texts = [[each.text or "", *written] for each, written in zip(chunk.rows, captions, strict=True)]
        worker.score(for_filter, texts)
        scored = time.perf_counter()
        spent.update({"decode ms": decoded - begun, "caption ms": captioned - decoded, "score ms": scored - captioned})
        rows += len(chunk.rows)
    return rows, {name: 1000 * each / rows for name, each in spent.items()}


# ---- what is told --------------------------------------------------------------------------------


def machine() -> dict[str, str | int]:
    """What the times depend on, besides the code."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def row(result: Result) -> str:
    """One line of the table, and one for what else was found."""
    rates = "   ".join(f"{side} {result.rate(side):9.3f} {result.unit}/s" for side in result.seconds)
    ratio = result.ratio()
    line = f"{result.name:<26}{rates}" + (f"   {ratio:6.2f}x" if ratio is not None else "")
    more = ", ".join(f"{name} {value:.2f}" for name, value in result.more.items())
    return f"{line}\n{'':<26}({more})" if more else line


def record(result: Result) -> dict[str, Any]:
    """The same for a program, with every single time."""
    rates = {side: result.rate(side) for side in result.seconds}
    return {**asdict(result), "rates": rates, "ratio": result.ratio()}


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
