"""BLIP for visual question answering (BLIP section 5.3): a reader of the question, a writer of the answer.

The reader is a MED that looks at the image, the writer a MED that looks at what was read. Nothing is shared.
Shapes: B questions, T positions of the longest question, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from blip.checkpoint import save_model
from blip.generate import Decoding, generate
from blip.med import MED
from blip.model import BlipConfig
from blip.tokenizer import Tokenizer
from blip.vision import VisionEncoder

MAX_QUESTION = 35  # tokens; salesforce/BLIP models/blip_vqa.py
ANSWER = Decoding(beams=3, min_length=1, max_length=10)  # as there


class BlipVQA(nn.Module):
    """Vision encoder + reader + writer. `config.text` describes both stacks."""

    def __init__(self, config: BlipConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = VisionEncoder(config.vision)
        self.reader = MED(replace(config.text, reads=True, writes=False), config.vision.width)
        self.writer = MED(replace(config.text, reads=False, writes=True), config.text.width)

    def read(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """States [B, T, D] of questions, ids and mask [B, T], that start with [CLS], about B images."""
        ids = torch.cat([torch.full_like(ids[:, :1], self.config.enc_id), ids[:, 1:]], 1)
        return self.reader.match(ids, mask, self.reader.project_image(self.vision(pixels)))

    @torch.no_grad()
    def answer(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        decoding: Decoding = ANSWER,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """One answer per question. `pixels` [B, 3, S, S]; `seeds`, one per question, are for nucleus.

        The writer never sees padding (in salesforce/BLIP and transformers it does, so that there an answer
        depends on the longest question of the batch): questions of the same length are answered together.
        """
        if self.tokenizer is None:
            raise ValueError("answers need a tokenizer: BlipVQA(config, tokenizer) or load_vqa(folder)")
        ids, mask = (x.to(pixels.device) for x in self.tokenizer(questions, MAX_QUESTION))
        states, lengths = self.read(pixels, ids, mask), mask.sum(1)  # [B, T, D], [B]
        start = torch.tensor([self.config.dec_id], device=pixels.device)
        answers = [""] * len(questions)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            memory = self.writer.project_image(states[rows, :length])
            places = rows.tolist()
            chosen = None if seeds is None else [seeds[place] for place in places]
            found = generate(self.writer, memory, start, self.tokenizer.sep, decoding, chosen)
            for place, text in zip(places, self.tokenizer.decode(found[:, 1:]), strict=True):
                answers[place] = text
        return answers

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `load_vqa` loads."""
        save_model(self, folder)
