"""BLIP-2's stage 1 (section 3.2): the Q-Former learns from a frozen vision encoder to see what texts say.

    ITC   the query most like the text, against all texts of the batch; neither has seen the other
    ITM   queries that saw the text, and it them, tell whether they match
    ITG   the text is written by what the queries saw

Shapes: B images, N image tokens, Q queries, R = n * B texts, T text positions, E shared embedding, G pairs of
all processes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import losses
from blip.checkpoint import save_model
from blip.distributed import Rows, share
from blip.layers import KV, at_least_fp32, bert_init
from blip.model import TEMPERATURE_RANGE, Batch, itm_of_pairs, lm_of_texts
from blip.tokenizer import Tokenizer
from blip.vision import EVA_VIT_G, VisionConfig
from qformer.encoder import Encoder, new_encoder
from qformer.qformer import QFormer, QFormerConfig


@dataclass(frozen=True)
class Stage1Config:
    """Defaults are BLIP-2's, with EVA's ViT-g at 224 px."""

    vision: VisionConfig = EVA_VIT_G
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    embed: int = 256  # E
    dec_id: int = 30522  # [DEC], first token of what is written
    norm_eps: float = 1e-5  # of the norm of image tokens; Hugging Face's configs ask 1e-6
    label_smoothing: float = 0.1  # of ITC and ITG
    negative_floor: float = 1e-4  # added to the weight of every ITM negative
    vision_source: str = ""  # where the frozen weights are from, for `load_stage1`; "" = it must be told
    trains_vision: bool = False  # the encoder is trained too, and its weights are in the checkpoint

    def __post_init__(self) -> None:
        if self.qformer.image_width != self.vision.width:
            raise ValueError(
                f"the Q-Former looks at tokens of width {self.qformer.image_width}, but those of the vision "
                f"encoder have {self.vision.width}; set image_width to that"
            )
        if not self.qformer.text:
            raise ValueError("stage 1 needs a Q-Former with text; text: false is for stage 2")
        if not 0 <= self.dec_id < self.qformer.vocab_size:
            raise ValueError(
                f"a vocabulary of {self.qformer.vocab_size} words has no [DEC], which is {self.dec_id}; it "
                "takes one word more than BERT's: vocab_size 30523, or the dec_id of your own vocabulary"
            )


class Stage1(nn.Module):
    """Vision encoder, its norm, the Q-Former and three heads. All is trained, but the encoder only where the
    config says so."""

    def __init__(self, config: Stage1Config, tokenizer: Tokenizer | None = None):
        super().__init__()
        if tokenizer is not None and tokenizer.dec != config.dec_id:
            raise ValueError(
                f"the tokenizer has [DEC] {tokenizer.dec}, the config dec_id {config.dec_id}; give the "
                "vocabulary that the weights were trained with"
            )
        self.config, self.tokenizer = config, tokenizer
        self.vision = new_encoder(config.vision, config.trains_vision)
        self.ln_vision = nn.LayerNorm(config.vision.width, eps=config.norm_eps)
        self.qformer = QFormer(config.qformer)
        self.heads = make_heads(config.qformer.width, config.embed)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    # What evaluation asks for

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S], or what `see` passes, -> normalised [B, N, D], the class token first."""
        return self._normalise(see(self.vision, pixels))

    def project_image(self, image_tokens: Tensor) -> list[KV]:
        """[B, N, D] -> the keys and values that all queries look by, for `match_projected`."""
        return self.qformer.project_image(image_tokens)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit ITC features [B, Q, E], compared with texts by `similarity`."""
        return self.image_features(self.image_tokens(pixels))

    def image_features(self, image_tokens: Tensor) -> Tensor:
        """Unit ITC features [B, Q, E] of image tokens [B, N, D]."""
        return self._features("vision_proj", self.qformer.look(image_tokens))

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit ITC features [R, E] of texts that start with [CLS]."""
        return self._features("text_proj", self.qformer.read(ids, mask)[:, 0])

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosine of features, of the query most like the text: [B, Q, E] and [R, E] -> [B, R]."""
        return similarity(images, texts)

    def match(self, ids: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """ITM logits [R, 2], class 1 = match, of R = n * B texts, those of an image next to each other."""
        return self.match_projected(ids, mask, self.project_image(image_tokens))

    def match_projected(self, ids: Tensor, mask: Tensor, image: list[KV]) -> Tensor:
        """`match` on keys and values that were projected before, by `project_image`."""
        queries, _ = self.qformer.look_projected(image, ids, mask)  # [R, Q, D]
        return at_least_fp32(self.heads["itm"](queries)).mean(1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `load_stage1` loads; of a frozen encoder the sha256 alone."""
        save_model(self, folder)

    # Training

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses itc, itm and, with an LM head, itg. Training sums them. Each image has one text.

        Raises ValueError where the pairs of all processes do not show two different images.
        """
        assert len(batch.ids) == len(batch.pixels), f"{len(batch.ids)} texts for {len(batch.pixels)} images"
        bare = see(self.vision, batch.pixels)  # [B, N, D]
        image = self.project_image(self._normalise(bare))  # once, for all uses
        queries, seen = self.qformer.look_projected(image)
        rows = Rows.of(len(batch.ids), batch.ids.device)
        itc, to_text, to_image = self._itc(batch, rows, self._features("vision_proj", queries))
        itm = self._itm(batch, rows, bare, image, to_text.detach(), to_image.detach())
        found = {"itc": itc * rows.share, "itm": itm * rows.share}
        if self.qformer.lm_head is not None:
            smoothing = self.config.label_smoothing
            itg, words = lm_of_texts(self.qformer, batch, seen, self.config.dec_id, smoothing)
            found["itg"] = itg * share(words, batch.ids.device)
        return found

    @torch.no_grad()
    def after_step(self) -> None:
        """Called by the trainer after each optimiser step. BLIP clamps the temperature, BLIP-2 does not."""
        self.temperature.clamp_(*TEMPERATURE_RANGE)

    def _itc(self, batch: Batch, rows: Rows, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and logits [B, G] of images [B, Q, E] to all texts and of texts to all images."""
        texts = self.encode_texts(batch.ids, batch.mask)  # [B, E]
        to_text = similarity(images, rows.gather_with_grad(texts)) / self.temperature  # [B, G]
        to_image = similarity(rows.gather_with_grad(images), texts).T / self.temperature
        same = losses.same_image(batch.image_ids, rows.gather(batch.image_ids))
        smoothing = self.config.label_smoothing
        targets = (1 - smoothing) * losses.itc_targets(same) + smoothing / same.size(1)
        return losses.itc_loss(to_text, to_image, targets, targets), to_text, to_image

    def _itm(
        self, batch: Batch, rows: Rows, bare: Tensor, image: list[KV], to_text: Tensor, to_image: Tensor
    ) -> Tensor:
        """ITM with hard negatives of all processes; `to_text` and `to_image` [B, G] are logits of ITC."""
        ids, mask = rows.gather_texts(batch.ids), rows.gather_texts(batch.mask)  # [G, T]
        same = losses.same_image(batch.image_ids, rows.gather(batch.image_ids))
        wrong_text = losses.hard_negatives(to_text, same, self.config.negative_floor)  # [B]
        wrong_image = losses.hard_negatives(to_image, same, self.config.negative_floor)
        if len(rows.counts) == 1:
            wrong = [(keys[wrong_image], values[wrong_image]) for keys, values in image]
        else:  # bare tokens travel, those of a frozen encoder without a gradient; they are projected here
            gather = rows.gather_with_grad if self.config.trains_vision else rows.gather
            wrong = self.project_image(self._normalise(gather(bare)[wrong_image]))
        own, other = (ids[rows.own], mask[rows.own]), (ids[wrong_text], mask[wrong_text])
        return itm_of_pairs(self.match_projected, batch, own, other, image, wrong)

    def _normalise(self, bare: Tensor) -> Tensor:
        tokens: Tensor = self.ln_vision(at_least_fp32(bare))
        return tokens

    def _features(self, head: str, states: Tensor) -> Tensor:
        return F.normalize(at_least_fp32(self.heads[head](states)), dim=-1)


def make_heads(width: int, embed: int) -> nn.ModuleDict:
    """Of ITC for images and texts, and of ITM."""
    heads = nn.ModuleDict(
        {
            "vision_proj": nn.Linear(width, embed),
            "text_proj": nn.Linear(width, embed),
            "itm": nn.Linear(width, 2),
        }
    )
    bert_init(heads, width)
    return heads


def see(vision: Encoder, images: Tensor) -> Tensor:
    """Tokens [B, N, D] of pixels [B, 3, S, S]; those that a frozen encoder made before pass as they are."""
    tokens: Tensor = images if images.ndim == 3 else vision(images)
    return tokens


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each text with the query most like it: unit [B, Q, E] and [G, E] -> [B, G]."""
    return torch.einsum("bqe,ge->bgq", images, texts).amax(-1)
