"""The Q-Former (BLIP-2 section 3.1): a few learned queries that look at an image, and text beside them.

    look    queries alone, or with a text, each seeing the other; only queries look at the image    ITC, ITM
    read    text alone                                                                              ITC
    write   causal text that sees the queries, which do not see it                                  ITG

Queries and text share self-attention; each has an MLP of its own. Text sees of an image what the queries took
from it, never the image itself.

Shapes: B images, N image tokens, Q queries, R rows of text (R = n * B, the n texts of an image next to each
other), T positions, D width, V words; keys and values [B, H, S, C].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.layers import BERT_EPS, KV, MLP, Attention, bert_init, causal_mask, extend, padding_mask
from blip.med import LMHead


@dataclass(frozen=True)
class QFormerConfig:
    """Defaults are BLIP-2's: BERT-base with one extra word, [DEC], on the 1408 channels of EVA's ViT-g."""

    vocab_size: int = 30523
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    queries: int = 32  # Q
    cross_every: int = 2  # every so many blocks, the first included, the queries look at the image
    max_positions: int = 512  # of text; queries have no positions
    dropout: float = 0.1
    image_width: int = 1408
    text: bool = True  # can look with a text, read and write; without, it only looks (stage 2)
    writes: bool = True  # with text: has the LM head of ITG; transformers' retrieval models have none

    def __post_init__(self) -> None:
        for name in ("queries", "cross_every", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the Q-Former is {getattr(self, name)}; it must be at least 1")


class QFormerBlock(nn.Module):
    """Shared self-attention; queries look at the image; an MLP for queries and one for text."""

    def __init__(self, config: QFormerConfig, looks: bool):
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.attend = Attention(width, heads, dropout=dropout)
        self.look = Attention(width, heads, config.image_width, dropout=dropout) if looks else None
        self.query_mlp = MLP(width, config.hidden, dropout)
        self.text_mlp = MLP(width, config.hidden, dropout) if config.text else None

    def forward(
        self, x: Tensor, mask: Tensor | None, queries: int, image: KV | None = None, past: KV | None = None
    ) -> tuple[Tensor, KV]:
        """The first `queries` rows of `x` [R, Q + T, D] are queries, the others text -> new x, and the keys
        and values of past and new positions. `image` [B, H, N, C] each, R = n * B."""
        kv = extend(past, self.attend.project(x))
        x = self.attend(x, kv, mask)
        seeing, text = x[:, :queries], x[:, queries:]
        parts = []
        if seeing.size(1):
            if self.look is not None:
                assert image is not None, "queries were given no image to look at"
                seeing = self.look(seeing, image)
            parts.append(self.query_mlp(seeing))
        if text.size(1):
            assert self.text_mlp is not None, "text was given to a block without an MLP for it"
            parts.append(self.text_mlp(text))
        return torch.cat(parts, 1), kv


class QFormer(nn.Module):
    """Queries, words and blocks. What it looks at comes as tokens or, projected once for many uses, as keys
    and values; see `project_image`."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(config.queries, config.width))  # [Q, D]
        self.words = nn.Embedding(config.vocab_size, config.width) if config.text else None
        self.positions = nn.Embedding(config.max_positions, config.width) if config.text else None
        self.norm = nn.LayerNorm(config.width, eps=BERT_EPS)  # of queries and words alike
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            QFormerBlock(config, looks=i % config.cross_every == 0) for i in range(config.depth)
        )
        self.lm_head = LMHead(config.width, config.vocab_size) if config.text and config.writes else None
        bert_init(self, config.width)
        nn.init.normal_(self.queries, std=0.02)  # as in LAVIS; its scale does not matter, a norm comes next

    def project_image(self, image_tokens: Tensor) -> list[KV]:
        """[B, N, image width] -> keys and values of every block that looks, each [B, H, N, C]."""
        looking = [block.look for block in self.blocks if block.look is not None]
        return [look.project(image_tokens) for look in looking if isinstance(look, Attention)]

    def look(self, image_tokens: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What the queries took from [B, N, image width]: [B, Q, D], or [R, Q, D] with texts.

        `ids` and `mask` [R, T] are n = R / B texts for each image; queries and text then see each other.
        """
        return self.look_projected(self.project_image(image_tokens), ids, mask)[0]

    def look_projected(
        self, image: list[KV], ids: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[KV]]:
        """`look` at an image that was projected before; also the keys and values of all positions, by block.

        Those of queries without text, each [B, H, Q, C], are what `write` needs of the image.
        """
        rows = image[0][0].size(0) if ids is None else ids.size(0)
        queries = self._begin(self.queries.expand(rows, -1, -1))  # [R, Q, D]
        x, allowed = queries, None
        if ids is not None:
            if mask is None:
                mask = torch.ones_like(ids)
            x = torch.cat([queries, self._embed(ids)], 1)  # [R, Q + T, D]
            allowed = padding_mask(with_queries(mask, self.config.queries))
        seen = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, allowed, self.config.queries, image[i // self.config.cross_every])
            seen.append(kv)
        return x[:, : self.config.queries], seen

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text alone. ids, mask [R, T] -> [R, T, D]."""
        x, allowed = self._embed(ids), padding_mask(mask)
        for block in self.blocks:
            x, _ = block(x, allowed, queries=0)
        return x

    def write(
        self, ids: Tensor, image: list[KV], mask: Tensor | None = None, past: list[KV] | None = None
    ) -> tuple[Tensor, list[KV]]:
        """Causal text that sees what the queries saw. ids [R, T] after `past` -> states [R, T, D], new past.

        `image` is what `look_projected` kept of the queries alone, `mask` [R, S] covers past and new words,
        1 = may be seen, None where nothing is padded. R = n * B where there is no `past` yet: keys and values
        of the few queries are copied for the texts of an image, and from then on are part of `past`.
        """
        queries = self.config.queries
        before = past if past else [_for_each(kv, len(ids)) for kv in image]
        seen = before[0][0].size(2)  # queries, and words written before
        x = self._embed(ids, first=seen - queries)
        allowed = causal_mask(ids.size(1), seen + ids.size(1), ids.device)[None, None]  # [1, 1, T, S]
        if mask is not None:
            allowed = allowed & padding_mask(with_queries(mask, queries))
        new = []
        for block, kv in zip(self.blocks, before, strict=True):
            x, kv = block(x, allowed, queries=0, past=kv)
            new.append(kv)
        return x, new

    def logits(self, x: Tensor) -> Tensor:
        """States of `write` [..., D] -> next-word logits [..., V]."""
        if self.lm_head is None or self.words is None:
            raise ValueError(
                "this Q-Former has no LM head and cannot write; load weights of a whole stage 1, or train ITG"
            )
        return self.lm_head(x, self.words.weight)

    def _embed(self, ids: Tensor, first: int = 0) -> Tensor:
        """[R, T] ids, the first at position `first` whatever queries come before -> [R, T, D]."""
        if self.words is None or self.positions is None:
            raise ValueError("this Q-Former was made without text (text: false); only `look` at images works")
        places = torch.arange(first, first + ids.size(1), device=ids.device)
        return self._begin(self.words(ids) + self.positions(places))

    def _begin(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(x))


def with_queries(mask: Tensor, queries: int) -> Tensor:
    """[R, T] -> [R, Q + T]: the queries, which come before the text, may always be seen."""
    return F.pad(mask, [queries, 0], value=1)


def _for_each(kv: KV, rows: int) -> KV:
    """[B, H, S, C] -> [R, H, S, C], those of an image for each of its n = R / B texts."""
    keys, values = kv
    times = rows // len(keys)
    return kv if times == 1 else (keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0))
