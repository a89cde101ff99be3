"""Fine-tuning of BLIP-2: an encoder that is trained, a Q-Former that reads the question. Random weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_blip_parity import assert_close
from test_qformer_stage2 import BOTH, Language, opt
from tiny import VOCABULARY, pixels, tiny_batch, tiny_tokenizer
from tiny_language import OPT_BOS, opt_folder, opt_tokenizer, t5_tokenizer
from tiny_qformer import CONFIG, QFORMER, save_tower, tiny_stage1
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip.generate import Decoding
from blip.vision import interpolate_position_embedding
from qformer import Stage1, Stage2, export_hf, load_stage1, load_stage2
from qformer.frozen import Frozen
from qformer.language import CausalLM, load_language
from qformer.stage2 import Asked, Stage2Batch, Stage2Config, let_read, start_stage2

TRAINED = replace(CONFIG, trains_vision=True)
BEAMS = Decoding(beams=3, min_length=1, max_length=6)
VIT = "vision.vit."


def trained_stage1(seed: int = 0) -> Stage1:
    """The weights of `tiny_stage1`, its encoder trained."""
    model, frozen = Stage1(TRAINED), tiny_stage1(seed)
    vit = {f"vision.{name}": weight for name, weight in frozen.vision.module.state_dict().items()}
    model.load_state_dict({k: v for k, v in frozen.state_dict().items() if not k.startswith("vision.")} | vit)
    return model.eval()


def saved_stage1(folder: Path, seed: int = 0) -> Path:
    """A folder of a frozen stage 1, its vocabulary in it."""
    tokenizer = tiny_tokenizer(folder / "words")
    model = tiny_stage1(seed, replace(CONFIG, vision_source=str(folder / "vit.pth")), tokenizer)
    save_tower(model, folder / "vit.pth")
    model.save_pretrained(folder / "stage1")
    return folder / "stage1"


def saved_stage2(folder: Path) -> Path:
    """A folder of a stage 2 that went on from the stage 1 of `folder`, which is given other weights since."""
    lm = opt_folder(folder / "opt")
    model = start_stage2(load_stage1(folder / "stage1"), load_language(lm, torch.float32), str(lm))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
        model.projection.weight.mul_(20)  # or what is written hardly depends on the image
    model.save_pretrained(folder / "stage2")
    return folder / "stage2"


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---- an encoder that is trained ------------------------------------------------------------------


def test_stage1_has_the_same_losses_with_a_trained_encoder_and_gradients_in_it() -> None:
    batch = tiny_batch([1, 2, 3, 4])
    models = {"frozen": tiny_stage1(), "trained": trained_stage1()}
    losses = {}
    for name, model in models.items():
        torch.manual_seed(0)
        losses[name] = model(batch)
        sum(losses[name].values()).backward()
    for name, loss in losses["frozen"].items():
        torch.testing.assert_close(losses["trained"][name], loss)
    inside = {name: weight for name, weight in models["trained"].named_parameters() if name.startswith(VIT)}
    assert len(inside) == len(list(models["frozen"].vision.module.parameters())) > 20
    for name, weight in inside.items():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    frozen = models["frozen"]
    assert not any(name.startswith("vision.") for name, _ in frozen.named_parameters())
    assert all(weight.grad is None for weight in frozen.vision.module.parameters())
    shared = dict(models["trained"].named_parameters())
    for name, weight in frozen.named_parameters():
        torch.testing.assert_close(shared[name].grad, weight.grad, atol=1e-5, rtol=1e-4)


@BOTH
def test_stage2_has_gradients_in_a_trained_encoder_and_none_in_the_language_model(language: Language) -> None:
    model = start_stage2(trained_stage1(), language()).train()
    assert model.config.trains_vision and model.vision.training
    texts = model.language.tokenizer(["", ""], ["a red cat", "a dog"])
    model(Stage2Batch(pixels(2), texts))["lm"].backward()
    inside = [weight for name, weight in model.named_parameters() if name.startswith(VIT)]
    assert len(inside) > 20 and all(weight.grad.abs().sum() > 0 for weight in inside)
    assert all(weight.grad is None for weight in model.language.lm.module.parameters())


def test_a_trained_encoder_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Bit for bit, and nothing else is needed to load it."""
    first = trained_stage1()
    first.save_pretrained(tmp_path / "first")
    again = load_stage1(tmp_path / "first")
    assert again.config == TRAINED and not again.training
    assert_equal(again.state_dict(), first.state_dict())
    lm = opt_folder(tmp_path / "lm")
    second = start_stage2(first, load_language(lm, torch.float32), str(lm))
    second.save_pretrained(tmp_path / "second")
    other = load_stage2(tmp_path / "second", dtype=torch.float32)
    assert other.config == second.config and sum(name.startswith(VIT) for name in other.state_dict()) > 20
    assert_equal(other.state_dict(), second.state_dict())
    with pytest.raises(ValueError, match="holds the vision encoder that was trained with it; leave vision="):
        load_stage2(tmp_path / "second", vision=tmp_path / "first")


def test_fine_tuning_starts_from_a_frozen_model_in_one_call(tmp_path: Path) -> None:
    """At a larger image size, its positions resampled; and what was trained can be frozen again."""
    folder = saved_stage1(tmp_path)
    source = saved_stage2(tmp_path)
    frozen = {name: weight for name, weight in load_stage1(folder).vision.module.state_dict().items()}
    for load, place in ((load_stage1, folder), (load_stage2, source)):
        before, model = load(place), load(place, trains_vision=True, image_size=64)
        assert (model.config.trains_vision, model.config.vision.image_size) == (True, 64)
        assert model.config.vision_source == ""
        found = model.state_dict()
        expected = interpolate_position_embedding(frozen["vit.pos_embed"], 17)  # 4 x 4 patches and [CLS]
        assert torch.equal(found.pop("vision.vit.pos_embed"), expected)
        vit = {f"vision.{name}": w for name, w in frozen.items() if name != "vit.pos_embed"}
        rest = {name: w for name, w in before.state_dict().items() if name != "vision.digest"}
        assert_equal(found, vit | rest)
        assert all(w.requires_grad for name, w in model.named_parameters())
        with torch.no_grad():
            model.vision.vit.cls_token.add_(1)
        model.save_pretrained(tmp_path / "tuned")
        again = load(tmp_path / "tuned", trains_vision=False)
        assert isinstance(again.vision, Frozen) and again.config.vision_source == str(tmp_path / "tuned")
        assert_equal(again.vision.module.state_dict(), model.vision.state_dict())
        again.save_pretrained(tmp_path / "refrozen")
        assert_equal(load(tmp_path / "refrozen").state_dict(), again.state_dict())


def test_weights_of_a_trained_encoder_that_are_missing_are_named(tmp_path: Path) -> None:
    model = trained_stage1()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"depth": 2', '"depth": 3'))
    with pytest.raises(ValueError, match=r"missing: vision\.vit\.blocks\.2\.attn\.proj\.bias"):
        load_stage1(tmp_path)


def test_a_trained_encoder_is_exported_like_a_frozen_one(tmp_path: Path) -> None:
    export_hf(trained_stage1(), tmp_path / "trained")
    export_hf(tiny_stage1(), tmp_path / "frozen")
    one, other = (Blip2ForImageTextRetrieval.from_pretrained(tmp_path / n) for n in ("trained", "frozen"))
    assert_equal(one.state_dict(), other.state_dict())
    ours = start_stage2(trained_stage1(), opt()).eval()
    export_hf(ours, tmp_path / "second")
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "second").eval()
    with torch.no_grad():
        assert_close(ours.soft_prompt(pixels(2)), theirs.get_image_features(pixels(2)).pooler_output)


# ---- a Q-Former that reads the question ----------------------------------------------------------

QUESTIONS = ["is it red", "what is on the left", "red"]
ANSWERS = [["yes", "no"], ["a cat"], ["yes", "red", "a big dog"]]
WEIGHTS = [[0.75, 0.25], [0.5], [0.5, 0.25, 0.25]]
TEMPLATE = "question: {} answer:"


def reading(language: Language, folder: Path, seed: int = 0) -> Stage2:
    """In eval mode; the words of its Q-Former are w0, w1, ..."""
    stage1 = tiny_stage1(seed, tokenizer=tiny_tokenizer(folder))
    model = start_stage2(stage1, language(), reads_question=True).eval()
    with torch.no_grad():
        model.projection.weight.mul_(20)
    return model


def asked_ids(lengths: Sequence[int] = (3, 6, 4)) -> tuple[Tensor, Tensor]:
    """Questions of random words, as the Q-Former reads them."""
    batch = tiny_batch(range(len(lengths)), seed=4)
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    ids = torch.nn.functional.pad(batch.ids, (0, 8))[:, :8].clamp(min=5) * mask
    ids[:, 0] = 2  # [CLS]
    return ids, mask


def test_stage2_keeps_what_reads(tmp_path: Path) -> None:
    stage1 = tiny_stage1(seed=4, tokenizer=tiny_tokenizer(tmp_path / "words"))
    model = start_stage2(stage1, opt(), reads_question=True)
    theirs = {name: w for name, w in stage1.qformer.state_dict().items() if not name.startswith("lm_head")}
    assert_equal(model.qformer.state_dict(), theirs)
    assert {"words.weight", "positions.weight", "blocks.0.text_mlp.up.weight"} <= theirs.keys()
    assert model.tokenizer is stage1.tokenizer
    ids, mask = asked_ids()
    with torch.no_grad():
        seen = stage1.eval().qformer.look(stage1.image_tokens(pixels(3)), ids, mask)
        assert_close(model.eval().soft_prompt(pixels(3), ids, mask), model.projection(seen))


def test_what_looks_is_stage_2_s_and_what_reads_is_stage_1_s(tmp_path: Path) -> None:
    stage1 = load_stage1(saved_stage1(tmp_path))
    stage2 = load_stage2(saved_stage2(tmp_path), dtype=torch.float32)
    for start in (stage2, load_stage2(tmp_path / "stage2", dtype=torch.float32, trains_vision=True)):
        model = let_read(start, stage1)
        assert model.config.trains_vision == start.config.trains_vision
        mine, first, second = model.state_dict(), stage1.state_dict(), start.state_dict()
        reads = {name for name in mine if name not in second}
        assert reads == {
            "qformer.words.weight",
            "qformer.positions.weight",
            *(name for name in first if ".text_mlp." in name),
        }
        assert_equal(mine, {name: (first if name in reads else second)[name] for name in mine})
        assert not torch.equal(first["qformer.queries"], second["qformer.queries"])
    wide = replace(CONFIG, qformer=replace(QFORMER, hidden=48))
    with pytest.raises(
        ValueError, match=r"stage 1 and stage 2 together do not fit.* qformer\.blocks\.0\.text_mlp"
    ):
        let_read(stage2, tiny_stage1(config=wide))


def test_the_question_changes_what_the_queries_see_and_padding_does_not(tmp_path: Path) -> None:
    model = reading(opt, tmp_path)
    ids, mask = asked_ids()
    with torch.no_grad():
        whole = model.soft_prompt(pixels(3), ids, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = model.soft_prompt(pixels(3)[row : row + 1], ids[row : row + 1, :length])
            assert_close(whole[row : row + 1], alone)
            other = ids[row : row + 1, :length].clone()
            other[0, length - 1] = 5 if other[0, length - 1] != 5 else 6  # the last word
            far = model.soft_prompt(pixels(3)[row : row + 1], other) - alone
            assert far.abs().max() > 0.01 * alone.abs().max()
        noise = ids.masked_fill(mask == 0, VOCABULARY - 1)
        assert_close(model.soft_prompt(pixels(3), noise, mask), whole)
        images = [2, 0, 0]  # questions about some of the images, in any order
        assert_close(
            model.soft_prompt(pixels(3), ids, mask, images), model.soft_prompt(pixels(3)[images], ids, mask)
        )


def asked_batch(model: Stage2) -> Stage2Batch:
    owner = [row for row, answers in enumerate(ANSWERS) for _ in answers]
    given = [TEMPLATE.format(QUESTIONS[row]) for row in owner]
    texts = model.language.tokenizer(given, [answer for answers in ANSWERS for answer in answers], 64)
    weights = torch.tensor([weight for weights in WEIGHTS for weight in weights])
    return Stage2Batch(pixels(3), texts, Asked(*asked_ids(), weights, torch.tensor(owner)))


def by_hand(model: Stage2, row: int, answer: str) -> Tensor:
    """-log P(answer and its end), in float64, of a question alone, without padding, word by word."""
    ids, mask = asked_ids()
    image = model.ln_vision(model.vision.module(pixels(3)[row : row + 1].double()))
    seen = model.qformer.look(image, ids[row : row + 1, : int(mask[row].sum())])
    prompt, lm = model.projection(seen), model.language.lm.module
    question = TEMPLATE.format(QUESTIONS[row])
    if isinstance(model.language, CausalLM):
        given = [OPT_BOS, *opt_tokenizer()(question)["input_ids"]]
        wanted = opt_tokenizer()(f" {answer}\n")["input_ids"]
        read = torch.cat([prompt, lm.get_input_embeddings()(torch.tensor([given + wanted]))], 1)
        logits = lm(inputs_embeds=read).logits[0, prompt.size(1) + len(given) - 1 : -1]
    else:
        read = torch.cat(
            [prompt, lm.get_input_embeddings()(torch.tensor([t5_tokenizer()(question)["input_ids"]]))], 1
        )
        wanted = t5_tokenizer()(answer)["input_ids"]  # </s> behind it
        written = torch.tensor([[lm.config.decoder_start_token_id, *wanted[:-1]]])
        logits = lm(inputs_embeds=read, decoder_input_ids=written).logits[0]
    return -logits.log_softmax(-1)[torch.arange(len(wanted)), wanted].sum()


@BOTH
def test_the_loss_of_answers_is_that_by_hand(tmp_path: Path, language: Language) -> None:
    """The cross-entropy of each answer alone times its weight, by the number of questions, in float64."""
    model = reading(language, tmp_path).double()
    batch = asked_batch(model)
    batch = replace(
        batch, pixels=batch.pixels.double(), asked=replace(batch.asked, weights=batch.asked.weights.double())
    )
    expected = torch.zeros((), dtype=torch.float64)
    for row, (answers, weights) in enumerate(zip(ANSWERS, WEIGHTS, strict=True)):
        for answer, weight in zip(answers, weights, strict=True):
            expected += weight * by_hand(model, row, answer)
    loss = model(batch)["lm"]
    torch.testing.assert_close(loss, expected / 3, atol=1e-9, rtol=1e-9)
    loss.backward()
    for name, weight in model.named_parameters():
        last = name.startswith("qformer.blocks.2.text_mlp")  # of the last block's text nobody takes anything
        assert weight.grad is not None and (weight.grad.abs().sum() > 0 or last or "key.bias" in name), name


@BOTH
def test_answers_depend_on_their_own_question_and_image(tmp_path: Path, language: Language) -> None:
    asking = reading(language, tmp_path)
    plain = start_stage2(tiny_stage1(), language()).eval()
    plain.projection.weight.data.mul_(20)
    questions = ["w1 w2?", "w3", "W4 w5 w6 w7!", "w1 w2?"]
    images = [1, 0, 1, 2]
    for model in (asking, plain):
        together = model.answer(pixels(3), questions, BEAMS, images=images)
        alone = [
            model.answer(pixels(3)[image : image + 1], [question], BEAMS)[0]
            for image, question in zip(images, questions, strict=True)
        ]
        assert together == alone
        assert together == model.answer(pixels(3)[images], questions, BEAMS)
        assert len(set(together)) > 1
    asking.tokenizer = None
    with pytest.raises(ValueError, match="questions need the Q-Former's words"):
        asking.answer(pixels(1), ["w1"])


def test_a_model_that_reads_goes_to_a_folder_with_its_words(tmp_path: Path) -> None:
    lm = opt_folder(tmp_path / "lm")
    stage1 = load_stage1(saved_stage1(tmp_path), trains_vision=True)
    model = start_stage2(stage1, load_language(lm, torch.float32), str(lm), reads_question=True).eval()
    model.save_pretrained(tmp_path / "vqa")
    again = load_stage2(tmp_path / "vqa", dtype=torch.float32)
    assert again.config == model.config and again.tokenizer is not None
    assert_equal(again.state_dict(), model.state_dict())
    asked = (pixels(2), ["w1 w2", "w3 w4?"], BEAMS)
    assert again.answer(*asked) == model.answer(*asked)
    with pytest.raises(ValueError, match="no Q-Former that reads the question beside a language model"):
        export_hf(again, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_settings_that_contradict() -> None:
    with pytest.raises(
        ValueError, match="needs text and writes nothing; set its text to true and its writes"
    ):
        Stage2Config(CONFIG.vision, QFORMER, reads_question=True)
    with pytest.raises(ValueError, match="needs text and writes nothing"):
        Stage2Config(CONFIG.vision, replace(QFORMER, text=False), reads_question=True)
