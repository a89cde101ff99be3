"""Both stages to transformers."""

from pathlib import Path

from qformer.stage1 import Stage1
from qformer.stage2 import Stage2
from qformer.weights_hf import export_stage1
from qformer.weights_stage2 import export_stage2


def export_hf(model: Stage1 | Stage2, folder: str | Path) -> None:
    """Write what transformers loads: a stage 1 as Blip2ForImageTextRetrieval, a stage 2 as
    Blip2ForConditionalGeneration, and Blip2Processor with both.

    Raises ValueError for an encoder or a language model that transformers' BLIP-2 cannot have.
    """
    if isinstance(model, Stage1):
        export_stage1(model, folder)
    else:
        export_stage2(model, folder)
