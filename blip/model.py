"""Blip: a vision encoder, the MED and three heads (BLIP figure 2).

Shapes: B images, N image tokens, D width, R = n * B texts, T text positions, E shared embedding, V words.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import losses
from blip.checkpoint import save_model
from blip.distributed import Rows, share
from blip.generate import BEAM_SEARCH, Decoding, Writer, generate
from blip.layers import KV, at_least_fp32, bert_init
from blip.med import MED, MEDConfig
from blip.momentum import Momentum, MomentumConfig
from blip.tokenizer import Tokenizer
from blip.vision import VisionConfig, VisionEncoder

TEMPERATURE_RANGE = (0.001, 0.5)  # BLIP models/blip_pretrain.py
IGNORED = -100  # the label of a token that does not count

Text = tuple[Tensor, Tensor]  # ids and mask
Match = Callable[[Tensor, Tensor, list[KV]], Tensor]  # ids and mask [R, T], image [B] -> ITM logits [R, 2]


@dataclass(frozen=True)
class BlipConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: MEDConfig = field(default_factory=MEDConfig)
    embed: int = 256  # E
    dec_id: int = 30522  # [DEC], first token of the decoder
    enc_id: int = 30523  # [ENC], first token of the image-grounded encoder
    label_smoothing: float = 0.1  # of LM
    negative_floor: float = (
        1e-4  # added to the weight of every ITM negative; raise it when ITM stays at 0.6365
    )
    negative_all_rank: bool = False  # ITM negatives from all processes; BLIP: in retrieval fine-tuning only

    @staticmethod
    def of(size: str, image_size: int = 224) -> "BlipConfig":
        """A size of the paper, e.g. `BlipConfig.of("base", image_size=384)`."""
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
        return replace(SIZES[size], vision=replace(SIZES[size].vision, image_size=image_size))


# BLIP table of sizes: the text stack is BERT-base in both, only the ViT grows.
SIZES = {
    "base": BlipConfig(),
    "large": BlipConfig(vision=VisionConfig(width=1024, depth=24, heads=16, drop_path=0.1)),
}


@dataclass(frozen=True)
class Batch:
    """What a training step sees. Texts start with [CLS]; a captioner's text carries its prompt after it.

    Each image has one text; for LM alone it may have n, next to each other: ids and mask are then [n * B, T].
    """

    pixels: Tensor  # [B, 3, S, S]; for the Q-Former also tokens [B, N, D] that a frozen encoder made before
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 1 = a real token
    image_ids: Tensor  # [B] int64, equal for texts of the same image
    prompt_length: int = 0  # words of the prompt, which LM does not learn
    wrong_ids: Tensor | None = None  # [B, T'] texts made wrong, further ITM negatives of their images
    wrong_mask: Tensor | None = None  # [B, T'], all 0 where a row has none

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class Blip(nn.Module):
    """Vision encoder + MED + ITC, ITM and LM heads; `config.text.reads` and `.writes` say which it has."""

    def __init__(self, config: BlipConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = VisionEncoder(config.vision)
        self.med = MED(config.text, config.vision.width)
        self.heads = nn.ModuleDict()
        if config.text.reads:
            self.heads["vision_proj"] = nn.Linear(config.vision.width, config.embed)
            self.heads["text_proj"] = nn.Linear(config.text.width, config.embed)
            self.heads["itm"] = nn.Linear(config.text.width, 2)
            bert_init(self.heads, config.text.width)
            self.temperature = nn.Parameter(torch.tensor(0.07))
        self.teacher: Momentum | None = None

    # What evaluation and CapFilt ask for

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, D], the class token first."""
        return self.vision(pixels)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit ITC features [B, E]."""
        return self.image_features(self.image_tokens(pixels))

    def image_features(self, image_tokens: Tensor) -> Tensor:
        """Unit ITC features [B, E] of image tokens [B, N, D]."""
        return F.normalize(at_least_fp32(self._head("vision_proj")(image_tokens[:, 0])), dim=-1)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit ITC features [R, E] of texts that start with [CLS]."""
        return F.normalize(at_least_fp32(self._head("text_proj")(self.med.encode(ids, mask)[:, 0])), dim=-1)

    def project_image(self, image_tokens: Tensor) -> list[KV]:
        """[B, N, D] -> the keys and values of every block, for `match_projected`."""
        return self.med.project_image(image_tokens)

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosine of features: [B, E] and [R, E] -> [B, R]."""
        return images @ texts.T

    def match(self, ids: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """ITM logits [R, 2], class 1 = match, of R = n * B texts, those of an image next to each other."""
        return self.match_projected(ids, mask, self.project_image(image_tokens))

    def match_projected(self, ids: Tensor, mask: Tensor, image: list[KV]) -> Tensor:
        """`match` on keys and values that were projected before, by `project_image`."""
        states = self.med.match(begin(ids, self.config.enc_id), mask, image)
        return at_least_fp32(self._head("itm")(states[:, 0]))

    @torch.no_grad()
    def caption(
        self,
        pixels: Tensor,
        prompt: str = "a picture of ",
        decoding: Decoding | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """One caption per image, the prompt not repeated. `seeds` (one per image) are needed for nucleus."""
        if self.tokenizer is None:
            raise ValueError("captions need a tokenizer: Blip(config, tokenizer) or load_blip(folder)")
        image = self.med.project_image(self.image_tokens(pixels))
        start = self.tokenizer.prompt(prompt).to(pixels.device)  # [P]
        ids = generate(self.med, image, start, self.tokenizer.sep, decoding or BEAM_SEARCH, seeds)
        return self.tokenizer.decode(ids[:, len(start) :])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `load_blip` loads; the teacher is left out."""
        save_model(self, folder)

    # Training

    def with_teacher(self, config: MomentumConfig) -> "Blip":
        """Give ITC a momentum teacher that starts as a copy of this model."""
        heads = nn.ModuleDict(
            {name: copy.deepcopy(self._head(name)) for name in ("vision_proj", "text_proj")}
        )
        text = replace(self.config.text, writes=False)
        self.teacher = Momentum(config, copy.deepcopy(self.vision), text, heads, self.config.embed)
        self.teacher.follow(self, decay=0.0)
        self.teacher.train(self.training)
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses of the objectives this model has heads for: itc and itm, lm. Training sums them."""
        tokens = self.image_tokens(batch.pixels)
        image = self.med.project_image(tokens)  # once, for all ITM pairs and for LM
        found: dict[str, Tensor] = {}
        if self.config.text.reads:
            found |= self._itc_itm(batch, tokens, image)
        if self.config.text.writes:
            loss, words = self.lm_loss(batch, image)
            found["lm"] = loss * share(words, batch.ids.device)
        return found

    @torch.no_grad()
    def after_step(self) -> None:
        """Called by the trainer after each optimiser step: clamp the temperature, let the teacher follow."""
        if self.config.text.reads:
            self.temperature.clamp_(*TEMPERATURE_RANGE)
        if self.teacher is not None:
            self.teacher.follow(self)
            self.teacher.steps += 1

    def _itc_itm(self, batch: Batch, tokens: Tensor, image: list[KV]) -> dict[str, Tensor]:
        rows = Rows.of(len(batch.ids), batch.ids.device)
        image_features, text_features = self.image_features(tokens), self.encode_texts(batch.ids, batch.mask)
        batch_ids = rows.gather(batch.image_ids)  # [G]
        if self.teacher is None:
            images, texts = rows.gather_with_grad(image_features), rows.gather_with_grad(text_features)
            ids = (
                batch_ids  # images, texts, ids: the candidates, [C, E] and [C], the batch of all ranks first
            )
        else:
            slow = self.teacher.features(batch.pixels, batch.ids, batch.mask)
            slow_images, slow_texts = rows.gather(slow[0]), rows.gather(slow[1])
            images = torch.cat([slow_images, self.teacher.image_queue])
            texts = torch.cat([slow_texts, self.teacher.text_queue])
            ids = torch.cat([batch_ids, self.teacher.id_queue])
        same = losses.same_image(batch.image_ids, ids)  # [B, C]
        to_text = image_features @ texts.T / self.temperature  # [B, C]
        to_image = text_features @ images.T / self.temperature
        targets = [losses.itc_targets(same)] * 2
        if self.teacher is not None:
            with torch.no_grad():
                seen = slow[0] @ texts.T / self.temperature, slow[1] @ images.T / self.temperature
                targets = [losses.itc_targets(same, logits, self.teacher.alpha) for logits in seen]
            if self.training:  # what is only measured stays out of the queue
                self.teacher.enqueue(slow_images, slow_texts, batch_ids)
        itc = losses.itc_loss(to_text, to_image, *targets)
        itm = self._itm(batch, rows, tokens, image, to_text.detach(), to_image.detach())
        return {"itc": itc * rows.share, "itm": itm * rows.share}

    def _itm(
        self, batch: Batch, rows: Rows, tokens: Tensor, image: list[KV], to_text: Tensor, to_image: Tensor
    ) -> Tensor:
        """Each image with its text and with a hard wrong one, each text with a hard wrong image: 3B pairs;
        and each image with its text made wrong, where the batch has one.

        The wrong ones are of this rank, or of all with `negative_all_rank`; `to_text` and `to_image` [B, C].
        """
        ids, mask, image_ids = batch.ids, batch.mask, batch.image_ids
        candidates = rows.own
        everywhere = self.config.negative_all_rank and len(rows.counts) > 1
        if everywhere:
            ids, mask = rows.gather_texts(ids), rows.gather_texts(mask)  # [G, T]
            image_ids, candidates = rows.gather(image_ids), slice(0, sum(rows.counts))
        same = losses.same_image(batch.image_ids, image_ids)
        floor = self.config.negative_floor
        wrong_text = losses.hard_negatives(to_text[:, candidates], same, floor)  # [B]
        wrong_image = losses.hard_negatives(to_image[:, candidates], same, floor)
        if everywhere:
            wrong = self.med.project_image(rows.gather_with_grad(tokens)[wrong_image])
            own_ids, own_mask = ids[rows.own], mask[rows.own]
        else:
            wrong = [(k[wrong_image], v[wrong_image]) for k, v in image]
            own_ids, own_mask = ids, mask
        texts = (own_ids, own_mask), (ids[wrong_text], mask[wrong_text])
        return itm_of_pairs(self.match_projected, batch, *texts, image, wrong)

    def lm_loss(self, batch: Batch, image: list[KV]) -> tuple[Tensor, int]:
        """LM of the texts on projected images [B], in nats a word, labels smoothed; and how many words."""
        return lm_of_texts(self.med, batch, image, self.config.dec_id, self.config.label_smoothing)

    def _head(self, name: str) -> nn.Module:
        if name not in self.heads:
            raise ValueError(
                f"these weights have no {name} head: a captioner has none; load a pretrained MED or a filter"
            )
        return self.heads[name]


def itm_of_pairs(
    match: Match, batch: Batch, own: Text, wrong_text: Text, image: list[KV], wrong_image: list[KV]
) -> Tensor:
    """ITM of each image with its own text and with a wrong one, of each text with a wrong image, and of each
    image with its text made wrong, where the batch has one. Texts [B, T] of one length, images [B].
    """
    two_ids, two_masks = (
        torch.stack([one, other], 1).flatten(0, 1) for one, other in zip(own, wrong_text, strict=True)
    )  # [2B, T], two texts per image
    pairs = match(two_ids, two_masks, image).unflatten(0, (-1, 2))  # [B, 2, 2]
    unmatched = [pairs[:, 1], match(batch.ids, batch.mask, wrong_image)]
    if batch.wrong_ids is not None and batch.wrong_mask is not None:
        made = batch.wrong_mask.any(1).nonzero()[:, 0]  # [K]
        if len(made):
            seen = [(k[made], v[made]) for k, v in image]
            unmatched.append(match(batch.wrong_ids[made], batch.wrong_mask[made], seen))
    return losses.itm_loss(pairs[:, 0], torch.cat(unmatched))


def lm_of_texts(
    writer: Writer, batch: Batch, image: list[KV], first: int, smoothing: float
) -> tuple[Tensor, int]:
    """LM of the texts, `first` their first id, in nats a word, labels smoothed; and how many words."""
    ids = begin(batch.ids, first)
    states, _ = writer.write(ids[:, :-1], image)  # pads come last: causality already hides them
    targets = lm_targets(ids, batch.mask, batch.prompt_length)  # [B, T - 1]
    counts = targets != IGNORED
    logits = writer.logits(states[counts])
    return losses.lm_loss(logits, targets[counts], smoothing), len(logits)


def lm_targets(ids: Tensor, mask: Tensor, prompt_length: int) -> Tensor:
    """[B, T] ids -> [B, T - 1] next words; padding and the prompt's own words are `IGNORED`."""
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    targets[:, :prompt_length] = IGNORED
    return targets


def begin(ids: Tensor, first: int) -> Tensor:
    """The same texts with another first token."""
    ids = ids.clone()
    ids[:, 0] = first
    return ids
