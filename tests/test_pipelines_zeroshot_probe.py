"""The linear probe: the objective of scikit-learn, by its gradient, and the search for its strength."""

import numpy as np
import pytest
import torch

from pipelines.zeroshot import best_strength, fit_probe, validation_rows


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_a_probe_is_where_the_gradient_of_logistic_regression_vanishes(strength: float) -> None:
    """Of scikit-learn's objective, strength * sum of cross-entropies + |weight|^2 / 2, which is convex."""
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    probe = fit_probe(torch.tensor(features), torch.tensor(labels), 3, strength)
    weight, bias = probe.weight.numpy(), probe.bias.numpy()
    slope, offset = weight.copy(), np.zeros(3)
    for x, label in zip(features, labels, strict=True):
        odds = np.exp(weight @ x + bias)
        error = odds / odds.sum() - np.eye(3)[label]
        slope += strength * np.outer(error, x)
        offset += strength * error
    assert np.abs(slope).max() < 1e-3 * strength * 60 and np.abs(offset).max() < 1e-3 * strength * 60
    assert np.abs(weight).max() > 1e-2
    torch.testing.assert_close(probe(torch.tensor(features)), torch.tensor(features @ weight.T + bias))


def test_a_probe_separates_what_can_be_separated() -> None:
    labels = torch.arange(30) % 3
    features = torch.eye(3, dtype=torch.float64)[labels] + 0.01 * torch.arange(30)[:, None]
    probe = fit_probe(features, labels, 3, strength=1e4)
    assert (probe(features).argmax(1) == labels).all()


@pytest.mark.parametrize("peak", [-6.0, -4.0, 1.375, 0.5, 6.0])
def test_the_search_finds_the_peak_at_eight_steps_a_decade(peak: float) -> None:
    asked: list[float] = []

    def score(strength: float) -> float:
        asked.append(np.log10(strength))
        return -abs(asked[-1] - peak)

    assert np.log10(best_strength(score)) == pytest.approx(peak)
    assert len(asked) <= 7 + 4 * 2 and min(asked) >= -6 and max(asked) <= 6
    assert best_strength(lambda strength: 1.0) == pytest.approx(1e-6)


def test_every_fifth_image_of_a_class_is_held_out() -> None:
    labels = [2, 0, 0, 2, 0, 0, 1, 0, 0, 0, 2]
    seen: dict[int, int] = {}
    expected = []
    for label in labels:
        expected.append(seen.get(label, 0) % 5 == 1)
        seen[label] = seen.get(label, 0) + 1
    assert validation_rows(torch.tensor(labels)).tolist() == expected
