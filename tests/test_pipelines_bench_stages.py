"""Both sides of the bench of BLIP-2's stages compute the same, what differs is refused, days add up."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines import bench, bench_stages
from pipelines.bench import BenchRun
from pipelines.bench_stages import OPT, STAGE1, STAGES, T5, BenchStagesConfig, Shown, Sides
from pipelines.bench_stages_plain import PlainStage1, plain_name
from pipelines.bench_train import CLS, losses_and_gradients
from pipelines.config import load_config
from qformer.stage1 import Stage1Config

ROOT = Path(__file__).resolve().parent.parent
CONFIG, REAL = ROOT / "configs/tiny/bench.yaml", ROOT / "configs/bench_stages_gpu.yaml"
Loaded = dict[str, tuple[Sides, Shown]]


@pytest.fixture(scope="module")
def config() -> BenchStagesConfig:
    return load_config(BenchRun, CONFIG).stages


@pytest.fixture(scope="module")
def loaded(config: BenchStagesConfig, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    found = {}
    for name in STAGES:
        sides = bench_stages.make_sides(config, name, tmp_path_factory.mktemp("sides"), seed=0)
        found[name] = sides, bench_stages.draw(config, sides, seed=0)
    return found


@pytest.fixture
def stage1(loaded: Loaded) -> tuple[Sides, Shown]:
    """Free to be spoilt."""
    return copy.deepcopy(loaded[STAGE1])


def double(sides: Sides, shown: Shown) -> tuple[Shown, Sides]:
    """In float64, where rounding hides nothing."""
    sides = copy.deepcopy(sides)
    for model in (sides.ours, sides.theirs, *sides.frozen):
        model.double()
    exact = (replace(each, pixels=each.pixels.double()) for each in (shown.ours, shown.theirs))
    return Shown(*exact, shown.tokens), sides


# ---- both sides do the same work -----------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_losses_and_gradients_are_those_of_the_plain_loop(loaded: Loaded, name: str) -> None:
    shown, sides = double(*loaded[name])
    found = losses_and_gradients(sides.ours, shown.ours, 0)
    expected = losses_and_gradients(sides.theirs, shown.theirs, 0)
    assert found.keys() == expected.keys() == ({"itc", "itm", "itg"} if name == STAGE1 else {"lm"})
    for loss in expected:
        assert float(found[loss]) == pytest.approx(float(expected[loss]), abs=1e-6)  # some are float32 there
    seen = 0
    for part, weight in sides.ours.named_parameters():
        theirs = sides.theirs.get_parameter(plain_name(part)).grad
        assert weight.grad is not None and theirs is not None
        torch.testing.assert_close(weight.grad, theirs.view_as(weight), rtol=1e-4, atol=1e-8)
        seen += bool(weight.grad.any())
    trained = [part for part, weight in sides.theirs.named_parameters() if weight.requires_grad]
    assert seen >= 0.95 * len(trained)  # softmax does not see the bias of a key


@pytest.mark.parametrize("name", STAGES)
def test_equal_sides_pass(loaded: Loaded, name: str) -> None:
    sides, shown = loaded[name]
    bench_stages.compare(sides, shown, seed=3)
    assert all(weight.grad is None for model in (sides.ours, sides.theirs) for weight in model.parameters())


def test_the_plain_loop_has_texts_of_32_tokens(loaded: Loaded, config: BenchStagesConfig) -> None:
    shown = loaded[STAGE1][1]
    assert shown.theirs.ids.shape == (config.batch, 32) and shown.ours.ids.size(1) < 32
    words = int(shown.ours.mask.sum())
    assert shown.tokens == config.batch * 17 + words == config.batch * 17 + int(shown.theirs.mask.sum())


def test_a_t5_reads_one_half_and_writes_the_other(loaded: Loaded) -> None:
    whole, halves = loaded[OPT][1].ours.texts, loaded[T5][1].ours.texts
    assert torch.equal(torch.cat([halves.ids, halves.labels.clamp(min=0)], 1), whole.ids)
    assert torch.equal(whole.labels != -100, whole.mask.bool()) and int(halves.mask.sum()) > 0


# ---- what is not equal is refused ----------------------------------------------------------------


def refuses(sides: Sides, shown: Shown, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.* so nothing is timed"):
        bench_stages.compare(sides, shown, seed=0)


def test_other_images_are_refused(loaded: Loaded) -> None:
    for sides, shown in loaded.values():
        other = replace(shown.theirs, pixels=shown.theirs.pixels.roll(1, 0))
        refuses(sides, replace(shown, theirs=other), "")


def test_another_first_word_is_refused(stage1: tuple[Sides, Shown]) -> None:
    sides, shown = stage1
    sides.theirs.config = replace(sides.theirs.config, dec_id=CLS)
    refuses(sides, shown, "itg is")


@pytest.mark.parametrize(("loss", "axes"), [("itm", 2), ("itg", 4)])
def test_a_mask_that_shows_too_much_is_refused(
    stage1: tuple[Sides, Shown], monkeypatch: pytest.MonkeyPatch, loss: str, axes: int
) -> None:
    """Padding to ITM, the words to come to ITG."""
    look = PlainStage1.look

    def see(
        self: PlainStage1, image: Tensor, ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return look(
            self, image, ids, torch.ones_like(mask) if mask is not None and mask.ndim == axes else mask
        )

    monkeypatch.setattr(PlainStage1, "look", see)
    refuses(*stage1, f"{loss} is")


def test_another_gradient_is_refused(stage1: tuple[Sides, Shown]) -> None:
    sides, shown = stage1
    weight = sides.theirs.get_parameter(plain_name("qformer.queries"))
    weight.register_hook(lambda gradient: 1.01 * gradient)
    refuses(sides, shown, r"gradients of qformer\.queries differ by")


def test_a_missing_gradient_is_refused(stage1: tuple[Sides, Shown]) -> None:
    sides, shown = stage1
    sides.theirs.get_parameter(plain_name("ln_vision.bias")).requires_grad_(False)
    refuses(sides, shown, r"ln_vision\.bias has a gradient on one side")


# ---- the part ------------------------------------------------------------------------------------


def test_the_part_ends_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(CONFIG), f"out={tmp_path}", "parts=[stages]", "repeats=2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "bench.json").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"{name}, cpu fp32" for name in STAGES]
    for line in lines:
        more = line["more"]
        assert {side: len(each) for side, each in line["seconds"].items()} == {"here": 2, "transformers": 2}
        assert line["ratio"] == pytest.approx(more["transformers s"] / more["here s"])
        assert more["tokens known GFLOP"] < more["here GFLOP"] <= more["transformers GFLOP"]
        assert more["tokens known images/s"] == pytest.approx(4 / more["tokens known s"])
        assert not any(name.endswith(("days", "GB", "peak")) for name in more)
    stage1, opt, _ = (line["more"] for line in lines)
    assert stage1["transformers GFLOP"] > 1.5 * stage1["here GFLOP"]
    assert opt["transformers GFLOP"] > opt["here GFLOP"]  # of queries, too, it computes words
    assert "transformers" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # the exports are gone


@pytest.mark.parametrize("name", [STAGE1, OPT])
def test_bf16_is_compared_in_fp32(config: BenchStagesConfig, tmp_path: Path, name: str) -> None:
    half = replace(config, precision="bf16")
    sides = bench_stages.make_sides(half, name, tmp_path, seed=0)
    shown = bench_stages.draw(half, sides, seed=0)
    bench_stages.compare(sides, shown, seed=0)  # to 1e-4, which bf16 does not reach
    assert {weight.dtype for module in sides.frozen for weight in module.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in sides.ours.parameters()} == {torch.float32}
    result = bench_stages.time_steps(half, name, sides, shown, seed=0, repeats=1)
    assert result.name == f"{name}, cpu bf16"


def test_days_of_the_paper() -> None:
    """250,000 steps of 1,680 images are 420 million, for which 16 GPUs of 100 a second need 3 days."""
    assert bench_stages.days(STAGE1, 100.0) == pytest.approx(420e6 / 1600 / 86400)
    assert bench_stages.days(OPT, 50.0) == pytest.approx(2.2222, abs=1e-4)  # 153.6 million at 800 a second
    assert bench_stages.days(T5, 50.0) == pytest.approx(1.7593, abs=1e-4)


def test_frozen_weights_are_counted(loaded: Loaded) -> None:
    """Bytes of both sides: transformers has no weight more, but the temperature is in neither's export."""
    for sides, _ in loaded.values():
        assert bench_stages.weights(sides.ours) == bench_stages.weights(sides.theirs)


def test_the_real_sizes_are_those_of_the_paper() -> None:
    """BLIP-2: OPT of 2.7 billion, FlanT5 XL of 3 billion (2.85 counted), and all defaults are its own."""
    config = load_config(BenchRun, REAL).stages
    assert config.model == Stage1Config()
    assert (config.batch * bench_stages.GPUS, config.precision) == (1680, "bf16")
    with torch.device("meta"):
        models = [new(config, 0).lm.module for new in (bench_stages.new_opt, bench_stages.new_t5)]
    assert [round(model.num_parameters() / 1e6) for model in models] == [2652, 2850]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STAGES)
def test_a_gpu_tells_memory_and_days(config: BenchStagesConfig, tmp_path: Path, name: str) -> None:
    wanted = replace(config, device="cuda", precision="bf16", peak_tflops=100.0)
    sides = bench_stages.make_sides(wanted, name, tmp_path, seed=0)
    shown = bench_stages.draw(wanted, sides, seed=0)
    bench_stages.compare(sides, shown, seed=0)
    more = bench_stages.time_steps(wanted, name, sides, shown, seed=0, repeats=2).more
    for side in ("here", "transformers", "tokens known"):
        assert 0 < more[f"{side} share of peak"] < 1 and more[f"{side} days"] > 0
        assert more[f"{side} GB"] > bench_stages.weights(sides.ours) / 1e9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("stages.words=[6, 31]", r"words is \[6, 31\]; .* between 1 and padding - 2 = 30"),
        ("stages.padding=41", "padding is 41; .* allows at most 40"),
        ("stages.batch=1", "batch is 1; it must be at least 2"),
        ("stages.opt_words=320", "opt_words is 320; it must be above 320"),
        ("stages.t5_words=10", "t5_words is 10"),
    ],
)
def test_impossible_runs(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(BenchRun, CONFIG, [wrong])
