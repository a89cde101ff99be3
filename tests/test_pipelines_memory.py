"""The memory plan against what autograd saves in a real step, and what is said where it cannot fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import CLS
from tiny_language import opt_config, opt_tokenizer, t5_config, t5_tokenizer
from torch import Tensor, nn

from blip.layers import Attention
from blip.med import MEDConfig
from blip.model import Batch, Blip, BlipConfig
from blip.momentum import MomentumConfig
from blip.vision import EVA_VIT_G, VisionConfig, VisionEncoder
from blip.vqa import BlipVQA, VqaBatch
from pipelines import memory
from pipelines.activations import Model, Step
from pipelines.data import DataConfig
from pipelines.launch import make_cheaper
from pipelines.memory import check_memory, describe, memory_of_machine, plan_memory
from pipelines.optim import OptimConfig, make_optimizer
from pipelines.parallel import Precision, autocast
from pipelines.trainer import TrainConfig
from qformer import Stage1, Stage2
from qformer.frozen import Frozen
from qformer.language import CausalLM, EncoderDecoderLM
from qformer.qformer import QFormerConfig
from qformer.stage1 import Stage1Config
from qformer.stage2 import Stage2Batch, Stage2Config
from qformer.texts import CausalTokenizer, EncoderDecoderTokenizer

CPU = torch.device("cpu")
BATCH, LENGTH = 4, 14
Sized = tuple[int, int, int, int]  # width, depth, image size, words
SMALL, BASE = (64, 3, 64, 300), (384, 4, 224, 3000)


def blip_config(sized: Sized, **vision: Any) -> BlipConfig:
    width, depth, size, words = sized
    seen = VisionConfig(size, 16, width, depth, heads=width // 32, **vision)
    text = MEDConfig(words, width, depth, width // 32, 4 * width, dropout=0.0)
    return BlipConfig(seen, text, dec_id=words - 2, enc_id=words - 1)


def qformer_config(sized: Sized, image_width: int, **values: Any) -> QFormerConfig:
    width, depth, _, words = sized
    return QFormerConfig(
        words, width, depth, width // 32, 4 * width, dropout=0.0, image_width=image_width, **values
    )


def text_batch(size: int, words: int) -> Batch:
    ids = torch.randint(5, words - 3, (BATCH, LENGTH))
    ids[:, 0] = CLS
    return Batch(torch.randn(BATCH, 3, size, size), ids, torch.ones_like(ids), torch.arange(BATCH))


def blip(sized: Sized) -> tuple[Model, Any]:
    return Blip(blip_config(sized)), text_batch(sized[2], sized[3])


def blip_with_a_stem(sized: Sized) -> tuple[Model, Any]:
    return Blip(blip_config(sized, stem=(16, 24, 32, 48))), text_batch(sized[2], sized[3])


def blip_with_a_teacher(sized: Sized) -> tuple[Model, Any]:
    return Blip(blip_config(sized)).with_teacher(MomentumConfig(queue_size=4000)), text_batch(
        sized[2], sized[3]
    )


def captioner(sized: Sized) -> tuple[Model, Any]:
    config = blip_config(sized)
    return Blip(replace(config, text=replace(config.text, reads=False))), text_batch(sized[2], sized[3])


def vqa(sized: Sized) -> tuple[Model, Any]:
    batch = text_batch(sized[2], sized[3])
    texts = batch.ids, batch.mask
    return BlipVQA(blip_config(sized)), VqaBatch(
        batch.pixels, *texts, *texts, torch.ones(BATCH), torch.arange(BATCH)
    )


def stage1(sized: Sized, trains_vision: bool = False) -> tuple[Model, Any]:
    vision = VisionConfig(sized[2], 16, 96, 2, heads=3, final_norm=False)
    qformer = qformer_config(sized, image_width=96)
    model = Stage1(Stage1Config(vision, qformer, dec_id=sized[3] - 1, trains_vision=trains_vision))
    return model, text_batch(sized[2], sized[3])


def stage1_with_its_encoder(sized: Sized) -> tuple[Model, Any]:
    return stage1(sized, trains_vision=True)


def stage2(sized: Sized, language: CausalLM | EncoderDecoderLM) -> tuple[Model, Any]:
    vision = VisionConfig(sized[2], 16, 96, 2, heads=3, final_norm=False)
    config = Stage2Config(vision, qformer_config(sized, image_width=96, text=False))
    texts = language.tokenizer(["a red bird on the left"] * BATCH, ["a cat the dog of big"] * BATCH)
    model = Stage2(config, Frozen(VisionEncoder(vision)), language)
    return model, Stage2Batch(torch.randn(BATCH, 3, sized[2], sized[2]), texts)


def stage2_opt(sized: Sized) -> tuple[Model, Any]:
    width, depth, _, words = sized
    config = opt_config()
    config.update({"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width})
    config.update({"num_hidden_layers": depth, "vocab_size": words})
    return stage2(sized, CausalLM(transformers.OPTForCausalLM(config), CausalTokenizer(opt_tokenizer())))


def stage2_t5(sized: Sized, act: str = "gelu_new") -> tuple[Model, Any]:
    width, depth, _, words = sized
    config = t5_config(act)
    config.update({"d_model": width, "d_kv": width // 4, "d_ff": 3 * width, "vocab_size": words})
    config.update({"num_layers": depth, "num_decoder_layers": depth, "dense_act_fn": act})
    lm = transformers.T5ForConditionalGeneration(config)
    return stage2(sized, EncoderDecoderLM(lm, EncoderDecoderTokenizer(t5_tokenizer())))


def step_of(batch: Any, precision: Precision = "fp32", blocks: int = 0) -> Step:
    if isinstance(batch, Stage2Batch):
        return Step(BATCH, batch.texts.ids.size(1), 0, precision == "bf16", blocks)
    return Step(BATCH, LENGTH, BATCH * (LENGTH - 1), precision == "bf16", blocks)


def saved_by(model: Model, batch: Any, precision: Precision) -> int:
    """Bytes that are there for the backward pass alone: what autograd saves, each storage once, without the
    weights; and what attention looks at, which a checkpointed block holds without saving it."""
    held = [module.module for module in model.modules() if isinstance(module, Frozen)]
    tensors = [tensor for module in (model, *held) for tensor in (*module.parameters(), *module.buffers())]
    known, seen = {tensor.untyped_storage().data_ptr() for tensor in tensors}, {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # or another could come to lie where it was
        return tensor

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        for tensor in given[1]:
            note(tensor)

    for name, module in model.named_modules():
        if isinstance(module, Attention) and name.endswith("look"):
            module.register_forward_pre_hook(look)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(CPU, precision):
        model(batch)
    return sum(seen.values())


Build = Callable[[Sized], tuple[Model, Any]]
MODELS: tuple[Build, ...] = (
    *(blip, blip_with_a_stem, blip_with_a_teacher, captioner, vqa),
    *(stage1, stage1_with_its_encoder, stage2_opt, stage2_t5),
)


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(build: Build, precision: Precision) -> None:
    estimated_well(build, SMALL, precision)


@pytest.mark.parametrize("build", [blip, stage1, stage2_opt, stage2_t5])
def test_activations_of_a_larger_model_are_what_autograd_saves(build: Build) -> None:
    estimated_well(build, BASE, "bf16")


@pytest.mark.parametrize("build", [blip, stage1, stage2_opt, stage2_t5])
@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_activations_of_checkpointed_blocks_are_what_autograd_saves(build: Build, blocks: int) -> None:
    estimated_well(build, SMALL, "fp32", blocks)


def estimated_well(build: Build, sized: Sized, precision: Precision, blocks: int = 0) -> None:
    torch.manual_seed(0)
    model, batch = build(sized)
    model.train()
    for frozen in [module for module in model.modules() if isinstance(module, Frozen)]:
        frozen.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    config = TrainConfig(steps=1, precision=precision, checkpoint_blocks=blocks)
    plan = plan_memory(model, config, step_of(batch, precision, blocks))
    make_cheaper(model, config)
    saved = saved_by(model, batch, precision)
    estimated = plan.copies + sum(plan.activations.values())
    assert 0.8 < estimated / saved < 1.25, f"estimated {estimated}, saved {saved}, {plan.activations}"


def test_weights_gradients_and_the_state_of_the_optimizer_are_counted() -> None:
    """Against the tensors that there are after a step."""
    model, batch = blip_with_a_teacher(SMALL)
    assert isinstance(model, Blip)
    plan = plan_memory(model, TrainConfig(steps=1), step_of(batch), CPU)
    optimizer = make_optimizer(model, OptimConfig())
    sum(model(batch).values()).backward()
    gradients = sum(weight.grad.nbytes for weight in model.parameters() if weight.grad is not None)
    optimizer.step()
    state = sum(v.nbytes for held in optimizer.state.values() for v in held.values() if v.ndim)
    assert abs(plan.gradients - gradients) <= 4 and abs(plan.optimizer - state) <= 8
    tensors = (*model.parameters(), *model.buffers())
    assert plan.weights == sum(tensor.nbytes for tensor in tensors) - model.temperature.nbytes
    assert plan.there == plan.weights


def test_what_is_sharded_is_divided() -> None:
    model, batch = stage2_opt(SMALL)
    one, spread = TrainConfig(steps=1), TrainConfig(steps=1, optimizer_sharding="zero1", shard_frozen=True)
    plain, shared = (plan_memory(model, config, step_of(batch), CPU, 8, 4) for config in (one, spread))
    assert shared.optimizer == plain.optimizer / 8 and shared.gradients == plain.gradients
    assert isinstance(model, Stage2) and isinstance(model.vision, Frozen)
    blocks = [*model.vision.module.vit.blocks, *model.language.blocks]
    frozen = sum(weight.nbytes for block in blocks for weight in block.parameters())
    assert plain.weights - shared.weights == pytest.approx(frozen * 3 / 4)


def test_the_model_of_the_paper_is_planned_without_a_byte_of_it() -> None:
    """BLIP-2 with ViT-g and OPT-2.7B. Its section 3.1 has 188M weights in the Q-Former of stage 1."""
    opt = transformers.OPTConfig(
        hidden_size=2560,
        ffn_dim=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        word_embed_proj_dim=2560,
    )
    with torch.device("meta"):
        stage1 = Stage1(Stage1Config())
        lm = CausalLM(transformers.OPTForCausalLM(opt).to(torch.bfloat16), CausalTokenizer(opt_tokenizer()))
        stage2 = Stage2(Stage2Config(), Frozen(VisionEncoder(EVA_VIT_G)), lm)
    assert isinstance(stage1.vision, Frozen) and isinstance(stage2.vision, Frozen)
    stage1.vision.to(torch.bfloat16)
    stage2.vision.to(torch.bfloat16)
    config = TrainConfig(steps=1, precision="bf16", accumulate=16)
    first = plan_memory(stage1, config, Step(105, 32, 105 * 31, True))
    second = plan_memory(stage2, config, Step(120, 32, 0, True))
    print("\n".join([*describe(first, CPU, None), *describe(second, CPU, None)]))
    parts = {part.name: part for part in (*first.parts, *second.parts)}
    assert parts["vision"].frozen / 1e6 == pytest.approx(986, abs=1)
    assert parts["language"].frozen / 1e9 == pytest.approx(2.65, abs=0.02)
    trained = sum(part.trained for part in first.parts)
    assert trained / 1e6 == pytest.approx(188, abs=2)
    assert first.gradients == pytest.approx(4 * trained, rel=1e-3) and first.there == 0
    # BLIP-2 trained with these on 16 A100 of 40 GB, its Q-Former in fp16.
    assert 10e9 < first.total < 40e9 and 10e9 < second.total < 40e9


DATA = DataConfig(("unused",), batch_size=64, max_length=LENGTH)


def room(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(memory, "room_of", lambda _: size)


def test_what_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stage1(SMALL)
    config = TrainConfig(steps=1, accumulate=3)

    def total(images: int, blocks: int = 0) -> float:
        cheaper = replace(config, checkpoint_blocks=blocks)
        return plan_memory(model, cheaper, memory.step_of(DATA, cheaper, images, blocks), CPU).total

    room(monkeypatch, total(40))
    told = (
        r"a step of 64 images needs about 0\.\d\d GB \(weights 0\.\d\d, .*activations 0\.\d\d, .*cpu has "
        r"0\.\d\d GB for it; set data\.batch_size to 40 and train\.accumulate to 6; or raise train\.check"
    )
    with pytest.raises(ValueError, match=told):
        check_memory(model, DATA, config, CPU)
    room(monkeypatch, total(1, 9) / 2)
    with pytest.raises(ValueError, match=r"with data\.batch_size 1 .* take a larger device, or several with"):
        check_memory(model, DATA, config, CPU)
    room(monkeypatch, total(64) * 0.95)
    assert check_memory(model, DATA, config, CPU)[-1].endswith("which may be too little")
    room(monkeypatch, total(64) * 1.01)
    lines = check_memory(model, DATA, config, CPU)
    assert lines[0].startswith("memory of a step of 64 images on cpu, in GB")
    assert [line for line in lines if "weights: vision" in line and line.endswith("M frozen")]
    assert [line for line in lines if "together" in line and "too little" not in line]


def test_the_machine_is_as_large_as_its_container(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    cgroup.mkdir()
    assert memory_of_machine(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree:         8000000 kB\n")
    assert memory_of_machine(meminfo, cgroup) == 16_000_000 * 1024
    (cgroup / "memory.max").write_text("max\n")
    assert memory_of_machine(meminfo, cgroup) == 16_000_000 * 1024
    (cgroup / "memory.max").write_text("4294967296\n")
    assert memory_of_machine(meminfo, cgroup) == 4 << 30
    found = memory.room_of(CPU)
    assert found is not None and found > 1e8
