"""Image-text retrieval, ITC and then ITM of the best k in both directions, here and by transformers.

Here it is what `make eval-retrieval` does: every image and text is encoded once, the pairs of an image share
its keys and values, and a pair that both directions ask for is scored once. Beside it are the same weights in
BlipForImageTextRetrieval, on the same pairs, in three ways:

    a pair a call      as its documentation shows it: every pair encodes its image
    n pairs a call     the same, in batches
    images kept        its modules called by hand: an image is encoded once, its keys and values are not kept

Seconds are those of the processor, summed over threads, which a busy machine changes little. Transformers
is timed on a sample of the pairs, another in each repeat, and the others are taken in proportion; its ITC is
left out, in its favour. Nothing is told unless ITM logits and ITC cosines of the sample agree.

Shapes: I images, T texts, P sampled pairs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from blip import Blip
from blip.model import begin
from pipelines.bench_sides import Result, check_close
from pipelines.eval_retrieval import encode
from pipelines.retrieval import Texts, cut, rerank
from pipelines.testset import TestImage, batches_of_pixels
from pipelines.world import WorldConfig, make_row

V = TypeVar("V")

CLOSE = 1e-3  # of logits and cosines
COMPARED = 4  # sampled pairs whose cosines are compared too
MAX_WORDS, MAX_LENGTH = 30, 35  # of `make eval-retrieval`
TIMED = "pairs timed there and the others in proportion"
WORDS = 30_000  # w0, w1, ... that texts are drawn from


@dataclass(frozen=True)
class BenchRetrievalConfig:
    """The model is that of the bench. Where there are as many images as k, or more, an image has about as
    many pairs as in a large set, k and for each of its texts k, so that the ratio holds for large ones."""

    images: int = 16
    texts: int = 5  # of each image
    words: tuple[int, int] = (6, 18)  # of a text, the fewest and the most; [CLS] and [SEP] come on top
    k: int = 16
    pairs: int = 24  # that transformers is timed on
    batch: int = 8  # images or pairs in a call, where it is more than one

    def __post_init__(self) -> None:
        least = {"images": 2, "texts": 1, "k": 1, "pairs": 2, "batch": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {value}")
        fewest, most = self.words
        if not 1 <= fewest <= most <= MAX_WORDS:
            raise ValueError(f"words is {list(self.words)}; they must rise, between 1 and {MAX_WORDS}")


@dataclass(frozen=True)
class Ranked:
    """What a whole evaluation found here."""

    texts: Texts
    cosine: Tensor  # [I, T]
    itm: Tensor  # [I, T], logit of a match; NaN where a pair is among the best k of neither direction

    @property
    def pairs(self) -> Tensor:
        """[all pairs that ITM scored, 2], image and text."""
        return (~self.itm.isnan()).nonzero()


@dataclass(frozen=True)
class Sample:
    """Some of these pairs, as transformers is shown them."""

    pixels: Tensor  # [I, 3, S, S]
    texts: Texts
    enc: int  # the first token of ITM; with [CLS], as texts come, something else is scored
    pairs: Tensor  # [P, 2], image and text
    total: int  # pairs of which these are some

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images [b], and ids and mask [b, L] of their texts, for at most `size` pairs at a time."""
        for few in self.pairs.split(size):
            ids, mask = cut(self.texts, few[:, 1])
            yield few[:, 0], begin(ids, self.enc), mask


Way = Callable[[Any, Sample, int], tuple[float, Tensor]]  # seconds of all pairs, logits [P] of the sample


def measure_retrieval(
    config: BenchRetrievalConfig, ours: Blip, theirs: Any, seed: int, repeats: int
) -> Iterator[Result]:
    """One for each way. Raises ValueError where the two sides differ."""
    images, size = draw(config, seed), ours.config.vision.image_size
    batches = batches_of_pixels(images, size, config.batch, torch.device("cpu"))
    pixels = torch.cat([some for _, some in batches])
    ways: dict[str, tuple[Way, int]] = {
        "a pair a call": (by_class, 1),
        f"{config.batch} pairs a call": (by_class, config.batch),
        "images kept": (by_modules, config.batch),
    }
    here: list[float] = []
    there: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        seconds, found = clocked(lambda: rank(ours, images, config))
        here.append(seconds)
        sample = draw_sample(found, pixels, ours.config.enc_id, config.pairs, seed + turn)
        check_close("cosines", *cosines(theirs, sample, found), CLOSE)
        expected = found.itm[sample.pairs[:, 0], sample.pairs[:, 1]]
        for name, (way, batch) in ways.items():
            seconds, logits = way(theirs, sample, batch)
            check_close(f"ITM logits, {name},", expected, logits, CLOSE)
            there[name].append(seconds)
    for name, seconds_there in there.items():
        more = {"processor s here": median(here), "processor s there": median(seconds_there)}
        more |= {"images": len(images), "pairs": sample.total, TIMED: len(sample.pairs)}
        sides = {"here": here, "transformers": seconds_there}
        yield Result(f"retrieval, {name}", "pairs", sample.total, sides, more)


def draw(config: BenchRetrievalConfig, seed: int) -> list[TestImage]:
    """Pictures of the generated world, with texts of random words."""
    numbers, world = torch.Generator().manual_seed(seed), WorldConfig(seed=seed)
    fewest, most = config.words
    images = []
    for number in range(config.images):
        row = make_row(world, "test", number)
        lengths = torch.randint(fewest, most + 1, (config.texts,), generator=numbers)
        words = torch.randint(WORDS, (config.texts, most), generator=numbers)
        rows = zip(words.tolist(), lengths.tolist(), strict=True)
        texts = tuple(" ".join(f"w{i}" for i in each[:length]) for each, length in rows)
        images.append(TestImage(row.key, row.jpeg, texts))
    return images


@torch.inference_mode()
def rank(model: Blip, images: Sequence[TestImage], config: BenchRetrievalConfig) -> Ranked:
    """As `make eval-retrieval`, without the percentages."""
    found = encode(model, images, config.batch, MAX_WORDS, MAX_LENGTH)
    own = zip(found.numbers, found.tokens, strict=True)
    to_text, to_image = rerank(model, own, found.texts, found.cosine, config.k)
    best = torch.maximum(to_text, to_image.T)  # what is not re-ranked has its cosine - 1000
    itm = (best - found.cosine).masked_fill(best < -500, torch.nan)
    return Ranked(found.texts, found.cosine, itm)


def draw_sample(found: Ranked, pixels: Tensor, enc: int, pairs: int, seed: int) -> Sample:
    """`pairs` of those that were scored here, or all of fewer."""
    scored = found.pairs
    chosen = torch.randperm(len(scored), generator=torch.Generator().manual_seed(seed))[:pairs]
    return Sample(pixels, found.texts, enc, scored[chosen], len(scored))


@torch.inference_mode()
def cosines(theirs: Any, sample: Sample, found: Ranked) -> tuple[Tensor, Tensor]:
    """[b, b] of the images and texts of the first COMPARED pairs, here and there."""
    image, text = sample.pairs[:COMPARED].unbind(1)
    ids, mask = cut(sample.texts, text)
    pixels = sample.pixels[image]
    said = theirs(input_ids=ids, pixel_values=pixels, attention_mask=mask, use_itm_head=False)
    return found.cosine[image][:, text], said.itm_score


@torch.inference_mode()
def by_class(theirs: Any, sample: Sample, batch: int) -> tuple[float, Tensor]:
    """The class as it is called: every pair has an image of its own, padding is that of its batch."""

    def score() -> Tensor:
        found = [
            theirs(input_ids=ids, pixel_values=sample.pixels[image], attention_mask=mask, use_itm_head=True)
            for image, ids, mask in sample.batches(batch)
        ]
        return torch.cat([each.itm_score[:, 1] for each in found])

    seconds, logits = clocked(score)
    return seconds * sample.total / len(sample.pairs), logits


@torch.inference_mode()
def by_modules(theirs: Any, sample: Sample, batch: int) -> tuple[float, Tensor]:
    """What one would write by hand: the tokens of each image once, then the text encoder on them."""
    images, place = sample.pairs[:, 0].unique(return_inverse=True)

    def see() -> Tensor:
        return torch.cat([theirs.vision_model(sample.pixels[few])[0] for few in images.split(batch)])

    def score() -> Tensor:
        found = []
        for (_, ids, mask), few in zip(sample.batches(batch), place.split(batch), strict=True):
            states = theirs.text_encoder(
                input_ids=ids, attention_mask=mask, encoder_hidden_states=tokens[few]
            )
            found.append(theirs.itm_head(states[0][:, 0])[:, 1])
        return torch.cat(found)

    seeing, tokens = clocked(see)
    scoring, logits = clocked(score)
    images_share, pairs_share = len(images) / len(sample.pixels), len(sample.pairs) / sample.total
    return seeing / images_share + scoring / pairs_share, logits


def clocked(work: Callable[[], V]) -> tuple[float, V]:
    """Seconds of the processor, of all threads together, and what the work gave."""
    begun = time.process_time()
    found = work()
    return time.process_time() - begun, found
