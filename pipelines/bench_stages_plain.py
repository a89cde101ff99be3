"""BLIP-2's two stages as plain loops over transformers' modules, for pipelines/bench_stages.py.

Shapes: B pairs, T positions, N image tokens, Q queries, E shared embedding, D width, V words.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from blip.layers import BERT_EPS
from blip.losses import hard_negatives
from blip.model import IGNORED, Batch
from pipelines.bench_train import TEMPERATURE
from qformer.stage1 import Stage1Config
from qformer.stage2 import Stage2Batch
from qformer.weights_names import LAVIS, outside_name


class PlainStage1(nn.Module):
    """LAVIS blip2_models/blip2_qformer.py, with Blip2ForImageTextRetrieval of transformers taken apart."""

    def __init__(self, config: Stage1Config, retrieval: Any):
        """transformers has no LM head for it: BERT's is added."""
        super().__init__()
        self.config, self.model = config, retrieval
        words, width = config.qformer.vocab_size, config.qformer.width
        settings = BertConfig(vocab_size=words, hidden_size=width, layer_norm_eps=BERT_EPS)
        self.lm_head = BertOnlyMLMHead(settings)
        head = self.lm_head.predictions
        head.decoder.weight, head.decoder.bias = retrieval.embeddings.word_embeddings.weight, head.bias
        self.temp = nn.Parameter(torch.tensor(TEMPERATURE))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses, of images that differ: `batch.image_ids` is not looked at."""
        ids, mask = batch.ids, batch.mask
        image = self.model.vision_model(batch.pixels).last_hidden_state  # [B, N, D]
        to_text = self.similarity(image, ids, mask) / self.temp  # [B, B]
        own = torch.arange(len(ids), device=ids.device)
        smoothing, floor = self.config.label_smoothing, self.config.negative_floor
        rows, columns = (F.cross_entropy(x, own, label_smoothing=smoothing) for x in (to_text, to_text.T))

        same = own[:, None] == own[None]
        wrong_text = hard_negatives(to_text.detach(), same, floor)  # [B]
        wrong_image = hard_negatives(to_text.detach().T, same, floor)
        matches = self.match(
            torch.cat([image, image[wrong_image], image]),  # [3B, N, D]
            torch.cat([ids, ids, ids[wrong_text]]),  # [3B, T]
            torch.cat([mask, mask, mask[wrong_text]]),
        )
        labels = (torch.arange(len(matches), device=ids.device) < len(ids)).long()
        return {
            "itc": (rows + columns) / 2,
            "itm": F.cross_entropy(matches, labels),
            "itg": self.write(image, ids, mask),
        }

    def similarity(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Of each text with the query most like it, [B, B]."""
        seen = self.model.vision_projection(self.look(image))  # [B, Q, E]
        words = self.model.embeddings(ids)
        read = self.model.qformer(words, query_length=0, attention_mask=mask).last_hidden_state
        texts = F.normalize(self.model.text_projection(read[:, 0]), dim=-1)  # [B, E]
        return (F.normalize(seen, dim=-1)[:, None] @ texts[None, :, :, None]).squeeze(-1).amax(-1)

    def match(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """ITM logits [B, 2]: queries and text see each other."""
        states = self.look(image, ids, self.with_queries(mask))
        logits: Tensor = self.model.itm_head(states[:, : self.config.qformer.queries]).mean(1)
        return logits

    def write(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """ITG: queries see queries, text sees them and the text before it."""
        queries = self.config.qformer.queries
        begun = torch.cat([torch.full_like(ids[:, :1], self.config.dec_id), ids[:, 1:]], 1)
        total = queries + ids.size(1)
        causal = torch.ones(total, total, dtype=torch.bool, device=ids.device).tril()
        causal[:queries, :queries] = True
        seen = causal & self.with_queries(mask).bool()[:, None, None]  # [B, 1, Q + T, Q + T]
        words = self.lm_head(self.look(image, begun, seen)[:, queries:-1])  # [B, T - 1, V]
        wanted = begun.masked_fill(mask == 0, IGNORED)[:, 1:]
        smoothing = self.config.label_smoothing
        return F.cross_entropy(words.flatten(0, 1), wanted.flatten(), label_smoothing=smoothing)

    def look(self, image: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """States of queries and text [B, Q + T, D]."""
        queries = self.model.query_tokens.expand(len(image), -1, -1)
        states: Tensor = self.model.qformer(
            query_embeds=queries if ids is None else self.model.embeddings(ids, query_embeds=queries),
            query_length=queries.size(1),
            attention_mask=mask,
            encoder_hidden_states=image,
        ).last_hidden_state
        return states

    def with_queries(self, mask: Tensor) -> Tensor:
        """[B, T] -> [B, Q + T]."""
        return torch.cat([mask.new_ones(len(mask), self.config.qformer.queries), mask], 1)


class PlainStage2(nn.Module):
    """Blip2ForConditionalGeneration of transformers as it is, given what a Stage2Batch holds."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, batch: Stage2Batch) -> dict[str, Tensor]:
        ids, labels, config = batch.texts.ids, batch.texts.labels, self.model.config
        image = ids.new_full((len(ids), config.num_query_tokens), config.image_token_index)
        if config.use_decoder_only_language_model:
            labels = torch.cat([torch.full_like(image, IGNORED), labels], 1)
        mask = torch.cat([torch.ones_like(image), batch.texts.mask], 1)
        return {"lm": self.model(batch.pixels, torch.cat([image, ids], 1), mask, labels=labels).loss}


def plain_name(name: str) -> str:
    """A trained weight of ours by its name in the plain loop."""
    if name == "temperature":
        return "temp"
    if name.startswith("projection."):
        return f"model.language_{name}"
    if name.startswith("qformer.lm_head."):
        return f"lm_head.{str(outside_name(name, hugging_face=False)).removeprefix(f'{LAVIS}cls.')}"
    return f"model.{outside_name(name, hugging_face=True)}"
