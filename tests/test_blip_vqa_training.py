"""VQA fine-tuning: its loss against a loop without padding and against transformers; what it starts from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign_weights import pretrained, write
from test_blip_parity import WORDS, begin, hf_config
from tiny import CLS, SEP, VOCABULARY, pixels, randomize, tiny_blip, tiny_config, tiny_tokenizer, tiny_vqa
from torch import Tensor
from transformers import BlipForQuestionAnswering

from blip import Blip, BlipVQA, load_vqa
from blip.checkpoint import save_model
from blip.tokenizer import clean_question
from blip.vqa import VqaBatch
from blip.weights import start_vqa

DEC, ENC = VOCABULARY - 2, VOCABULARY - 1
QUESTIONS = (4, 7, 5)  # tokens
ANSWERS = (3, 5, 3, 4, 4, 3)  # tokens
OWNER = (0, 1, 1, 1, 2, 2)
WEIGHTS = (1.0, 0.3, 0.6, 0.1, 0.2, 0.5)


def texts(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Random ids and mask [R, T]: [CLS], words, [SEP], padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY - 2, (len(lengths), max(lengths)), generator=generator)
    ends = torch.tensor(lengths)
    ids[:, 0] = CLS
    ids[torch.arange(len(ids)), ends - 1] = SEP
    mask = (torch.arange(ids.size(1)) < ends[:, None]).long()
    return ids * mask, mask


def batch() -> VqaBatch:
    """In float64."""
    images = pixels(len(QUESTIONS)).double()
    weights, owner = torch.tensor(WEIGHTS, dtype=torch.float64), torch.tensor(OWNER)
    return VqaBatch(images, *texts(QUESTIONS, 1), *texts(ANSWERS, 2), weights, owner)


@pytest.fixture(scope="module")
def vqa() -> BlipVQA:
    return tiny_vqa(seed=3).double()


def smoothed(logits: Tensor, target: int) -> Tensor:
    """[V] -> cross-entropy with a tenth of the mass spread over all words, written out."""
    losses = -logits.log_softmax(-1)
    return 0.9 * losses[target] + 0.1 * losses.mean()


@torch.no_grad()
def test_the_loss_is_that_of_every_answer_by_itself(vqa: BlipVQA) -> None:
    """One question and one answer at a time, each cut to its own length: there is no padding to see."""
    given, total = batch(), 0.0
    for number, length in enumerate(QUESTIONS):
        image = vqa.reader.project_image(vqa.vision(given.pixels[number][None]))
        question = begin(given.ids[number, :length][None], ENC)
        states = vqa.reader.match(question, torch.ones_like(question), image)
        memory = vqa.writer.project_image(states)
        for answer in range(len(ANSWERS)):
            if OWNER[answer] != number:
                continue
            ids = begin(given.answer_ids[answer, : ANSWERS[answer]][None], DEC)
            logits = vqa.writer.logits(vqa.writer.write(ids, memory)[0][0])  # [U, V]
            losses = [smoothed(logits[place], int(ids[0, place + 1])) for place in range(ids.size(1) - 1)]
            total += WEIGHTS[answer] * float(sum(losses))
    found = vqa(given)
    assert found.keys() == {"lm"}
    assert float(found["lm"]) == pytest.approx(total / len(QUESTIONS), abs=1e-6)
    assert total > 1


@torch.no_grad()
def test_answers_know_their_questions_in_any_order(vqa: BlipVQA) -> None:
    given, order = batch(), torch.tensor([4, 0, 5, 2, 3, 1])
    fields = ("answer_ids", "answer_mask", "weights", "owner")
    shuffled = replace(given, **{name: getattr(given, name)[order] for name in fields})
    torch.testing.assert_close(vqa(shuffled)["lm"], vqa(given)["lm"])
    assert not torch.allclose(vqa(replace(given, owner=given.owner.flip(0)))["lm"], vqa(given)["lm"])


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(vqa: BlipVQA) -> None:
    given = batch()
    ids = torch.where(given.mask.bool(), given.ids, 17)
    answers = torch.where(given.answer_mask.bool(), given.answer_ids, 23)
    junk = replace(given, ids=ids, answer_ids=answers)
    torch.testing.assert_close(vqa(junk)["lm"], vqa(given)["lm"])


def test_the_gradient_reaches_every_weight_of_the_three_parts() -> None:
    vqa = tiny_vqa(seed=3).double().train()
    sum(vqa(batch()).values()).backward()
    vqa.after_step()
    parts = {"vision": 0, "reader": 0, "writer": 0}
    for name, parameter in vqa.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("key.bias"):  # adds the same to all scores of a query, which softmax ignores
            assert parameter.grad.abs().max() > 1e-9, name
        parts[name.partition(".")[0]] += 1
    assert all(parts.values())


@torch.no_grad()
def test_the_loss_of_transformers(tmp_path: Path) -> None:
    """Theirs is a mean over words, has no weights, and smooths labels only if its config says so (BLIP: 0.1).

    It shows the padding of questions to the writer: so one question at a time, or questions of one length.
    """
    config = hf_config(vision=48, text=48)
    config.text_config.label_smoothing = 0.1
    theirs = randomize(BlipForQuestionAnswering(config))
    theirs.save_pretrained(tmp_path)
    ours, given = load_vqa(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words")).double(), batch()
    theirs.double()
    total = 0.0
    for answer, (number, length) in enumerate(zip(OWNER, ANSWERS, strict=True)):
        question, labels = given.ids[number, : QUESTIONS[number]][None], given.answer_ids[answer, :length]
        out = theirs(
            begin(question, WORDS - 1),
            given.pixels[number][None],
            decoder_input_ids=begin(labels[None], WORDS - 2),
            attention_mask=torch.ones_like(question),
            labels=labels[None],
        )
        total += WEIGHTS[answer] * float(out.loss) * (length - 1)
    assert float(ours(given)["lm"]) == pytest.approx(total / len(QUESTIONS), abs=1e-6)

    (ids, mask), (answers, answer_mask) = texts((6, 6), 3), texts((4, 4), 4)
    out = theirs(
        begin(ids, WORDS - 1),
        given.pixels[:2],
        decoder_input_ids=begin(answers, WORDS - 2),
        attention_mask=mask,
        labels=answers,
    )
    one_each = VqaBatch(
        given.pixels[:2], ids, mask, answers, answer_mask, torch.ones(2).double(), torch.arange(2)
    )
    assert float(ours(one_each)["lm"]) == pytest.approx(3 * float(out.loss), abs=1e-6)


# What the writer may look at


@pytest.mark.parametrize("texts_each", [1, 2])
@torch.no_grad()
def test_masked_memory_is_memory_cut_off(vqa: BlipVQA, texts_each: int) -> None:
    """With one text to each memory, and with two that are folded into it."""
    memory = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, _ = texts((5,) * (2 * texts_each), 5)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    found, _ = vqa.writer.write(ids, vqa.writer.project_image(memory), image_mask=mask)
    for row, length in enumerate((4, 6)):
        own = slice(row * texts_each, (row + 1) * texts_each)
        cut = vqa.writer.project_image(memory[row : row + 1, :length])
        torch.testing.assert_close(found[own], vqa.writer.write(ids[own], cut)[0])
    everything, _ = vqa.writer.write(ids, vqa.writer.project_image(memory))
    assert not torch.allclose(found[0], everything[0])


def test_answers_to_many_questions_are_those_to_each(tmp_path: Path) -> None:
    """Of ten lengths, whose answers end at different times; the longest has more words than are read."""
    vqa = tiny_vqa(seed=10)
    vqa.tokenizer = tiny_tokenizer(tmp_path)
    with torch.no_grad():
        vqa.writer.embeddings.word.weight.mul_(0.2)
        vqa.writer.lm_head.bias[SEP] += 3
    counts = (1, 9, 2, 8, 3, 7, 4, 6, 5, 60)
    images = pixels(len(counts))
    questions = [" ".join(f"w{(7 * i + k) % 43}" for k in range(count)) for i, count in enumerate(counts)]
    together = vqa.answer(images, questions)
    assert together == [vqa.answer(images[i : i + 1], [questions[i]])[0] for i in range(len(counts))]
    assert len(set(together)) > 5 and len({len(answer.split()) for answer in together}) > 3


def test_a_question_is_cleaned_up_before_it_is_answered(tmp_path: Path) -> None:
    vqa = tiny_vqa()
    vqa.tokenizer = tiny_tokenizer(tmp_path)
    image = pixels(1)
    assert vqa.answer(image, ['W1 (w2), "W3"!']) == vqa.answer(image, ["w1 w2, w3"])
    assert vqa.answer(image, ["w1 w2, w3"]) != vqa.answer(image, ["w1 w3"])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("What colour is the U.S. flag?", "what colour is the us flag?"),
        ("  Is this  a #1 (or #2)?\n", "is this a 1 or 2?"),
        ("a " * 60, " ".join("a" * 50)),
        ("...", ""),
    ],
)
def test_questions_are_cleaned_up_as_by_blip(text: str, cleaned: str) -> None:
    assert clean_question(text) == cleaned == clean_question(cleaned)


# What fine-tuning starts from


def square_blip() -> Blip:
    """Vision and text of one width, as in BLIP's base."""
    config = tiny_config()
    return randomize(Blip(replace(config, vision=replace(config.vision, width=32, heads=4))), seed=8)


@torch.no_grad()
def test_vqa_starts_as_the_pretrained_med(tmp_path: Path) -> None:
    blip = square_blip()
    blip.tokenizer = tiny_tokenizer(tmp_path / "words")
    save_model(blip, tmp_path / "med")
    vqa = start_vqa(tmp_path / "med", dropout=0.0, drop_path=0.1)
    assert vqa.tokenizer is not None and not vqa.training
    assert (vqa.config.text.dropout, vqa.config.vision.drop_path) == (0.0, 0.1)
    (ids, mask), images = texts((4, 7), 1), pixels(2)
    image = blip.med.project_image(blip.image_tokens(images))
    states = vqa.read(images, ids, mask)
    torch.testing.assert_close(states, blip.med.match(begin(ids, ENC), mask, image))
    found, _ = vqa.writer.write(ids, vqa.writer.project_image(states))
    expected, _ = blip.med.write(ids, blip.med.project_image(states))
    torch.testing.assert_close(vqa.writer.logits(found), blip.med.logits(expected))


def test_reader_and_writer_share_no_weight_once_they_have_started(tmp_path: Path) -> None:
    save_model(square_blip(), tmp_path / "med")
    vqa = start_vqa(tmp_path / "med")
    places = [weight.data_ptr() for weight in vqa.parameters()]
    assert len(set(places)) == len(places)
    with torch.no_grad():
        for weight in vqa.reader.parameters():
            weight.add_(1)
    again = start_vqa(tmp_path / "med")
    assert all(
        torch.equal(one, other)
        for one, other in zip(vqa.writer.parameters(), again.writer.parameters(), strict=True)
    )


def test_only_keys_and_values_of_another_width_are_drawn_anew(tmp_path: Path) -> None:
    blip = tiny_blip()  # 24 and 32
    save_model(blip, tmp_path / "med")
    vqa, weights = start_vqa(tmp_path / "med", image_size=64), blip.state_dict()
    assert vqa.config.vision.image_size == 64
    drawn = []
    for name, weight in vqa.state_dict().items():
        source = weights[name if name.startswith("vision.") else f"med.{name.partition('.')[2]}"]
        if source.shape != weight.shape:
            drawn.append(name)
        elif name != "vision.vit.pos_embed":
            assert torch.equal(source, weight), name
    drawn.remove("vision.vit.pos_embed")
    assert drawn == [f"writer.blocks.{i}.look.{part}.weight" for i in range(2) for part in ("key", "value")]
    for name in drawn:  # as a new stack of this width has them
        assert float(vqa.state_dict()[name].std()) == pytest.approx(0.02 * 24**0.5, rel=0.1)


def test_vqa_starts_from_a_file_of_salesforce(tmp_path: Path) -> None:
    tensors, captioner, retrieval = pretrained()
    vqa = start_vqa(write(tmp_path / "model_base.pth", tensors), tokenizer=tiny_tokenizer(tmp_path / "words"))
    (ids, mask), images = texts((4, 7), 1), pixels(2)
    with torch.no_grad():
        image = retrieval.vision_model(images).last_hidden_state
        asked = retrieval.text_encoder(begin(ids, ENC), attention_mask=mask, encoder_hidden_states=image)
        torch.testing.assert_close(vqa.read(images, ids, mask), asked.last_hidden_state, atol=1e-4, rtol=0)
    theirs = captioner.text_decoder.bert.encoder.layer[2].attention.self.query.weight
    assert torch.equal(vqa.writer.blocks[2].write.query.weight, theirs)


@pytest.mark.parametrize(("part", "lacks"), [("reads", "reads"), ("writes", "writes")])
def test_a_captioner_or_a_filter_is_no_start(tmp_path: Path, part: str, lacks: str) -> None:
    save_model(tiny_blip(**{part: False}), tmp_path / "half")
    with pytest.raises(ValueError, match=f"half has no part that {lacks}; VQA starts from a pretrained MED"):
        start_vqa(tmp_path / "half")


def test_what_is_fine_tuned_already_is_loaded_and_not_started(tmp_path: Path) -> None:
    save_model(tiny_vqa(), tmp_path / "vqa")
    with pytest.raises(ValueError, match=r"is a BlipVQA, not a Blip; give weights.*load it with load_vqa"):
        start_vqa(tmp_path / "vqa")
