"""MED, the multimodal mixture of encoder-decoder (BLIP section 3.1): one text stack, three ways to use it.

    encode   unimodal encoder          [CLS] ...   bidirectional                    ITC
    match    image-grounded encoder    [ENC] ...   bidirectional, looks at image    ITM
    write    image-grounded decoder    [DEC] ...   causal, looks at image           LM

Everything is shared except self-attention, by construction: a block owns one for reading and one for writing.

Shapes: R rows of text (R = n * B, the n texts of an image next to each other), T positions, D width, V words.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.layers import BERT_EPS, KV, MLP, Attention, bert_init, causal_mask, extend, padding_mask


@dataclass(frozen=True)
class MEDConfig:
    """Defaults are BERT-base with BLIP's two extra tokens."""

    vocab_size: int = 30524
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    reads: bool = True  # has the encoders (ITC, ITM); a captioner has none
    writes: bool = True  # has the decoder (LM); a filter has none

    def __post_init__(self) -> None:
        if not (self.reads or self.writes):
            raise ValueError(
                "a MED must read (ITC, ITM), write (LM) or both; reads and writes are both false"
            )


class MEDBlock(nn.Module):
    """Self-attention (its own for reading and for writing), cross-attention to the image, MLP."""

    def __init__(self, config: MEDConfig, image_width: int | None):
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.read = Attention(width, heads, dropout=dropout) if config.reads else None
        self.write = Attention(width, heads, dropout=dropout) if config.writes else None
        self.look = Attention(width, heads, image_width, dropout=dropout) if image_width else None
        self.mlp = MLP(width, config.hidden, dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        image: KV | None,
        causal: bool,
        past: KV | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor, KV]:
        """`x` [R, T, D], `image` [B, H, N, C] each -> new x, keys and values of past and new positions.

        Masks are boolean, True where attending is allowed: `mask` [R or 1, 1, T or 1, S], `image_mask`
        [B, 1, 1, N], None where all of the image may be seen.
        """
        attend = self.write if causal else self.read
        if attend is None:
            raise ValueError(_missing("LM decoder") if causal else _missing("ITC and ITM encoder"))
        kv = extend(past, attend.project(x))
        x = attend(x, kv, mask)
        if image is not None:
            assert self.look is not None, "an image was given to a text encoder without cross-attention"
            x = self.look(x, image, image_mask)
        return self.mlp(x), kv


class Embeddings(nn.Module):
    """Word and absolute position embeddings, norm, dropout. [R, T] -> [R, T, D]."""

    def __init__(self, config: MEDConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=BERT_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        positions = torch.arange(first, first + ids.size(1), device=ids.device)
        return self.dropout(self.norm(self.word(ids) + self.position(positions)))


class LMHead(nn.Module):
    """BERT's prediction head; its output matrix is the word embedding, passed in. [..., D] -> [..., V]."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=BERT_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), words, self.bias)


class MED(nn.Module):
    """The text stack. Image keys and values come from `project_image`, once per image, for every use.

    `image_width` None builds the unimodal encoder alone, without cross-attention (the momentum teacher).
    """

    def __init__(self, config: MEDConfig, image_width: int | None):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(MEDBlock(config, image_width) for _ in range(config.depth))
        self.lm_head = LMHead(config.width, config.vocab_size) if config.writes else None
        bert_init(self, config.width)

    def project_image(self, image_tokens: Tensor) -> list[KV]:
        """[B, N, image width] -> the keys and values of every block, each [B, H, N, C]."""
        found = []
        for block in self.blocks:
            look = block.look
            assert isinstance(look, Attention), "a text encoder without cross-attention cannot see an image"
            found.append(look.project(image_tokens))
        return found

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text alone. ids, mask [R, T] -> [R, T, D]."""
        return self._read(ids, mask, None)

    def match(self, ids: Tensor, mask: Tensor, image: list[KV]) -> Tensor:
        """Text that looks at its image. ids, mask [R, T], image B = R / n -> [R, T, D]."""
        return self._read(ids, mask, image)

    def write(
        self,
        ids: Tensor,
        image: list[KV],
        mask: Tensor | None = None,
        past: list[KV] | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[KV]]:
        """Causal text that looks at its image. ids [R, T] after `past` -> states [R, T, D], new past.

        `mask` [R, S] covers past and new positions, `image_mask` [B, N] what is looked at, 1 = may be seen;
        None where nothing is padded. No image is, but a question that an answer looks at.
        """
        seen = past[0][0].size(2) if past else 0
        x = self.embeddings(ids, first=seen)
        allowed = causal_mask(ids.size(1), seen + ids.size(1), ids.device)[None, None]  # [1, 1, T, S]
        if mask is not None:
            allowed = allowed & padding_mask(mask)
        visible = None if image_mask is None else padding_mask(image_mask)
        new = []
        for i, block in enumerate(self.blocks):
            before = past[i] if past else None
            x, kv = block(x, allowed, image[i], causal=True, past=before, image_mask=visible)
            new.append(kv)
        return x, new

    def logits(self, x: Tensor) -> Tensor:
        """Decoder states [..., D] -> next-word logits [..., V]."""
        if self.lm_head is None:
            raise ValueError(_missing("LM decoder"))
        return self.lm_head(x, self.embeddings.word.weight)

    def _read(self, ids: Tensor, mask: Tensor, image: list[KV] | None) -> Tensor:
        x, allowed = self.embeddings(ids), padding_mask(mask)
        for i, block in enumerate(self.blocks):
            x, _ = block(x, allowed, None if image is None else image[i], causal=False)
        return x


def _missing(part: str) -> str:
    return f"these weights have no {part}; load a checkpoint that has it (a pretrained MED has all three)"
