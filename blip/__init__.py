"""BLIP's MED family: the model, its weights, its words and its images."""

from blip.image import image_transform
from blip.model import Blip, BlipConfig
from blip.tokenizer import Tokenizer
from blip.vqa import BlipVQA
from blip.weights import load_blip, load_vqa
from blip.weights_hf import export_hf

__all__ = [
    "Blip",
    "BlipConfig",
    "BlipVQA",
    "Tokenizer",
    "export_hf",
    "image_transform",
    "load_blip",
    "load_vqa",
]
