"""BLIP-2: queries that learn to look at what a frozen vision encoder sees, for a frozen language model."""

from qformer.export import export_hf
from qformer.qformer import QFormerConfig
from qformer.stage1 import Stage1
from qformer.stage2 import Stage2
from qformer.weights import load_stage1
from qformer.weights_stage2 import load_stage2

__all__ = ["QFormerConfig", "Stage1", "Stage2", "export_hf", "load_stage1", "load_stage2"]
