"""Tiny language models learn from true texts; what the demo of BLIP-2 prints is what its models say."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipelines_vqa_run import right_answers
from tiny_language import opt_folder
from tiny_qformer import CONFIG, save_tower, tiny_stage1

from pipelines import train_language
from pipelines.config import load_config
from pipelines.demo_qformer import BRIEF, DemoRun, Told, examples, plan, table, tell
from pipelines.steps import check_steps
from pipelines.testset import TestImage
from pipelines.train_language import (
    LanguageRun,
    OPTShape,
    T5Shape,
    lines_of,
    new_t5,
    opt_tokenizer,
    t5_tokenizer,
    world_pages,
)
from pipelines.world import WorldConfig, make_row, make_scene
from pipelines.world_text import judge
from qformer import Stage2
from qformer.language import CAPTION, load_language
from qformer.stage2 import start_stage2

ROOT = Path(__file__).resolve().parent.parent
WORLD = WorldConfig(seed=6, brief=True, captions_per_image=1, side=48)


def test_a_page_tells_what_is_true_and_can_be_answered_from_its_beginning() -> None:
    pages = world_pages(WORLD, scenes=200, seed=3)
    asked = set()
    for number, page in enumerate(pages):
        scene = make_scene(WORLD, np.random.default_rng([3, number]))
        assert len(page.told) == 3 and 1 <= len(page.asked) <= 2
        assert all(judge(text, scene).true for text in page.told)
        for question, answer in page.asked:
            assert answer in right_answers(question, scene)
            assert all(answer in text.split() for text in page.told), page
            asked.add(question.split()[1])
        lines = lines_of(page, random.Random(number))
        questions = [f"Question: {question} Answer: {answer}" for question, answer in page.asked]
        assert lines[0] == page.told[0] and sorted(lines) == sorted([*page.told, *questions])
    assert asked == {"colour", "shape"}
    assert len({page.told[0].split()[0] for page in pages}) > 1  # brief or detailed, whichever comes first


def test_a_word_is_a_token_and_a_brief_caption_may_end_where_it_does() -> None:
    # In pieces of one or two letters the tiny models never learned which colour belongs to which shape.
    pages = world_pages(WORLD, scenes=400, seed=3)
    texts = [line for page in pages for line in lines_of(page, random.Random(0))]
    words = {word.strip(",:?") for text in texts for word in text.split()[1:]}
    size = LanguageRun(out="", opt=OPTShape()).vocabulary
    for tokenizer, end in ((opt_tokenizer(texts, size), 0), (t5_tokenizer(texts, size), 1)):
        torn = {word for word in words if len(tokenizer(f"a {word}")["input_ids"]) != 2 + end}
        assert not torn
        lengths = [len(tokenizer(text)["input_ids"]) - end for page in pages for text in page.told]
        assert BRIEF.min_length <= min(lengths) < CAPTION.min_length


@pytest.mark.parametrize(
    "shape", ["opt: {hidden_size: 32, ffn_dim: 64}", "t5: {d_model: 32, d_kv: 8, d_ff: 64}"]
)
def test_a_tiny_language_model_learns_and_can_be_frozen(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "language.yaml"
    config.write_text(
        f"out: {tmp_path}/lm\n{shape}\nscenes: 60\nsteps: 200\nbatch_size: 8\nlength: 24\n"
        "optim: {lr: 5e-3}\n"
    )
    assert train_language.main([str(config)]) == 0
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "| lm" in line]
    assert len(losses) == 2 and losses[1] < losses[0] < 5  # ln 400 = 6.0 at the start
    language = load_language(tmp_path / "lm", torch.float32)
    assert language.width == 32
    text = "a red ring above a blue star"
    found = language.tokenizer([""], [text])
    assert language.tokenizer.decode(found.labels)[0] == text


def test_a_new_t5_has_heads_that_look_at_neighbours() -> None:
    # Without them the tiny FlanT5 never learned which colour belongs to which shape.
    vocabulary = LanguageRun(out="", t5=T5Shape()).vocabulary
    tokenizer = t5_tokenizer(["a red ring above a blue star"], vocabulary)
    lm = new_t5(T5Shape(), tokenizer).eval()
    lm.set_attn_implementation("eager")  # which tells what is attended to
    ids = torch.randint(0, len(tokenizer), (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = lm(input_ids=ids, decoder_input_ids=ids, output_attentions=True)
    assert len(seen.encoder_attentions) == len(seen.decoder_attentions) == 2
    for block in range(2):
        of_encoder, of_decoder = (
            seen.encoder_attentions[block],
            seen.decoder_attentions[block],
        )  # [B, H, T, S]
        for attention, head, place in ((of_encoder, 0, -1), (of_encoder, 1, 1), (of_decoder, 0, -1)):
            assert attention[:, head].diagonal(place, 1, 2).min() > 0.9
        assert of_encoder[:, 2:].max() < 0.9  # the others are free


def test_one_shape_of_a_language_model_is_given(tmp_path: Path) -> None:
    for shapes in ("", "opt: {}\nt5: {}\n"):
        (tmp_path / "both.yaml").write_text(f"out: {tmp_path}/lm\n{shapes}")
        with pytest.raises(ValueError, match="give either opt or t5"):
            train_language.main([str(tmp_path / "both.yaml")])
    with pytest.raises(ValueError, match="num_heads is 1; a tiny FlanT5 needs two"):
        T5Shape(num_heads=1)


def test_the_demo_s_steps_fit_together() -> None:
    steps = plan(load_config(DemoRun, ROOT / "configs/tiny/demo_qformer.yaml", ["out=runs/x"]))
    check_steps(steps)
    written: set[str] = set()
    for step in steps:
        for override in step.overrides:
            name, _, place = override.partition("=")
            if name == "out":
                written.add(place)
            else:  # what a step reads, one before it has written
                assert (
                    any(place.strip("[]").startswith(f"{folder}/") for folder in written) or place in written
                )
    assert [step.name for step in steps] == [
        "world",
        "features",
        "language_opt",
        "language_flant5",
        "stage1",
        "stage2_opt",
        "stage2_flant5",
    ]


def small_stage2(folder: Path) -> Stage2:
    first = tiny_stage1(config=CONFIG)
    save_tower(first, folder / "vit.pth")
    return start_stage2(first, load_language(opt_folder(folder / "opt"), torch.float32)).eval()


def test_what_is_told_of_a_picture_does_not_depend_on_the_others(tmp_path: Path) -> None:
    rows = [make_row(WORLD, "test", number) for number in range(3)]
    images = [TestImage(row.key, row.jpeg, row.texts) for row in rows]
    scenes = {row.key: row.scene for row in rows}
    model = small_stage2(tmp_path)
    told = dict(tell(model, images, scenes, WORLD, "a photo of"))
    assert told.keys() == scenes.keys()
    assert dict(tell(model, images[1:2], scenes, WORLD, "a photo of"))[rows[1].key] == told[rows[1].key]
    for row in rows:
        for question, _, right in told[row.key].answers:
            assert question.startswith(("what colour", "what shape"))
            assert set(right) == right_answers(question, row.scene)


def test_the_table_and_the_examples_tell_right_from_wrong() -> None:
    row = make_row(WORLD, "test", 0)
    first = row.scene.objects[0]
    good = Told(row.texts[0], (("what colour?", first.colour, {first.colour: 1.0}),))
    bad = Told("img 1 jpg", (("what colour?", "none", {first.colour: 1.0}),))
    scenes = {row.key: row.scene}
    told = {"OPT": {row.key: good}, "FlanT5": {row.key: bad}}
    lines = table(told, scenes).splitlines()
    assert lines[1].split() == ["OPT", "100.0%", "100.0%", "100.0%"]
    assert lines[2].split() == ["FlanT5", "0.0%", "0.0%", "0.0%"]
    shown = examples(1, told, [TestImage(row.key, row.jpeg, row.texts)], scenes)
    assert f"{row.texts[0]}   (right)" in shown and "img 1 jpg   (not a sentence about shapes)" in shown
    assert f"what colour? {first.colour} (right)" in shown and "what colour? none (wrong)" in shown
