"""The captioner: images -> k synthetic captions, each with chance of its own (BLIP section 3.3)."""

import hashlib
from collections.abc import Sequence

from torch import Tensor

from blip.generate import Decoding, generate
from blip.model import Blip


class Captioner:
    """A MED fine-tuned with LM. Its image keys and values are projected once and serve all k captions."""

    def __init__(self, model: Blip, decoding: Decoding, prompt: str, captions: int, seed: int):
        if not model.config.text.writes:
            raise ValueError(
                "these weights cannot write captions (they are a filter's); give a captioner's folder"
            )
        if model.tokenizer is None:
            raise ValueError("these weights came without a tokenizer; captions cannot be spelt")
        self.med, self.model, self.tokenizer = model.med, model, model.tokenizer
        self.decoding, self.prompt, self.captions, self.seed = decoding, prompt, captions, seed

    def __call__(self, pixels: Tensor, keys: Sequence[str]) -> list[list[str]]:
        """[B, 3, S, S] and the rows' keys -> k captions for each of the B images, the prompt not repeated."""
        image = self.med.project_image(self.model.image_tokens(pixels))
        start = self.tokenizer.prompt(self.prompt).to(pixels.device)  # [P]
        rounds = []
        for number in range(self.captions):
            seeds = [caption_seed(self.seed, key, number) for key in keys]
            ids = generate(self.med, image, start, self.tokenizer.sep, self.decoding, seeds)
            rounds.append(self.tokenizer.decode(ids[:, len(start) :]))
        return [list(texts) for texts in zip(*rounds, strict=True)]


def caption_seed(seed: int, key: str, number: int) -> int:
    """63 bits that depend on nothing but the run's seed, the row and the number of the caption.

    So a retry, a resume, another shard order or another batch neighbour does not change a caption.
    """
    digest = hashlib.blake2b(f"{seed}|{number}|{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
