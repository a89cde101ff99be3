"""A stage's vision encoder, from weights: frozen and from elsewhere, or trained and among its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from blip.checkpoint import check_fit
from blip.vision import VisionConfig, pretrained_vit
from blip.weights_files import PICKLES, locate, read_tensors
from qformer.encoder import Encoder, encoder_of
from qformer.frozen import Frozen
from qformer.stage1 import Stage1Config
from qformer.stage2 import Stage2Config
from qformer.weights_names import FROZEN, tower_of, tower_to_ours

EVA_SOURCE = "eva_giant_patch14_clip_224.laion400m"  # of EVA_VIT_G, timm's name; or LAVIS' eva_vit_g.pth
CLIP_SOURCE = "vit_large_patch14_clip_quickgelu_224.openai"  # of CLIP_VIT_L
VISION = "vision."  # of the encoder, in a state dict of ours

C = TypeVar("C", Stage1Config, Stage2Config)


def read_vision(source: str | Path) -> dict[str, Tensor]:
    """The weights of a vision encoder in timm's or transformers' names.

    source: a file in timm's or LAVIS' names such as eva_vit_g.pth, a folder that a Blip was saved to, a
    transformers folder or hub name of a BLIP-2, or timm's name of a ViT, see EVA_SOURCE and CLIP_SOURCE.
    """
    if not str(source):
        raise ValueError(
            "the frozen vision encoder is not among these weights; give vision=, the file, folder or timm's "
            f"name that it was trained with, such as eva_vit_g.pth or {EVA_SOURCE}"
        )
    if Path(source).exists() or "/" in str(source) or Path(source).suffix in PICKLES:
        found = read_tensors(locate(source))
        return tower_of(found) or found
    try:
        return pretrained_vit(str(source))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{source} is no file or folder, nor a ViT that timm can find or download: {error}"
        ) from error


def find_tower(
    config: C, tower: dict[str, Tensor], vision: str | Path | None, source: str | Path
) -> tuple[C, dict[str, Tensor]]:
    """The weights of a frozen encoder, which `tower` may be, and the config that says where they are from;
    none where the encoder was trained."""
    if config.trains_vision:
        if vision:
            raise ValueError(
                f"{source} holds the vision encoder that was trained with it; leave vision={vision} out"
            )
        return config, {}
    if tower and not vision:
        return config, tower
    config = replace(config, vision_source=str(vision or config.vision_source))
    return config, read_vision(config.vision_source)


def changed(
    config: C,
    image_size: int | None,
    dropout: float | None,
    trains_vision: bool | None,
    source: str | Path,
) -> C:
    """The config with what is not None. An encoder that was trained, and is frozen now, lies in `source`."""
    trained = config.trains_vision if trains_vision is None else trains_vision
    place = str(source) if config.trains_vision else config.vision_source
    return replace(
        config,
        vision=replace(config.vision, image_size=image_size or config.vision.image_size),
        qformer=config.qformer if dropout is None else replace(config.qformer, dropout=dropout),
        trains_vision=trained,
        vision_source="" if trained else place,
    )


def split_tower(
    weights: Mapping[str, Tensor], tower: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's weights without its encoder's, and these: `tower` if that is frozen."""
    return {k: v for k, v in weights.items() if not k.startswith(VISION)}, tower or tower_of(weights)


def take_tower(
    vision: Encoder, tower: Mapping[str, Tensor], config: VisionConfig, source: str
) -> dict[str, Tensor]:
    """What a stage's state dict holds of an encoder with the weights of `tower`, in outside names.

    Of a frozen one, which takes them here, the sha256. Of a trained one the weights, or nothing where `tower`
    is empty: they are then among the stage's own. Raises ValueError for weights of another encoder.
    """
    wanted = encoder_of(vision).state_dict()
    found = tower_to_ours(wanted.keys(), tower, config)
    if isinstance(vision, Frozen):
        vision.fill(found, source)
        return {FROZEN: vision.digest()}
    if tower:
        check_fit(wanted, found, source)
    return {VISION + name: tensor for name, tensor in found.items()}
