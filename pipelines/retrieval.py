"""Image-text retrieval: TR@k (the texts of an image) and IR@k (the image of a text), ITC alone or re-ranked.

The protocol of ALBEF and BLIP (salesforce/BLIP train_retrieval.py): candidates are ranked by cosine of ITC;
the best k are ranked again by ITM logit + cosine and stay ahead of the others. A hit at n means that one of
the right candidates is among the first n.
Several processes share the batches of texts, and the images whose pairs are matched (pipelines.turns).
Shapes: I images, T texts, Q queries, C candidates, E shared embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip.distributed import Rows
from blip.model import Blip
from pipelines.turns import own_turns, rows_of_turns
from qformer import Stage1

CUTS = (1, 5, 10)

Retriever = Blip | Stage1


@dataclass(frozen=True)
class Texts:
    """Texts of images: ids and mask [T, L], and for each text the number of its image."""

    ids: Tensor
    mask: Tensor
    image: Tensor  # [T] int64


def rank_of_truth(scores: Tensor, wanted: Tensor, found: Tensor) -> Tensor:
    """How many wrong candidates come before the best right one: scores [Q, C], ids [Q] and [C] -> [Q].

    A wrong candidate with the same score comes before: a model that says the same of all is not perfect.
    A query without a right candidate has C, which is no hit at any cut.
    """
    right = wanted[:, None] == found[None, :]  # [Q, C]
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    before = ((scores >= best) & ~right).sum(1)
    return torch.where(right.any(1), before, scores.size(1))


def recalls(prefix: str, ranks: Tensor, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """The share of queries whose truth is among the first n, e.g. {"tr@1": 0.8}."""
    return {f"{prefix}@{cut}": (ranks < cut).double().mean().item() for cut in cuts}


def retrieval_metrics(to_text: Tensor, to_image: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """TR@n, IR@n and their mean, from scores [I, T] and [T, I]; `image_of_text` [T]."""
    images = torch.arange(len(to_text), device=to_text.device)
    found = recalls("tr", rank_of_truth(to_text, images, image_of_text))
    found |= recalls("ir", rank_of_truth(to_image, image_of_text, images))
    return found | {"mean_recall": sum(found.values()) / len(found)}


@torch.inference_mode()
def text_features(model: Retriever, texts: Texts, batch: int = 256) -> Tensor:
    """Unit ITC features [T, E]; texts of like length share a batch, so little padding is computed."""
    order = texts.mask.sum(1).argsort()
    found = [model.encode_texts(*cut(texts, rows)) for rows in own_turns(order.split(batch))]
    return rows_of_turns(found, texts.ids.device)[order.argsort()]


@torch.inference_mode()
def rerank(
    model: Retriever,
    images: Iterator[tuple[int, Tensor]],
    texts: Texts,
    cosine: Tensor,
    k: int,
    batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores [I, T] and [T, I] whose best k of each row carry ITM logit + cosine, the others cosine - 1000.

    `images` gives (number of the image, its tokens [1, N, D]), each once and in one process; `cosine` [I, T].
    A pair that is among the best of both its image and its text is scored once, and all pairs of an image
    share its projected keys and values. `batch` pairs are scored at once; None: 256, on a CPU 32, as texts of
    like length are then padded less.
    """
    batch = batch or (32 if cosine.device.type == "cpu" else 256)
    k_text, k_image = min(k, cosine.size(1)), min(k, cosine.size(0))
    of_image = torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, cosine.topk(k_text, 1).indices, True)
    of_text = torch.zeros_like(of_image).scatter_(0, cosine.topk(k_image, 0).indices, True)  # [I, T]
    matched = torch.zeros_like(cosine)
    own: list[int] = []
    for number, tokens in images:
        own.append(number)
        projected = model.project_image(tokens)
        chosen = (of_image | of_text)[number].nonzero()[:, 0]
        chosen = chosen[texts.mask[chosen].sum(1).argsort()]
        for rows in chosen.split(batch):
            matched[number, rows] = model.match_projected(*cut(texts, rows), projected)[:, 1].to(cosine)
    _share_rows(matched, torch.tensor(own, dtype=torch.long, device=cosine.device))
    late = cosine - 1000
    whole = cosine + matched
    return torch.where(of_image, whole, late), torch.where(of_text, whole, late).T


def _share_rows(table: Tensor, own: Tensor) -> None:
    """The rows `own` of each process's table [I, T] go into the tables of all."""
    rows = Rows.of(len(own), table.device)
    if len(rows.counts) > 1:
        table[rows.gather(own)] = rows.gather(table[own])


def cut(texts: Texts, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask of some texts, no longer than the longest of them."""
    longest = int(texts.mask[rows].sum(1).max())
    return texts.ids[rows, :longest], texts.mask[rows, :longest]
