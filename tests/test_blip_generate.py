"""The decode loop against transformers, brute force and exact probabilities."""

import itertools
import math

import pytest
import torch
import transformers
from tiny import SEP, VOCABULARY, pixels, tiny_blip
from torch import Tensor
from transformers.generation import logits_process

from blip.generate import BEAM_SEARCH, NUCLEUS, Decoding, generate, highest, sample, uniform
from blip.layers import KV
from blip.med import MEDConfig
from blip.model import Blip
from blip.weights_hf import export_hf

PROMPT = torch.tensor([VOCABULARY - 2, 7, 9])  # [DEC] and two words
IMAGES = 6


@pytest.fixture(scope="module")
def blip() -> Blip:
    blip = tiny_blip(seed=6, reads=False)
    with torch.no_grad():
        blip.med.lm_head.bias[SEP] += 4  # so that texts end, at various lengths
    return blip


@pytest.fixture(scope="module")
def theirs(blip, tmp_path_factory) -> transformers.BlipForConditionalGeneration:
    """The same weights in transformers."""
    folder = tmp_path_factory.mktemp("hf")
    export_hf(blip, folder)
    model = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    model.config.text_config.sep_token_id = SEP
    return model


def ours(
    blip: Blip, images: Tensor, decoding: Decoding, seeds=None, prompt: Tensor = PROMPT
) -> list[list[int]]:
    ids = generate(blip.med, blip.med.project_image(blip.image_tokens(images)), prompt, SEP, decoding, seeds)
    return trimmed(ids)


def trimmed(ids: Tensor, end: int = SEP) -> list[list[int]]:
    """Rows up to and with the first end."""
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


# Against transformers

DECODINGS = [
    Decoding(beams, repetition_penalty=penalty, length_penalty=length, min_length=low, max_length=high)
    for beams, length, penalty, (low, high) in itertools.product(
        (1, 3, 5), (0.6, 1.0, 2.0), (1.0, 1.5), ((0, 9), (8, 20))
    )
    if beams > 1 or length == 1
]


@pytest.mark.parametrize("images", [1, IMAGES])
@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_same_ids_as_transformers(blip, theirs, decoding, images):
    batch = pixels(images, seed=images)
    expected = theirs.generate(
        batch,
        torch.cat([PROMPT, torch.tensor([SEP])]).repeat(images, 1),  # their generate cuts the last id
        num_beams=decoding.beams,
        min_length=decoding.min_length,
        max_length=decoding.max_length,
        repetition_penalty=decoding.repetition_penalty,
        length_penalty=decoding.length_penalty,
        do_sample=False,
    )
    assert ours(blip, batch, decoding) == trimmed(expected)


def test_the_comparison_sees_every_way_to_stop(blip):
    """The tiny model ends some texts early and some never, and every setting matters."""
    batch = pixels(IMAGES, seed=IMAGES)
    for decoding in (Decoding(), Decoding(beams=3)):
        lengths = [len(text) for text in ours(blip, batch, decoding)]
        assert min(lengths) < 8 and max(lengths) == 20
    settings = [{}, {"beams": 5}, {"length_penalty": 2.0}, {"repetition_penalty": 1.5}, {"min_length": 12}]
    texts = [ours(blip, batch, Decoding(**{"beams": 3} | setting)) for setting in settings]
    assert all(one != other for one, other in itertools.combinations(texts, 2))


# Beam search against all sequences


class Toy:
    """A writer of `words` words whose logits are a random table of the image and of the whole text before.

    States are (image, text), the text read back from the cache, so that a wrongly reordered cache shows.
    """

    def __init__(self, words: int, seed: int = 0):
        self.words, self.seed = words, seed
        self.config = MEDConfig(words)

    def write(
        self, ids: Tensor, image: list[KV], mask: Tensor | None = None, past: list[KV] | None = None
    ) -> tuple[Tensor, list[KV]]:
        new = ids[:, None, :, None].double()  # [R, 1, T, 1]
        text = torch.cat([past[0][0], new], 2) if past else new
        numbers = image[0][0].flatten().repeat_interleave(len(ids) // len(image[0][0]))  # [R]
        states = torch.cat([numbers[:, None].double(), text[:, 0, :, 0]], 1)[:, None]  # [R, 1, 1 + t]
        return states, [(text, text)]

    def logits(self, x: Tensor) -> Tensor:
        return torch.tensor([self.row(int(row[0]), tuple(row[1:].long().tolist())) for row in x])

    def row(self, image: int, text: tuple[int, ...]) -> list[float]:
        generator = torch.Generator().manual_seed(hash((self.seed, image, text)) % 2**40)
        return (2 * torch.randn(self.words, generator=generator)).tolist()


def toy_images(images: int) -> list[KV]:
    numbers = torch.arange(images, dtype=torch.float32).view(-1, 1, 1, 1)
    return [(numbers, numbers)]


def likeliest(toy: Toy, image: int, prompt: tuple[int, ...], end: int, decoding: Decoding) -> list[int]:
    """The best of all texts by its definition, in Python floats."""
    best: tuple[float, list[int]] = (-math.inf, [])

    def walk(text: tuple[int, ...], score: float) -> None:
        nonlocal best
        if text != prompt and (text[-1] == end or len(text) == decoding.max_length):
            best = max(best, (score / (len(text) - len(prompt)) ** decoding.length_penalty, list(text)))
            return
        logits = toy.row(image, text)
        total = math.log(sum(math.exp(value) for value in logits))
        for word, value in enumerate(logits):
            if word != end or len(text) >= decoding.min_length:
                penalty = decoding.repetition_penalty if word in text else 1
                walk((*text, word), score + (value - total) * penalty)

    walk(prompt, 0.0)
    return best[1]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("low", "penalty"), [(0, 1.0), (4, 1.0), (3, 1.3)])
def test_beams_as_many_as_texts_find_the_best_of_all(length_penalty, low, penalty):
    decoding = Decoding(
        400, min_length=low, max_length=6, length_penalty=length_penalty, repetition_penalty=penalty
    )
    toy, end = Toy(5), 4
    found = generate(toy, toy_images(3), torch.tensor([0, 2]), end, decoding)
    assert trimmed(found, end) == [likeliest(toy, image, (0, 2), end, decoding) for image in range(3)]


# Nucleus


def test_uniform_is_splitmix64():
    published = [  # outputs of seed 1234567, as on Rosetta Code, "Pseudo-random numbers/Splitmix64"
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = [float(uniform(torch.tensor([1234567]), step)[0]) for step in range(5)]
    assert found == [(number >> 11) / 2**53 for number in published]


def test_uniform_wraps_like_unsigned_arithmetic():
    word = 2**64 - 1

    def splitmix(seed: int, step: int) -> float:
        x = (seed + (step + 1) * 0x9E3779B97F4A7C15) & word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return ((x ^ (x >> 31)) >> 11) / 2**53

    seeds = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    for step in (0, 1, 19, 1000):
        found = uniform(seeds, step)
        assert found.tolist() == [splitmix(seed, step) for seed in seeds.tolist()]
        assert found.min() >= 0 and found.max() < 1


def test_highest_breaks_ties_by_position():
    scores = torch.randint(-3, 3, (4, 200), generator=torch.Generator().manual_seed(0)).float()
    scores[0, 7] = -torch.inf
    values, positions = highest(scores, 200)
    assert torch.equal(positions, torch.sort(scores, descending=True, stable=True).indices)
    assert torch.equal(values, scores.sort(descending=True).values)
    assert torch.equal(highest(scores, 5)[1], positions[:, :5])


def test_highest_orders_floats_of_all_sizes():
    scores = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, 1000)
    assert torch.equal(highest(scores, 1000)[0], scores.sort(descending=True).values)


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.9, 50), (0.5, 50), (1.0, None), (0.9, 3), (0.01, 50), (0.9, None)]
)
def test_sampling_follows_the_distribution_of_transformers(top_p, top_k):
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, 60, (4, 6), generator=generator)
    scores = 2 * torch.randn(4, 60, generator=generator)
    expected = scores
    if top_k is not None:
        expected = logits_process.TopKLogitsWarper(top_k)(texts, expected)
    if top_p < 1:
        expected = logits_process.TopPLogitsWarper(top_p)(texts, expected)
    expected = expected.softmax(-1)
    grid = 2000  # evenly spaced random numbers draw each word as often as its probability says, up to one
    uniforms = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    for row in range(4):
        words = sample(scores[row].expand(grid, -1), top_p, top_k, uniforms)
        counts = torch.bincount(words, minlength=60)
        assert (counts - grid * expected[row]).abs().max() <= 1.01
        assert not counts[expected[row] == 0].any()


def test_the_nucleus_is_the_shortest_run_that_holds_top_p():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    high = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    found = [int(sample(scores, top_p, 50, high)) for top_p in (0.3, 0.41, 0.69, 0.71, 0.89, 0.91)]
    assert found == [1, 3, 3, 2, 2, 0]
    assert int(sample(torch.zeros(1, 5), 0.5, 50, high)) == 2  # of equals, the first three


class Constant:
    """A writer with the same logits everywhere. The one cached layer holds nothing but the right shape."""

    def __init__(self, logits: Tensor):
        self.row = logits
        self.config = MEDConfig(len(logits))

    def write(
        self, ids: Tensor, image: list[KV], mask: Tensor | None = None, past: list[KV] | None = None
    ) -> tuple[Tensor, list[KV]]:
        blank = torch.zeros(len(ids), 1, ids.size(1), 1)
        return torch.zeros(*ids.shape, 1), [(blank, blank)]

    def logits(self, x: Tensor) -> Tensor:
        return self.row.expand(len(x), -1)


def test_drawn_words_have_the_exact_probabilities():
    """Both words of 20,000 texts with neighbouring seeds."""
    probabilities = [0.05, 0.3, 0.02, 0.2, 0.25, 0.18]  # nucleus of 0.9: words 1, 4, 3, 5; their mass is 0.93
    nucleus = {1: 0.3 / 0.93, 4: 0.25 / 0.93, 3: 0.2 / 0.93, 5: 0.18 / 0.93}
    rows = 20_000
    decoding = Decoding(top_p=0.9, min_length=0, max_length=3)
    writer = Constant(torch.tensor(probabilities).log())
    found = generate(writer, toy_images(rows), torch.tensor([0]), 9, decoding, range(rows))
    counts = torch.bincount(found[:, 1] * 6 + found[:, 2], minlength=36).tolist()
    expected = {6 * a + b: rows * nucleus[a] * nucleus[b] for a in nucleus for b in nucleus}
    assert all(count == 0 for pair, count in enumerate(counts) if pair not in expected)
    chi_square = sum((counts[pair] - mean) ** 2 / mean for pair, mean in expected.items())
    assert chi_square < 37.7  # 0.1 % point of 15 degrees of freedom


def test_repetition_penalty_and_min_length_act_before_the_draw():
    """Word 1 (logit 2) is in the prompt, so it counts as 2 / 1.1; the end (logit 5) may not come yet."""
    rows = 4000
    writer = Constant(torch.tensor([0.0, 2.0, 1.5, 5.0]))
    decoding = Decoding(top_p=1.0, min_length=3, max_length=3, repetition_penalty=1.1)
    found = generate(writer, toy_images(rows), torch.tensor([1, 1]), 3, decoding, range(rows))[:, 2]
    weights = [math.exp(0.0), math.exp(2 / 1.1), math.exp(1.5)]
    for word, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(int((found == word).sum()) - rows * share) < 4 * math.sqrt(rows * share * (1 - share))
    assert not (found == 3).any()


def test_seeds_decide(blip):
    images = pixels(1).repeat(30, 1, 1, 1)  # the same picture
    seeds = [2**64 - 1 - i for i in range(30)]
    first = ours(blip, images, NUCLEUS, seeds)
    assert first == ours(blip, images, NUCLEUS, seeds)
    assert len({tuple(text) for text in first}) > 8
    assert first != ours(blip, images, NUCLEUS, range(30))
    assert len({tuple(text) for text in ours(blip, images, NUCLEUS, [5] * 30)}) == 1


# The batch


@pytest.mark.parametrize("decoding", [Decoding(), BEAM_SEARCH, NUCLEUS], ids=["greedy", "beams", "nucleus"])
def test_a_row_does_not_depend_on_its_neighbours(blip, decoding):
    images, seeds = pixels(16), range(100, 116)
    together = ours(blip, images, decoding, seeds)
    assert together == [ours(blip, images[i : i + 1], decoding, seeds[i : i + 1])[0] for i in range(16)]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    assert [together[i] for i in order] == ours(blip, images[order], decoding, [seeds[i] for i in order])


class Watched:
    """The same writer, with a record of what it was asked."""

    def __init__(self, writer):
        self.writer, self.logits, self.config = writer, writer.logits, writer.config
        # shape of ids, images, address of the first keys
        self.calls: list[tuple[tuple[int, ...], int, int]] = []

    def write(self, ids, image, mask=None, past=None):
        self.calls.append((tuple(ids.shape), len(image[0][0]), image[0][0].data_ptr()))
        return self.writer.write(ids, image, mask, past)


@pytest.mark.parametrize("decoding", [Decoding(), BEAM_SEARCH, NUCLEUS], ids=["greedy", "beams", "nucleus"])
def test_the_work_done(blip, decoding):
    """Prompt once per image, one position per row after it, images never multiplied, leaving by halves."""
    count = 32
    image = blip.med.project_image(blip.image_tokens(pixels(count)))
    watched = Watched(blip.med)
    ids = generate(watched, image, PROMPT, SEP, decoding, range(count))
    assert watched.calls[0] == ((count, len(PROMPT)), count, image[0][0].data_ptr())
    batches = [images for _, images, _ in watched.calls]
    assert [shape for shape, _, _ in watched.calls[1:]] == [(n * decoding.beams, 1) for n in batches[1:]]
    assert batches[-1] <= count // 2  # some left
    changes = list(itertools.pairwise(watched.calls))
    assert all(after[1] == before[1] or 2 * after[1] <= before[1] for before, after in changes)
    assert all(after[2] == before[2] for before, after in changes if after[1] == before[1])  # else not copied
    assert len(watched.calls) == ids.size(1) - len(PROMPT)  # stops with the last text


def test_greedy_with_cache_is_argmax_of_full_passes(blip):
    image = blip.med.project_image(blip.image_tokens(pixels(IMAGES)))
    ids = PROMPT.repeat(IMAGES, 1)
    with torch.no_grad():
        while ids.size(1) < 15:
            logits = blip.med.logits(blip.med.write(ids, image)[0][:, -1])
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert ours(blip, pixels(IMAGES), Decoding(min_length=0, max_length=15)) == trimmed(ids)


@pytest.mark.parametrize("decoding", [{}, {"beams": 4}, {"top_p": 0.9}])
@pytest.mark.parametrize("words", [0, 1, 4])
def test_lengths_count_the_prompt(blip, decoding, words):
    prompt = torch.cat([PROMPT[:1], torch.arange(10, 10 + words)])
    longest = ours(blip, pixels(8), Decoding(**decoding, min_length=8, max_length=8), range(8), prompt)
    assert all(len(text) == 8 and SEP not in text for text in longest)
    texts = ours(blip, pixels(8), Decoding(**decoding, min_length=6, max_length=12), range(8), prompt)
    assert all(text[: len(prompt)] == prompt.tolist() and 7 <= len(text) <= 12 for text in texts)


def test_ended_texts_are_padded_with_the_end(blip):
    image = blip.med.project_image(blip.image_tokens(pixels(32)))
    for decoding in (Decoding(), BEAM_SEARCH, NUCLEUS):
        rows = generate(blip.med, image, PROMPT, SEP, decoding, range(32)).tolist()
        ended = [row[row.index(SEP) :] for row in rows if SEP in row]
        assert any(len(rest) > 5 for rest in ended) and all(set(rest) == {SEP} for rest in ended)


# What is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"beams": 3, "top_p": 0.9}, "keep one"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"min_length": 21}, "min_length 21 and max_length 20"),
        ({"min_length": -1}, "min_length -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_impossible_decodings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**wrong)


def test_impossible_requests():
    def ask(prompt: list[int], decoding: Decoding, seeds: list[int] | None = None) -> None:
        generate(Toy(5), toy_images(2), torch.tensor(prompt), 4, decoding, seeds)

    with pytest.raises(ValueError, match="the prompt has 6 ids"):
        ask([0] * 6, Decoding(max_length=6))
    with pytest.raises(ValueError, match="no seeds"):
        ask([0], NUCLEUS)
    with pytest.raises(ValueError, match="3 seeds for 2 images"):
        ask([0], NUCLEUS, [1, 2, 3])


@pytest.mark.parametrize("decoding", [{}, {"beams": 3}, {"top_p": 0.9}])
def test_texts_are_at_most_as_long_as_the_text_stack(blip, decoding):
    """The tiny model has 40 positions."""
    longest = ours(blip, pixels(2), Decoding(**decoding, min_length=40, max_length=40), range(2))
    assert [len(text) for text in longest] == [40, 40]
    with pytest.raises(ValueError, match=r"max_length is 41, .* positions for 40 ids, .* at most 40"):
        ours(blip, pixels(2), Decoding(**decoding, max_length=41), range(2))
    with pytest.raises(ValueError, match=r"the prompt has 40 ids .* max_length \(of at most 40\)"):
        ours(blip, pixels(2), Decoding(**decoding, max_length=40), range(2), prompt=PROMPT[:1].repeat(40))
