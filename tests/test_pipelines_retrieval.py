"""Recall and re-ranking against naive loops over whole matrices, with ties and several texts an image."""

import pytest
import torch
from tiny import pixels, tiny_batch, tiny_blip
from torch import Tensor

from blip.model import Blip
from pipelines.retrieval import Texts, rank_of_truth, recalls, rerank, retrieval_metrics, text_features

OWNERS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1])  # image of each text


def naive_hits(scores: Tensor, right: list[set[int]], cut: int) -> float:
    """Sort all candidates of each query, the wrong ones first among equals, and look at the first few."""
    hits = 0
    for row, truth in zip(scores.tolist(), right, strict=True):
        ranking = sorted(range(len(row)), key=lambda c: (-row[c], c in truth))
        hits += bool(truth & set(ranking[:cut]))
    return hits / len(right)


@pytest.mark.parametrize("seed", range(5))
def test_recall_is_what_sorting_everything_gives(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (4, 8), generator=generator).float()  # many ties
    texts_of = [{t for t in range(8) if OWNERS[t] == i} for i in range(4)]
    found = retrieval_metrics(scores, scores.T, OWNERS)
    for cut in (1, 5, 10):
        assert found[f"tr@{cut}"] == naive_hits(scores, texts_of, cut)
        assert found[f"ir@{cut}"] == naive_hits(scores.T, [{int(i)} for i in OWNERS], cut)
    six = [found[f"{way}@{cut}"] for way in ("tr", "ir") for cut in (1, 5, 10)]
    assert found["mean_recall"] == pytest.approx(sum(six) / 6)


def test_a_model_that_says_the_same_of_all_finds_nothing() -> None:
    assert retrieval_metrics(torch.ones(20, 20), torch.ones(20, 20), torch.arange(20))["tr@10"] == 0


def test_a_query_without_truth_is_a_miss() -> None:
    ranks = rank_of_truth(torch.tensor([[3.0, 1.0]]), torch.tensor([7]), torch.tensor([1, 2]))
    assert ranks.tolist() == [2]
    assert recalls("tr", ranks, (1, 2)) == {"tr@1": 0.0, "tr@2": 0.0}


def some_texts() -> Texts:
    batch = tiny_batch(tuple(range(len(OWNERS))), seed=4)
    return Texts(batch.ids, batch.mask, OWNERS)


def model_and_tokens() -> tuple[Blip, Tensor]:
    model = tiny_blip(writes=False)
    with torch.no_grad():
        return model, model.image_tokens(pixels(4, seed=9))


@torch.no_grad()
def test_features_do_not_depend_on_the_batch() -> None:
    model, _ = model_and_tokens()
    texts = some_texts()
    expected = torch.cat([model.encode_texts(texts.ids[[t]], texts.mask[[t]]) for t in range(8)])
    torch.testing.assert_close(text_features(model, texts, batch=3), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3, 100])
def test_reranked_scores_are_those_of_every_pair_one_by_one(k: int) -> None:
    model, tokens = model_and_tokens()
    texts = some_texts()
    cosine = model.image_features(tokens) @ text_features(model, texts).T  # [I, T]
    to_text, to_image = rerank(model, ((i, tokens[[i]]) for i in range(4)), texts, cosine, k, batch=2)
    for i in range(4):
        for t in range(8):
            itm = model.match(texts.ids[[t]], texts.mask[[t]], tokens[[i]])[0, 1]
            best_texts = sorted(range(8), key=lambda other: -cosine[i, other])[:k]
            best_images = sorted(range(4), key=lambda other: -cosine[other, t])[:k]
            for score, among in ((to_text[i, t], t in best_texts), (to_image[t, i], i in best_images)):
                expected = cosine[i, t] + itm if among else cosine[i, t] - 1000
                torch.testing.assert_close(score, expected, atol=1e-4, rtol=0)
