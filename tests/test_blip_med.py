"""The three uses of the MED: what each may see, and that padding, folding and caching change nothing."""

from dataclasses import replace

import pytest
import torch
from tiny import VOCABULARY, pixels, tiny_batch, tiny_blip, tiny_config
from torch import Tensor

from blip.layers import KV
from blip.med import MED, MEDConfig
from blip.model import Batch, Blip

TEXT = MEDConfig(VOCABULARY, width=32, depth=2, heads=4, hidden=64, max_positions=40)
DEC, ENC = VOCABULARY - 2, VOCABULARY - 1


@pytest.fixture(scope="module")
def blip() -> Blip:
    return tiny_blip(seed=2).double()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return tiny_batch((1, 2, 3), seed=4)


def look(blip: Blip, images: int = 3, seed: int = 0) -> list[KV]:
    return blip.med.project_image(blip.image_tokens(pixels(images, seed).double()))


def unpadded(batch: Batch, row: int) -> Tensor:
    return batch.ids[row, : int(batch.mask[row].sum())][None]


def change(ids: Tensor, place: int) -> Tensor:
    """Another word at one place of every text."""
    ids = ids.clone()
    ids[:, place] = (ids[:, place] - 4) % (VOCABULARY - 7) + 5
    return ids


# What may be seen


@torch.no_grad()
def test_a_written_word_never_sees_a_later_one(blip: Blip, batch: Batch) -> None:
    image = look(blip)
    states, _ = blip.med.write(batch.ids, image)
    for place in range(1, batch.ids.size(1)):
        others, _ = blip.med.write(change(batch.ids, place), image)
        assert torch.equal(others[:, :place], states[:, :place])
        assert ((others[:, place:] - states[:, place:]).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_a_read_word_sees_all_words(blip: Blip, batch: Batch) -> None:
    image, ids, mask = look(blip), batch.ids, torch.ones_like(batch.ids)
    for place in range(ids.size(1)):
        for one, other in (
            (blip.med.encode(ids, mask), blip.med.encode(change(ids, place), mask)),
            (blip.med.match(ids, mask, image), blip.med.match(change(ids, place), mask, image)),
        ):
            assert ((one - other).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_only_encode_is_blind_to_the_image(blip: Blip, batch: Batch) -> None:
    ids, mask = batch.ids, batch.mask
    encoded = blip.med.encode(ids, mask)
    one, other = look(blip, seed=0), look(blip, seed=1)
    assert not torch.allclose(blip.med.match(ids, mask, one), blip.med.match(ids, mask, other))
    assert not torch.allclose(blip.med.write(ids, one)[0], blip.med.write(ids, other)[0])
    assert not torch.allclose(blip.med.match(ids, mask, one), encoded)
    blind = MED(replace(TEXT, writes=False), image_width=None).double().eval()
    weights = {name: w for name, w in blip.med.state_dict().items() if name in blind.state_dict()}
    blind.load_state_dict(weights)  # without any cross-attention
    assert torch.equal(blind.encode(ids, mask), encoded)


# Padding


@torch.no_grad()
def test_padding_changes_no_encoded_or_matched_text(blip: Blip, batch: Batch) -> None:
    image = look(blip)
    together = blip.med.encode(batch.ids, batch.mask), blip.med.match(batch.ids, batch.mask, image)
    assert (batch.mask.sum(1) < batch.ids.size(1)).any()
    for row in range(3):
        ids = unpadded(batch, row)
        one = [(k[row : row + 1], v[row : row + 1]) for k, v in image]
        alone = blip.med.encode(ids, torch.ones_like(ids)), blip.med.match(ids, torch.ones_like(ids), one)
        for whole, single in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[row, : ids.size(1)], single[0])


@torch.no_grad()
def test_padding_changes_no_written_text_with_or_without_its_mask(blip: Blip, batch: Batch) -> None:
    image = look(blip)
    for mask in (batch.mask, None):
        together, _ = blip.med.write(batch.ids, image, mask)
        for row in range(3):
            ids = unpadded(batch, row)
            alone, _ = blip.med.write(ids, [(k[row : row + 1], v[row : row + 1]) for k, v in image])
            torch.testing.assert_close(together[row, : ids.size(1)], alone[0])


@torch.no_grad()
def test_a_masked_word_is_not_seen_by_later_ones(blip: Blip, batch: Batch) -> None:
    """Behind the text causality hides the padding; before or within it only the mask can."""
    image, mask = look(blip), torch.ones_like(batch.ids)
    mask[:, 1] = 0
    states, others = (blip.med.write(ids, image, mask)[0] for ids in (batch.ids, change(batch.ids, 1)))
    assert torch.equal(states[:, 2:], others[:, 2:])
    assert not torch.equal(states[:, 2:], blip.med.write(batch.ids, image)[0][:, 2:])


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(blip: Blip, batch: Batch) -> None:
    junk = torch.where(batch.mask.bool(), batch.ids, 17)
    real = batch.mask.bool()
    image = look(blip)
    for use in (
        lambda ids: blip.med.encode(ids, batch.mask),
        lambda ids: blip.med.match(ids, batch.mask, image),
        lambda ids: blip.med.write(ids, image, batch.mask)[0],
    ):
        assert torch.equal(use(batch.ids)[real], use(junk)[real])


# Caching and folding


@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1, 1, 1], [3, 1, 1, 2], [1, 6], [7]])
@pytest.mark.parametrize("is_masked", [False, True])
@torch.no_grad()
def test_steps_with_a_cache_are_the_full_pass(blip: Blip, steps: list[int], is_masked: bool) -> None:
    ids = tiny_batch((1, 2, 3), seed=4).ids[:, :7]
    mask = (torch.arange(7) < torch.tensor([[7], [4], [5]])).long() if is_masked else None
    image, past, seen, found = look(blip), None, 0, []
    for step in steps:
        covered = None if mask is None else mask[:, : seen + step]
        states, past = blip.med.write(ids[:, seen : seen + step], image, covered, past)
        found.append(states)
        seen += step
        assert past[0][0].size(2) == seen
    whole, cache = blip.med.write(ids, image, mask)
    torch.testing.assert_close(torch.cat(found, 1), whole)
    torch.testing.assert_close(past, cache)


@pytest.mark.parametrize("texts", [2, 3])
@torch.no_grad()
def test_texts_of_one_image_together_are_texts_apart(blip: Blip, texts: int) -> None:
    batch, image = tiny_batch(range(2 * texts), seed=5), look(blip, images=2)
    matched = blip.med.match(batch.ids, batch.mask, image)
    written, _ = blip.med.write(batch.ids, image)
    for row in range(2 * texts):
        one = [(k[row // texts][None], v[row // texts][None]) for k, v in image]
        ids, mask = batch.ids[row][None], batch.mask[row][None]
        torch.testing.assert_close(matched[row], blip.med.match(ids, mask, one)[0])
        torch.testing.assert_close(written[row], blip.med.write(ids, one)[0][0])


# What is shared


@pytest.mark.parametrize(
    ("part", "changes_reading", "changes_writing"),
    [
        ("blocks.0.read.value", True, False),
        ("blocks.1.write.value", False, True),
        ("blocks.0.look.value", True, True),
        ("blocks.1.mlp.up", True, True),
        ("embeddings.word", True, True),
        ("embeddings.position", True, True),
    ],
)
@torch.no_grad()
def test_all_but_self_attention_is_shared(part: str, changes_reading: bool, changes_writing: bool) -> None:
    blip, batch = tiny_blip(), tiny_batch((1, 2))
    image = blip.image_tokens(batch.pixels)

    def outputs() -> tuple[Tensor, Tensor]:
        seen = blip.med.project_image(image)
        return blip.med.match(batch.ids, batch.mask, seen), blip.med.write(batch.ids, seen)[0]

    before = outputs()
    blip.med.get_submodule(part).weight.mul_(1.5)
    after = outputs()
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [changes_reading, changes_writing]


@torch.no_grad()
def test_next_words_are_read_off_the_word_embeddings(blip: Blip) -> None:
    """BERT's head, written out: dense, GELU, norm, then the product with every word."""
    head, state = blip.med.lm_head, torch.randn(32, dtype=torch.float64)
    assert head is not None
    x = head.dense.weight @ state + head.dense.bias
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    x = (x - x.mean()) / (x.var(correction=0) + 1e-12).sqrt() * head.norm.weight + head.norm.bias
    expected = [float(x @ word + head.bias[i]) for i, word in enumerate(blip.med.embeddings.word.weight)]
    torch.testing.assert_close(blip.med.logits(state), torch.tensor(expected, dtype=torch.float64))


@torch.no_grad()
def test_positions_count_from_the_first_one_given(blip: Blip) -> None:
    embeddings, ids = blip.med.embeddings, torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(embeddings(ids)[:, 1:], embeddings(ids[:, 1:], first=1))
    assert not torch.allclose(embeddings(ids[:, 1:]), embeddings(ids[:, 1:], first=1))


# What is not there


def test_a_text_stack_that_does_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"must read .* write .* or both"):
        MEDConfig(reads=False, writes=False)


def test_a_captioner_cannot_read_and_a_filter_cannot_write(batch: Batch) -> None:
    captioner, only_filter = tiny_blip(reads=False), tiny_blip(writes=False)
    image = captioner.med.project_image(captioner.image_tokens(batch.pixels))
    with pytest.raises(ValueError, match="no ITC and ITM encoder"):
        captioner.med.encode(batch.ids, batch.mask)
    with pytest.raises(ValueError, match="no ITC and ITM encoder"):
        captioner.med.match(batch.ids, batch.mask, image)
    with pytest.raises(ValueError, match="no LM decoder"):
        only_filter.med.write(batch.ids, image)
    with pytest.raises(ValueError, match="no LM decoder"):
        only_filter.med.logits(torch.zeros(32))


def test_an_image_is_never_ignored(batch: Batch) -> None:
    blind = MED(replace(tiny_config().text, writes=False), image_width=None)
    with pytest.raises(AssertionError, match="without cross-attention"):
        blind.match(batch.ids, batch.mask, [(torch.zeros(3, 4, 5, 8), torch.zeros(3, 4, 5, 8))] * 2)
