"""Fine-tuning of BLIP-2 by its tiny configs, the rates of its ViT by depth, and the paper's recipes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from image_files import put_json
from test_pipelines_parallel import in_processes, part
from test_qformer_finetune import trained_stage1
from test_qformer_stage1 import likeliest
from tiny import tiny_batch, tiny_blip
from tiny_language import opt_folder
from tiny_qformer import CONFIG, save_tower, tiny_stage1
from torch import nn

from blip.checkpoint import load_state
from blip.distributed import rank
from blip.image import decode, image_transform
from blip.model import Batch
from blip.tokenizer import Tokenizer
from blip.vision import EVA_VIT_G, VisionConfig, VisionEncoder
from pipelines import (
    eval_captions,
    eval_retrieval,
    eval_vqa,
    train_stage1,
    train_stage2,
    train_stage2_vqa,
)
from pipelines.config import ConfigError, load_config
from pipelines.optim import OptimConfig, lr_at, make_optimizer, parameter_groups, vision_scales
from pipelines.parallel import data_parallel, mean_over_ranks, optimizer_class
from pipelines.testset import read_questions
from pipelines.train_stage1 import Stage1Run
from pipelines.train_stage2 import Stage2Run
from pipelines.train_stage2_vqa import Stage2VqaRun
from pipelines.trainer import TrainConfig, train
from pipelines.world import WorldConfig, write_world
from pipelines.world_questions import QUESTION_VOCABULARY, QuestionsRun, write_questions
from qformer import Stage1, load_stage1, load_stage2
from qformer.language import load_language
from qformer.stage2 import SHORT_QUESTION, start_stage2

ROOT = Path(__file__).resolve().parent.parent
TRAINED = replace(CONFIG, trains_vision=True)

# ---- rates by depth ------------------------------------------------------------------------------

HALVES = {  # layer_decay 0.5 in a ViT of two blocks
    "vit.cls_token": 0.125,
    "vit.pos_embed": 0.125,
    "vit.patch_embed": 0.125,
    "vit.norm_pre": 0.125,
    "vit.blocks.0": 0.25,
    "vit.blocks.1": 0.5,
    "vit.norm": 0.5,
}


def wanted_scale(name: str) -> float:
    """Of a parameter of a whole model, by the list above."""
    _, _, inside = name.partition("vision.")
    found = [scale for start, scale in HALVES.items() if f"{inside}.".startswith(f"{start}.")]
    assert len(found) == (1 if name.startswith("vision.") else 0), name
    return found[0] if found else 1.0


@pytest.mark.parametrize("kind", ["blip", "stage1", "clip"])
def test_rates_are_those_of_the_list(kind: str) -> None:
    """Of a BLIP, whose ViT ends with a norm; of a stage 1; of a ViT that begins with one, as CLIP's."""
    model: nn.Module
    if kind == "blip":
        model = tiny_blip()
    elif kind == "stage1":
        model = Stage1(TRAINED)
    else:
        small = VisionConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3, pre_norm=True)
        model = nn.ModuleDict({"vision": VisionEncoder(small), "other": nn.Linear(2, 2)})
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5, weight_decay=0.1))
    places = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(places) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = places[id(parameter)]
        assert group["scale"] == wanted_scale(name), name
        assert group["weight_decay"] == (0.0 if parameter.ndim < 2 or name.endswith("bias") else 0.1)


def test_rates_of_vit_g() -> None:
    """LAVIS: lr_scale ** (39 + 1 - layer), of the patches layer 0, of block i layer i + 1."""
    with torch.device("meta"):
        vision = VisionEncoder(EVA_VIT_G)
    scales = vision_scales(vision, 0.95)
    found = {name: scales[parameter] for name, parameter in vision.named_parameters()}
    assert found["vit.patch_embed.proj.weight"] == pytest.approx(0.1285, abs=1e-4)  # 0.95 ** 40
    assert found["vit.blocks.0.mlp.fc1.weight"] == pytest.approx(0.1353, abs=1e-4)  # 0.95 ** 39
    assert found["vit.blocks.9.attn.qkv.bias"] == pytest.approx(0.95**30)
    assert found["vit.blocks.10.norm1.weight"] == pytest.approx(0.95**29)
    assert found["vit.blocks.38.mlp.fc1.weight"] == 0.95


def test_a_decay_without_a_vit_to_train_is_refused() -> None:
    """In LAVIS it is in the config and does nothing."""
    with pytest.raises(ValueError, match=r"layer_decay is 0\.9, but the model trains no ViT"):
        parameter_groups(Stage1(CONFIG), OptimConfig(layer_decay=0.9))
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got 0\.0"):
        OptimConfig(layer_decay=0.0)
    assert [group["scale"] for group in parameter_groups(Stage1(TRAINED), OptimConfig())] == [1.0, 1.0]


def same_batch() -> Iterator[Batch]:
    while True:
        yield tiny_batch([1, 2, 3, 4])


def test_training_steps_as_far_as_the_list_says(tmp_path: Path) -> None:
    """The first step of AdamW moves a weight by the rate, whatever its gradient; the third is a cosine's."""
    torch.manual_seed(0)
    model = Stage1(TRAINED)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optim = OptimConfig(lr=1e-3, warmup_lr=4e-4, warmup_steps=2, weight_decay=0.0, layer_decay=0.5)
    optimizer = make_optimizer(model, optim)
    config = TrainConfig(steps=1, device="cpu")
    train(model, same_batch(), optimizer, optim, config, None, tmp_path, 0, steps_per_epoch=4)
    for name, weight in model.named_parameters():
        if "key.bias" not in name and "qkv.bias" not in name:  # some of their gradients are all but zero
            far = (weight.detach() - before[name]).abs().max().item()
            assert far == pytest.approx(4e-4 * wanted_scale(name), rel=0.02), name
    config = TrainConfig(steps=3, device="cpu")
    train(model, same_batch(), optimizer, optim, config, None, tmp_path, 1, steps_per_epoch=4)
    for group in optimizer.param_groups:
        assert group["lr"] == lr_at(optim, 2, 3, 4) * group["scale"]
    assert {group["scale"] for group in optimizer.param_groups} == {0.125, 0.25, 0.5, 1.0}


def a_step(rows: slice, sharding: Literal["none", "zero1"]) -> dict[str, torch.Tensor]:
    """Losses, gradients and weights of a step of a stage 1 that trains its encoder, in float64."""
    drawn, torch.multinomial = torch.multinomial, likeliest
    model = trained_stage1().double()  # in eval mode, without dropout
    optim = OptimConfig(lr=1e-3, layer_decay=0.5)
    optimizer = make_optimizer(model, optim, optimizer_class(sharding))
    parallel = data_parallel(model)
    for group in optimizer.param_groups:
        group["lr"] = lr_at(optim, 0, 1, 1) * group["scale"]
    batch = tiny_batch((1, 2, 1, 3, 2), prompt_length=1, seed=3)
    losses = parallel(part(replace(batch, pixels=batch.pixels.double()), rows))
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    torch.multinomial = drawn
    found = {name: mean_over_ranks(loss.detach()[None]) for name, loss in losses.items()}
    found |= {f"gradient {name}": w.grad for name, w in model.named_parameters() if w.grad is not None}
    return found | {name: w.detach() for name, w in model.named_parameters()}


def step_of_this_rank() -> dict[str, torch.Tensor]:
    return a_step((slice(0, 3), slice(3, 5))[rank()], "zero1")  # rank 1 has fewer rows


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """Wrong pairs have images of the other process, and their gradient goes back there; sharded rates too."""
    expected = a_step(slice(0, 5), "none")
    for found in in_processes(step_of_this_rank, tmp_path):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=1e-7, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---- runs ----------------------------------------------------------------------------------------

WORLD = WorldConfig(
    seed=7, noisy_rows=0, clean_rows=12, test_rows=5, shard_rows=6, captions_per_image=2, side=48
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with questions, an OPT, and both stages with random weights beside a ViT of their own."""
    found = tmp_path_factory.mktemp("finetune")
    write_world(WORLD, found / "world")
    write_questions(QuestionsRun(str(found / "world"), str(found / "asked"), questions_per_image=4))
    words = Tokenizer(found / "asked/vocabulary")
    assert len(words) == len(QUESTION_VOCABULARY) + 7
    qformer = replace(CONFIG.qformer, vocab_size=words.dec + 1)
    config = replace(CONFIG, qformer=qformer, dec_id=words.dec, vision_source=str(found / "vit.pth"))
    first = tiny_stage1(config=config, tokenizer=words)
    save_tower(first, found / "vit.pth")
    first.save_pretrained(found / "stage1")
    lm = opt_folder(found / "opt")
    torch.manual_seed(0)
    second = start_stage2(first, load_language(lm, torch.float32), str(lm))
    second.projection.weight.data.mul_(20)  # or what is written hardly depends on the image
    second.save_pretrained(found / "stage2")
    return found


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(entry: Any, config: str, out: Path, *settings: str) -> list[dict[str, float]]:
    """A tiny config with what it reads and writes moved; what was logged."""
    small = ("data.batch_size=6", "train.log_every=1", "optim.warmup_steps=0", "optim.schedule=constant")
    assert entry.main([str(ROOT / f"configs/tiny/{config}.yaml"), f"out={out}", *small, *settings]) == 0
    return metrics(out)


def retrieval(folder: Path, out: Path, *settings: str) -> list[dict[str, float]]:
    places = (f"start.weights={folder}/stage1", f"data.shards=[{folder}/world/clean]")
    return run(train_stage1, "stage1_retrieval", out, *places, *settings)


def captions(folder: Path, out: Path, *settings: str) -> list[dict[str, float]]:
    start = (f"start.weights={folder}/stage2", f"language={folder}/opt")
    shards = f"data.shards=[{folder}/world/clean]"
    return run(train_stage2, "stage2_captions", out, *start, shards, *settings)


def vqa(folder: Path, out: Path, *settings: str) -> list[dict[str, float]]:
    places = (f"start.weights={folder}/stage2", f"language={folder}/opt", f"stage1.weights={folder}/stage1")
    shards = f"data.shards=[{folder}/asked/train]"
    return run(train_stage2_vqa, "stage2_vqa", out, *places, shards, *settings)


def evaluate(entry: Any, folder: Path, out: Path, model: Path, shards: str, **more: object) -> dict[str, Any]:
    """What was measured on the test images."""
    tree = {"out": str(out), "model": str(model), "shards": [str(folder / shards)], "device": "cpu"}
    assert entry.main([put_json(out.with_suffix(".yaml"), tree | {"batch_size": 4} | more)]) == 0
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def test_retrieval_is_fine_tuned_and_evaluated(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = retrieval(folder, out, "train.steps=4", "start.image_size=64")
    assert all({"itc", "itm", "itg"} <= line.keys() for line in lines) and len(lines) == 4
    before = load_stage1(folder / "stage1", trains_vision=True, image_size=64).state_dict()
    model = load_stage1(out / "model")
    assert model.config.trains_vision and model.config.vision.image_size == 64
    inside = {name for name in before if name.startswith("vision.vit.")}
    assert len(inside) > 20 and inside <= moved(before, model.state_dict())
    found = evaluate(
        eval_retrieval, folder, tmp_path / "eval", out / "model", "world/test", protocol={"k": 3}
    )
    assert found["protocol"]["image_size"] == 64 and found["images"] == 5
    assert {"tr@1", "ir@1"} <= found["itm"].keys()


def test_captions_are_fine_tuned_and_evaluated(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("train.steps=6", "optim.lr=3e-3", "train.checkpoint_blocks=1", "data.batch_size=12")
    lines = captions(folder, out, *settings)
    assert lines[-1]["lm"] < lines[0]["lm"] and all("grounding_gap" in line for line in lines)
    before = load_stage2(folder / "stage2", trains_vision=True, dtype=torch.float32).state_dict()
    after = load_stage2(out / "model", dtype=torch.float32).state_dict()
    inside = {name for name in before if name.startswith(("vision.vit.", "projection."))}
    assert inside <= moved(before, after) and "language.lm.digest" not in moved(before, after)
    protocol = {"prompt": "a picture of", "decoding": {"beams": 2, "min_length": 2, "max_length": 8}}
    found = evaluate(eval_captions, folder, tmp_path / "eval", out / "model", "world/test", protocol=protocol)
    assert found["images"] == 5 and "cider_d" in found["metrics"]


def test_vqa_is_fine_tuned_resumed_and_evaluated(folder: Path, tmp_path: Path) -> None:
    """The Q-Former reads the question; a stopped run goes on as if it had not been."""
    out = tmp_path / "whole"
    lines = vqa(folder, out, "train.steps=6", "optim.lr=3e-3", "data.batch_size=48")
    assert lines[-1]["lm"] < lines[0]["lm"] - 0.3
    vqa(folder, tmp_path / "parts", "train.steps=3", "optim.lr=3e-3", "data.batch_size=48")
    parts = vqa(folder, tmp_path / "parts", "train.steps=6", "optim.lr=3e-3", "data.batch_size=48")
    assert [line["lm"] for line in parts] == [line["lm"] for line in lines]
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    kept = load_state(out / "state.pt")["optimizer"]["param_groups"]
    rates = sorted({group["lr"] for group in kept})
    assert rates == pytest.approx([3e-3 * 0.7**3, 3e-3 * 0.7**2, 3e-3 * 0.7, 3e-3])
    model = load_stage2(out / "model", dtype=torch.float32)
    assert model.config.reads_question and model.config.trains_vision and model.tokenizer is not None
    first = load_stage1(folder / "stage1").state_dict()
    reads = {"qformer.words.weight", "qformer.positions.weight", "qformer.blocks.0.text_mlp.up.weight"}
    assert reads <= moved(first, model.state_dict())
    check_answers(folder, tmp_path / "eval", out / "model", {"beams": 2, "min_length": 1, "max_length": 6})


def check_answers(folder: Path, out: Path, model: Path, decoding: dict[str, int] | None, **more: str) -> None:
    """Every answer is that to the question alone; how it was asked and decoded is told beside the result."""
    protocol: dict[str, Any] = more | ({"decoding": decoding} if decoding else {})
    found = evaluate(eval_vqa, folder, out, model, "asked/test", protocol=protocol)
    answers = {row["question_id"]: row["answer"] for row in json.loads((out / "answers.json").read_text())}
    stage2, alone = load_stage2(model, dtype=torch.float32), {}
    settings = (eval_vqa.Decoding(**decoding),) if decoding else ()
    for image in read_questions([str(folder / "asked/test")]):
        pixels = image_transform(decode(image.data), 32)[None]
        for question in image.questions:
            (text,) = stage2.answer(pixels, [question.question], *settings, **more)  # type: ignore[arg-type]
            alone[question.id] = text
    assert answers == alone and len(alone) == 20 and len(set(alone.values())) > 1
    assert found["questions"] == 20 and 0 <= found["metrics"]["accuracy"] <= 1
    said = found["protocol"]["decoding"]
    assert said["beams"] == (decoding["beams"] if decoding else 5)  # BLIP-2's
    assert said["length_penalty"] == (1.0 if decoding else -1.0)
    assert found["protocol"]["template"] == more.get("template", "Question: {} Answer:")


def test_a_stage2_that_only_looks_answers_by_its_prompt(folder: Path, tmp_path: Path) -> None:
    check_answers(folder, tmp_path / "plain", folder / "stage2", None)
    check_answers(folder, tmp_path / "short", folder / "stage2", None, template=SHORT_QUESTION)


def test_what_blip2_cannot_do_is_said(folder: Path, tmp_path: Path) -> None:
    candidates = put_json(tmp_path / "list.json", ["yes", "no"])
    with pytest.raises(ValueError, match=r"writes its answers; set protocol\.candidates to null"):
        evaluate(
            eval_vqa,
            folder,
            tmp_path / "x",
            folder / "stage2",
            "asked/test",
            protocol={"candidates": candidates},
        )
    for template in ("Question:", "{} {}"):
        with pytest.raises(ConfigError, match=r"template is .*it must hold \{\} once"):
            protocol = {"template": template}
            evaluate(eval_vqa, folder, tmp_path / "x", folder / "stage2", "asked/test", protocol=protocol)
        with pytest.raises(ConfigError, match=r"template is .*it must hold \{\} once"):
            vqa(folder, tmp_path / "out", f"template='{template}'")
    with pytest.raises(ConfigError, match="or start, a stage 2 to go on from"):
        captions(folder, tmp_path / "out", f"stage1.weights={folder}/stage1")
    with pytest.raises(ConfigError, match="dense_act_fn is what the weights of start say"):
        captions(folder, tmp_path / "out", "dense_act_fn=gelu")
    with pytest.raises(ValueError, match=r"layer_decay is 0\.7, but the model trains no ViT"):
        captions(folder, tmp_path / "out", "start.trains_vision=false")


def test_a_stage2_is_fine_tuned_with_its_encoder_frozen(folder: Path, tmp_path: Path) -> None:
    """In bf16, what is frozen in bf16 as well; an encoder that is trained keeps its fp32 weights."""
    frozen = ("start.trains_vision=false", "optim.layer_decay=1.0")
    half = ("train.steps=1", "train.precision=bf16")
    assert len(captions(folder, tmp_path / "frozen", *half, *frozen)) == 1
    assert not load_stage2(tmp_path / "frozen/model").config.trains_vision
    assert len(vqa(folder, tmp_path / "trained", *half)) == 1
    weights = load_stage2(tmp_path / "trained/model").vision.state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.float32}


# ---- the recipes ---------------------------------------------------------------------------------

CAPTIONS = 566_747  # of COCO's Karpathy train split
ASKED = 443_757 + 214_354 + 1_445_322  # VQAv2's train and val, Visual Genome
PAPER: list[tuple[type[Any], str, int, int, int, float]] = [  # rows, batch, pixels, decay of the rate
    (Stage2Run, "stage2_captions_coco", CAPTIONS, 256, 364, 1.0),
    (Stage1Run, "stage1_retrieval_coco", CAPTIONS, 224, 364, 0.95),
    (Stage2VqaRun, "stage2_vqa", ASKED, 128, 490, 0.95),
]


@pytest.mark.parametrize(("kind", "name", "rows", "batch", "size", "decay"), PAPER)
def test_the_recipe_is_that_of_the_paper(
    kind: type[Any], name: str, rows: int, batch: int, size: int, decay: float
) -> None:
    """BLIP-2's tables of hyper-parameters: 5 epochs, rate 1e-5 after 1,000 steps; 16 processes."""
    recipe = load_config(kind, ROOT / f"configs/{name}.yaml")
    assert recipe.data.batch_size * 16 == batch
    assert recipe.train.accumulate == (1 if name.startswith("stage1") else 16)
    assert abs(recipe.train.steps - 5 * rows / batch) < 1
    optim = recipe.optim
    assert (optim.lr, optim.min_lr, optim.warmup_steps, optim.weight_decay) == (1e-5, 0.0, 1000, 0.05)
    assert (optim.betas, optim.schedule, optim.layer_decay) == ((0.9, 0.999), "cosine", decay)
    assert (recipe.start.image_size, recipe.start.trains_vision) == (size, True)
