"""A conversation keeps what was said, ends when asked to, and what it prints cannot steer a terminal."""

import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_files import jpeg, put
from test_qformer_stage2 import Language, opt, t5
from test_qformer_weights_stage2 import saved
from tiny import tiny_blip
from tiny_qformer import tiny_stage1

from blip.generate import Decoding
from blip.image import decode, image_transform
from pipelines import chat
from pipelines.chat import ChatRun, first_answer, fit, printable, with_turns
from pipelines.config import load_config
from qformer import Stage2
from qformer.language import CausalLM

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/chat.yaml"
SHORT = Decoding(beams=2, min_length=2, max_length=6)
SETTINGS = ("precision=fp32", "device=cpu", "decoding={beams: 2, min_length: 2, max_length: 6}")
TEMPLATE = "Question: {} Answer:"


def command(model: Path, image: Path, *settings: str) -> list[str]:
    return [str(CONFIG), f"model={model}", f"image={image}", *SETTINGS, *settings]


def asked(prompt: str, model: Stage2, image: Path) -> str:
    """What the model itself says of a prompt that is written out."""
    pixels = image_transform(decode(image.read_bytes()), model.config.vision.image_size)[None]
    return model.caption(pixels, prompt, SHORT)[0]


def test_a_conversation_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The second answer is that to both questions; the third question comes after the end and is not read."""
    model, folder, _, _ = saved(tmp_path)
    image = put(tmp_path / "a.jpg", jpeg(3))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.chat", *command(folder, image)],
        input="What is on the left?\nIs it red?\n\nand blue?\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    first, second = done.stdout.splitlines()
    assert first == asked("Question: what is on the left? Answer:", model, image)
    told = f"Question: what is on the left? Answer: {first}. Question: is it red? Answer:"
    assert second == asked(told, model, image)
    assert second != asked("Question: is it red? Answer:", model, image)
    assert "> " not in done.stdout


@pytest.mark.parametrize("typed", [b"what is on the left?\n\n", b"what is on the left?\n\x04"], ids=repr)
def test_on_a_terminal_there_is_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: bytes
) -> None:
    """A pseudo-terminal; an empty line ends it, and so does Ctrl-D."""
    model, folder, _, _ = saved(tmp_path)
    image = put(tmp_path / "a.jpg", jpeg(3))
    keyboard, terminal = pty.openpty()
    os.write(keyboard, typed)
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert chat.main(command(folder, image)) == 0
    os.close(keyboard)
    answer = asked("Question: what is on the left? Answer:", model, image)
    assert capsys.readouterr().out == f"> {answer}\n> "


# ---- what is read --------------------------------------------------------------------------------


def test_earlier_turns_come_first() -> None:
    """LAVIS examples/blip2_instructed_generation.ipynb."""
    turns = [("which city is this?", "singapore"), ("why?", "it has a statue of a merlion.")]
    assert with_turns(TEMPLATE, turns).format("where is its name from?") == (
        "Question: which city is this? Answer: singapore. "
        "Question: why? Answer: it has a statue of a merlion. "
        "Question: where is its name from? Answer:"
    )
    assert with_turns("{}!", [("{x}", "{}")]).format("{0}") == "{x}! {}. {0}!"  # braces are only text


@pytest.mark.parametrize("language", [opt, t5])
def test_the_oldest_turns_are_left_out(tmp_path: Path, language: Language) -> None:
    model, _, _, _ = saved(tmp_path, language)
    turns = [(f"what is on {side}?", "a dog") for side in ("the left", "the right", "a photo")]
    whole, two, alone = (with_turns(TEMPLATE, turns[first:]) for first in (0, 1, 3))

    def length(template: str) -> int:
        return model.language.tokenizer.prompts([template.format("is it red?")])[0].size(1)

    run = replace(load_config(ChatRun, CONFIG), decoding=SHORT)
    for template, context in ((whole, length(whole)), (two, length(whole) - 1), (alone, length(alone))):
        if context <= chat.room(run, model):  # the tiny OPT cannot read all
            assert fit(replace(run, context=context), model, turns, "is it red?") == template
    with pytest.raises(ValueError, match=rf"question has {length(alone)} tokens, at most 7 can be read"):
        fit(replace(run, context=7), model, turns, "is it red?")


def test_positions_of_the_language_model_limit_the_dialogue(tmp_path: Path) -> None:
    """The tiny OPT has 96, of which 5 queries and 6 tokens of the answer are taken; at the limit it works."""
    model, _, _, _ = saved(tmp_path)
    run = replace(load_config(ChatRun, CONFIG), decoding=SHORT)
    assert chat.room(run, model) == 96 - 5 - 6
    turns = [("what is on the left?", "a dog")] * 20
    prompt = fit(run, model, turns, "is it red?").format("is it red?")
    assert 60 < model.language.tokenizer.prompts([prompt])[0].size(1) <= 85
    with torch.inference_mode():
        model.caption(torch.zeros(1, 3, 32, 32), prompt, replace(SHORT, min_length=6))
        with pytest.raises(IndexError):
            model.caption(torch.zeros(1, 3, 32, 32), with_turns(TEMPLATE, turns).format(""), SHORT)


def test_a_question_that_is_too_long_does_not_end_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder, _, _ = saved(tmp_path)
    image = put(tmp_path / "a.jpg", jpeg(3))
    (tmp_path / "questions").write_text("a cat " + 300 * "x" + "\nis it red?\n")
    with (tmp_path / "questions").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert chat.main(command(folder, image)) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [asked("Question: is it red? Answer:", model, image)]
    assert [line for line in printed.err.splitlines() if line.startswith("error")] == [
        "error: the question has 315 tokens, at most 85 can be read; ask a shorter one"
    ]


# ---- what is printed -----------------------------------------------------------------------------


def test_only_the_first_answer_counts() -> None:
    assert first_answer("a dog. Question: why? Answer: it barks", TEMPLATE) == "a dog."
    assert first_answer("a\n  dog ", TEMPLATE) == "a dog"
    assert first_answer("a dog Question", "{}") == "a dog Question"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a caf\u00e9, \u72ac", "a caf\u00e9, \u72ac"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\bc\x00\x7f\x9b", r"a\x0db\x08c\x00\x7f\x9b"),
        ("\u202eevil\u2028", r"\x202eevil\x2028"),
        ("\udcff", r"\xdcff"),
    ],
)
def test_nothing_printed_steers_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_answer_with_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question of them, too, which the tokenizer may not like."""
    _, folder, _, _ = saved(tmp_path)
    seen: list[str] = []

    def generate(self: CausalLM, prefix: torch.Tensor, prompts: list[str], *_: object) -> list[str]:
        seen.extend(prompts)
        return ["red \x1b[31m\x07 \u202e"]

    monkeypatch.setattr(CausalLM, "generate", generate)
    (tmp_path / "questions").write_bytes(b"\x1b[2J what\tnow \xff?\n")
    with (tmp_path / "questions").open(encoding="utf-8", errors="surrogateescape") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert chat.main(command(folder, put(tmp_path / "a.jpg", jpeg(3)))) == 0
    assert capsys.readouterr().out == "red \\x1b[31m\\x07 \\x202e\n"
    assert seen == ["Question: \\x1b[2j what now \\xdcff? Answer:"]


# ---- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a\.jpg cannot be decoded: no image bytes; give a JPEG"),
        (b"no image", r"a\.jpg cannot be decoded: the bytes are no image of the kinds JPEG"),
        (jpeg(1)[:-200], r"a\.jpg cannot be decoded: OSError: (?i:.*truncated)"),
        (None, r"a\.jpg: no such file"),
    ],
)
def test_an_image_that_is_none(tmp_path: Path, data: bytes | None, message: str) -> None:
    """Found out before the model is looked for."""
    if data is not None:
        put(tmp_path / "a.jpg", data)
    with pytest.raises(ValueError, match=message):
        chat.main(command(tmp_path / "nowhere", tmp_path / "a.jpg"))


def test_a_model_that_is_no_stage_2(tmp_path: Path) -> None:
    tiny_blip().save_pretrained(tmp_path / "blip")
    tiny_stage1().save_pretrained(tmp_path / "stage1")
    image = put(tmp_path / "a.jpg", jpeg(1))
    for name, message in {"blip": "describes a Blip", "stage1": "describes a Stage1"}.items():
        with pytest.raises(ValueError, match=message):
            chat.main(command(tmp_path / name, image))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("template=Question:", "it must have one {}"),
        ("template={} and {}", "it must have one {}"),
        ("context=0", "context is 0"),
        ("decoding.top_p=0.9", r"beams|top_p"),
        ("decoding={top_p: 0.9, beams: 1}", "decoding.top_p asks for sampling"),
    ],
)
def test_impossible_conversations(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(ChatRun, CONFIG, [wrong])
