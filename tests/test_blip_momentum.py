"""The teacher: its queue against a Python list, its pace against a loop, and what it must not have."""

import copy
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny import tiny_batch, tiny_blip
from torch import Tensor, nn

from blip import losses
from blip.model import Blip
from blip.momentum import NO_IMAGE, Momentum, MomentumConfig, alpha_at


def teacher_of(blip: Blip, **config: float) -> Momentum:
    teacher = blip.with_teacher(MomentumConfig(**config)).teacher  # type: ignore[arg-type]
    assert teacher is not None
    return teacher


def test_alpha_climbs_in_a_line_and_stays() -> None:
    config = MomentumConfig(alpha=0.4, alpha_steps=8)
    assert [alpha_at(step, config) for step in (0, 2, 4, 8, 9, 1000)] == pytest.approx(
        [0, 0.1, 0.2, 0.4, 0.4, 0.4]
    )
    assert alpha_at(0, MomentumConfig(alpha=0.4)) == 0.4


@pytest.mark.parametrize(
    "wrong", [{"queue_size": -1}, {"decay": 1.1}, {"decay": -0.1}, {"alpha": 2.0}, {"alpha_steps": -1}]
)
def test_a_config_out_of_range_is_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="momentum needs"):
        MomentumConfig(**wrong)  # type: ignore[arg-type]


# The queue


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_queue_is_a_list_that_forgets_its_oldest(size: int) -> None:
    """Batches smaller than, as large as and larger than the queue; ids, images and texts stay together."""
    torch.manual_seed(0)
    teacher = teacher_of(tiny_blip(), queue_size=size)
    oracle = deque(zip(teacher.image_queue, teacher.text_queue, [NO_IMAGE] * size, strict=True), maxlen=size)
    count = 0
    for rows in (3, 1, 2, 7, 4, 19, 5, 1, 8):
        image, text = (F.normalize(torch.randn(rows, 16), dim=1) for _ in range(2))
        ids = torch.arange(count, count + rows)
        oracle.extend(zip(image, text, ids.tolist(), strict=True))
        teacher.enqueue(image, text, ids)
        count += rows
        by_age = (int(teacher.place) + torch.arange(size)) % size
        assert teacher.id_queue[by_age].tolist() == [id for _, _, id in oracle]
        assert torch.equal(teacher.image_queue[by_age], torch.stack([image for image, _, _ in oracle]))
        assert torch.equal(teacher.text_queue[by_age], torch.stack([text for _, text, _ in oracle]))


def test_places_never_filled_are_nobodys_positives() -> None:
    teacher = teacher_of(tiny_blip(), queue_size=6)
    ids = torch.tensor([0, 5, 2**63 - 1])
    teacher.enqueue(torch.zeros(2, 16), torch.zeros(2, 16), torch.tensor([5, 0]))
    same = losses.same_image(ids, teacher.id_queue)
    assert same.nonzero().tolist() == [[0, 1], [1, 0]]
    norms = torch.cat([teacher.image_queue, teacher.text_queue]).norm(dim=1)
    assert ((norms - 1).abs() < 1e-6).sum() == 8  # the unfilled ones are negatives from the first step on


def test_a_queue_of_nothing_leaves_the_batch() -> None:
    blip = tiny_blip().train()
    teacher_of(blip, queue_size=0)
    assert blip(tiny_batch((1, 2, 3)))["itc"].isfinite()


def test_only_training_fills_the_queue() -> None:
    blip, batch = tiny_blip(), tiny_batch((11, 12, 13))
    teacher = teacher_of(blip, queue_size=5)
    blip.eval()(batch)
    assert teacher.id_queue.tolist() == [NO_IMAGE] * 5
    blip.train()(batch)
    blip(tiny_batch((14, 15, 16)))
    assert teacher.id_queue.tolist() == [16, 12, 13, 14, 15]


def test_a_batch_is_compared_before_it_enters_the_queue() -> None:
    """With an empty ramp and a teacher equal to the student, the queue holds the only further candidates."""
    blip, batch = tiny_blip(), tiny_batch((1, 2, 3))
    teacher = teacher_of(blip, queue_size=4, alpha=0.0)
    blip.training = True  # it alone, so that nothing drops out
    images, texts = blip.encode_images(batch.pixels), blip.encode_texts(batch.ids, batch.mask)
    to_text = images @ torch.cat([texts, teacher.text_queue]).T / blip.temperature
    to_image = texts @ torch.cat([images, teacher.image_queue]).T / blip.temperature
    diagonal = torch.arange(3)
    expected = (F.cross_entropy(to_text, diagonal) + F.cross_entropy(to_image, diagonal)) / 2
    torch.testing.assert_close(blip(batch)["itc"], expected, atol=1e-5, rtol=0)


# Following


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().double() for name, parameter in module.named_parameters()}


def test_the_teacher_follows_as_a_loop_would() -> None:
    blip = tiny_blip()
    teacher = teacher_of(blip, queue_size=3, decay=0.9)
    slow = snapshot(teacher)
    for step in range(3):
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, blip.parameters()):
                parameter.add_(torch.randn_like(parameter))
        student = snapshot(blip)
        slow = {name: 0.9 * value + 0.1 * student[name] for name, value in slow.items()}
        teacher.follow(blip)
        for name, value in snapshot(teacher).items():
            torch.testing.assert_close(value, slow[name], atol=1e-6, rtol=1e-6, msg=f"{name} at step {step}")


def test_the_teacher_starts_as_a_copy_and_stays_one() -> None:
    blip = tiny_blip()
    teacher, student = teacher_of(blip, queue_size=3), dict(blip.named_parameters())
    names = {name for name, _ in teacher.named_parameters()}
    assert {name.split(".")[0] for name in names} == {"vision", "med", "heads"}
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, student[name])
        assert parameter.data_ptr() != student[name].data_ptr()


def test_the_teacher_knows_texts_alone() -> None:
    """No cross-attention, no decoder, no ITM head: they would be weights that nothing uses."""
    teacher = teacher_of(tiny_blip(), queue_size=3)
    names = [name for name, _ in teacher.named_parameters()]
    assert not [name for name in names if ".look." in name or ".write." in name or "lm_head" in name]
    assert sorted(teacher.heads) == ["text_proj", "vision_proj"]
    with pytest.raises(AssertionError, match="cross-attention"):
        teacher.med.project_image(torch.zeros(1, 5, 24))


def test_the_teacher_learns_nothing_by_gradient() -> None:
    blip = tiny_blip().train()
    teacher = teacher_of(blip, queue_size=3)
    before = copy.deepcopy(teacher.state_dict())
    sum(blip(tiny_batch((1, 2, 3))).values()).backward()
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.named_parameters())
    assert blip.temperature.grad is not None


def test_the_teacher_is_in_the_state_and_not_in_the_saved_model(tmp_path: Path) -> None:
    blip = tiny_blip()
    teacher_of(blip, queue_size=3)
    buffers = {"image_queue", "text_queue", "id_queue", "place", "steps"}
    assert {f"teacher.{name}" for name in buffers} <= blip.state_dict().keys()
    blip.save_pretrained(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == tiny_blip().state_dict().keys()


@pytest.mark.parametrize(("temperature", "clamped"), [(-1.0, 0.001), (0.2, 0.2), (9.0, 0.5)])
def test_after_a_step_the_temperature_is_in_range_and_the_teacher_has_followed(
    temperature: float, clamped: float
) -> None:
    blip = tiny_blip()
    teacher = teacher_of(blip, queue_size=3, decay=0.5)
    with torch.no_grad():
        blip.temperature.fill_(temperature)
        blip.heads["text_proj"].bias.add_(1)
    before = teacher.heads["text_proj"].bias.clone()
    blip.after_step()
    assert float(blip.temperature.detach()) == pytest.approx(clamped)
    torch.testing.assert_close(teacher.heads["text_proj"].bias, before + 0.5)
    assert int(teacher.steps) == 1


def test_a_captioner_has_nothing_to_teach() -> None:
    with pytest.raises(ValueError, match="no vision_proj head"):
        tiny_blip(reads=False).with_teacher(MomentumConfig())
