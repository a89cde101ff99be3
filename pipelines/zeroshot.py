"""Zero-shot classification and the linear probe of CLIP (Radford et al. 2021, section 3), as functions.

A class is the mean of its name in several templates; an image belongs to the class it is nearest to.
Shapes: I images, C classes, T templates, E shared embedding, D width of the features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.retrieval import rank_of_truth

CUTS = (1, 5)
STEPS_PER_DECADE = 8  # the finest of the search for the strength of a probe


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """C * T texts, those of a class next to each other."""
    return [template.replace("{}", name) for name in names for template in templates]


def class_embeddings(features: Tensor, num_templates: int) -> Tensor:
    """Unit features [C * T, E] of `prompts` -> unit class embeddings [C, E], the mean made unit again.

    As in openai/CLIP notebooks/Prompt_Engineering_for_ImageNet.ipynb.
    """
    return F.normalize(features.unflatten(0, (-1, num_templates)).mean(1), dim=-1)


def places_of_truth(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one, ties included: scores [I, C], labels [I] -> [I]."""
    return rank_of_truth(scores, labels, torch.arange(scores.size(1), device=scores.device))


def class_results(places: Tensor, labels: Tensor, names: Mapping[int, str]) -> dict[str, dict[str, float]]:
    """{name: {"images", "top1", "top5"}} of the classes in `names`; places and labels [I]."""
    found = {}
    for label, name in names.items():
        own = places[labels == label]
        found[name] = {"images": len(own)} | {f"top{cut}": _share(own < cut) for cut in CUTS}
    return found


def set_results(places: Tensor, classes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{"images", "top1", "top5", "mean_per_class"}; the last is the mean of the classes' top-1."""
    tops = {f"top{cut}": _share(places < cut) for cut in CUTS}
    mean = sum(result["top1"] for result in classes.values()) / len(classes)
    return {"images": len(places)} | tops | {"mean_per_class": mean}


def with_drops(sets: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Results of sets of one label space, in each but the first also "drop": what its top-1 lacks to it."""
    first = next(iter(sets.values()))["top1"]
    return {
        name: result if i == 0 else result | {"drop": first - result["top1"]}
        for i, (name, result) in enumerate(sets.items())
    }


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


# ---- the linear probe ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A linear classifier of frozen features."""

    weight: Tensor  # [C, D]
    bias: Tensor  # [C]

    def __call__(self, features: Tensor) -> Tensor:
        """[I, D] -> scores [I, C]."""
        return F.linear(features, self.weight, self.bias)


def fit_probe(
    features: Tensor, labels: Tensor, num_classes: int, strength: float, iterations: int = 1000
) -> Probe:
    """Multinomial logistic regression of labels [I] on features [I, D], from zero, by L-BFGS.

    Least is the cross-entropy, summed and times `strength`, plus half the squared weights: `strength` is
    scikit-learn's C, 1 / lambda in CLIP's paper. The bias is free.
    """
    weight = features.new_zeros(num_classes, features.size(1), requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        decay = weight.square().sum() / (2 * strength * len(features))
        found = F.cross_entropy(F.linear(features, weight, bias), labels) + decay
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    return Probe(weight.detach(), bias.detach())


def best_strength(score: Callable[[float], float]) -> float:
    """The strength that scores best, by CLIP's search: of 1e-6, 1e-4, ... 1e6, then around the best of these
    at half the distance, and so on, to eight steps a decade. Of equals the smaller.
    """
    found = {float(exponent): score(10.0**exponent) for exponent in range(-6, 7, 2)}
    step = 2.0
    while step * STEPS_PER_DECADE > 1:
        step /= 2
        best = _best(found)
        for exponent in (best - step, best + step):
            if -6 <= exponent <= 6:
                found[exponent] = score(10.0**exponent)
    return 10.0 ** _best(found)


def _best(found: Mapping[float, float]) -> float:
    return max(sorted(found), key=lambda exponent: found[exponent])


def validation_rows(labels: Tensor) -> Tensor:
    """[I] boolean: every fifth image of each class, from the second on; [] of a class with one image."""
    order = labels.argsort(stable=True)  # classes after each other, images in their order
    counts = labels.bincount()
    first = counts.cumsum(0) - counts  # [C], where each class begins in `order`
    number = torch.arange(len(labels), device=labels.device) - first[labels[order]]
    held = torch.zeros_like(labels, dtype=torch.bool)
    held[order] = number % 5 == 1
    return held
