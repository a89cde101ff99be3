"""BLIP for visual question answering (BLIP section 5.3): a reader of the question, a writer of the answer.

The reader is a MED that looks at the image, the writer a MED that looks at what was read. Nothing is shared.
The writer sees no padding of a question, in training and in answering. (In salesforce/BLIP and transformers
it does when it answers, so that there an answer depends on the longest question of the batch.)

Shapes: B questions, T positions of the longest one, A answers in training (one or more to a question),
U positions of the longest answer, C candidate answers, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.checkpoint import save_model
from blip.distributed import share
from blip.generate import Decoding, generate, highest
from blip.layers import KV
from blip.losses import weighted_lm_loss
from blip.med import MED, MEDConfig
from blip.model import IGNORED, BlipConfig, begin, lm_targets
from blip.tokenizer import Tokenizer, clean_question
from blip.vision import VisionEncoder

MAX_QUESTION, MAX_ANSWER = 35, 40  # tokens; salesforce/BLIP models/blip_vqa.py, which does not cut answers
AT_ONCE = 16  # questions whose candidates are scored together: with 128 each 1 GB of logits in fp32
ANSWER = Decoding(beams=3, min_length=1, max_length=10)  # as there


@dataclass(frozen=True)
class VqaBatch:
    """What a training step sees: questions about images, and their answers. All texts start with [CLS]."""

    pixels: Tensor  # [B, 3, S, S]
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 1 = a real token
    answer_ids: Tensor  # [A, U]
    answer_mask: Tensor  # [A, U]
    weights: Tensor  # [A] float, how much each answer counts
    owner: Tensor  # [A] int64, the question that each answer belongs to

    def to(self, device: torch.device) -> "VqaBatch":
        return VqaBatch(*(field.to(device, non_blocking=True) for field in vars(self).values()))


class BlipVQA(nn.Module):
    """Vision encoder + reader + writer. `config.text` describes both stacks."""

    def __init__(self, config: BlipConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = VisionEncoder(config.vision)
        self.reader = MED(replace(config.text, reads=True, writes=False), config.vision.width)
        self.writer = MED(replace(config.text, reads=False, writes=True), config.text.width)

    def read(self, pixels: Tensor, ids: Tensor, mask: Tensor, images: Sequence[int] | None = None) -> Tensor:
        """States [B, T, D] of questions, ids and mask [B, T], that start with [CLS].

        Question b is about image b of `pixels`, or about image `images[b]`: an image is encoded once.
        """
        image = self.reader.project_image(self.vision(pixels))
        if images is not None:
            image = [(keys[list(images)], values[list(images)]) for keys, values in image]
        return self.reader.match(begin(ids, self.config.enc_id), mask, image)

    @torch.no_grad()
    def answer(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        decoding: Decoding = ANSWER,
        seeds: Sequence[int] | None = None,
        images: Sequence[int] | None = None,
    ) -> list[str]:
        """One answer per question. `pixels` [B, 3, S, S]; `seeds`, one per question, are for nucleus.

        An answer depends on its question, its image and its seed, never on the rest of the batch (up to
        rounding). Questions are cleaned up as in training. `images`: as for `read`.
        """
        memory, mask = self._remember(pixels, questions, images)
        assert self.tokenizer is not None
        start = torch.tensor([self.config.dec_id], device=pixels.device)
        masked = [*memory, (mask, mask)]
        found = generate(_MaskedWriter(self.writer), masked, start, self.tokenizer.sep, decoding, seeds)
        return self.tokenizer.decode(found[:, 1:])

    @torch.no_grad()
    def rank(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        candidates: tuple[Tensor, Tensor],
        k: int = 128,
        images: Sequence[int] | None = None,
    ) -> list[int]:
        """For each question the number of the best candidate: ids and mask [C, U] that start with [CLS].

        As `rank_answer` of salesforce/BLIP models/blip_vqa.py: of the `k` whose first word is likeliest, the
        one whose words have the smallest loss in sum, labels smoothed as in training. Of equals the first.
        """
        memory, mask = self._remember(pixels, questions, images)
        ids, real = (tensor.to(pixels.device) for tensor in candidates)
        ids = begin(ids, self.config.dec_id)
        first, _ = self.writer.write(ids[:1, :1].expand(len(mask), 1), memory, image_mask=mask)
        odds = self.writer.logits(first[:, 0]).float().softmax(-1)[:, ids[:, 1]]  # [B, C]
        _, chosen = highest(odds, min(k, len(ids)))  # [B, k]
        losses = []
        for start in range(0, len(chosen), AT_ONCE):
            few = slice(start, start + AT_ONCE)
            numbers, seen = chosen[few].flatten(), [(keys[few], values[few]) for keys, values in memory]
            losses.append(self._losses(ids[numbers], real[numbers], seen, mask[few]))
        best = torch.cat(losses).view_as(chosen).argmin(1, keepdim=True)
        return [int(number) for number in chosen.gather(1, best)[:, 0]]

    def _remember(
        self, pixels: Tensor, questions: Sequence[str], images: Sequence[int] | None
    ) -> tuple[list[KV], Tensor]:
        """What the writer sees of questions: keys and values of each block, and the mask [B, T]."""
        if self.tokenizer is None:
            raise ValueError("answers need a tokenizer: BlipVQA(config, tokenizer) or load_vqa(folder)")
        cleaned = [clean_question(question) for question in questions]
        ids, mask = (x.to(pixels.device) for x in self.tokenizer(cleaned, MAX_QUESTION))
        return self.writer.project_image(self.read(pixels, ids, mask, images)), mask

    def _losses(self, ids: Tensor, real: Tensor, memory: list[KV], mask: Tensor) -> Tensor:
        """Cross-entropy of answers, ids and mask `real` [k * B, U], summed over their words: [k * B]."""
        longest = int(real.sum(1).max())
        ids, real = ids[:, :longest], real[:, :longest]
        states, _ = self.writer.write(ids[:, :-1], memory, image_mask=mask)
        targets = lm_targets(ids, real, prompt_length=0)
        counts = targets != IGNORED
        logits = self.writer.logits(states[counts]).float()  # [M, V], of the M words that count
        smoothing = self.config.label_smoothing
        each = F.cross_entropy(logits, targets[counts], label_smoothing=smoothing, reduction="none")  # [M]
        return torch.zeros(targets.shape, device=ids.device).masked_scatter(counts, each).sum(1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `load_vqa` loads."""
        save_model(self, folder)

    # Training

    def forward(self, batch: VqaBatch) -> dict[str, Tensor]:
        """{"lm"}: the cross-entropy of each answer's words, labels smoothed, summed over its words, times its
        weight, summed over the answers, by the number of questions (salesforce/BLIP models/blip_vqa.py).
        """
        memory = self.writer.project_image(self.read(batch.pixels, batch.ids, batch.mask))
        of_each = [(keys[batch.owner], values[batch.owner]) for keys, values in memory]  # [A, H, T, C]
        ids = begin(batch.answer_ids, self.config.dec_id)
        states, _ = self.writer.write(ids[:, :-1], of_each, image_mask=batch.mask[batch.owner])
        targets = lm_targets(ids, batch.answer_mask, prompt_length=0)  # [A, U - 1]
        counts = targets != IGNORED
        weights = batch.weights[:, None].expand_as(targets)[counts]  # [M], of the M words that count
        logits = self.writer.logits(states[counts])  # [M, V]
        total = weighted_lm_loss(logits, targets[counts], weights, self.config.label_smoothing)
        return {"lm": total / len(batch.ids) * share(len(batch.ids), total.device)}

    def after_step(self) -> None:
        """Called by the trainer after each optimiser step; there is nothing to clamp and no teacher."""


class _MaskedWriter:
    """The writer for `generate`; its memory ends with one more pair, twice the mask [B, T] of the questions.

    So the mask goes with keys and values when finished questions leave the batch.
    """

    def __init__(self, writer: MED):
        self.writer = writer

    @property
    def config(self) -> MEDConfig:
        return self.writer.config

    def write(
        self, ids: Tensor, image: list[KV], mask: Tensor | None = None, past: list[KV] | None = None
    ) -> tuple[Tensor, list[KV]]:
        *memory, (image_mask, _) = image
        return self.writer.write(ids, memory, mask, past, image_mask)

    def logits(self, x: Tensor) -> Tensor:
        return self.writer.logits(x)
