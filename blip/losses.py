"""The three objectives as pure functions: tensors in, scalar out (BLIP section 3.2).

Shapes: B pairs of the batch, G candidates (the batch, then the queue), R rows of text, V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def same_image(ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """[B], [G] image ids -> [B, G] boolean: candidate g shows the image of row b."""
    return ids[:, None] == candidate_ids[None, :]


def itc_targets(same: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """[B, G] rows that sum to one: all texts of the same image share the mass, softened by the teacher.

    alpha * softmax(teacher) + (1 - alpha) * positives / number of positives, as in ALBEF eq. 6 and
    salesforce/BLIP models/blip_retrieval.py.
    """
    hard = same.float() / same.sum(1, keepdim=True)
    if teacher_logits is None:
        return hard
    return alpha * teacher_logits.softmax(1) + (1 - alpha) * hard


def itc_loss(
    image_to_text: Tensor, text_to_image: Tensor, image_targets: Tensor, text_targets: Tensor
) -> Tensor:
    """Symmetric contrastive loss: mean of two soft cross-entropies, logits and targets each [B, G]."""
    image_targets, text_targets = image_targets.to(image_to_text), text_targets.to(text_to_image)
    return (F.cross_entropy(image_to_text, image_targets) + F.cross_entropy(text_to_image, text_targets)) / 2


@torch.no_grad()
def hard_negatives(logits: Tensor, same: Tensor, floor: float = 1e-4) -> Tensor:
    """For each row draw one candidate of another image, likelier the more similar it looks. [B, G] -> [B].

    Weights softmax(logits) + floor, zero where the image is the same (BLIP models/blip_pretrain.py, whose
    floor is 1e-4), all rows in one call. A higher floor mixes easy negatives in. Raises ValueError when a row
    has no candidate of another image.
    """
    if bool(same.all(1).any()):
        raise ValueError(
            f"hard negatives need a pair of another image for every pair; this batch of {len(logits)} has "
            "none for some: use batches of at least two different images"
        )
    weights = (logits.float().softmax(1) + floor).masked_fill(same, 0.0)
    # NaN weights are an error of multinomial, on a GPU one that ends the process. NaN logits make the loss
    # NaN as well, and there the trainer can say it.
    return torch.multinomial(weights.nan_to_num(1.0), 1)[:, 0]


def itm_loss(matched: Tensor, unmatched: Tensor) -> Tensor:
    """Two-class cross-entropy over all rows: logits [R, 2] of true and of wrong pairs; class 1 = match."""
    labels = torch.cat([matched.new_ones(len(matched)), matched.new_zeros(len(unmatched))]).long()
    return F.cross_entropy(torch.cat([matched, unmatched]), labels)


def lm_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.1) -> Tensor:
    """Mean cross-entropy of the next word over the tokens that count. logits [M, V], targets [M]."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def weighted_lm_loss(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.1) -> Tensor:
    """Sum of the cross-entropies of the next words, each times its weight.

    logits [M, V], targets and weights [M]. Of VQA: salesforce/BLIP models/blip_vqa.py.
    """
    each = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")  # [M]
    return (weights * each).sum()
