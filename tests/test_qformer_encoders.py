"""The frozen encoders of BLIP-2 are timm's without the last block, wherever their weights lie."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from test_blip_parity import assert_close
from tiny import randomize, tiny_config
from tiny_qformer import tiny_stage1
from torch import nn

from blip import Blip
from blip import export_hf as export_blip
from blip.vision import CLIP_VIT_L, EVA_VIT_G, VisionConfig, VisionEncoder
from qformer import load_stage1
from qformer.frozen import Frozen
from qformer.weights import read_vision
from qformer.weights_names import tower_to_ours

SMALL = VisionConfig(image_size=28, patch_size=14, width=64, depth=2, heads=4, hidden=280, final_norm=False)
ENCODERS = {
    "eva_giant_patch14_clip_224": (EVA_VIT_G, SMALL),
    "vit_large_patch14_clip_quickgelu_224": (
        CLIP_VIT_L,
        replace(SMALL, hidden=None, eps=1e-5, pre_norm=True, quick_gelu=True),
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_an_encoder_without_its_last_block_is_timms(tmp_path: Path, name: str) -> None:
    real, small = ENCODERS[name]
    ratio = {"mlp_ratio": 280 / 64} if small.hidden else {}
    theirs = randomize(
        timm.create_model(name, num_classes=7, img_size=28, embed_dim=64, depth=3, num_heads=4, **ratio)
    )
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = VisionEncoder(small).eval()
    tensors = tower_to_ours(ours.state_dict().keys(), read_vision(tmp_path / "vit.pth"), small)
    Frozen(ours).fill(tensors, "here")
    theirs.blocks, theirs.norm = theirs.blocks[:2], nn.Identity()
    image = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert_close(ours(image), theirs.forward_features(image))
    with torch.device("meta"):
        whole = timm.create_model(name).state_dict()
        names = VisionEncoder(real).state_dict()
        found = tower_to_ours(names.keys(), whole, real)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in names.items()}


@pytest.mark.parametrize("source", ["no_such_vit", "no_such_file.pth", "no/such/folder"])
def test_an_encoder_that_is_nowhere_is_an_error(source: str) -> None:
    with pytest.raises(ValueError, match=f"{source} (is no file or folder|does not exist)"):
        read_vision(source)


def test_a_missing_or_strange_weight_of_an_encoder_is_named(tmp_path: Path) -> None:
    model = tiny_stage1()
    model.save_pretrained(tmp_path / "model")
    tower = dict(model.vision.module.vit.state_dict())
    del tower["blocks.0.norm1.bias"]
    torch.save(tower | {"rope": torch.ones(2)}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"missing: vit.blocks.0.norm1.bias; unexpected: vit.rope"):
        load_stage1(tmp_path / "model", vision=tmp_path / "vit.pth")


@pytest.mark.parametrize("vision", [{"pre_norm": True}, {"quick_gelu": True}, {"final_norm": False}])
def test_such_encoders_are_none_of_transformers_blip(tmp_path: Path, vision: dict[str, bool]) -> None:
    config = tiny_config()
    blip = Blip(replace(config, vision=replace(config.vision, **vision)))
    with pytest.raises(ValueError, match="a plain ViT with a final norm"):
        export_blip(blip, tmp_path / "hf")
