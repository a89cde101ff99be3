"""Train a MED: pre-training (ITC + ITM + LM), a captioner (LM) or a filter (ITC + ITM).

The objectives are those the model has heads for: one that reads has ITC and ITM, one that writes has LM.
OUT holds config.yaml, metrics.jsonl, state.pt (to go on after a stop) and, at the end, model/ (a checkpoint
folder).
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blip.checkpoint import save_model
from blip.distributed import rank, world_size
from blip.model import Blip, BlipConfig
from blip.momentum import MomentumConfig
from blip.tokenizer import BERT_VOCABULARY, Tokenizer
from blip.weights import init_text, init_vision, load_blip
from pipelines.alarms import inspect
from pipelines.config import as_tree, config_hash, load_config, parse_args, run_main, save_config
from pipelines.data import DataConfig, training_batches
from pipelines.log import RunLog
from pipelines.optim import OptimConfig, make_optimizer
from pipelines.parallel import checkpoint_activations, optimizer_class, processes, wait_for_all
from pipelines.trainer import STATE_FILE, TrainConfig, resume, train


@dataclass(frozen=True)
class InitConfig:
    """What a new model begins with; without vision and text it is random."""

    tokenizer: str = BERT_VOCABULARY  # a folder with a vocabulary, or a Hugging Face name
    vision: str | None = None  # a timm name or a state dict file; BLIP: deit_base_patch16_224
    text: str | None = None  # a Hugging Face BERT, folder or name; BLIP: bert-base-uncased


@dataclass(frozen=True)
class StartConfig:
    """The trained model that fine-tuning starts from, and what of it: see `load_blip`."""

    weights: str  # a checkpoint folder, a Hugging Face folder or id, a salesforce .pth
    reads: bool | None = None  # false makes a captioner: no ITC, no ITM
    writes: bool | None = None  # false makes a filter: no LM
    image_size: int | None = None  # pixels; position embeddings are resampled
    dropout: float | None = None
    drop_path: float | None = None
    negative_floor: float | None = None  # of ITM, see BlipConfig
    negative_all_rank: bool | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class TrainRun:
    out: str
    data: DataConfig
    train: TrainConfig
    model: BlipConfig | None = None  # a new model; ViT-B/16 with BERT-base where nothing else is said
    init: InitConfig = field(default_factory=InitConfig)  # of a new model
    start: StartConfig | None = None  # or a trained one
    optim: OptimConfig = field(default_factory=OptimConfig)
    momentum: MomentumConfig | None = None  # the teacher of ITC; null: ITC within the batch

    def __post_init__(self) -> None:
        if self.start and (self.model or self.init != InitConfig()):
            raise ValueError(
                "start and model (or init) are both given; a run starts from trained weights or anew"
            )


def build(run: TrainRun) -> Blip:
    """The model of the run, with the weights it starts from, its tokenizer and its teacher."""
    if run.start:
        start = run.start
        model = load_blip(
            start.weights,
            image_size=start.image_size,
            reads=start.reads,
            writes=start.writes,
            dropout=start.dropout,
            drop_path=start.drop_path,
            tokenizer=start.tokenizer,
        )
        if start.negative_floor is not None:
            model.config = replace(model.config, negative_floor=start.negative_floor)
        if start.negative_all_rank is not None:
            model.config = replace(model.config, negative_all_rank=start.negative_all_rank)
    else:
        model = _new(run.model or BlipConfig(), run.init)
    if model.config.text.reads and run.data.texts_per_image > 1:
        raise ValueError(
            f"data.texts_per_image is {run.data.texts_per_image}; it must be 1 but for a captioner "
            "(start.reads: false), as ITC and ITM pair every image with one text"
        )
    if run.momentum is not None:
        model.with_teacher(run.momentum)
    return model


def _new(config: BlipConfig, init: InitConfig) -> Blip:
    tokenizer = Tokenizer(init.tokenizer)
    text = replace(config.text, vocab_size=len(tokenizer))
    model = Blip(replace(config, text=text, dec_id=tokenizer.dec, enc_id=tokenizer.enc), tokenizer)
    if init.vision:
        init_vision(model, init.vision)
    if init.text:
        init_text(model, init.text)
    return model


def check_same_run(run: TrainRun, out: Path) -> None:
    """Refuse to go on with a state that another config made. How long and how fast to train may change."""
    if not (out / STATE_FILE).exists() or not (out / "config.yaml").exists():
        return
    before, now = (_decisive(config) for config in (load_config(TrainRun, out / "config.yaml"), run))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        found = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
        raise ValueError(
            f"{out} holds a run with another config: {found}. Choose another out, or delete {out}"
        )


def _decisive(run: TrainRun) -> dict[str, Any]:
    """Dotted key -> value, of everything that decides what a step computes."""
    train = replace(
        run.train,
        steps=1,
        log_every=1,
        save_every=1,
        sinks=(),
        checkpoint_blocks=0,  # the same steps, for less memory
        checkpoint_backend="torch",
        optimizer_sharding="none",
    )
    return _flat(as_tree(replace(run, out="", train=train, data=replace(run.data, workers=0))))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name, item in tree.items() for k, v in _flat(item, f"{prefix}.{name}".strip(".")).items()
    }


def make_cheaper(model: Blip, config: TrainConfig) -> None:
    """What makes a run cheaper, in memory or time, and computes the same."""
    vision, text = model.vision.vit.blocks, model.med.blocks
    checkpoint_activations(vision, config.checkpoint_blocks, config.checkpoint_backend)
    if config.checkpoint_backend == "torch":  # as BLIP: fairscale for the ViT only
        checkpoint_activations(text, config.checkpoint_blocks)
    if config.compile:
        for block in [*vision, *text]:
            block.compile(dynamic=True)  # texts differ in length


def main(argv: list[str]) -> int:
    run = parse_args(argv, TrainRun)
    with processes(run.train.device) as device:
        out = Path(run.out)
        check_same_run(run, out)
        wait_for_all()  # before the config is written again
        train_run(run, out, device)
    return 0


def train_run(run: TrainRun, out: Path, device: torch.device) -> None:
    """From the first step, or from where a run of the same config in `out` stopped, to the model in `out`."""
    random.seed(run.train.seed)
    torch.manual_seed(run.train.seed)
    model = build(run).to(device)  # alike in all processes; what is drawn later is each one's own
    torch.manual_seed(run.train.seed + rank())
    make_cheaper(model, run.train)
    optimizer = make_optimizer(model, run.optim, optimizer_class(run.train.optimizer_sharding))
    step = resume(out, model, optimizer, device)
    assert model.tokenizer is not None
    batches, rows = training_batches(
        run.data,
        model.tokenizer,
        model.config.vision.image_size,
        run.train.seed,
        step * run.train.accumulate,
        rank(),
        world_size(),
    )
    steps_per_epoch = max(1, rows // (run.data.batch_size * run.train.accumulate * world_size()))
    with open_log(run, out, step) as log:
        if log:
            size = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
            where = f"{device}, {world_size()} processes" if world_size() > 1 else str(device)
            log.say(
                f"{size:.1f}M parameters on {where}, {rows} rows, config {config_hash(run)}, from step {step}"
            )
        train(
            model,
            batches,
            optimizer,
            run.optim,
            run.train,
            log,
            out,
            step,
            steps_per_epoch,
            partial(inspect, model),
        )
    if rank() == 0:
        save_model(model, out / "model")
        print(f"saved {out / 'model'}")


@contextmanager
def open_log(run: TrainRun, out: Path, step: int) -> Iterator[RunLog | None]:
    """The log of the first process, the config beside it; the others have none."""
    if rank() != 0:
        yield None
        return
    save_config(run, out)
    steps, sinks = run.train.steps, run.train.sinks
    with RunLog(out, total_steps=steps, start_step=step, sinks=sinks, config=asdict(run)) as log:
        yield log


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
