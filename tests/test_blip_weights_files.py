"""Files and folders of others: every format, damage, code in pickles, the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign_weights import hf_folder, salesforce, salesforce_config
from test_blip_parity import WORDS, assert_same_captioner, hf_config
from tiny import randomize, tiny_blip, tiny_tokenizer
from transformers import BlipForConditionalGeneration

from blip import load_blip
from blip.weights import init_text, init_vision

ROOT = Path(__file__).resolve().parent.parent


def test_every_file_format_of_a_folder(tmp_path: Path) -> None:
    words = tiny_tokenizer(tmp_path / "words")
    theirs = randomize(BlipForConditionalGeneration(hf_config()))
    single, sharded, pickled = (tmp_path / name for name in ("single", "sharded", "pickled"))
    theirs.save_pretrained(single)
    theirs.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    pickled.mkdir()
    (pickled / "config.json").write_text((single / "config.json").read_text())
    old = theirs.state_dict() | {"text_decoder.bert.embeddings.position_ids": torch.arange(20)[None]}
    torch.save(old, pickled / "pytorch_model.bin")
    for folder in (single, sharded, pickled):
        assert_same_captioner(load_blip(folder, tokenizer=words), theirs)
    next(sharded.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"00002.*missing or damaged"):
        load_blip(sharded, tokenizer=words)


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    words = tiny_tokenizer(tmp_path / "words")
    folder = hf_folder(tmp_path / "hf")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for end in (0, 5, 1000, len(content) - 1):
        file.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged"):
            load_blip(folder, tokenizer=words)
    file.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_blip(folder, tokenizer=words)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files of its own folder"):
        load_blip(folder, tokenizer=words)
    with pytest.raises(ValueError, match=r"absent\.pth does not exist"):
        load_blip(tmp_path / "absent.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_blip(tmp_path / "empty")


class Bomb:
    """Pickled, it runs a command when unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    torch.save({"model": {"text_proj.weight": Bomb(trace)}}, folder / "pytorch_model.bin")
    torch.save({"model": {"text_proj.weight": Bomb(trace)}}, tmp_path / "model.pth")
    for source in (folder, tmp_path / "model.pth"):
        with pytest.raises(ValueError, match="is refused"):
            load_blip(source)
        with pytest.raises(ValueError, match=r"is refused|model_type"):
            init_text(tiny_blip(), source)
    with pytest.raises(ValueError, match="is refused"):
        init_vision(tiny_blip(), tmp_path / "model.pth")
    assert not trace.exists()


def test_a_hub_name_is_loaded_from_the_cache_and_its_absence_is_explained(tmp_path: Path) -> None:
    """In another process, since the hub's library reads its settings once. No network is used."""
    folder = tmp_path / "hub" / "models--someone--blip" / "snapshots" / ("0" * 40)
    hf_folder(folder)
    tiny_tokenizer(folder)
    refs = tmp_path / "hub" / "models--someone--blip" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    torch.save(
        {"model": salesforce(randomize(BlipForConditionalGeneration(salesforce_config())))},
        tmp_path / "x.pth",
    )
    code = (
        "from blip import load_blip\n"
        "print(load_blip('someone/blip').config.text.vocab_size)\n"
        f"for source in ('someone/else', {str(tmp_path / 'x.pth')!r}):\n"
        "    try: load_blip(source)\n"
        "    except ValueError as error: print(error)\n"
    )
    settings = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True
    )
    size, absent, no_words = done.stdout.splitlines()
    assert size == str(WORDS)
    assert absent.startswith(
        "someone/else is no local file or folder, and cannot be had from the Hugging Face hub"
    )
    assert "vocabulary" in no_words  # salesforce's files carry none, and there is no network to fetch BERT's
