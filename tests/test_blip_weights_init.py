"""Starting points: the text stack from BERT, the vision encoder from timm's ViT."""

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from foreign_weights import bert, hf_folder, write
from safetensors.torch import load_file, save_file
from test_blip_parity import WORDS, assert_close
from tiny import pixels, randomize, tiny_blip

from blip import Blip
from blip.weights import init_text, init_vision


@torch.no_grad()
def assert_starts_as_bert(ours: Blip, theirs: transformers.BertForMaskedLM) -> None:
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    mask = (ids != 0).long()
    states = theirs.bert(ids, attention_mask=mask).last_hidden_state
    assert_close(ours.med.encode(ids, mask), states)
    state = ours.med.state_dict()
    for name in state:
        if ".write." in name:
            assert torch.equal(state[name], state[name.replace(".write.", ".read.")])


def test_text_starts_from_bert(tmp_path: Path) -> None:
    theirs = bert()
    theirs.save_pretrained(tmp_path / "bert")
    ours, drawn = tiny_blip(), tiny_blip().state_dict()
    init_text(ours, tmp_path / "bert")
    assert_starts_as_bert(ours, theirs)
    states = torch.randn(3, 32)
    assert_close(ours.med.logits(states)[:, : WORDS - 2], theirs.cls(states))
    for name, tensor in ours.state_dict().items():
        if ".look." in name or not name.startswith("med."):
            assert torch.equal(tensor, drawn[name])  # cross-attention is not BERT's, images and heads neither
    assert torch.equal(ours.med.embeddings.word.weight[-2:], drawn["med.embeddings.word.weight"][-2:])


@pytest.mark.parametrize("writes", [True, False])
def test_text_starts_from_older_and_headless_berts(tmp_path: Path, writes: bool) -> None:
    theirs = bert()
    tensors = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in theirs.state_dict().items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    tensors["bert.pooler.dense.weight"] = tensors["cls.seq_relationship.weight"] = torch.zeros(2, 2)
    theirs.bert.save_pretrained(tmp_path / "headless")
    for source in (write(tmp_path / "bert.pth", tensors), tmp_path / "headless"):
        ours = tiny_blip(writes=writes)
        init_text(ours, source)
        assert_starts_as_bert(ours, theirs)


def test_a_bert_that_does_not_fit(tmp_path: Path) -> None:
    theirs = bert()
    theirs.save_pretrained(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(file)
    key = "bert.encoder.layer.1.attention.self.key.bias"
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.1\.attention\.self\.key\.bias"):
        init_text(tiny_blip(), tmp_path / "bert")
    save_file(tensors | {"bert.encoder.layer.2.attention.self.key.bias": torch.zeros(32)}, file)
    with pytest.raises(ValueError, match=r"unexpected: encoder\.layer\.2"):
        init_text(tiny_blip(), tmp_path / "bert")
    bert(words=30).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"has 30 words, the model 48 before"):
        init_text(tiny_blip(), tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    with pytest.raises(ValueError, match="num_attention_heads 8; only 4"):
        init_text(tiny_blip(), tmp_path / "bert")
    with pytest.raises(ValueError, match="model_type 'blip'; only 'bert'"):
        init_text(tiny_blip(), hf_folder(tmp_path / "hf"))


@pytest.mark.parametrize("size", [32, 48])
def test_vision_starts_from_a_file_of_timm(tmp_path: Path, size: int) -> None:
    vit = timm.models.VisionTransformer(img_size=size, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    blip, image = tiny_blip(), pixels(2)
    init_vision(blip, write(tmp_path / "deit.pth", randomize(vit).state_dict()))
    positions = timm.layers.resample_abs_pos_embed(vit.pos_embed, [2, 2], antialias=False)
    vit.set_input_size(img_size=32)
    with torch.no_grad():
        vit.pos_embed.copy_(positions)  # its own resampling smooths, BLIP's does not
        assert_close(blip.image_tokens(image), vit.forward_features(image))


def test_a_vit_that_does_not_fit(tmp_path: Path) -> None:
    vit = timm.models.VisionTransformer(img_size=32, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.2"):
        init_vision(tiny_blip(), write(tmp_path / "deep.pth", vit.state_dict()))
