"""A small real run of CapFilt for tests: shards of the generated world, tiny models of random weights."""

import hashlib
from pathlib import Path

from tiny import randomize

from blip import load_blip
from blip.generate import Decoding
from blip.med import MEDConfig
from blip.model import Blip, BlipConfig
from blip.tokenizer import Tokenizer, write_vocabulary
from blip.vision import VisionConfig
from capfilt.worker import CapFiltConfig
from pipelines.world import WorldConfig, write_world
from pipelines.world_captions import VOCABULARY

WORLD = WorldConfig(seed=3, noisy_rows=48, clean_rows=0, test_rows=0, shard_rows=12, side=48)


def save_models(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A captioner and a filter that know the words of the world; random weights, far from flat."""
    write_vocabulary(VOCABULARY, folder / "words")
    tokenizer = Tokenizer(folder / "words")
    text = MEDConfig(len(tokenizer), width=32, depth=2, heads=4, hidden=64, max_positions=40)
    vision = VisionConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3)
    config = BlipConfig(vision, text, embed=16, dec_id=tokenizer.dec, enc_id=tokenizer.enc)
    randomize(Blip(config, tokenizer), seed).save_pretrained(folder / "med")
    load_blip(folder / "med", reads=False).save_pretrained(folder / "captioner")
    load_blip(folder / "med", writes=False).save_pretrained(folder / "filter")
    return folder / "captioner", folder / "filter"


def make_run(folder: Path) -> tuple[CapFiltConfig, Path]:
    """The config of a run over four shards of 12 rows, and the folder of the shards."""
    write_world(WORLD, folder / "world")
    captioner, judge = save_models(folder / "models")
    decoding = Decoding(top_p=0.9, min_length=5, max_length=14)
    config = CapFiltConfig(str(captioner), str(judge), decoding=decoding, batch_size=5, device="cpu")
    return config, folder / "world" / "noisy"


def hashes(out: Path) -> dict[str, str]:
    """sha256 of every scored shard."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (out / "scored").glob("*.parquet")
    }
