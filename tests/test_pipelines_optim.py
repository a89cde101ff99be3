"""pipelines.optim against numbers worked out by hand and against torch's own schedulers."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

from pipelines.optim import (
    OptimConfig,
    lr_at,
    make_optimizer,
    parameter_groups,
    warmup_constant,
    warmup_cosine,
    warmup_step_decay,
)


def cosine(step: int) -> float:
    return warmup_cosine(step, peak=1.0, floor=0.2, warmup_steps=4, total_steps=12, start=0.1)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.1),  # start
        (1, 0.325),  # 0.1 + 0.9 / 4
        (3, 0.775),
        (4, 1.0),  # the peak
        (6, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos 45 degrees
        (8, 0.6),  # half way: the mean of peak and floor
        (12, 0.2),  # the floor
        (500, 0.2),  # and it stays there
    ],
)
def test_cosine_by_hand(step: int, rate: float) -> None:
    assert cosine(step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.1),
        (2, 0.55),
        (4, 1.0),
        (9, 1.0),  # the last step of epoch 0
        (10, 0.5),
        (19, 0.5),
        (20, 0.25),
        (30, 0.2),  # 0.125 is below the floor
        (90, 0.2),
    ],
)
def test_step_decay_by_hand(step: int, rate: float) -> None:
    found = warmup_step_decay(
        step, peak=1.0, floor=0.2, warmup_steps=4, start=0.1, rate=0.5, steps_per_epoch=10
    )
    assert found == pytest.approx(rate, rel=1e-12)


def test_step_decay_is_blips_rule() -> None:
    """pretrain.py: `warmup_lr_schedule` in epoch 0, then `max(min_lr, init_lr * 0.9 ** epoch)` per epoch."""
    config = OptimConfig(
        lr=3e-4, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=3000, schedule="step_decay", decay_rate=0.9
    )
    for epoch in (0, 1, 2, 19, 80):
        for i in (0, 1, 1500, 2999, 3000, 4999):
            lr = max(1e-6, 3e-4 * 0.9**epoch)
            if epoch == 0:
                lr = min(3e-4, 1e-6 + (3e-4 - 1e-6) * i / 3000)
            assert lr_at(config, epoch * 5000 + i, 100_000, 5000) == pytest.approx(lr, rel=1e-12)


def test_a_warmup_longer_than_an_epoch_never_jumps_up() -> None:
    rates = [
        warmup_step_decay(s, peak=1.0, floor=0.0, warmup_steps=25, start=0.0, rate=0.8, steps_per_epoch=10)
        for s in range(60)
    ]
    assert max(b - a for a, b in pairwise(rates)) < 0.041  # the warm-up's own slope, 1/25
    assert rates[9] == pytest.approx(9 / 25)
    assert rates[22] == pytest.approx(0.8**2)  # the decay has met the warm-up, which would be at 0.88
    assert rates[30] == pytest.approx(0.8**3)


def torch_rates(
    build: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = build(optimizer)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_equals_torch() -> None:
    config = OptimConfig(lr=3e-4, min_lr=1e-5, warmup_lr=3e-5, warmup_steps=10)
    expected = torch_rates(
        lambda optimizer: SequentialLR(
            optimizer,
            [LinearLR(optimizer, 0.1, 1.0, 10), CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-5)],
            milestones=[10],
        )
    )
    assert [lr_at(config, step, 50, 7) for step in range(50)] == pytest.approx(expected, rel=1e-9)


def test_step_decay_equals_torch_lambda() -> None:
    config = OptimConfig(lr=3e-4, schedule="step_decay", decay_rate=0.85)
    expected = torch_rates(lambda optimizer: LambdaLR(optimizer, lambda step: 0.85 ** (step // 7)))
    assert [lr_at(config, step, 50, 7) for step in range(50)] == pytest.approx(expected, rel=1e-9)


def test_constant_after_warmup() -> None:
    config = OptimConfig(lr=0.5, warmup_lr=0.1, warmup_steps=4, schedule="constant")
    assert [lr_at(config, step, 1, 1) for step in (0, 1, 4, 99)] == pytest.approx([0.1, 0.2, 0.5, 0.5])
    assert warmup_constant(0, peak=0.5, warmup_steps=0, start=0.1) == 0.5  # no warm-up: no step at `start`


def test_cosine_survives_a_run_shorter_than_its_warmup() -> None:
    rates = [
        warmup_cosine(s, peak=1.0, floor=0.0, warmup_steps=10, total_steps=3, start=0.0) for s in range(12)
    ]
    assert rates[:3] == pytest.approx([0.0, 0.1, 0.2])
    assert all(math.isfinite(rate) for rate in rates)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "min_lr must be between 0 and lr = 0.0001, got 0.001"),
        ({"warmup_lr": 1.0}, "warmup_lr must be between"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in"),
        ({"decay_rate": 0.0}, "decay_rate must be in"),
        ({"grad_clip": 0.0}, "grad_clip must be null or above 0, got 0.0"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)  # type: ignore[arg-type]


class Small(nn.Module):
    """One parameter of every kind that a model of this project has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.words = nn.Embedding(5, 3)
        self.position = nn.Parameter(torch.ones(1, 4, 3))
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.matrix_bias = nn.Parameter(torch.ones(2, 2))  # a relative position bias is a matrix, and a bias
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_who_decays() -> None:
    model = Small()
    decay, no_decay = parameter_groups(model, OptimConfig(weight_decay=0.05))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decay["weight_decay"] == 0.05 and no_decay["weight_decay"] == 0.0
    assert {names[id(p)] for p in decay["params"]} == {"linear.weight", "words.weight", "position"}
    assert {names[id(p)] for p in no_decay["params"]} == {
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "temperature",
        "matrix_bias",
    }


def test_a_tied_parameter_is_in_one_group_once() -> None:
    model = Small()
    head = nn.Linear(3, 5)
    head.weight = model.words.weight
    model.head = head
    parameters = [p for group in parameter_groups(model, OptimConfig()) for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == 9


def test_one_step_by_hand() -> None:
    """AdamW step 1 moves by lr * sign(gradient), as the bias corrections cancel, after a decay by lr * wd."""
    model = Small()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(lr=0.01, weight_decay=0.5, betas=(0.5, 0.7)))
    torch.stack([parameter.sum() for parameter in model.parameters()]).sum().backward()  # every gradient is 1
    optimizer.step()
    after = dict(model.named_parameters())
    for name in ("linear.weight", "words.weight", "position"):
        torch.testing.assert_close(after[name], before[name] * (1 - 0.01 * 0.5) - 0.01)
    for name in ("linear.bias", "norm.weight", "temperature"):
        torch.testing.assert_close(after[name], before[name] - 0.01)
    assert torch.equal(after["frozen.weight"], before["frozen.weight"])
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.7)


def test_only_one_kind_and_none() -> None:
    assert len(make_optimizer(nn.Linear(2, 2, bias=False), OptimConfig()).param_groups) == 1
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fused_on_a_gpu_takes_the_same_steps() -> None:
    torch.manual_seed(0)
    host, device = Small(), Small()
    device.load_state_dict(host.state_dict())
    device.cuda()
    optimizers = [make_optimizer(model, OptimConfig(lr=0.01)) for model in (host, device)]
    assert optimizers[1].defaults["fused"] and not optimizers[0].defaults["fused"]
    for _ in range(5):
        for model, optimizer in zip((host, device), optimizers, strict=True):
            optimizer.zero_grad()
            torch.stack([(parameter**2).sum() for parameter in model.parameters()]).sum().backward()
            optimizer.step()
    for a, b in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-7)
