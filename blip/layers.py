"""The pieces every transformer of this house is made of. Post-norm as in BERT: x = norm(x + f(x)).

Shapes: R rows of text, B images (R = n * B, the n texts of one image next to each other), T positions asking,
S positions answering, D width, H heads, C = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KV = tuple[Tensor, Tensor]  # keys and values, each [B, H, S, C]

BERT_EPS = 1e-12


class Attention(nn.Module):
    """Attention whose keys and values are projected once, by the caller, and reused.

    Self:  attn(x, attn.project(x), mask).
    Cross: kv = attn.project(image_tokens); then attn(x, kv) for ITM, for LM and for every decoding step.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        memory_width: int | None = None,
        dropout: float = 0.0,
        eps: float = BERT_EPS,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}; choose a multiple")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width or width, width)
        self.value = nn.Linear(memory_width or width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def project(self, memory: Tensor) -> KV:
        """[B, S, memory width] -> keys and values, each [B, H, S, C]."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def forward(self, x: Tensor, kv: KV, mask: Tensor | None = None) -> Tensor:
        """`x` is [R, T, D], `mask` boolean, True where attending is allowed, broadcastable to [B, H, T, S].

        When `x` has n rows for each row of `kv` (beams, several texts of one image), they are folded into the
        positions that ask: [R, T, D] -> [B, n * T, D]. Keys and values are never copied. R must be n * B.
        """
        drop = self.dropout if self.training else 0.0
        asking = x.unflatten(0, (kv[0].size(0), -1)).flatten(1, 2)  # [B, n * T, D]
        y = F.scaled_dot_product_attention(
            self._split(self.query(asking)), *kv, attn_mask=mask, dropout_p=drop
        )
        y = self.out(y.transpose(1, 2).flatten(2)).view_as(x)  # [R, T, D]
        return self.norm(x + F.dropout(y, drop, self.training))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, S, C]


class MLP(nn.Module):
    """BERT's feed-forward layer with its residual and norm. [R, T, D] -> [R, T, D]."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, eps: float = BERT_EPS):
        super().__init__()
        self.dropout = dropout
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


def at_least_fp32(x: Tensor) -> Tensor:
    """What is normalised, compared or put into a loss has 32 bits or more, whatever autocast computed in."""
    return x if x.dtype == torch.float64 else x.float()


def extend(past: KV | None, kv: KV) -> KV:
    """Append the keys and values of new positions to those of earlier ones."""
    if past is None:
        return kv
    return torch.cat([past[0], kv[0]], 2), torch.cat([past[1], kv[1]], 2)


def padding_mask(mask: Tensor) -> Tensor:
    """[R, S] of 0/1 or bool, 1 = a real token -> [R, 1, 1, S] boolean attention mask."""
    return mask.bool()[:, None, None, :]


def causal_mask(asking: int, answering: int, device: torch.device) -> Tensor:
    """[T, S] boolean: the last `asking` of `answering` positions see themselves and all before them."""
    return torch.ones(asking, answering, dtype=torch.bool, device=device).tril(answering - asking)


def bert_init(module: nn.Module, width: int) -> None:
    """BERT's initialisation of all layers within: zero biases, normal weights of 0.02 at BERT's width, 768.

    A narrower stack begins with larger ones, 0.02 * sqrt(768 / width), so that its layers pass on as much as
    BERT's: with 0.02 at width 96 words that compete ("left", "right") never part.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02 * (768 / width) ** 0.5)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
