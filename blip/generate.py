"""The one decode loop: greedy, beam search and nucleus sampling, for every writer.

Keys and values of the image are projected once, by the caller. Beams are rows folded into the positions
that ask (see `layers.Attention`), so nothing of the image is copied or reordered for them; a step reorders
only the self-attention cache. The prompt runs once per image: beams grow from that one row.

Shapes: B images, b of them still in the batch, m texts of each, R = b * m rows (the m texts of an image next
to each other), t ids of a text so far, V words, K beams, k candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from blip.layers import KV


@dataclass(frozen=True)
class Decoding:
    """Greedy by default, beam search with `beams` > 1, nucleus sampling with `top_p`.

    Lengths count as in transformers, and so in BLIP: every id of a text, the prompt and its [DEC] included.
    `min_length` does not count the end; `max_length` does, and cuts a text that has not ended before.
    """

    beams: int = 1
    top_p: float | None = None  # the smallest set of words that holds this probability is drawn from
    top_k: int | None = 50  # of nucleus: at most so many words, None = all. BLIP inherits transformers' 50
    min_length: int = 5
    max_length: int = 20
    length_penalty: float = 1.0  # of beams: score = log-probability / words ** length_penalty
    repetition_penalty: float = 1.0  # > 1 makes words of the text so far, prompt included, less likely

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams is {self.beams}; give 1 for greedy or nucleus, more for beam search")
        if self.top_p is not None and self.beams > 1:
            raise ValueError(
                f"top_p {self.top_p} asks for nucleus sampling and beams {self.beams} for beam search; "
                "keep one: top_p with beams 1, or beams without top_p"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; a probability above 0 and up to 1 is needed, e.g. 0.9")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; give at least 1, or none to draw from all words")
        if not 0 <= self.min_length <= self.max_length:
            raise ValueError(
                f"min_length {self.min_length} and max_length {self.max_length} do not fit; "
                "needed is 0 <= min_length <= max_length"
            )
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0, 1 = none")


# salesforce/BLIP: configs/caption_coco.yaml, and models/blip.py `generate` with its repetition penalty of 1.1
BEAM_SEARCH = Decoding(beams=3)
NUCLEUS = Decoding(top_p=0.9, repetition_penalty=1.1)


class Positions(Protocol):
    """What a writer's config must tell, such as `MEDConfig`."""

    @property
    def max_positions(self) -> int:
        """The most ids a text can have."""


class Writer(Protocol):
    """A causal text stack that looks at an image, such as `MED`."""

    @property
    def config(self) -> Positions: ...

    def write(
        self, ids: Tensor, image: list[KV], mask: Tensor | None = None, past: list[KV] | None = None
    ) -> tuple[Tensor, list[KV]]:
        """ids [R, T] after `past`, image [b, H, N, C] -> states [R, T, D], new past [R, H, S, C]."""

    def logits(self, x: Tensor) -> Tensor:
        """States [R, D] -> next-word logits [R, V]."""


@dataclass(frozen=True)
class _State:
    """The images still in the batch. They are the first axis of every field: one indexing lets some leave."""

    places: Tensor  # [b] where in the output they belong
    seeds: Tensor  # [b] int64
    texts: Tensor  # [b, m, t]
    scores: Tensor  # [b, m] log-probability of each text, falling; zeros without beams
    closed: Tensor  # [b, K] falling, normalised scores of the best ended texts, -inf for those still to come
    best: Tensor  # [b, t] the answer so far, padded with the end
    done: Tensor  # [b] the answer is final

    def keep(self, images: Tensor) -> "_State":
        return _State(*(field[images] for field in vars(self).values()))


@torch.no_grad()
def generate(
    writer: Writer,
    image: list[KV],
    prompt: Tensor,
    end: int,
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """One text per image: ids [B, T], T <= max_length, prompt included, padded with `end` behind the end.

    `image` holds keys and values of every layer, each [B, H, N, C]; `prompt` [P] opens every text; `seeds`,
    one 64-bit number per image, are for nucleus. A text depends on its image, its seed and `decoding`, never
    on the rest of the batch (up to rounding, which differs between batch sizes).
    Raises ValueError where prompt, lengths or seeds do not fit, before anything is computed.

    Images whose text is final leave when they are half of the batch or more: all copies of image keys and
    values together then move less than the first batch once, and no step spends half its work on them.
    """
    images = image[0][0].size(0)
    _check(prompt, images, decoding, seeds, writer.config.max_positions)
    state = _start(prompt, images, decoding, seeds)
    output = prompt.new_full((images, decoding.max_length), end)
    past: list[KV] = []
    left, length = images, len(prompt)
    while left and length < decoding.max_length:
        if 2 * left <= len(state.done):
            output[state.places, :length] = state.best
            stay = (~state.done).nonzero()[:, 0]
            image, past = _take(image, stay), _take(past, _rows(stay, state.texts.size(1)))
            state = state.keep(stay)
        texts = state.texts.flatten(0, 1)  # [R, t]
        states, past = writer.write(texts[:, -1:] if past else texts, image, past=past or None)
        logits = writer.logits(states[:, -1]).float()  # [R, V]
        if decoding.beams > 1:
            state, parents = _extend_beams(state, logits, decoding, end, length - len(prompt))
            past = _take(past, parents)
        else:
            state = _extend_line(state, logits, decoding, end, length - len(prompt))
        length += 1
        left = int((~state.done).sum())  # the one wait for the device in a step
    output[state.places, :length] = state.best
    return output[:, :length]


def highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of float32 [R, N], falling: values and positions [R, count]. Of equals, the first.

    `topk` leaves ties open, its choice may change with the number of rows, and bf16 logits tie all the time.
    So score and position are packed into one integer: floats order like their bits, once the bits of negative
    ones are flipped.
    """
    bits, size = scores.view(torch.int32).long(), scores.size(-1)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32
    keys = order | torch.arange(size - 1, -1, -1, device=scores.device)
    positions = size - 1 - (keys.topk(count).values & 0xFFFFFFFF)
    return scores.gather(-1, positions), positions


def sample(scores: Tensor, top_p: float, top_k: int | None, uniforms: Tensor) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020): scores [R, V] and uniforms [R] in [0, 1) -> words [R].

    Among the `top_k` likeliest words, the nucleus is the shortest run from the top that holds `top_p`.
    """
    values, words = highest(scores, min(top_k or scores.size(-1), scores.size(-1)))
    probabilities = values.double().softmax(-1)  # [R, k]
    sums = probabilities.cumsum(-1)
    nucleus = (sums - probabilities < top_p) & (probabilities > 0)
    mass = sums.masked_fill(~nucleus, 0).amax(-1)
    below = (sums <= (uniforms * mass)[:, None]).sum(-1)
    chosen = below.minimum(nucleus.sum(-1) - 1)  # rounding of uniforms * mass may reach the mass itself
    return words.gather(-1, chosen[:, None])[:, 0]


def uniform(seeds: Tensor, step: int) -> Tensor:
    """int64 seeds [R] -> float64 [R] in [0, 1): the top 53 bits of splitmix64's output number `step`, from 0.

    splitmix64 (Steele, Lea and Flood 2014; Vigna's constants) hashes a counter: there is no state to carry,
    and a row's numbers know nothing of its neighbours. int64 products wrap like the unsigned ones meant here.
    """
    x = seeds + signed((step + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 11).double() * 2.0**-53


def _extend_line(state: _State, logits: Tensor, decoding: Decoding, end: int, written: int) -> _State:
    """Greedy and nucleus: one more word for the one text of each image, `written` words after the prompt."""
    texts = state.texts[:, 0]  # [b, t]
    scores = _restrict(logits, texts, decoding, end)
    if decoding.top_p is None:
        words = scores.argmax(-1)
    else:
        words = sample(scores, decoding.top_p, decoding.top_k, uniform(state.seeds, written))
    words = words.masked_fill(state.done, end)  # finished images wait here until enough of them can leave
    texts = torch.cat([texts, words[:, None]], -1)
    return replace(state, texts=texts[:, None], best=texts, done=state.done | (words == end))


def _extend_beams(
    state: _State, logits: Tensor, decoding: Decoding, end: int, written: int
) -> tuple[_State, Tensor]:
    """One step of beam search, `written` words after the prompt; also the row [R] of each new text's parent.

    As transformers 5.23 `_beam_search` with early_stopping=False: of the 2K best candidates the first K may
    end. An image is done when K texts have ended and the best open one, at its present length, beats none.
    """
    images, width, length = state.texts.shape
    vocabulary, beams = logits.size(-1), decoding.beams
    log_probs = _restrict(logits.log_softmax(-1), state.texts.flatten(0, 1), decoding, end)  # [R, V]
    totals = (state.scores.flatten()[:, None] + log_probs).view(images, width * vocabulary)
    scores, places = highest(totals, min(2 * beams, width * vocabulary))  # [b, k]
    parents, words = places // vocabulary, places % vocabulary
    each = torch.arange(images, device=logits.device)
    texts = torch.cat([state.texts[each[:, None], parents], words[..., None]], -1)  # [b, k, t + 1]
    ended = (words == end) | (length + 1 == decoding.max_length)

    weight = (written + 1) ** decoding.length_penalty
    ending = (scores / weight).masked_fill(~ended | state.done[:, None], -torch.inf)[:, :beams]
    first = ending.argmax(-1)  # [b]
    better = ending[each, first] > state.closed[:, 0]
    padded = torch.cat([state.best, state.best.new_full((images, 1), end)], -1)
    best = torch.where(better[:, None], texts[each, first], padded)
    closed = torch.cat([state.closed, ending], -1).topk(beams).values

    # Each parent has one ended child, so this many open ones are always among the candidates.
    stay = ended.int().argsort(stable=True)[:, : min(beams, width * (vocabulary - 1))]  # [b, m]
    scores = scores.gather(-1, stay)
    state = replace(
        state,
        texts=texts[each[:, None], stay],
        scores=scores,
        closed=closed,
        best=best,
        done=state.done | (scores[:, 0] / weight <= closed[:, -1]),
    )
    return state, (each[:, None] * width + parents.gather(-1, stay)).flatten()


def _restrict(scores: Tensor, texts: Tensor, decoding: Decoding, end: int) -> Tensor:
    """Scores [R, V] after texts [R, t], with repetition penalty (Keskar et al. 2019) and minimal length."""
    if decoding.repetition_penalty != 1:
        seen = scores.gather(-1, texts)
        penalty = decoding.repetition_penalty
        scores = scores.scatter(-1, texts, torch.where(seen < 0, seen * penalty, seen / penalty))
    if texts.size(-1) < decoding.min_length:
        scores = scores.masked_fill(torch.arange(scores.size(-1), device=scores.device) == end, -torch.inf)
    return scores


def _start(prompt: Tensor, images: int, decoding: Decoding, seeds: Sequence[int] | None) -> _State:
    numbers = [signed(seed) for seed in seeds] if seeds is not None else [0] * images
    return _State(
        places=torch.arange(images, device=prompt.device),
        seeds=torch.tensor(numbers, dtype=torch.int64, device=prompt.device),
        texts=prompt.repeat(images, 1, 1),
        scores=torch.zeros(images, 1, device=prompt.device),
        closed=torch.full((images, decoding.beams), -torch.inf, device=prompt.device),
        best=prompt.repeat(images, 1),
        done=torch.zeros(images, dtype=torch.bool, device=prompt.device),
    )


def _check(
    prompt: Tensor, images: int, decoding: Decoding, seeds: Sequence[int] | None, max_positions: int
) -> None:
    assert prompt.dim() == 1, f"all texts share one prompt [P], not {list(prompt.shape)}"
    if decoding.max_length > max_positions:
        raise ValueError(
            f"max_length is {decoding.max_length}, but the text stack has positions for {max_positions} ids, "
            f"prompt included; give a max_length of at most {max_positions}"
        )
    if not 0 < len(prompt) < decoding.max_length:
        raise ValueError(
            f"the prompt has {len(prompt)} ids and max_length, which counts them, is {decoding.max_length}; "
            f"give at least one id and a max_length (of at most {max_positions}) that leaves room for words"
        )
    if seeds is None and decoding.top_p is not None:
        raise ValueError(f"nucleus sampling of {images} images has no seeds; give one number per image")
    if seeds is not None and len(seeds) != images:
        raise ValueError(f"there are {len(seeds)} seeds for {images} images; give one per image")


def _take(kv: list[KV], rows: Tensor) -> list[KV]:
    return [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in kv]


def _rows(images: Tensor, width: int) -> Tensor:
    """Images [b] -> their rows [b * width]."""
    return (images[:, None] * width + torch.arange(width, device=images.device)).flatten()


def signed(number: int) -> int:
    """The int64 with the same low 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
