"""BLIP-2 at its real sizes beside transformers. float32, random weights, one image; for a machine at rest.

Not among the tests that run by default: minutes, and up to 7 GB of memory. To run them:

    python -m pytest -m large tests/test_qformer_real_sizes.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from test_blip_parity import assert_close
from test_qformer_stage2 import assert_same
from tiny import randomize
from tiny_language import (
    OPT_BOS,
    OPT_IMAGE,
    OPT_PAD,
    SPACE,
    T5_END,
    T5_IMAGE,
    T5_PAD,
    opt_tokenizer,
    t5_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from transformers import PreTrainedTokenizerFast as Fast
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from blip.vision import VisionEncoder
from qformer import Stage1, load_stage2
from qformer.stage1 import Stage1Config
from qformer.weights_hf import hf_config
from qformer.weights_names import QUERIES, outside_name, tower_outside

pytestmark = pytest.mark.large
CLOSE = 1e-4
WORDS = torch.tensor([[101, 2003, 2023, 1037, 4937, 102], [101, 1037, 3899, 102, 0, 0]])  # of BERT, two texts


# ---- stage 1, with EVA's ViT-g -------------------------------------------------------------------


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Stage1, Blip2ForImageTextRetrieval]]:
    """Ours, and theirs on the very same 1.2 billion numbers: each is in memory once."""
    with torch.device("meta"):
        ours = Stage1(Stage1Config(norm_eps=1e-6)).eval()  # one eps for both norms there
        theirs = Blip2ForImageTextRetrieval(Blip2Config(**hf_config(ours.config))).eval()
    ours.to_empty(device="cpu")
    encoder = ours.vision.module
    assert isinstance(encoder, VisionEncoder)
    randomize(ours)
    randomize(encoder, seed=1)
    shared: dict[str, Tensor] = {tower_outside(name): weight for name, weight in encoder.named_parameters()}
    for name, weight in ours.named_parameters():
        if outside := outside_name(name, hugging_face=True):
            shared[outside] = weight[None] if outside == QUERIES else weight
    theirs.load_state_dict(shared, assign=True)  # strict
    theirs.embeddings.position_ids = torch.arange(512)[None]  # a buffer that no file holds
    assert not any(tensor.is_meta for tensor in (*theirs.parameters(), *theirs.buffers()))
    yield ours, theirs


@torch.no_grad()
def test_stage_1_with_the_real_encoder(both: tuple[Stage1, Blip2ForImageTextRetrieval]) -> None:
    """Image tokens, what the queries took from them, ITC and ITM."""
    ours, theirs = both
    assert ours.config.vision.tokens == 257
    counts = [
        sum(weight.numel() for weight in part.parameters()) for part in (ours.vision.module, ours.qformer)
    ]
    assert [round(count / 1e6) for count in counts] == [986, 186]
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    mask = (WORDS > 0).long()
    expected = theirs(image, WORDS, mask)  # with the image encoded once, all else follows from its tokens
    tokens = ours.image_tokens(image)
    reached = expected.vision_model_output.last_hidden_state
    error = (tokens - reached).norm(dim=-1) / reached.norm(dim=-1)  # [1, 257]
    assert float(error.max()) < CLOSE and float(reached.std(1).min()) > 0.01  # and no token is another's copy

    queries = theirs.qformer(query_embeds=theirs.query_tokens, encoder_hidden_states=reached)
    assert_close(ours.qformer.look(tokens), queries.last_hidden_state)
    texts = ours.encode_texts(WORDS, mask)
    assert_close(texts, expected.text_embeds)
    itc = ours.similarity(ours.image_features(tokens), texts)
    torch.testing.assert_close(itc, expected.logits_per_image, atol=CLOSE, rtol=0)
    assert abs(float(itc[0, 0] - itc[0, 1])) > 50 * CLOSE

    theirs.vision_model.forward = lambda **_: expected.vision_model_output  # a minute saved for each text
    for row in range(2):
        one = WORDS[row : row + 1], mask[row : row + 1]
        matched = theirs(image, *one, use_image_text_matching_head=True).logits_per_image
        assert_close(ours.match(*one, tokens), matched)
    torch.testing.assert_close(
        ours.match(WORDS, mask, tokens)[1:], matched, atol=CLOSE, rtol=0
    )  # both at once


# ---- stage 2 -------------------------------------------------------------------------------------


def with_words(
    tokenizer: transformers.PreTrainedTokenizerFast, size: int
) -> transformers.PreTrainedTokenizerFast:
    """The tiny tokenizer that can also spell every other word that a model of `size` words may write."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    words, more = tree["model"]["vocab"], [f"w{i}" for i in range(len(tokenizer), size)]
    if isinstance(words, dict):  # BPE
        words |= {SPACE + word: len(tokenizer) + i for i, word in enumerate(more)}
    else:
        words += [["\u2581" + word, -30.0] for word in more]
    return Fast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)), **tokenizer.special_tokens_map)


def opt_125m() -> transformers.OPTConfig:
    """facebook/opt-125m, with the special tokens of the tiny tokenizer; it ends at a line break."""
    return transformers.OPTConfig(
        vocab_size=50272,
        hidden_size=768,
        word_embed_proj_dim=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        ffn_dim=3072,
        max_position_embeddings=2048,
        pad_token_id=OPT_PAD,
        bos_token_id=OPT_BOS,
        eos_token_id=opt_tokenizer()("\n", add_special_tokens=False)["input_ids"][0],
    )


def flan_t5_base() -> transformers.T5Config:
    """google/flan-t5-base, computed with "gelu" as LAVIS does."""
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        num_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=T5_PAD,
        bos_token_id=T5_END,
        eos_token_id=T5_END,
        decoder_start_token_id=T5_PAD,
    )
    config.dense_act_fn = "gelu"
    return config


def blip2(causal: bool) -> Blip2ForConditionalGeneration:
    """The real Q-Former of 32 queries between a small ViT and a language model of real size."""
    config = Blip2Config(
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 32,
            "patch_size": 16,
        },
        text_config=(opt_125m() if causal else flan_t5_base()).to_dict(),
        num_query_tokens=32,
        image_token_index=OPT_IMAGE if causal else T5_IMAGE,
    )
    model = randomize(Blip2ForConditionalGeneration(config))
    with torch.no_grad():
        model.query_tokens.normal_(generator=torch.Generator().manual_seed(1))
        language: Any = model.language_model
        if causal:  # it writes by its words: logits of a few units
            for part in language.modules():
                if isinstance(part, nn.Embedding):
                    part.weight.mul_(0.25)
            return model
        for part in language.modules():
            if isinstance(part, T5LayerNorm):
                part.weight.add_(1)
            if isinstance(part, T5Attention):  # which does not divide its scores
                part.q.weight.div_(8)
        language.shared.weight.normal_(generator=torch.Generator().manual_seed(2))
        # It writes by a matrix of its own, where transformers begins with the words.
        language.lm_head.weight = nn.Parameter(language.shared.weight.flip(1) * 768**-0.5)
    return model


@pytest.mark.parametrize(
    ("causal", "millions"), [(True, 125), (False, 248)], ids=["opt_125m", "flan_t5_base"]
)
def test_stage_2_with_a_real_language_model(
    monkeypatch: pytest.MonkeyPatch, causal: bool, millions: int
) -> None:
    """Soft prompts, logits, losses, and the texts of five beams."""
    theirs = blip2(causal)
    assert round(theirs.language_model.num_parameters() / 1e6) == millions
    tiny = opt_tokenizer if causal else t5_tokenizer
    words = with_words(tiny(), theirs.config.text_config.vocab_size)
    monkeypatch.setattr(f"test_qformer_stage2.{tiny.__name__}", lambda: words)
    monkeypatch.setattr("test_qformer_stage2.QUERIES", 32)
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        words.save_pretrained(folder)
        ours = load_stage2(Path(folder), dtype=torch.float32)
    assert ours.config.qformer.depth == 12 and ours.config.qformer.queries == 32
    assert len(ours.language.tokenizer.decode(torch.tensor([[300, 30_000]]))[0].split()) == 2
    assert_same(ours, theirs)
