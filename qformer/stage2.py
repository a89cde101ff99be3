"""BLIP-2's stage 2 (section 3.3): what the queries saw becomes a soft prompt for a frozen language model.

    vision encoder -> ln_vision -> Q-Former (queries only) -> projection -> frozen language model

The norm, the Q-Former and the projection are trained, with the language model's loss; to fine-tune on
captions or questions also the encoder. For visual question answering (section 4.3) the Q-Former reads the
question as well: queries and question see each other, so that the queries look for what is asked.

Shapes: B images, S pixels, Q queries, R questions, A answers, T tokens read, U tokens written, D_lm width of
the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from blip.checkpoint import check_fit, save_model
from blip.distributed import share
from blip.generate import Decoding
from blip.layers import at_least_fp32, bert_init
from blip.losses import weighted_lm_loss
from blip.model import IGNORED
from blip.tokenizer import Tokenizer, clean_question
from blip.vision import EVA_VIT_G, VisionConfig, VisionEncoder
from blip.vqa import MAX_QUESTION
from qformer.encoder import Encoder
from qformer.language import ANSWER, CAPTION, LanguageModel
from qformer.qformer import QFormer, QFormerConfig
from qformer.stage1 import Stage1, see
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
    trains_vision: bool = False  # the encoder is trained too, and its weights are in the checkpoint
    reads_question: bool = False  # the Q-Former reads the question, too

    def __post_init__(self) -> None:
        if self.qformer.text and not self.reads_question:
            raise ValueError(
                "the Q-Former of stage 2 only looks at images; set its text to false, or reads_question to "
                "true for one that reads the question"
            )
        if self.reads_question and (not self.qformer.text or self.qformer.writes):
            raise ValueError(
                "a Q-Former that reads questions needs text and writes nothing; set its text to true and its "
                "writes to false"
            )
        wide, seen = self.vision.width, self.qformer.image_width
        if wide != seen:
            raise ValueError(f"image_width of the Q-Former is {seen}, but images have {wide}; set it to that")


@dataclass(frozen=True)
class Asked:
    """A question about each image, and what its answers count; an answer's text repeats its question."""

    ids: Tensor  # [B, T] what the Q-Former reads, in BERT's words, the first [CLS]
    mask: Tensor  # [B, T], 1 = a real token
    weights: Tensor  # [A] float, how much each answer counts
    owner: Tensor  # [A] int64, the question that each answer belongs to

    def to(self, device: torch.device) -> "Asked":
        return Asked(*(field.to(device, non_blocking=True) for field in vars(self).values()))


@dataclass(frozen=True)
class Stage2Batch:
    """What a training step sees: images, and texts of `language.tokenizer` about them."""

    pixels: Tensor  # [B, 3, S, S], or kept tokens [B, N, D] of the frozen encoder
    texts: Texts  # of [B, T] and [B, U], or of [A, T] and [A, U] where something is asked
    asked: Asked | None = None

    def to(self, device: torch.device) -> "Stage2Batch":
        asked = None if self.asked is None else self.asked.to(device)
        return Stage2Batch(self.pixels.to(device, non_blocking=True), self.texts.to(device), asked)


class Stage2(nn.Module):
    """`vision` and `language` are finished parts; the latter stays as it is, what is before it is trained.

    Words are those of `language.tokenizer`; `tokenizer` has those of a Q-Former that reads the question.
    """

    def __init__(
        self,
        config: Stage2Config,
        vision: Encoder,
        language: LanguageModel,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__()
        assert config.trains_vision == isinstance(vision, VisionEncoder), "the config is of another encoder"
        self.config, self.vision, self.language, self.tokenizer = config, vision, language, tokenizer
        self.ln_vision = nn.LayerNorm(config.vision.width, eps=config.norm_eps)
        self.qformer = QFormer(config.qformer)
        self.projection = nn.Linear(config.qformer.width, language.width)
        bert_init(self.projection, config.qformer.width)

    def soft_prompt(
        self,
        pixels: Tensor,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        images: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, 3, S, S] -> [B, Q, D_lm], what the language model reads of an image.

        With questions, ids and mask [R, T] that start with [CLS], [R, Q, D_lm]: what it reads of the image
        that a question is about, `images[r]` of `pixels`, or one question for each. An image is encoded once.
        """
        tokens = self.ln_vision(at_least_fp32(see(self.vision, pixels)))  # [B, N, image width]
        image = self.qformer.project_image(tokens)
        if images is not None:
            image = [(keys[list(images)], values[list(images)]) for keys, values in image]
        prompt: Tensor = self.projection(self.qformer.look_projected(image, ids, mask)[0])
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

    @torch.no_grad()
    def answer(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        decoding: Decoding = ANSWER,
        seeds: Sequence[int] | None = None,
        template: str = QUESTION,
        images: Sequence[int] | None = None,
    ) -> list[str]:
        """One answer per question; `pixels` [B, 3, S, S]. Questions are cleaned up as LAVIS does.

        `images`: as for `soft_prompt`. Of a Q-Former that only looks, each image has one soft prompt for all
        its questions.
        """
        cleaned = [clean_question(question) for question in questions]
        if self.config.reads_question:
            if self.tokenizer is None:
                raise ValueError("questions need the Q-Former's words: Stage2(..., tokenizer)")
            ids, mask = (x.to(pixels.device) for x in self.tokenizer(cleaned, MAX_QUESTION))
            prompt = self.soft_prompt(pixels, ids, mask, images)
        else:
            prompt = self.soft_prompt(pixels)
            prompt = prompt if images is None else prompt[list(images)]
        given = [template.format(question) for question in cleaned]
        return self.language.generate(prompt, given, decoding, seeds)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `load_stage2` loads: what is trained; of the frozen parts the sha256 alone."""
        save_model(self, folder)

    # Training

    def forward(self, batch: Stage2Batch) -> dict[str, Tensor]:
        """{"lm"}: the mean cross-entropy, in nats a token, of what is to be written about the images.

        Where something is asked: of each answer the sum over its tokens times its weight, summed over the
        answers, by the number of questions. That is BLIP's (`blip.vqa`), without smoothing; the paper of
        BLIP-2 does not tell.
        """
        if batch.asked is not None:
            return {"lm": self._answers(batch, batch.asked)}
        loss = self.language.loss(self.soft_prompt(batch.pixels), batch.texts)
        words = int((batch.texts.labels != IGNORED).sum())
        return {"lm": loss * share(words, loss.device)}

    def after_step(self) -> None:
        """Called by the trainer after each optimiser step; there is nothing to clamp."""

    def _answers(self, batch: Stage2Batch, asked: Asked) -> Tensor:
        prompt = self.soft_prompt(batch.pixels, asked.ids, asked.mask)  # [B, Q, D_lm]
        logits = self.language.logits(prompt[asked.owner], batch.texts)  # [A, U, V]
        counts = batch.texts.labels != IGNORED
        weights = asked.weights[:, None].expand_as(counts)[counts]  # [M], of the M tokens that count
        wanted = batch.texts.labels[counts]
        total = weighted_lm_loss(at_least_fp32(logits[counts]), wanted, weights, smoothing=0.0)
        return total / len(asked.ids) * share(len(asked.ids), total.device)


def start_stage2(
    stage1: Stage1,
    language: LanguageModel,
    language_source: str = "",
    dense_act_fn: str | None = None,
    reads_question: bool = False,
) -> Stage2:
    """A Stage2 to be trained: what looks at images is stage 1's, the projection is drawn.

    Stage 1's heads stay behind, and its words and what only text uses, but where the Q-Former is to read the
    question. The encoder is shared, not copied.
    """
    writes = stage1.config.qformer.writes and not reads_question
    config = Stage2Config(
        vision=stage1.config.vision,
        qformer=replace(stage1.config.qformer, text=reads_question, writes=writes),
        norm_eps=stage1.config.norm_eps,
        vision_source=stage1.config.vision_source,
        language_source=language_source,
        dense_act_fn=dense_act_fn,
        trains_vision=stage1.config.trains_vision,
        reads_question=reads_question,
    )
    model = Stage2(config, stage1.vision, language, stage1.tokenizer if reads_question else None)
    model.ln_vision.load_state_dict(stage1.ln_vision.state_dict())
    theirs = stage1.qformer.state_dict()
    model.qformer.load_state_dict({name: theirs[name] for name in model.qformer.state_dict()})
    return model


def let_read(stage2: Stage2, stage1: Stage1) -> Stage2:
    """`stage2` with a Q-Former that reads the question, to be trained: words, positions and the MLPs of text,
    which stage 2 went without, are stage 1's. Encoder and language model are shared, not copied.

    Raises ValueError where the two Q-Formers are not of one shape.
    """
    theirs = stage1.config.qformer
    qformer = replace(
        stage2.config.qformer,
        vocab_size=theirs.vocab_size,
        max_positions=theirs.max_positions,
        text=True,
        writes=False,
    )
    config = replace(stage2.config, qformer=qformer, reads_question=True)
    model = Stage2(config, stage2.vision, stage2.language, stage1.tokenizer)
    both, wanted = stage1.state_dict() | stage2.state_dict(), model.state_dict()
    found = {name: both[name] for name in wanted if name in both}
    check_fit(wanted, found, "stage 1 and stage 2 together")
    model.load_state_dict(found)
    return model
