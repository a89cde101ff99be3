"""Train a MED: pre-training (ITC + ITM + LM), a captioner (LM) or a filter (ITC + ITM).

The objectives are those the model has heads for: model.text.reads gives ITC and ITM, model.text.writes gives LM.
OUT holds config.yaml, metrics.jsonl, state.pt (to go on after a stop) and, at the end, model/ (a checkpoint folder).
"""

import random
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from blip.checkpoint import save_model
from blip.model import Blip, BlipConfig
from blip.momentum import MomentumConfig
from blip.tokenizer import Tokenizer
from blip.weights import init_text, init_vision, load_blip
from pipelines.config import config_hash, parse_args, run_main, save_config
from pipelines.data import DataConfig, training_batches
from pipelines.log import RunLog
from pipelines.optim import OptimConfig, make_optimizer
from pipelines.parallel import checkpoint_activations, pick_device
from pipelines.trainer import TrainConfig, resume, train


@dataclass(frozen=True)
class InitConfig:
    """Where the weights come from. `blip` alone, or vision and text apart, or none: random."""

    blip: str | None = None  # a checkpoint folder, a Hugging Face folder or id, a salesforce .pth
    vision: str | None = None  # a timm name or a state dict file; BLIP: deit_base_patch16_224
    text: str | None = None  # a Hugging Face BERT; BLIP: bert-base-uncased
    tokenizer: str | None = None  # a folder or name; by default that of `blip`, else bert-base-uncased


@dataclass(frozen=True)
class TrainRun:
    out: str
    data: DataConfig
    train: TrainConfig
    model: BlipConfig = field(default_factory=BlipConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    momentum: MomentumConfig | None = None  # null: ITC within the batch


def build(run: TrainRun) -> Blip:
    """The model of the run, with the weights it starts from and its tokenizer."""
    if run.init.blip:
        text = run.model.text
        model = load_blip(run.init.blip, tokenizer=run.init.tokenizer, image_size=run.model.vision.image_size)
        model = model.keep(reads=text.reads, writes=text.writes)
    else:
        tokenizer = Tokenizer(run.init.tokenizer) if run.init.tokenizer else Tokenizer()
        text = replace(run.model.text, vocab_size=len(tokenizer))
        config = replace(run.model, text=text, dec_id=tokenizer.dec, enc_id=tokenizer.enc)
        model = Blip(config, tokenizer)
        if run.init.vision:
            init_vision(model, run.init.vision)
        if run.init.text:
            init_text(model, run.init.text)
    if run.momentum is not None and run.model.text.reads:
        model.with_teacher(run.momentum)
    return model


def main(argv: list[str]) -> int:
    run = parse_args(argv, TrainRun)
    out = Path(run.out)
    random.seed(run.train.seed)
    torch.manual_seed(run.train.seed)
    device = pick_device(run.train.device)
    model = build(run).to(device)
    if run.train.checkpoint_blocks:
        checkpoint_activations(model.vision.vit.blocks, run.train.checkpoint_blocks)
        checkpoint_activations(model.med.blocks, run.train.checkpoint_blocks)
    optimizer = make_optimizer(model, run.optim)
    step = resume(out, model, optimizer, device)
    save_config(run, out)
    assert model.tokenizer is not None
    batches, rows = training_batches(
        run.data, model.tokenizer, model.config.vision.image_size, run.train.seed, step * run.train.accumulate
    )
    with RunLog(out, total_steps=run.train.steps, start_step=step, sinks=run.train.sinks, config=asdict(run)) as log:
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.say(f"{size / 1e6:.1f}M parameters on {device}, {rows} rows, config {config_hash(run)}, from step {step}")
        train(model, batches, optimizer, run.optim, run.train, log, out, step, rows)
    save_model(model, out / "model")
    print(f"saved {out / 'model'}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
