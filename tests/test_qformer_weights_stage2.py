"""Stage 2 from folders of ours and files of LAVIS, and everything that can be wrong with them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_qformer_stage2 import (
    BEAMS,
    PROMPTS,
    QUERIES,
    Language,
    assert_same,
    hf_blip2,
    hf_folder,
    opt,
    tiny_stage2,
)
from tiny import pixels, tiny_blip
from tiny_language import OPT_IMAGE, WIDTH, opt_folder, t5_folder
from tiny_qformer import QFORMER, VISION, save_tower, tiny_stage1
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from qformer import export_hf
from qformer.language import CausalLM, load_language
from qformer.stage2 import Stage2, Stage2Config
from qformer.weights_stage2 import load_stage2

# LAVIS

TO_LAVIS = [  # transformers' convert_blip_2_original_to_pytorch.py, the other way round
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^qformer\.", "Qformer.bert."),
    (r"\.attention\.attention\.", ".attention.self."),
    (r"\.crossattention\.attention\.", ".crossattention.self."),
]


def lavis(model: Blip2ForConditionalGeneration, projection: str) -> dict[str, Tensor]:
    found = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in TO_LAVIS:
            name = re.sub(pattern, replacement, name)
        name = name.replace("language_projection", projection)
        if not name.startswith(("vision_model.", "language_model.")):  # frozen, so LAVIS leaves them out
            found[name] = tensor.clone()
    return found


@pytest.mark.parametrize("causal", [True, False])
def test_lavis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """Of LAVIS' files the vision encoder is known by its width: here that of a tiny one."""
    tiny = replace(VISION, hidden=80)
    monkeypatch.setattr("qformer.weights.EVA_VIT_G", tiny)
    theirs = hf_blip2(causal, width=128)
    torch.save({"model": lavis(theirs, "opt_proj" if causal else "t5_proj")}, tmp_path / "blip2.pth")
    tower = tmp_path / "tower"
    theirs.save_pretrained(tower)  # a ViT in transformers' names
    folder = (opt_folder if causal else t5_folder)(tmp_path / "lm")
    ours = load_stage2(tmp_path / "blip2.pth", vision=tower, language=folder, dtype=torch.float32)
    assert ours.config.norm_eps == 1e-5  # LAVIS' own
    assert ours.config.dense_act_fn == (None if causal else "gelu")  # the folder itself has "gelu_new"
    ours.ln_vision.eps = theirs.config.vision_config.layer_norm_eps
    assert_same(ours, theirs)


# Folders


def saved(folder: Path, language: Language = opt) -> tuple[Stage2, Path, Path, Path]:
    """A model, its folder, and the files of its frozen parts."""
    model = tiny_stage2(language)
    tower = folder / "tower.pth"
    save_tower(model, tower)
    lm = (opt_folder if language is opt else t5_folder)(folder / "lm")
    model.config = replace(model.config, vision_source=str(tower), language_source=str(lm))
    model.save_pretrained(folder / "saved")
    return model, folder / "saved", tower, lm


def test_our_folder(tmp_path: Path) -> None:
    model, folder, _, _ = saved(tmp_path)
    again = load_stage2(folder, dtype=torch.float32)
    assert again.config == model.config and not again.training
    assert again.caption(pixels(3), PROMPTS, BEAMS) == model.caption(pixels(3), PROMPTS, BEAMS)
    trained = sum(weight.numel() * 4 for weight in model.parameters())
    assert (folder / "model.safetensors").stat().st_size < trained + 20_000  # no frozen weight is in it
    assert load_stage2(folder).language.lm.dtype == torch.bfloat16  # its sha256 is the same in 16 bits


def test_our_folder_with_parts_from_elsewhere(tmp_path: Path) -> None:
    model, folder, tower, lm = saved(tmp_path)
    tower = tower.rename(tmp_path / "moved.pth")
    given = load_language(lm.rename(tmp_path / "other"), torch.float32)
    again = load_stage2(folder, vision=tower, language=given, dropout=0.2)
    assert again.language is given and again.config.qformer.dropout == 0.2
    assert again.config.vision_source == str(tower)
    torch.testing.assert_close(again.soft_prompt(pixels(2)), model.soft_prompt(pixels(2)))


def test_images_of_another_size(tmp_path: Path) -> None:
    _, folder, _, _ = saved(tmp_path)
    again = load_stage2(folder, image_size=64)
    assert again.config.vision.image_size == 64
    assert again.soft_prompt(torch.randn(2, 3, 64, 64)).shape == (2, QUERIES, WIDTH)


def test_parts_in_a_folder_of_transformers(tmp_path: Path) -> None:
    """A BLIP-2 there holds both frozen parts, also for weights that were trained on from it."""
    theirs, _ = hf_folder(tmp_path / "hf", True)
    model = load_stage2(theirs, dtype=torch.float32)
    assert model.config.vision_source == model.config.language_source == str(theirs)
    model.save_pretrained(tmp_path / "saved")
    again = load_stage2(tmp_path / "saved", dtype=torch.float32)
    assert again.caption(pixels(3), PROMPTS, BEAMS) == model.caption(pixels(3), PROMPTS, BEAMS)
    weights = load_file(theirs / "model.safetensors")
    weights.pop("language_model.model.decoder.layers.1.fc1.weight")
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.decoder\.layers\.1\.fc1\.weight"):
        load_stage2(theirs)


def test_frozen_parts_that_are_others(tmp_path: Path) -> None:
    _, folder, _, _ = saved(tmp_path)
    other = save_tower(tiny_stage1(seed=9), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="belong to a frozen vision whose sha256"):
        load_stage2(folder, vision=other)
    with pytest.raises(ValueError, match=r"belong to a frozen language\.lm whose sha256"):
        load_stage2(folder, language=opt_folder(tmp_path / "otherlm", seed=9))


def test_parts_that_are_missing(tmp_path: Path) -> None:
    model, folder, tower, lm = saved(tmp_path)
    lm.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"does not exist; .*say where it is with language="):
        load_stage2(folder)
    model.config = replace(model.config, language_source="")
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"language model is not among the weights .* give language="):
        load_stage2(folder)
    tower.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        load_stage2(folder, language=tmp_path / "moved")


def test_weights_of_another_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qformer.weights.EVA_VIT_G", replace(VISION, hidden=80))
    theirs = hf_blip2(True, width=128)
    weights = lavis(theirs, "opt_proj")
    tower, lm = tmp_path / "tower", opt_folder(tmp_path / "lm")
    theirs.save_pretrained(tower)

    def load(**changes: Tensor) -> Stage2:
        torch.save({"model": weights | changes}, tmp_path / "blip2.pth")
        return load_stage2(tmp_path / "blip2.pth", vision=tower, language=lm)

    load()
    with pytest.raises(ValueError, match="language model of width 48, but the one given has 32"):
        load(**{"opt_proj.weight": torch.zeros(48, 128), "opt_proj.bias": torch.zeros(48)})
    with pytest.raises(ValueError, match=r"query_tokens|qformer\.queries"):
        load(query_tokens=torch.zeros(1, 7, 96))
    with pytest.raises(ValueError, match=r"unexpected: .*strange"):
        load(strange=torch.zeros(1))
    weights.pop("Qformer.bert.encoder.layer.1.output_query.dense.bias")
    with pytest.raises(ValueError, match=r"missing: .*layer\.1\.output_query\.dense\.bias"):
        load()


def test_a_checkpoint_of_another_query_count(tmp_path: Path) -> None:
    _, folder, _, _ = saved(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"queries": 5', '"queries": 7'))
    with pytest.raises(ValueError, match=r"qformer\.queries \[5, 32\] instead of \[7, 32\]"):
        load_stage2(folder)


def test_other_models_are_told_apart(tmp_path: Path) -> None:
    tiny_blip().save_pretrained(tmp_path / "blip")
    with pytest.raises(ValueError, match="describes a Blip"):
        load_stage2(tmp_path / "blip")
    tiny_stage1().save_pretrained(tmp_path / "stage1")
    with pytest.raises(ValueError, match="describes a Stage1"):
        load_stage2(tmp_path / "stage1")


def test_an_export_needs_a_row_for_the_image_token(tmp_path: Path) -> None:
    model = tiny_stage2(opt)
    assert isinstance(model.language, CausalLM)
    model.language.lm.module.resize_token_embeddings(OPT_IMAGE)
    with pytest.raises(ValueError, match=f"<image> would be token {OPT_IMAGE}, .* none to spare"):
        export_hf(model, tmp_path)


def test_settings_that_contradict() -> None:
    with pytest.raises(ValueError, match="set its text to false"):
        Stage2Config(VISION, QFORMER)
    with pytest.raises(ValueError, match="image_width of the Q-Former is 24, but images have 32"):
        Stage2Config(replace(VISION, width=32), replace(QFORMER, text=False))
