"""Frozen language models behind two methods, against transformers. float32, random weights."""

import json
import pickle
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from tiny_language import (
    OPT_BOS,
    T5_END,
    T5_PAD,
    WIDTH,
    opt_config,
    opt_folder,
    opt_tokenizer,
    prefix,
    t5_config,
    t5_folder,
    t5_tokenizer,
    tiny_opt,
    tiny_t5,
)
from torch import Tensor

from blip.generate import Decoding
from qformer.language import CausalLM, EncoderDecoderLM, load_language
from qformer.texts import CausalTokenizer, EncoderDecoderTokenizer, Texts, split_prefix

CLOSE = 1e-4
GIVEN = ["", "a photo of", "question: what is on the left? answer:", ""]
WANTED = ["a red cat", "the dog", "a bird on the right", "blue"]
BEAMS = Decoding(beams=5, min_length=1, max_length=12)
Language = CausalLM | EncoderDecoderLM


def opt() -> CausalLM:
    return CausalLM(tiny_opt(), CausalTokenizer(opt_tokenizer()))


def t5() -> EncoderDecoderLM:
    return EncoderDecoderLM(tiny_t5(), EncoderDecoderTokenizer(t5_tokenizer()))


BOTH = pytest.mark.parametrize("build", [opt, t5])


def row(texts: Texts, i: int) -> Texts:
    """One row, without its padding."""
    read, written = int(texts.mask[i].sum()), int((texts.labels[i] != -100).nonzero().max()) + 1
    return Texts(texts.ids[i : i + 1, :read], texts.mask[i : i + 1, :read], texts.labels[i : i + 1, :written])


# Words and tensors


def test_what_opt_reads_and_what_counts() -> None:
    """LAVIS blip2_opt.py: [</s> text \\n], targets the same; the prompt's are hidden, then </s> with them."""
    tokenizer = opt_tokenizer()
    texts = CausalTokenizer(tokenizer)(["", "a photo of"], ["a red cat", "the dog on  the\nleft"])
    spelt = tokenizer("a red cat\n")["input_ids"], tokenizer("a photo of the dog on the left\n")["input_ids"]
    hidden = len(tokenizer("a photo of")["input_ids"])
    first, second = [OPT_BOS, *spelt[0]], [OPT_BOS, *spelt[1]]
    assert spelt[0][-1] == opt_config().eos_token_id
    pads = len(second) - len(first)
    assert pads > 0 and texts.mask.tolist() == [[1] * len(first) + [0] * pads, [1] * len(second)]
    assert texts.ids[0, : len(first)].tolist() == first and texts.ids[1].tolist() == second
    assert texts.labels[0].tolist() == first + [-100] * pads
    assert texts.labels[1].tolist() == [-100] * (1 + hidden) + second[1 + hidden :]


def test_what_flan_t5_reads_and_writes() -> None:
    tokenizer = t5_tokenizer()
    texts = EncoderDecoderTokenizer(tokenizer)(["", "a photo of"], ["a red cat", "the dog"])
    assert [int(one) for one in texts.mask.sum(1)] == [1, len(tokenizer("a photo of")["input_ids"])]
    assert texts.ids[0, 0] == T5_END and texts.ids[0, 1] == T5_PAD
    assert texts.ids[1].tolist() == tokenizer("a photo of")["input_ids"]
    longer, shorter = tokenizer("a red cat")["input_ids"], tokenizer("the dog")["input_ids"]
    assert texts.labels.tolist() == [longer, shorter + [-100] * (len(longer) - len(shorter))]
    assert longer[-1] == T5_END


def test_a_text_that_is_cut() -> None:
    end = opt_config().eos_token_id
    cut = CausalTokenizer(opt_tokenizer())([""], ["a red cat on the left"], max_length=4)
    assert cut.ids.shape == (1, 4) and end not in cut.labels
    cut = EncoderDecoderTokenizer(t5_tokenizer())(["a cat of"], ["a red cat on the left"], max_length=3)
    assert cut.ids.shape == cut.labels.shape == (1, 3)
    assert cut.ids[0, -1] == cut.labels[0, -1] == T5_END  # as transformers cuts, and so LAVIS


def test_a_special_token_in_a_caption_is_spelt() -> None:
    texts = CausalTokenizer(opt_tokenizer())(["", ""], ["a </s> cat", "a cat"])
    assert texts.ids[:, 1:].eq(OPT_BOS).sum() == 0


def test_prompts_of_a_causal_model_end_where_writing_begins() -> None:
    ids, mask = CausalTokenizer(opt_tokenizer()).prompts(GIVEN)
    assert mask[:, -1].all() and mask[0].sum() == 1 and ids[0, -1] == OPT_BOS


@BOTH
def test_a_tokenizer_travels_to_a_worker_without_the_weights(build) -> None:  # type: ignore[no-untyped-def]
    lm = build()
    sent = pickle.dumps(lm.tokenizer)
    assert len(sent) < 100_000
    here, there = lm.tokenizer(GIVEN, WANTED), pickle.loads(sent)(GIVEN, WANTED)
    assert torch.equal(here.ids, there.ids) and torch.equal(here.labels, there.labels)


def test_prefixes_are_split_evenly_from_the_first_word_to_the_middle() -> None:
    rng = random.Random(0)
    counts = Counter(len(split_prefix("a b c d e f g h i", rng.random())[0].split()) for _ in range(4000))
    assert counts.keys() == {1, 2, 3, 4}  # words 1 to 9 // 2
    assert all(abs(count - 1000) < 150 for count in counts.values())  # 5.5 standard deviations


@pytest.mark.parametrize(
    ("text", "chance", "parts"),
    [
        ("a red cat sits", 0.0, ("a", "red cat sits")),
        ("a red cat sits", 0.999, ("a red", "cat sits")),
        ("a  red\ncat", 0.999, ("a", "red cat")),
        ("cat", 0.5, ("", "cat")),
        ("", 0.5, ("", "")),
    ],
)
def test_prefix_of(text: str, chance: float, parts: tuple[str, str]) -> None:
    assert split_prefix(text, chance) == parts


# Losses


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all labels that count, one at a time."""
    found = [
        -logits[i, t].double().log_softmax(-1)[labels[i, t]]
        for i in range(len(labels))
        for t in range(labels.size(1))
        if labels[i, t] != -100
    ]
    return torch.stack(found).mean().float()


def test_opt_on_the_soft_prompt_alone() -> None:
    """Against OPT itself, run row by row on embeddings put together here, labels shifted by transformers."""
    lm, theirs = opt(), tiny_opt()
    texts, soft = lm.tokenizer(GIVEN, WANTED), prefix(4)
    logits, losses, counts = lm.logits(soft, texts), [], []
    for i in range(4):
        one = row(texts, i)
        words = theirs.model.decoder.embed_tokens(one.ids)
        labels = torch.cat([torch.full((1, 4), -100), one.labels], 1)
        out = theirs(inputs_embeds=torch.cat([soft[i : i + 1], words], 1), labels=labels)
        torch.testing.assert_close(logits[i, : one.ids.size(1)], out.logits[0, 3:-1], atol=CLOSE, rtol=0)
        losses.append(out.loss)
        counts.append(int((one.labels != -100).sum()))
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(lm.loss(soft, texts), expected, atol=CLOSE, rtol=0)
    torch.testing.assert_close(lm.loss(soft, texts), by_hand(logits, texts.labels), atol=CLOSE, rtol=0)


def test_t5_on_the_soft_prompt_alone() -> None:
    lm, theirs = t5(), tiny_t5()
    texts, soft = lm.tokenizer(GIVEN, WANTED), prefix(4)
    logits = lm.logits(soft, texts)
    for i in range(4):
        one = row(texts, i)
        inputs = torch.cat([soft[i : i + 1], theirs.shared(one.ids)], 1)
        out = theirs(inputs_embeds=inputs, labels=one.labels)
        torch.testing.assert_close(logits[i, : one.labels.size(1)], out.logits[0], atol=CLOSE, rtol=0)
        torch.testing.assert_close(lm.loss(soft[i : i + 1], one), out.loss, atol=CLOSE, rtol=0)
    torch.testing.assert_close(lm.loss(soft, texts), by_hand(logits, texts.labels), atol=CLOSE, rtol=0)


@BOTH
def test_the_loss_reaches_the_soft_prompt_and_no_weight(build) -> None:  # type: ignore[no-untyped-def]
    lm = build()
    soft = prefix(4).requires_grad_()
    lm.train()
    first = lm.loss(soft, lm.tokenizer(GIVEN, WANTED))
    first.backward()
    assert soft.grad is not None and (soft.grad.abs().amax((1, 2)) > 0).all()
    assert not list(lm.parameters()) and not lm.lm.module.training
    assert all(weight.grad is None for weight in lm.lm.module.parameters())
    assert torch.equal(lm.loss(soft, lm.tokenizer(GIVEN, WANTED)), first)  # no dropout, whatever train() says


@BOTH
def test_texts_without_a_label_cost_nothing(build) -> None:  # type: ignore[no-untyped-def]
    lm = build()
    texts = lm.tokenizer(GIVEN[:2], WANTED[:2])
    nothing = Texts(texts.ids, texts.mask, torch.full_like(texts.labels, -100))
    assert lm.loss(prefix(2), nothing) == 0


@BOTH
def test_weights_of_16_bits(build) -> None:  # type: ignore[no-untyped-def]
    """Autocast is left outside: the model computes in the type it has, and the loss is of 32 bits."""
    lm, full = build(), build()
    lm.to(torch.bfloat16)
    texts, soft = lm.tokenizer(GIVEN, WANTED), prefix(4).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = lm.loss(soft, texts)
    assert loss.dtype == torch.float32 and lm.logits(soft, texts).dtype == torch.bfloat16
    loss.backward()
    assert soft.grad is not None and soft.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(full.loss(soft, texts).item(), rel=0.1)


# Writing


def of_transformers(lm: Language, soft: Tensor, prompt: str, **settings: object) -> str:
    """What transformers' own beam search writes after one soft prompt and one prompt."""
    causal = isinstance(lm, CausalLM)
    tokenizer, model = (opt_tokenizer(), tiny_opt()) if causal else (t5_tokenizer(), tiny_t5())
    ids = [OPT_BOS] * causal + tokenizer(prompt)["input_ids"]
    words = model.get_input_embeddings()(torch.tensor([ids]))
    found = model.generate(inputs_embeds=torch.cat([soft, words], 1), do_sample=False, **settings)
    return str(tokenizer.decode(found[0], skip_special_tokens=True)).strip()


@BOTH
@pytest.mark.parametrize("penalty", [1.0, -1.0])
def test_beams_of_a_batch_are_those_of_its_rows(build, penalty: float) -> None:  # type: ignore[no-untyped-def]
    """Prompts of different lengths, so rows are padded; transformers writes each alone."""
    lm, soft = build(), prefix(4)
    settings = {"num_beams": 5, "max_new_tokens": 12, "min_new_tokens": 2, "length_penalty": penalty}
    expected = [of_transformers(lm, soft[i : i + 1], GIVEN[i], **settings) for i in range(4)]
    decoding = Decoding(beams=5, min_length=2, max_length=12, length_penalty=penalty)
    assert lm.generate(soft, GIVEN, decoding) == expected
    assert len(set(expected)) == 4 and len({len(text) for text in expected}) > 1
    alone = [lm.generate(soft[i : i + 1], GIVEN[i : i + 1], decoding)[0] for i in range(4)]
    assert alone == expected


@BOTH
def test_prompts_and_soft_prompts_matter(build) -> None:  # type: ignore[no-untyped-def]
    lm, soft = build(), prefix(2)
    one = lm.generate(soft[:1].expand(2, -1, -1), ["", "a photo of"], BEAMS)
    assert one[0] != one[1]
    assert lm.generate(soft, ["a photo of"] * 2, BEAMS) != [one[1]] * 2


@BOTH
def test_lengths_count_what_is_written(build) -> None:  # type: ignore[no-untyped-def]
    lm = build()
    three = lm.generate(prefix(4), GIVEN, Decoding(min_length=3, max_length=3))
    eight = lm.generate(prefix(4), GIVEN, Decoding(min_length=8, max_length=8))
    assert all(long.startswith(short) and long != short for long, short in zip(eight, three, strict=True))


@BOTH
def test_nucleus_depends_on_the_own_seed_only(build) -> None:  # type: ignore[no-untyped-def]
    lm, soft = build(), prefix(4)
    nucleus = Decoding(top_p=0.9, min_length=2, max_length=8)
    seeds = [7, 8, 2**64 - 1, 7]
    together = lm.generate(soft, GIVEN, nucleus, seeds)
    torch.manual_seed(1)  # nothing is drawn from it
    alone = [lm.generate(soft[i : i + 1], GIVEN[i : i + 1], nucleus, seeds[i : i + 1])[0] for i in range(4)]
    assert together == alone
    same = soft[:1].expand(6, -1, -1)
    assert len(set(lm.generate(same, [""] * 6, nucleus, range(6)))) > 3
    greedy = lm.generate(soft, GIVEN, Decoding(min_length=2, max_length=8))
    assert lm.generate(soft, GIVEN, Decoding(top_p=1e-6, min_length=2, max_length=8), seeds) == greedy


def test_nucleus_draws_by_probability() -> None:
    """The first word of many seeds, against the model's own softmax cut at top_p."""
    lm, soft = opt(), prefix(1)
    logits = lm.logits(soft, Texts(torch.tensor([[OPT_BOS, 9]]), torch.ones(1, 2), torch.zeros(1, 2)))[0, 1]
    chances, words = logits.detach().double().softmax(-1).sort(descending=True)
    inside = chances.cumsum(0) - chances < 0.5
    expected = torch.zeros_like(chances).scatter(0, words[inside], chances[inside] / chances[inside].sum())
    top = opt_tokenizer().decode([int(expected.argmax())])
    nucleus = Decoding(top_p=0.5, top_k=None, min_length=1, max_length=1)
    found = Counter(lm.generate(soft.expand(400, -1, -1), [""] * 400, nucleus, range(400)))
    share = found[top.strip()] / 400
    assert 0.1 < expected.max() < 0.9
    assert share == pytest.approx(float(expected.max()), abs=4 * (0.25 / 400) ** 0.5)


# Loading


@pytest.mark.parametrize(("write", "kind"), [(opt_folder, CausalLM), (t5_folder, EncoderDecoderLM)])
def test_folder(tmp_path: Path, write, kind: type) -> None:  # type: ignore[no-untyped-def]
    folder = write(tmp_path)
    lm = load_language(folder, torch.float32)
    assert isinstance(lm, kind) and lm.width == WIDTH
    theirs = (tiny_opt() if kind is CausalLM else tiny_t5()).state_dict()
    found = lm.lm.module.state_dict()
    assert found.keys() == theirs.keys() and all(torch.equal(found[name], theirs[name]) for name in found)
    soft = prefix(4)
    assert lm.loss(soft, lm.tokenizer(GIVEN, WANTED)).isfinite()
    assert load_language(folder).lm.dtype == torch.bfloat16


def test_lavis_computes_flan_t5_with_another_gelu(tmp_path: Path) -> None:
    folder = t5_folder(tmp_path)
    own, lavis = load_language(folder, torch.float32), load_language(folder, torch.float32, "gelu")
    texts, soft = own.tokenizer(GIVEN, WANTED), prefix(4)
    torch.testing.assert_close(lavis.logits(soft, texts), t5().logits(soft, texts))
    assert not torch.allclose(own.logits(soft, texts), lavis.logits(soft, texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [transformers.GPT2Config, transformers.LlamaConfig])
def test_other_language_models(tmp_path: Path, config: type[transformers.PreTrainedConfig]) -> None:
    """Any of transformers', here with learned and with rotary positions; padding changes nothing."""
    torch.manual_seed(0)
    small = config(
        vocab_size=130,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path)
    opt_tokenizer().save_pretrained(tmp_path)
    lm = load_language(tmp_path, torch.float32)
    assert isinstance(lm, CausalLM)
    texts, soft = lm.tokenizer(GIVEN, WANTED), prefix(4)
    rows = [lm.loss(soft[i : i + 1], row(texts, i)) for i in range(4)]
    counts = (texts.labels != -100).sum(1)
    expected = (torch.stack(rows) * counts).sum() / counts.sum()
    torch.testing.assert_close(lm.loss(soft, texts), expected, atol=CLOSE, rtol=0)
    alone = [lm.generate(soft[i : i + 1], GIVEN[i : i + 1], BEAMS)[0] for i in range(4)]
    assert lm.generate(soft, GIVEN, BEAMS) == alone


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give a folder"):
        load_language(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no tokenizer of a language model"):
        load_language(without(opt_folder(tmp_path / "a"), "tokenizer.json"))
    with pytest.raises(ValueError, match="cannot be read as a language model"):
        load_language(without(opt_folder(tmp_path / "b"), "config.json"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_language(without(opt_folder(tmp_path / "c"), "model.safetensors"))
    with pytest.raises(ValueError, match="which has no dense_act_fn; leave it out"):
        load_language(opt_folder(tmp_path / "d"), dense_act_fn="gelu")


def test_weights_that_are_missing_or_misshapen(tmp_path: Path) -> None:
    wider = opt_config()
    wider.ffn_dim = 80
    wider.save_pretrained(opt_folder(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"cannot be loaded|not as expected"):
        load_language(tmp_path / "a")
    deeper = opt_config()
    deeper.num_hidden_layers = 3
    deeper.save_pretrained(opt_folder(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"missing: .*layers\.2\."):
        load_language(tmp_path / "b")


def test_tokenizers_that_do_not_belong(tmp_path: Path) -> None:
    folder = opt_folder(tmp_path / "a")
    t5_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="no token for a line break"):
        load_language(folder)
    folder = t5_folder(tmp_path / "b")
    spelt = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spelt | {"post_processor": None}))
    with pytest.raises(ValueError, match="puts no end"):
        load_language(folder)
    folder = opt_folder(tmp_path / "c")
    larger = opt_tokenizer().__class__.from_pretrained(folder)
    larger.add_tokens([f"<{i}>" for i in range(20)])
    larger.save_pretrained(folder)
    with pytest.raises(ValueError, match="do not belong together"):
        load_language(folder)


@BOTH
def test_calls_that_do_not_fit(build) -> None:  # type: ignore[no-untyped-def]
    lm = build()
    with pytest.raises(ValueError, match="there are 3 texts for 2 images"):
        lm.generate(prefix(2), [""] * 3, BEAMS)
    with pytest.raises(ValueError, match="nucleus sampling for 2 images has no seeds"):
        lm.generate(prefix(2), ["", ""], Decoding(top_p=0.9))
    with pytest.raises(ValueError, match="has 1 seeds"):
        lm.generate(prefix(2), ["", ""], Decoding(top_p=0.9), [1])


def test_flan_t5_of_old_and_new_files_is_the_same() -> None:
    """What LAVIS changes is a setting, not a weight: the config of transformers keeps it."""
    assert transformers.T5Config(**t5_config("gelu").to_dict()).dense_act_fn == "gelu"
