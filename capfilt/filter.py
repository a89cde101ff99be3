"""The filter: (image, texts) -> P(match) of ITM and the cosine of ITC (BLIP section 3.3)."""

from collections.abc import Sequence

from torch import Tensor

from blip.model import Blip
from blip.tokenizer import clean_caption


class Filter:
    """A MED fine-tuned with ITC and ITM. One image forward serves all texts of the image."""

    def __init__(self, model: Blip, max_words: int, max_length: int):
        if not model.config.text.reads:
            raise ValueError(
                "these weights cannot score texts (they are a captioner's); give a filter's folder"
            )
        if model.tokenizer is None:
            raise ValueError("these weights came without a tokenizer; texts cannot be read")
        self.model, self.tokenizer = model, model.tokenizer
        self.max_words, self.max_length = max_words, max_length

    def __call__(self, pixels: Tensor, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] and n texts for each image -> P(match) [B, n] in 0..1 and cosine [B, n] in -1..1.

        P(match) is the softmax of the ITM head on [ENC], as in training (not [CLS], as some ports have it).
        """
        count = len(texts[0])
        cleaned = [clean_caption(text, self.max_words) for row in texts for text in row]
        ids, mask = (tensor.to(pixels.device) for tensor in self.tokenizer(cleaned, self.max_length))
        tokens = self.model.image_tokens(pixels)
        itm = self.model.match(ids, mask, tokens).softmax(-1)[:, 1]  # [B * n]
        text = self.model.encode_texts(ids, mask).unflatten(0, (-1, count))  # [B, n, E]
        itc = (text * self.model.image_features(tokens)[:, None]).sum(-1)
        return itm.unflatten(0, (-1, count)), itc
