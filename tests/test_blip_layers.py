"""Attention, MLP and masks against loops and formulas written out."""

import math

import pytest
import torch
from torch import Tensor

from blip.layers import MLP, Attention, bert_init, causal_mask, extend, padding_mask


def made(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In float64 and eval mode, with weights that leave nothing flat."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return module


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """[D] -> [D], by the formula."""
    variance = (x - x.mean()).square().mean()
    return (x - x.mean()) / (variance + 1e-12).sqrt() * norm.weight + norm.bias


def loop_attention(attention: Attention, x: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
    """x [R, T, D], memory [R, S, D], allowed [R, T, S] -> [R, T, D], one head of one position at a time."""
    size = x.size(-1) // attention.heads
    rows = []
    for row in range(len(x)):
        places = []
        for place in range(x.size(1)):
            asked = attention.query(x[row, place])
            answers = []
            for head in range(attention.heads):
                part = slice(head * size, (head + 1) * size)
                scores = [
                    float(asked[part] @ attention.key(token)[part]) / math.sqrt(size) for token in memory[row]
                ]
                masses = [math.exp(s) * bool(a) for s, a in zip(scores, allowed[row, place], strict=True)]
                values = [attention.value(token)[part] for token in memory[row]]
                answers.append(
                    sum(mass / sum(masses) * value for mass, value in zip(masses, values, strict=True))
                )
            answer = attention.out(torch.cat(answers))
            places.append(layer_norm(x[row, place] + answer, attention.norm))
        rows.append(torch.stack(places))
    return torch.stack(rows)


@torch.no_grad()
def test_attention_is_the_loop_over_heads_and_positions() -> None:
    attention, x = made(Attention(12, 3)), drawn(2, 4, 12)
    allowed = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    allowed[1, :, 0] = False
    allowed[1, 0, 0] = True
    found = attention(x, attention.project(x), allowed[:, None])
    torch.testing.assert_close(found, loop_attention(attention, x, x, allowed))


@torch.no_grad()
def test_cross_attention_to_a_memory_of_another_width() -> None:
    attention, x, memory = made(Attention(12, 4, memory_width=7)), drawn(2, 3, 12), drawn(2, 5, 7)
    everywhere = torch.ones(2, 3, 5, dtype=torch.bool)
    found = attention(x, attention.project(memory))
    torch.testing.assert_close(found, loop_attention(attention, x, memory, everywhere))


@pytest.mark.parametrize("texts", [1, 3])
@torch.no_grad()
def test_several_texts_of_an_image_are_folded_and_not_mixed(texts: int) -> None:
    attention, x, memory = made(Attention(12, 4)), drawn(2 * texts, 3, 12), drawn(2, 5, 12)
    folded = attention(x, attention.project(memory))
    apart = attention(x, attention.project(memory.repeat_interleave(texts, 0)))
    torch.testing.assert_close(folded, apart)


def test_texts_that_do_not_divide_among_the_images_are_an_error() -> None:
    """3 texts of 4 tokens would also cut into 2 images of 6 positions, in silence."""
    attention = Attention(12, 4)
    with pytest.raises(RuntimeError):
        attention(torch.zeros(3, 4, 12), attention.project(torch.zeros(2, 5, 12)))


@torch.no_grad()
def test_keys_and_values_of_new_positions_are_appended() -> None:
    attention, x = made(Attention(12, 3)), drawn(2, 5, 12)
    whole = attention.project(x)
    grown = extend(extend(None, attention.project(x[:, :2])), attention.project(x[:, 2:]))
    for found, expected in zip(grown, whole, strict=True):
        assert expected.shape == (2, 3, 5, 4)
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_mlp_is_its_formula() -> None:
    mlp, x = made(MLP(6, 10)), drawn(2, 3, 6)
    for row in range(2):
        for place in range(3):
            hidden = mlp.up.weight @ x[row, place] + mlp.up.bias
            gelu = torch.tensor(
                [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden.tolist()]
            ).double()
            expected = layer_norm(x[row, place] + mlp.down.weight @ gelu + mlp.down.bias, mlp.norm)
            torch.testing.assert_close(mlp(x)[row, place], expected)


@pytest.mark.parametrize("asking", [1, 2, 5])
def test_the_causal_mask_of_the_last_positions(asking: int) -> None:
    mask = causal_mask(asking, 5, torch.device("cpu"))
    expected = [[seen <= 5 - asking + place for seen in range(5)] for place in range(asking)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
def test_the_padding_mask_is_for_every_head_and_position(kind: torch.dtype) -> None:
    mask = padding_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]).to(kind))
    assert mask.shape == (2, 1, 1, 3)
    assert mask[:, 0, 0].tolist() == [[True, True, False], [True, False, False]]


def test_dropout_is_for_training() -> None:
    x = drawn(2, 3, 12).float()
    for module in (Attention(12, 3, dropout=0.5), MLP(12, 24, dropout=0.5)):
        inputs = (x, module.project(x)) if isinstance(module, Attention) else (x,)
        module.eval()
        assert torch.equal(module(*inputs), module(*inputs))
        module.train()
        assert not torch.equal(module(*inputs), module(*inputs))


def test_a_width_that_does_not_divide_among_the_heads_is_an_error() -> None:
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 4"):
        Attention(10, 4)


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (48, 0.08)])  # 16 times narrower, 4 times larger
def test_berts_initialisation(width: int, std: float) -> None:
    torch.manual_seed(0)
    stack = torch.nn.Sequential(torch.nn.Embedding(300, width), Attention(width, 4), MLP(width, 200))
    bert_init(stack, width)
    for name, parameter in stack.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.1), name
            assert abs(float(parameter.detach().mean())) < std / 10, name
