"""BLIP-2's stage 2 (section 3.3): what the queries saw becomes a soft prompt for a frozen language model.

    frozen vision encoder -> ln_vision -> Q-Former (queries only) -> projection -> frozen language model

The norm, the Q-Former and the projection are trained, with the language model's loss.

Shapes: B images, S pixels, Q queries, T tokens read, U tokens written, D_lm width of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from blip.checkpoint import save_model
from blip.distributed import share
from blip.generate import Decoding
from blip.layers import at_least_fp32, bert_init
from blip.model import IGNORED
from blip.tokenizer import Tokenizer, clean_question
from blip.vision import EVA_VIT_G, VisionConfig, VisionEncoder
from qformer.frozen import Frozen
from qformer.language import ANSWER, CAPTION, LanguageModel
from qformer.qformer import QFormer, QFormerConfig
from qformer.stage1 import Stage1
from qformer.texts import Texts

QUESTION = "Question: {} Answer:"  # BLIP-2 for OPT
SHORT_QUESTION = "Question: {} Short answer:"  # BLIP-2 for FlanT5


@dataclass(frozen=True)
class Stage2Config:
    """Defaults are BLIP-2's, with EVA's ViT-g at 224 px. The language model describes itself."""

    vision: VisionConfig = EVA_VIT_G
    qformer: QFormerConfig = field(default_factory=lambda: QFormerConfig(text=False))
    norm_eps: float = 1e-5  # of the norm of image tokens; Hugging Face's configs ask 1e-6
    vision_source: str = ""  # where the frozen weights are from, for `load_stage2`; "" = it must be told
    language_source: str = ""
    dense_act_fn: str | None = None  # of a T5, where it is not computed with its own, see `load_language`

    def __post_init__(self) -> None:
        if self.qformer.text:
            raise ValueError("the Q-Former of stage 2 only looks at images; set its text to false")
        wide, seen = self.vision.width, self.qformer.image_width
        if wide != seen:
            raise ValueError(f"image_width of the Q-Former is {seen}, but images have {wide}; set it to that")


@dataclass(frozen=True)
class Stage2Batch:
    """What a training step sees: images, and texts of `language.tokenizer` about them."""

    pixels: Tensor  # [B, 3, S, S]
    texts: Texts  # of [B, T] and [B, U]

    def to(self, device: torch.device) -> "Stage2Batch":
        return Stage2Batch(self.pixels.to(device, non_blocking=True), self.texts.to(device))


class Stage2(nn.Module):
    """`vision` and `language` are finished parts and stay as they are; what is between them is trained."""

    tokenizer: Tokenizer | None = None  # words are those of `language.tokenizer`

    def __init__(self, config: Stage2Config, vision: Frozen[VisionEncoder], language: LanguageModel):
        super().__init__()
        self.config, self.vision, self.language = config, vision, language
        self.ln_vision = nn.LayerNorm(config.vision.width, eps=config.norm_eps)
        self.qformer = QFormer(config.qformer)
        self.projection = nn.Linear(config.qformer.width, language.width)
        bert_init(self.projection, config.qformer.width)

    def soft_prompt(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, Q, D_lm], what the language model reads of an image."""
        tokens = self.ln_vision(at_least_fp32(self.vision(pixels)))  # [B, N, image width]
        prompt: Tensor = self.projection(self.qformer.look(tokens))
        return prompt

    @torch.no_grad()
    def caption(
        self,
        pixels: Tensor,
        prompts: str | Sequence[str] = "",
        decoding: Decoding = CAPTION,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """One text per image, its prompt not repeated. `prompts` are one for all images, or one for each.

        Lengths of `decoding` count what is written. `seeds`, one per image, are needed for nucleus. A text
        depends on its image, prompt and seed, never on the rest of the batch (up to rounding).
        """
        each = [prompts] * len(pixels) if isinstance(prompts, str) else prompts
        return self.language.generate(self.soft_prompt(pixels), each, decoding, seeds)

    def answer(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        decoding: Decoding = ANSWER,
        seeds: Sequence[int] | None = None,
        template: str = QUESTION,
    ) -> list[str]:
        """One answer per question; `pixels` [B, 3, S, S]. Questions are cleaned up as LAVIS does."""
        prompts = [template.format(clean_question(question)) for question in questions]
        return self.caption(pixels, prompts, decoding, seeds)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `load_stage2` loads: what is trained; of the frozen parts the sha256 alone."""
        save_model(self, folder)

    # Training

    def forward(self, batch: Stage2Batch) -> dict[str, Tensor]:
        """{"lm"}: the mean cross-entropy, in nats a token, of what is to be written about the images."""
        loss = self.language.loss(self.soft_prompt(batch.pixels), batch.texts)
        words = int((batch.texts.labels != IGNORED).sum())
        return {"lm": loss * share(words, loss.device)}

    def after_step(self) -> None:
        """Called by the trainer after each optimiser step; there is nothing to clamp."""


def start_stage2(
    stage1: Stage1, language: LanguageModel, language_source: str = "", dense_act_fn: str | None = None
) -> Stage2:
    """A Stage2 to be trained: what looks at images is stage 1's, the projection is drawn.

    Stage 1's heads, its words and what only text uses stay behind. The frozen encoder is shared, not copied.
    """
    config = Stage2Config(
        vision=stage1.config.vision,
        qformer=replace(stage1.config.qformer, text=False),
        norm_eps=stage1.config.norm_eps,
        vision_source=stage1.config.vision_source,
        language_source=language_source,
        dense_act_fn=dense_act_fn,
    )
    model = Stage2(config, stage1.vision, language)
    model.ln_vision.load_state_dict(stage1.ln_vision.state_dict())
    theirs = stage1.qformer.state_dict()
    model.qformer.load_state_dict({name: theirs[name] for name in model.qformer.state_dict()})
    return model
