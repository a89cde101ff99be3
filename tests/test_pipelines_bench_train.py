"""Both sides of the training bench compute the same, what differs is refused, FLOP are counted rightly."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from blip import Blip, export_hf
from pipelines import bench, bench_train
from pipelines.bench import BenchRun
from pipelines.bench_sides import Result
from pipelines.bench_train import BenchTrainConfig, PlainBlip
from pipelines.config import load_config

CONFIG = Path(__file__).resolve().parent.parent / "configs/tiny/bench.yaml"
Sides = tuple[Blip, PlainBlip]


@pytest.fixture(scope="module")
def config() -> BenchTrainConfig:
    return load_config(BenchRun, CONFIG).train


@pytest.fixture(scope="module")
def loaded(config: BenchTrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    folder = tmp_path_factory.mktemp("models")
    ours = bench_train.training_model(config.model, seed=0)
    export_hf(ours, folder)
    retrieval = BlipForImageTextRetrieval.from_pretrained(folder / "retrieval", local_files_only=True)
    captioner = BlipForConditionalGeneration.from_pretrained(folder / "captioner", local_files_only=True)
    return ours, PlainBlip(ours.config, retrieval, captioner)


@pytest.fixture
def sides(loaded: Sides) -> Sides:
    """In training, and free to be spoilt."""
    ours, theirs = copy.deepcopy(loaded)
    return ours.train(), theirs.train()


def run_both(
    sides: Sides, config: BenchTrainConfig, seeds: tuple[int, int] = (0, 0)
) -> list[dict[str, Tensor]]:
    batch = bench_train.draw_batch(config, seed=0)
    batches = batch, bench_train.padded(batch, config.padding)
    return [
        bench_train.losses_and_gradients(model, each, seed)
        for model, each, seed in zip(sides, batches, seeds, strict=True)
    ]


# ---- both sides do the same work -----------------------------------------------------------------


def test_losses_and_gradients_are_those_of_the_plain_loop(sides: Sides, config: BenchTrainConfig) -> None:
    """In float64, where rounding hides nothing; a weight of both stacks has the gradients of both."""
    ours, theirs = sides[0].double(), sides[1].double()
    batch = bench_train.draw_batch(config, seed=0)
    batch = replace(batch, pixels=batch.pixels.double())
    plain = bench_train.padded(batch, config.padding)
    found, expected = (
        bench_train.losses_and_gradients(model, each, 0) for model, each in ((ours, batch), (theirs, plain))
    )
    assert found.keys() == expected.keys() == {"itc", "itm", "lm"}
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=0, atol=1e-7)

    block, heads = ours.med.blocks[1], ours.heads
    read, write = theirs.text_encoder, theirs.text_decoder.bert
    stacks = [stack.encoder.layer[1] for stack in (read, write)]
    weights: list[tuple[nn.Parameter, list[nn.Parameter]]] = [
        (ours.vision.vit.patch_embed.proj.weight, [theirs.vision_model.embeddings.patch_embedding.weight]),
        (ours.med.embeddings.word.weight, [each.embeddings.word_embeddings.weight for each in (read, write)]),
        (block.look.key.weight, [each.crossattention.self.key.weight for each in stacks]),
        (block.mlp.up.weight, [each.intermediate.dense.weight for each in stacks]),
        (block.read.query.weight, [stacks[0].attention.self.query.weight]),
        (block.write.query.weight, [stacks[1].attention.self.query.weight]),
        (heads["itm"].weight, [theirs.itm_head.weight]),
        (heads["text_proj"].weight, [theirs.text_proj.weight]),
        (ours.temperature, [theirs.temp]),
    ]
    for weight, copies in weights:
        gradients = [each.grad for each in (weight, *copies) if each.grad is not None]
        assert len(gradients) == 1 + len(copies) and all(gradient.any() for gradient in gradients)
        torch.testing.assert_close(gradients[0], sum(gradients[1:]), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_check_lets_equal_sides_pass(sides: Sides, config: BenchTrainConfig, seed: int) -> None:
    bench_train.check_losses(*run_both(sides, config, (seed, seed)))
    bench_train.check_gradients(*sides)


def test_nothing_is_dropped(sides: Sides, config: BenchTrainConfig) -> None:
    """Though the model of the config has dropout: the check could not agree, or by chance."""
    assert config.model.text.dropout > 0
    first, second = run_both(sides, config), run_both(sides, config)
    assert first == second


def test_negatives_are_drawn(sides: Sides, config: BenchTrainConfig) -> None:
    """Both sides follow the seed, and the loss of ITM alone."""
    drawn = [run_both(sides, config, (seed, seed)) for seed in range(8)]
    for losses in zip(*drawn, strict=True):
        assert len({float(each["itm"]) for each in losses}) > 1
        assert len({(float(each["itc"]), float(each["lm"])) for each in losses}) == 1


# ---- what is not equal is refused ----------------------------------------------------------------


def refused(sides: Sides, config: BenchTrainConfig, name: str, seeds: tuple[int, int] = (0, 0)) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .* so nothing is timed"):
        bench_train.check_losses(*run_both(sides, config, seeds))


def test_other_negatives_are_refused(sides: Sides, config: BenchTrainConfig) -> None:
    refused(sides, config, "itm", (0, 5))


def test_cls_in_place_of_enc_is_refused(sides: Sides, config: BenchTrainConfig) -> None:
    sides[1].config = replace(sides[1].config, enc_id=bench_train.CLS)
    refused(sides, config, "itm")


def test_other_smoothing_is_refused(sides: Sides, config: BenchTrainConfig) -> None:
    sides[1].text_decoder.label_smoothing = 0.0
    refused(sides, config, "lm")


def test_another_temperature_is_refused(sides: Sides, config: BenchTrainConfig) -> None:
    """By the gradients: the loss of ITC may be near its plateau, log B, whatever the temperature."""
    with torch.no_grad():
        sides[0].temperature.mul_(1.01)
    run_both(sides, config)
    with pytest.raises(ValueError, match="the gradient of temperature here"):
        bench_train.check_gradients(*sides)


def test_a_model_that_does_not_see_is_refused(sides: Sides, config: BenchTrainConfig) -> None:
    """One block of the decoder's copy: the LM must depend on the image, or the check proves little."""
    with torch.no_grad():
        sides[1].text_decoder.bert.encoder.layer[1].crossattention.output.dense.weight.zero_()
    refused(sides, config, "lm")


@pytest.mark.parametrize("wrong", [1.0002, float("nan")])
def test_other_losses_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"itm is .* so nothing is timed"):
        bench_train.check_losses({"itm": torch.tensor(wrong)}, {"itm": torch.tensor(1.0)})


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("name", ["itm_head.bias", "text_encoder.encoder.layer.0.output.dense.weight"])
def test_another_gradient_is_refused(
    sides: Sides, config: BenchTrainConfig, name: str, factor: float
) -> None:
    run_both(sides, config)
    gradient = sides[1].get_parameter(name).grad
    assert gradient is not None
    gradient.mul_(factor)
    with pytest.raises(ValueError, match=r"the gradient of .* differs by"):
        bench_train.check_gradients(*sides)


def test_a_missing_gradient_is_refused(sides: Sides, config: BenchTrainConfig) -> None:
    run_both(sides, config)
    sides[0].heads["itm"].zero_grad()
    with pytest.raises(ValueError, match=r"heads\.itm\.weight has no gradient on one side"):
        bench_train.check_gradients(*sides)


# ---- what both sides see -------------------------------------------------------------------------


def test_captions_vary_and_are_padded_to_the_longest(config: BenchTrainConfig) -> None:
    batch = bench_train.draw_batch(replace(config, batch=64), seed=3)
    lengths = batch.mask.sum(1)
    assert (lengths.min(), lengths.max()) == (8, 20)  # 6 to 18 words, [CLS] and [SEP]
    assert batch.ids.shape == batch.mask.shape == (64, 20)
    assert torch.equal(batch.mask, (torch.arange(20) < lengths[:, None]).long())
    assert torch.equal(batch.ids > 0, batch.mask == 1)
    assert (batch.ids[:, 0] == 101).all() and (batch.ids == 102).sum() == 64
    assert (batch.ids[torch.arange(64), lengths - 1] == 102).all()
    assert len(batch.image_ids.unique()) == 64
    again, other = (bench_train.draw_batch(replace(config, batch=64), seed) for seed in (3, 4))
    assert torch.equal(batch.ids, again.ids) and torch.equal(batch.pixels, again.pixels)
    assert other.ids.shape != batch.ids.shape or not torch.equal(batch.ids, other.ids)


def test_the_plain_loop_pads_to_thirty(config: BenchTrainConfig) -> None:
    batch = bench_train.draw_batch(config, seed=0)
    plain = bench_train.padded(batch, config.padding)
    length = batch.ids.size(1)
    assert length < 30 and plain.ids.shape == plain.mask.shape == (config.batch, 30)
    assert torch.equal(plain.ids[:, :length], batch.ids) and not plain.ids[:, length:].any()
    assert torch.equal(plain.mask[:, :length], batch.mask) and not plain.mask[:, length:].any()


# ---- the arithmetic ------------------------------------------------------------------------------


def test_flops_of_a_linear_layer() -> None:
    """Two for each weight and row forward, and twice that backward, for the input and for the weight."""
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    assert bench_train.flops(lambda: layer(x)) == 2 * 3 * 5 * 7
    assert bench_train.flops(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_flops_of_fused_attention_are_counted() -> None:
    query, memory = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    counted = bench_train.flops(lambda: F.scaled_dot_product_attention(query, memory, memory))
    assert counted == 2 * (2 * 2 * 3 * 4 * 6 * 8)  # queries by keys, weights by values


def test_details_are_per_step_and_of_the_median() -> None:
    result = Result("x", "images", 4, {"a": [2.0, 1.0, 9.0], "b": [4.0]})
    counts = {"a": 6 * 10**12, "b": 8 * 10**12}
    found = bench_train.details(result, counts, tokens=100, peak_tflops=10.0)
    expected = {"s": (2, 4), "GFLOP": (6000, 8000), "tokens/s": (50, 25), "share of peak": (0.3, 0.2)}
    assert found == pytest.approx(
        {f"{side} {name}": values[i] for name, values in expected.items() for i, side in enumerate("ab")}
    )
    assert not any("peak" in name for name in bench_train.details(result, counts, 100, None))


def test_a_peak_is_only_told_where_it_is_known(config: BenchTrainConfig) -> None:
    cpu = torch.device("cpu")
    assert bench_train.peak(config, cpu) is None
    assert bench_train.peak(replace(config, peak_tflops=3.5), cpu) == 3.5


# ---- the part ------------------------------------------------------------------------------------


def test_the_part_ends_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(CONFIG), f"out={tmp_path}", "parts=[train]", "repeats=2"]) == 0
    (line,) = (json.loads(line) for line in (tmp_path / "bench.json").read_text().splitlines())
    assert line["name"] == "train step, cpu fp32" and line["unit"] == "images" and line["amount"] == 4
    assert {side: len(each) for side, each in line["seconds"].items()} == {"here": 2, "transformers": 2}
    more = line["more"]
    assert line["ratio"] == pytest.approx(more["transformers s"] / more["here s"])
    assert more["here GFLOP"] < more["transformers GFLOP"]
    assert line["run"]["train"]["padding"] == 30 and line["machine"]["torch"] == torch.__version__
    assert "images/s" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # the exports are gone


def test_bf16_is_timed_after_a_check_in_fp32(
    sides: Sides, config: BenchTrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[set[torch.dtype]] = []
    check = bench_train.check_losses

    def noted(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        checked.append({loss.dtype for loss in (*ours.values(), *theirs.values())})
        check(ours, theirs)

    monkeypatch.setattr(bench_train, "check_losses", noted)
    result = bench_train.measure_steps(replace(config, precision="bf16"), *sides, seed=0, repeats=1)
    assert result.name == "train step, cpu bf16" and checked == [{torch.float32}]
    assert all(parameter.grad is None for side in sides for parameter in side.parameters())


def test_sides_that_differ_are_not_timed(sides: Sides, config: BenchTrainConfig) -> None:
    with torch.no_grad():
        sides[1].itm_head.bias[0].add_(0.1)
    with pytest.raises(ValueError, match="so nothing is timed"):
        bench_train.measure_steps(config, *sides, seed=0, repeats=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_tells_its_share(sides: Sides, config: BenchTrainConfig, precision: str) -> None:
    wanted = replace(config, device="cuda", precision=precision, peak_tflops=100.0)
    result = bench_train.measure_steps(wanted, *sides, seed=0, repeats=1)
    assert result.name == f"train step, cuda {precision}"
    assert all(0 < result.more[f"{side} share of peak"] < 1 for side in result.seconds)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("train.words=[6, 29]", r"words is \[6, 29\]; .* between 1 and padding - 2 = 28"),
        ("train.words=[9, 8]", r"words is \[9, 8\]"),
        ("train.words=[0, 8]", r"words is \[0, 8\]"),
        ("train.padding=41", "padding is 41; model.text.max_positions allows at most 40"),
        ("train.batch=1", "batch is 1; it must be at least 2"),
        ("train.peak_tflops=0.0", "peak_tflops is 0.0; it must be above 0"),
    ],
)
def test_impossible_runs(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(BenchRun, CONFIG, [wrong])
