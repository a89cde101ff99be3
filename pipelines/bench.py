"""How fast this machine writes captions, scores texts and runs CapFilt, beside what there is to compare with.

captions, scores   our models and those of transformers, in one process and in turns, with the same random
                   weights; timed only after both wrote the same ids and gave the same P(match)
retrieval          a test set ranked by ITC and ITM, and the same pairs by transformers' class
                   (pipelines/bench_retrieval.py); told only if both gave the same scores
train              a step of pre-training, forward and backward, and a plain loop over transformers' modules
                   (pipelines/bench_train.py); timed only after losses and gradients agreed
stages             the same of BLIP-2's two stages (pipelines/bench_stages.py)
ray                CapFilt on Ray and the same workers as plain processes, on the same shards; told only if
                   both wrote the same bytes
capfilt            CapFilt in one process, and where its time goes

Prints medians, and appends all that was measured to OUT/bench.json, one JSON object a line.
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
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor
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
from pipelines.bench_retrieval import BenchRetrievalConfig, measure_retrieval
from pipelines.bench_sides import Result, check_close, draw_weights, in_turns, pictures, race
from pipelines.bench_stages import BenchStagesConfig, measure_stages
from pipelines.bench_train import BenchTrainConfig, PlainBlip, measure_steps, training_model
from pipelines.config import parse_args, run_main
from pipelines.world import WorldConfig, write_world

Part = Literal["captions", "scores", "retrieval", "train", "stages", "ray", "capfilt"]

BERT_WORDS = 30522  # so that the output layer has its real size
PROMPT = "a picture of "
TEXT_WORDS = (10, 8)  # of the two texts of an image, found and written; [ENC] and [SEP] come on top
CLOSE = 1e-4  # of probabilities


@dataclass(frozen=True)
class BenchRun:
    out: str
    capfilt: CapFiltConfig  # of the parts ray and capfilt, on the generated world
    parts: tuple[Part, ...] = get_args(Part)
    model: BlipConfig = field(default_factory=lambda: BlipConfig.of("base", image_size=384))
    batch: int = 8  # images, of the parts captions and scores
    tokens: int = 20  # of every caption, the prompt's included
    seed: int = 0  # of the random weights, images and texts
    repeats: int = 3
    retrieval: BenchRetrievalConfig = field(default_factory=BenchRetrievalConfig)
    train: BenchTrainConfig = field(default_factory=BenchTrainConfig)
    stages: BenchStagesConfig = field(default_factory=BenchStagesConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    workers: int = 2  # of the part ray

    def __post_init__(self) -> None:
        for name, least in {"batch": 2, "repeats": 1, "workers": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def main(argv: list[str]) -> int:
    run = parse_args(argv, BenchRun)
    Path(run.out).mkdir(parents=True, exist_ok=True)
    where = machine()
    print("  ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    with Path(run.out, "bench.json").open("a", encoding="utf-8") as log:
        for result in measure(run):
            print(lines(result), flush=True)
            found = asdict(result) | {"rates": result.rates, "ratio": result.ratio}
            print(json.dumps(found | {"machine": where, "run": asdict(run)}), file=log, flush=True)
    return 0


def measure(run: BenchRun) -> Iterator[Result]:
    """Every part that is asked for; each frees its models before the next."""
    with TemporaryDirectory(dir=run.out, prefix="bench-") as folder:
        if "captions" in run.parts:
            yield from measure_captions(run, Path(folder, "captions"))
        if "scores" in run.parts:
            yield measure_scores(run, Path(folder, "scores"))
        if "retrieval" in run.parts:
            yield from rank_and_compare(run, Path(folder, "retrieval"))
        if "train" in run.parts:
            yield measure_train(run, Path(folder, "train"))
        if "stages" in run.parts:
            yield from measure_stages(run.stages, Path(folder), run.seed, run.repeats)
        if "ray" in run.parts:
            yield measure_ray(run, Path(folder, "ray"))
        if "capfilt" in run.parts:
            yield measure_capfilt(run, Path(folder, "capfilt"))


def machine() -> dict[str, str | int]:
    """What the times depend on, besides the code."""
    info = Path("/proc/cpuinfo")
    entries = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in entries if line.startswith("model name")]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def lines(result: Result) -> str:
    """One line of the table, and one for what else was found."""
    line = f"{result.name:<28}"
    line += "   ".join(f"{side} {rate:8.3f} {result.unit}/s" for side, rate in result.rates.items())
    line += f"   {result.ratio:6.2f}x" if result.ratio is not None else ""
    more = ", ".join(f"{name} {value:.2f}" for name, value in result.more.items())
    return f"{line}\n{'':<28}({more})" if more else line


@dataclass(frozen=True)
class Pair:
    """The same weights here and in transformers, and the images that both are shown."""

    ours: Blip
    theirs: Any
    tokenizer: Tokenizer
    pixels: Tensor  # [B, 3, S, S]


def make_pair(run: BenchRun, folder: Path, their_class: Any, *, reads: bool, writes: bool) -> Pair:
    words = PROMPT.split()
    words += [f"w{i}" for i in range(BERT_WORDS - len(SPECIAL) - len(words))]
    write_vocabulary(words, folder / "words")
    tokenizer = Tokenizer(folder / "words")
    config = replace(run.model, text=replace(run.model.text, reads=reads, writes=writes))
    ours = draw_weights(Blip(config, tokenizer).eval(), run.seed)
    export_hf(ours, folder / "hf")
    theirs = their_class.from_pretrained(folder / "hf", local_files_only=True).eval()
    return Pair(ours, theirs, tokenizer, pictures(run.batch, config.vision.image_size, run.seed))


def measure_captions(run: BenchRun, folder: Path) -> Iterator[Result]:
    """Nucleus sampling and beam search as in CapFilt, but of exactly `tokens` tokens: no end comes before."""
    pair = make_pair(run, folder, BlipForConditionalGeneration, reads=False, writes=True)
    greedy, beams, nucleus = (
        replace(decoding, min_length=run.tokens, max_length=run.tokens)
        for decoding in (Decoding(), BEAM_SEARCH, NUCLEUS)
    )
    for name, decoding in (("greedy decoding", greedy), ("beam search", beams)):
        check_captions(name, caption(pair, decoding), caption_there(pair, decoding))
    for name, decoding in ((f"nucleus {nucleus.top_p}", nucleus), (f"{beams.beams} beams", beams)):
        ours, theirs = partial(caption, pair, decoding), partial(caption_there, pair, decoding)
        yield race(f"captions, {name}", "images", run.batch, ours, theirs, run.repeats)


@torch.inference_mode()
def caption(pair: Pair, decoding: Decoding) -> Tensor:
    """Ids [B, T]."""
    image = pair.ours.med.project_image(pair.ours.image_tokens(pair.pixels))
    start, seeds = pair.tokenizer.prompt(PROMPT), range(len(pair.pixels))
    return generate(pair.ours.med, image, start, pair.tokenizer.sep, decoding, seeds)


@torch.inference_mode()
def caption_there(pair: Pair, decoding: Decoding) -> Tensor:
    """Ids [B, T]. The forward of the images is a part of transformers' `generate`."""
    start = [*pair.tokenizer.prompt(PROMPT).tolist(), pair.tokenizer.sep]  # their generate cuts the last id
    drawn = {"top_p": decoding.top_p, "top_k": decoding.top_k} if decoding.top_p is not None else {}
    ids: Tensor = pair.theirs.generate(
        pair.pixels,
        input_ids=torch.tensor([start] * len(pair.pixels)),
        num_beams=decoding.beams,
        do_sample=decoding.top_p is not None,
        min_length=decoding.min_length,
        max_length=decoding.max_length,
        length_penalty=decoding.length_penalty,
        repetition_penalty=decoding.repetition_penalty,
        **drawn,
    )
    return ids


def check_captions(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raises ValueError where two captions of an image differ, or where all images have the same one."""
    if not torch.equal(ours, theirs):
        raise ValueError(
            f"{name}: the ids here and those of transformers differ, so nothing is timed; try another seed, "
            f"and if they differ again, one side is wrong: {ours.tolist()} and {theirs.tolist()}"
        )
    if len(ours.unique(dim=0)) == 1:
        raise ValueError(f"{name}: all images have the same caption, which proves little; try another seed")


def measure_scores(run: BenchRun, folder: Path) -> Result:
    """All texts of all images in one call."""
    pair = make_pair(run, folder, BlipForImageTextRetrieval, reads=True, writes=False)
    judge = Filter(pair.ours, run.capfilt.max_words, run.capfilt.max_length)
    numbers = torch.Generator().manual_seed(run.seed)
    words = torch.randint(30_000, (run.batch, max(TEXT_WORDS)), generator=numbers).tolist()
    texts = [[" ".join(f"w{i}" for i in row[:length]) for length in TEXT_WORDS] for row in words]
    ours, theirs = partial(score, judge, pair, texts), partial(score_there, judge, pair, texts)
    check_close("P(match)", ours(), theirs(), CLOSE)
    return race("scores, 2 texts an image", "texts", 2 * run.batch, ours, theirs, run.repeats)


@torch.inference_mode()
def score(judge: Filter, pair: Pair, texts: Sequence[Sequence[str]]) -> Tensor:
    """P(match) [B, n]. More work than on the other side: the cosine of ITC comes with it."""
    return judge(pair.pixels, texts)[0]


@torch.inference_mode()
def score_there(judge: Filter, pair: Pair, texts: Sequence[Sequence[str]]) -> Tensor:
    """P(match) [B, n] by transformers, called as it documents: every text has an image of its own."""
    ids, mask = pair.tokenizer([text for each in texts for text in each], judge.max_length)
    ids[:, 0] = pair.tokenizer.enc  # left at [CLS] there, which scores something else
    count = len(texts[0])
    images = pair.pixels.repeat_interleave(count, 0)  # [B * n, 3, S, S]
    found = pair.theirs(input_ids=ids, pixel_values=images, attention_mask=mask, use_itm_head=True)
    scores: Tensor = found.itm_score.softmax(-1)[:, 1].unflatten(0, (-1, count))
    return scores


def rank_and_compare(run: BenchRun, folder: Path) -> Iterator[Result]:
    """The part retrieval, on a filter."""
    pair = make_pair(run, folder, BlipForImageTextRetrieval, reads=True, writes=False)
    yield from measure_retrieval(run.retrieval, pair.ours, pair.theirs, run.seed, run.repeats)


def measure_train(run: BenchRun, folder: Path) -> Result:
    """The two stacks of transformers hold copies of the weights that a MED shares: it cannot share them."""
    ours = training_model(run.train.model, run.seed)
    export_hf(ours, folder)
    theirs = PlainBlip(
        ours.config,
        BlipForImageTextRetrieval.from_pretrained(folder / "retrieval", local_files_only=True),
        BlipForConditionalGeneration.from_pretrained(folder / "captioner", local_files_only=True),
    )
    return measure_steps(run.train, ours, theirs, run.seed, run.repeats)


@dataclass(frozen=True)
class Clock:
    """When a CapFilt run did what, in seconds, read off the files it wrote: the same way for every engine."""

    start_up: float  # from the call to the first row: processes, imports, models
    rows: float  # from the first row to the last shard that is done
    late: float  # from the first row until the second worker began
    work: float  # inside the workers, summed over them
    shut_down: float  # from the last shard to the return
    files: Mapping[str, str]  # scored shard -> sha256


def clock(engine: Callable[[Path], Summary], folder: Path) -> Clock:
    """Run an engine into an empty folder of its own. Raises ValueError when a shard failed."""
    out = Path(mkdtemp(dir=folder))
    called = time.time()
    summary = engine(out)
    returned = time.time()
    if summary.failed:
        raise ValueError(f"shards failed, so nothing is told: {'; '.join(summary.failed.values())}")
    spent = {mark.split.id: float(mark.counts["seconds"]) for mark in done_splits(out)}
    # A worker writes the stats of a shard as soon as its seconds are over, and its done-mark last.
    begun = sorted(stats_path(out, id).stat().st_mtime - each for id, each in spent.items())
    ended = max(done_path(out, id).stat().st_mtime for id in spent)
    return Clock(
        start_up=begun[0] - called,
        rows=ended - begun[0],
        late=begun[:2][-1] - begun[0],
        work=sum(spent.values()),
        shut_down=returned - ended,
        files={id: hashlib.sha256(scored_path(out, id).read_bytes()).hexdigest() for id in spent},
    )


def measure_ray(run: BenchRun, folder: Path) -> Result:
    """Compares the time from the first row to the last; how long each engine took to start is in `more`."""
    write_world(run.world, folder / "world")
    source = folder / "world" / "noisy"
    engines: dict[str, Callable[[Path], Summary]] = {
        "Ray": partial(capfilt.run_on_ray, run.capfilt, source, cluster=RayConfig(workers=run.workers)),
        "processes": partial(capfilt.run_local, run.capfilt, source, workers=run.workers),
    }
    found = in_turns({name: partial(clock, each, folder) for name, each in engines.items()}, run.repeats)
    check_files([each.files for clocks in found.values() for each in clocks])
    times = {name: [each.rows for each in clocks] for name, clocks in found.items()}
    more = {
        f"{name} {part}": statistics.median(getattr(each, part) for each in clocks)
        for part in ("start_up", "late", "work", "shut_down")
        for name, clocks in found.items()
    }
    return Result(f"CapFilt, {run.workers} workers", "rows", run.world.noisy_rows, times, more)


def check_files(runs: Sequence[Mapping[str, str]]) -> None:
    """Raises ValueError where two runs did not write the same bytes."""
    if any(files != runs[0] for files in runs):
        raise ValueError(f"the scored shards are not the same in every run, so no time is told: {runs}")


def measure_capfilt(run: BenchRun, folder: Path) -> Result:
    """One process and the first shard of the world; `more` holds what each stage alone takes."""
    write_world(run.world, folder / "world")
    source = folder / "world" / "noisy" / "00000.parquet"
    threads = torch.get_num_threads()
    clocks = [clock(partial(capfilt.run_local, run.capfilt, source), folder) for _ in range(run.repeats)]
    rows, more = stages(run.capfilt, source)
    torch.set_num_threads(threads)  # a worker sets its own
    times = {f"{run.capfilt.threads} threads": [each.rows for each in clocks]}
    return Result("CapFilt, 1 worker", "rows", rows, times, more)


@torch.inference_mode()
def stages(config: CapFiltConfig, source: Path) -> tuple[int, dict[str, float]]:
    """Rows of a shard, and milliseconds a row of each stage, in float32, one after the other.

    Their sum is more than a row takes in a run, where two threads decode beside the models.
    """
    worker, spent, rows = CapFiltWorker(config, source.parent, {}), Counter[str](), 0
    (split,) = plan_splits(source, config.rows_per_split)
    for chunk in batches(open_split(split, config.columns).chunks, config.batch_size):
        begun = time.perf_counter()
        images = [decode(row.image) for row in chunk.rows]
        made = {size: torch.stack([image_transform(i, size) for i in images]) for size in set(worker.sizes)}
        for_captioner, for_filter = (made[size].to(worker.device) for size in worker.sizes)
        decoded = time.perf_counter()
        captions = worker.caption(for_captioner, [row.key for row in chunk.rows])
        written = time.perf_counter()
        worker.score(for_filter, [[row.text or "", *k] for row, k in zip(chunk.rows, captions, strict=True)])
        ended = time.perf_counter()
        spent.update({"decode": decoded - begun, "caption": written - decoded, "score": ended - written})
        rows += len(chunk.rows)
    return rows, {f"{name} ms": 1000 * each / rows for name, each in spent.items()}


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
