"""The vision encoder of a stage: frozen, as BLIP-2 pre-trains both, or trained, to fine-tune."""

from blip.vision import VisionConfig, VisionEncoder
from qformer.frozen import Frozen

Encoder = Frozen[VisionEncoder] | VisionEncoder


def new_encoder(config: VisionConfig, trained: bool) -> Encoder:
    """A trained one is a child like any other: optimiser, checkpoint and `train()` reach it."""
    encoder = VisionEncoder(config)
    return encoder if trained else Frozen(encoder)


def encoder_of(vision: Encoder) -> VisionEncoder:
    """The ViT itself, whoever holds it."""
    return vision.module if isinstance(vision, Frozen) else vision
