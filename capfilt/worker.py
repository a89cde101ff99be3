"""One worker: one process on one device that owns both models and turns a split into a scored shard.

It knows no Ray and no other worker. What it writes depends on the split and the config alone: batches lie on
a fixed grid, a bad row leaves a hole in its batch, chance comes from the row's key.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blip.generate import NUCLEUS, Decoding
from blip.image import ImageError, decode, image_transform
from blip.weights import load_blip
from capfilt.captioner import Captioner
from capfilt.filter import Filter
from capfilt.schema import Chunk, Columns, Row, Scores, ShardError, scored_schema, scored_table, short_reason
from capfilt.shards import (
    Split,
    batches,
    input_fingerprint,
    mark_done,
    open_split,
    scored_path,
    stats_path,
    write_json_atomically,
    writing_shard,
)
from capfilt.stats import Stats


@dataclass(frozen=True)
class CapFiltConfig:
    """What decides the content of the scored shards. All of it is in the fingerprint of the output."""

    captioner: str  # checkpoint folder, Hugging Face folder or id, salesforce .pth
    filter: str
    captions: int = 1  # k synthetic captions per image; the paper takes one
    decoding: Decoding = NUCLEUS
    prompt: str = "a picture of "
    seed: int = 0
    batch_size: int = 32
    max_words: int = 30  # of a text, for scoring (BLIP data/utils.py)
    max_length: int = 35  # tokens of a text, for scoring (BLIP train_retrieval.py)
    min_side: int = 1  # pixels; smaller images are not scored
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    threads: int = 1  # of torch, per worker; another number may change the last bits of a score
    decoders: int = 2  # threads of a worker that decode images; a core makes 150 images/s, a GPU takes more
    keep_images: bool = True  # copy the image bytes into the scored shards
    rows_per_split: int = 8192
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        for name in (
            "captions",
            "batch_size",
            "max_words",
            "max_length",
            "min_side",
            "threads",
            "decoders",
            "rows_per_split",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def settings(config: CapFiltConfig) -> CapFiltConfig:
    """The config without what does not decide the content: where it runs, and where the weights lie."""
    return replace(config, captioner="", filter="", device="", decoders=1)


@dataclass(frozen=True)
class Progress:
    """Rows done since the last message, and how many of them have no score."""

    split: str
    rows: int
    errors: int = 0
    note: str = ""  # for a person


@dataclass(frozen=True)
class ShardResult:
    """How a split ended: `stats` of a scored shard, or `error`, why it could not be read."""

    split: str
    stats: Stats
    error: str | None = None


class CapFiltWorker:
    """Loads both models once, then `worker(split)` scores one split after the other into `out`.

    `fingerprint` is the run's, from `capfilt.job`: digests of both models and of the config.
    """

    def __init__(self, config: CapFiltConfig, out: Path, fingerprint: Mapping[str, str]):
        self.config, self.out, self.fingerprint = config, out, fingerprint
        torch.set_num_threads(config.threads)
        self.device = torch.device(_device(config.device))
        captioner, judge = (self._load(source) for source in (config.captioner, config.filter))
        self.caption = Captioner(captioner, config.decoding, config.prompt, config.captions, config.seed)
        self.score = Filter(judge, config.max_words, config.max_length)
        self.sizes = (captioner.config.vision.image_size, judge.config.vision.image_size)
        self.most = config.batch_size  # images that the models take at a time
        self.note = ""

    def _load(self, source: str) -> Any:
        return load_blip(source).to(self.device).eval()

    def __call__(self, split: Split) -> ShardResult:
        """Score the split; a shard that cannot be read gives a result with `error`, not an exception."""
        for message in self.steps(split):
            if isinstance(message, ShardResult):
                return message
        raise AssertionError("steps() ends with a ShardResult")

    def steps(self, split: Split) -> Generator[Progress | ShardResult, None, None]:
        """The same, telling about every batch on the way."""
        started, stats = time.monotonic(), Stats()
        try:
            fingerprint = {**self.fingerprint, "input": input_fingerprint(split.path)}
            shard = open_split(split, self.config.columns)
            provenance = {"fingerprint": fingerprint, "settings": asdict(settings(self.config))}
            schema = scored_schema(
                shard.schema, shard.found, keep_images=self.config.keep_images, provenance=provenance
            )
            path = scored_path(self.out, split.id)
            with writing_shard(path, schema) as writer:
                for chunk, scores in self._scored(batches(shard.chunks, self.config.batch_size)):
                    writer.append(scored_table(chunk, scores, schema))
                    stats.add(chunk.rows, scores)
                    yield Progress(split.id, len(scores), sum(s.status != "ok" for s in scores), self.note)
                    self.note = ""
            stats.seconds = time.monotonic() - started
            write_json_atomically(stats_path(self.out, split.id), stats.to_json())
            mark_done(self.out, split, fingerprint, stats.to_json(), [path])
        except (ShardError, OSError, ValueError) as error:
            yield ShardResult(split.id, stats, f"{split.path}: {short_reason(error)}")
            return
        yield ShardResult(split.id, stats)

    def _scored(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Scores]]]:
        """While the models work on a batch, threads decode the next; never more than that is in memory."""
        with ThreadPoolExecutor(self.config.decoders) as pool:
            waiting: tuple[Chunk, list[Future[Any]]] | None = None
            for chunk in chunks:
                ahead = chunk, [pool.submit(self._decode, row) for row in chunk.rows]
                if waiting:
                    yield waiting[0], self._score(waiting[0], [future.result() for future in waiting[1]])
                waiting = ahead
            if waiting:
                yield waiting[0], self._score(waiting[0], [future.result() for future in waiting[1]])

    def _decode(self, row: Row) -> list[Tensor] | Scores:
        """Pixels for the captioner and for the filter, or why there are none."""
        if row.status != "ok":
            return Scores(row.status, row.error)
        try:
            image = decode(row.image, self.config.min_side)
        except ImageError as error:
            return Scores(error.fault, str(error))
        made = {size: image_transform(image, size) for size in set(self.sizes)}
        return [made[size] for size in self.sizes]

    @torch.inference_mode()
    def _score(self, chunk: Chunk, decoded: Sequence[list[Tensor] | Scores]) -> list[Scores]:
        """Caption and score the rows that could be decoded; the others keep their reason."""
        good = [i for i, found in enumerate(decoded) if not isinstance(found, Scores)]
        scores = [found if isinstance(found, Scores) else Scores("ok") for found in decoded]
        if not good:
            return scores
        for_captioner, for_filter = (
            torch.stack([decoded[i][side] for i in good]).to(self.device)  # type: ignore[index]
            for side in (0, 1)
        )
        rows = [chunk.rows[i] for i in good]
        done = 0
        while done < len(rows):
            part = slice(done, done + self.most)
            try:
                found = self._judge(rows[part], for_captioner[part], for_filter[part])
            except torch.OutOfMemoryError:
                found = []  # go on outside: the exception holds what filled the memory
            if not found:
                self._take_fewer(len(rows[part]))
                continue
            for i, judged in zip(good[part], found, strict=True):
                scores[i] = judged
            done += len(found)
        return scores

    def _judge(self, rows: Sequence[Row], for_captioner: Tensor, for_filter: Tensor) -> list[Scores]:
        with self._autocast():
            captions = self.caption(for_captioner, [row.key for row in rows])
            texts = [[row.text or "", *written] for row, written in zip(rows, captions, strict=True)]
            itm, itc = (tensor.tolist() for tensor in self.score(for_filter, texts))
        return [_judged(*found) for found in zip(rows, captions, itm, itc, strict=True)]

    def _take_fewer(self, images: int) -> None:
        """`images` at a time are too many for the device: half of them, from now on.

        Then scores may differ in their last bits from those of a run with enough memory.
        """
        if images == 1:
            raise ValueError(
                f"{self.device} has not enough memory for one image and its texts; close what else uses it, "
                "set capfilt.precision=bf16, or take smaller models"
            )
        self.most = images // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.note = (
            f"{self.device} has not enough memory for {images} images at a time; going on with {self.most}. "
            "To keep this from happening again, set capfilt.batch_size to that"
        )

    def _autocast(self) -> Any:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _judged(row: Row, captions: list[str], itm: list[float], itc: list[float]) -> Scores:
    """Position 0 of the scores is the web text, scored only where there is one; then the k captions."""
    has_text = bool(row.text and row.text.strip())
    status, error = "ok", None
    if not any(caption.strip() for caption in captions):
        status, error = "caption_error", "the captioner wrote no word"
    elif any(score != score for score in itm):
        status, error = "score_error", "the filter's score is not a number"
    return Scores(
        status,
        error,
        captions=captions,
        itm_web=itm[0] if has_text else None,
        itc_web=itc[0] if has_text else None,
        itms=itm[1:],
        itcs=itc[1:],
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but torch finds no GPU here; use device=cpu or device=auto"
        )
    return name
