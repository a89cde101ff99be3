"""ranks.json beside the metrics.json of a retrieval: where the truth of each query stands, and what is first.

{"itc": {"tr": {"rank": [...], "top": [[...], ...]}, "ir": {...}}, "itm": {...}}. `rank` has, of each query in
the order of the test set, how many wrong candidates come before the best right one: 0 is the first place.
`top` has the numbers of its best candidates, images and texts being numbered in the order of the test set.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.retrieval import rank_of_truth

SCORES = ("itc", "itm")
SIDES = ("tr", "ir")  # the texts of an image, the image of a text
TOP = 5  # candidates told of each query


@dataclass(frozen=True)
class Ranking:
    """Of Q queries. `top` is empty where the file has none."""

    rank: tuple[int, ...]
    top: tuple[tuple[int, ...], ...]


Rankings = Mapping[str, Mapping[str, Ranking]]  # of SCORES, of SIDES


def ranks_of(to_text: Tensor, to_image: Tensor, image_of_text: Tensor) -> dict[str, dict[str, Any]]:
    """What ranks.json holds of one kind of score: scores [I, T] and [T, I], `image_of_text` [T]."""
    images = torch.arange(len(to_text), device=to_text.device)
    asked = {"tr": (to_text, images, image_of_text), "ir": (to_image, image_of_text, images)}
    return {
        side: {
            "rank": rank_of_truth(scores, wanted, found).tolist(),
            "top": scores.topk(min(TOP, scores.size(1)), 1).indices.tolist(),
        }
        for side, (scores, wanted, found) in asked.items()
    }


def recall_curve(ranks: Sequence[int], k: int) -> list[float]:
    """Recall at 1..k: the share of queries whose truth has fewer wrong candidates before it."""
    hits = [0] * k
    for rank in ranks:
        if rank < k:
            hits[rank] += 1
    curve, so_far = [], 0
    for number in hits:
        so_far += number
        curve.append(so_far / len(ranks))
    return curve


def read_ranks(folder: Path, images: int, texts: int) -> Rankings | None:
    """ranks.json of a retrieval of so many images and texts, None where there is none.

    Errors: ValueError for a file that holds something else.
    """
    path = folder / "ranks.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        queries = {"tr": (images, texts), "ir": (texts, images)}
        return {
            score: {side: _ranking(found[score][side], *queries[side]) for side in SIDES}
            for score in SCORES
            if score in found
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: does not tell the ranks of {images} images and {texts} texts "
            f"({type(error).__name__}: {error}); run the evaluation again"
        ) from error


def _ranking(found: Mapping[str, Any], queries: int, candidates: int) -> Ranking:
    rank, top = tuple(found["rank"]), tuple(tuple(numbers) for numbers in found.get("top", ()))
    if len(rank) != queries or len(top) not in (0, queries):
        raise ValueError(f"{len(rank)} ranks and {len(top)} lists of the best, of {queries} queries")
    numbers = [*rank, *(number for best in top for number in best)]
    if any(type(number) is not int or not 0 <= number <= candidates for number in numbers):
        raise ValueError(f"a rank or a number is no whole number from 0 to {candidates}")
    if any(number == candidates for best in top for number in best):
        raise ValueError(f"a candidate has the number {candidates}, the last one is {candidates - 1}")
    return Ranking(rank, top)
