"""A step of pre-training, forward and backward, here and as a plain loop over transformers' BLIP modules.

Both sides have the same weights, images and captions, draw the same hard negatives and compute the same three
losses, ITC + ITM + LM; they are timed only after losses and gradients agreed. On both sides

- dropout and stochastic depth are 0, since no two sides would drop the same;
- ITC is within the batch, without momentum teacher and queue. A teacher is one more forward of images and
  texts, much the same on both sides: with one, the ratio is nearer to 1;
- the optimiser's step is left out.

The plain loop is salesforce/BLIP models/blip_pretrain.py: captions padded to 30 tokens, a pass of the text
encoder for the true pairs and one for the wrong pairs, each with image tokens of its own, and the decoder.
Where it is slower than it must be, we do not follow it: there is no mask for images, whose tokens all count,
and the negatives of all rows are drawn at once.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip import Blip, BlipConfig
from blip.model import IGNORED, Batch
from blip.weights_names import outside_names
from pipelines.bench_sides import Result, Work, draw_weights, pictures, race
from pipelines.parallel import Precision, autocast, pick_device

CLS, SEP, FIRST_WORD = 101, 102, 1996  # of bert-base-uncased
TEMPERATURE = 0.07
LOSS_CLOSE = 1e-4
GRADIENT_CLOSE = 1e-3  # of the norm of a weight's gradient
NO_GRADIENT = 1e-7  # of the norm of all gradients: rounding, where a gradient is 0, as of keys' biases
PEAK_TFLOPS = {  # dense bf16, from NVIDIA's data sheets, by torch's name; a slice (MIG) has another
    "NVIDIA H200": 989.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
}


@dataclass(frozen=True)
class BenchTrainConfig:
    model: BlipConfig = field(default_factory=lambda: BlipConfig.of("base"))
    batch: int = 8  # images, with a caption each
    words: tuple[int, int] = (6, 18)  # of a caption, the fewest and the most; [CLS] and [SEP] come on top
    padding: int = 30  # tokens of every caption in the plain loop, as in BLIP; here the longest of the batch
    device: str = "cpu"
    precision: Precision = "fp32"  # of what is timed; both sides are compared in fp32
    peak_tflops: float | None = None  # of the device in dense bf16; null: as known, or not told

    def __post_init__(self) -> None:
        fewest, most = self.words
        if not 1 <= fewest <= most <= self.padding - 2:
            raise ValueError(
                f"words is [{fewest}, {most}]; it must be the fewest and the most words of a caption, "
                f"between 1 and padding - 2 = {self.padding - 2}"
            )
        positions = self.model.text.max_positions
        if self.padding > positions:
            raise ValueError(
                f"padding is {self.padding}; model.text.max_positions allows at most {positions}"
            )
        if self.batch < 2:
            raise ValueError(
                f"batch is {self.batch}; it must be at least 2: a wrong pair needs another image"
            )
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops is {self.peak_tflops}; it must be above 0, or null")


class PlainBlip(nn.Module):
    """The plain loop. transformers cannot share weights as a MED does: each of its text stacks has a copy.

    Shapes: B pairs, T positions, N image tokens, D width. Modules are named as in salesforce/BLIP.
    """

    def __init__(self, config: BlipConfig, retrieval: Any, captioner: Any):
        """Takes BlipForImageTextRetrieval and BlipForConditionalGeneration of transformers apart."""
        super().__init__()
        self.config = config
        self.vision_model, self.text_encoder = retrieval.vision_model, retrieval.text_encoder
        self.vision_proj, self.text_proj = retrieval.vision_proj, retrieval.text_proj
        self.itm_head = retrieval.itm_head
        self.text_decoder = captioner.text_decoder
        self.temp = nn.Parameter(torch.tensor(TEMPERATURE))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses, of images that differ: `batch.image_ids` is not looked at."""
        ids, mask = batch.ids, batch.mask
        image = self.vision_model(batch.pixels).last_hidden_state  # [B, N, D]
        text = self.text_encoder(ids, attention_mask=mask).last_hidden_state  # [B, T, D]
        image_features = F.normalize(self.vision_proj(image[:, 0]), dim=-1)
        text_features = F.normalize(self.text_proj(text[:, 0]), dim=-1)
        to_text = image_features @ text_features.T / self.temp  # [B, B]
        to_image = text_features @ image_features.T / self.temp
        own = torch.arange(len(ids), device=ids.device)
        itc = (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2

        wrong_text, wrong_image = self.hard_negatives(to_text), self.hard_negatives(to_image)  # [B]
        ids = ids.clone()
        ids[:, 0] = self.config.enc_id
        true = self.text_encoder(ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        wrong = self.text_encoder(
            torch.cat([ids, ids[wrong_text]]),  # [2B, T]
            attention_mask=torch.cat([mask, mask[wrong_text]]),
            encoder_hidden_states=torch.cat([image[wrong_image], image]),
        ).last_hidden_state
        matches = self.itm_head(torch.cat([true[:, 0], wrong[:, 0]]))  # [3B, 2]
        itm = F.cross_entropy(matches, (torch.arange(len(matches), device=ids.device) < len(ids)).long())

        ids = ids.clone()
        ids[:, 0] = self.config.dec_id
        labels = ids.masked_fill(mask == 0, IGNORED)
        lm = self.text_decoder(ids, attention_mask=mask, encoder_hidden_states=image, labels=labels).loss
        return {"itc": itc, "itm": itm, "lm": lm}

    @torch.no_grad()
    def hard_negatives(self, logits: Tensor) -> Tensor:
        """[B, B] -> [B]: for each row the number of a wrong column, likelier the higher its logit."""
        weights = logits.float().softmax(1) + self.config.negative_floor
        return torch.multinomial(weights.fill_diagonal_(0), 1)[:, 0]


def training_model(config: BlipConfig, seed: int) -> Blip:
    """With all three losses and random weights that make every input matter; nothing is ever dropped."""
    vision = replace(config.vision, drop_path=0.0)
    text = replace(config.text, dropout=0.0, reads=True, writes=True)
    model = draw_weights(Blip(replace(config, vision=vision, text=text)), seed)
    with torch.no_grad():
        model.temperature.fill_(TEMPERATURE)
    return model


def draw_batch(config: BenchTrainConfig, seed: int) -> Batch:
    """A picture and a caption of random words each, padded to the longest caption."""
    generator = torch.Generator().manual_seed(seed)
    fewest, most = config.words
    lengths = torch.randint(fewest, most + 1, (config.batch,), generator=generator) + 2  # [CLS] and [SEP]
    shape = (config.batch, int(lengths.max()))
    ids = torch.randint(FIRST_WORD, config.model.dec_id, shape, generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(config.batch), lengths - 1] = SEP
    mask = (torch.arange(shape[1]) < lengths[:, None]).long()
    pixels = pictures(config.batch, config.model.vision.image_size, seed)
    return Batch(pixels, ids * mask, mask, torch.arange(config.batch))


def padded(batch: Batch, length: int) -> Batch:
    """The same texts at a length of `length` tokens."""
    more = [0, length - batch.ids.size(1)]
    return replace(batch, ids=F.pad(batch.ids, more), mask=F.pad(batch.mask, more))


def measure_steps(config: BenchTrainConfig, ours: Blip, theirs: PlainBlip, seed: int, repeats: int) -> Result:
    """Raises ValueError where losses or gradients differ. Both models are left on the device, in training."""
    device = pick_device(config.device)
    batch = draw_batch(config, seed).to(device)
    plain = padded(batch, config.padding)
    ours.to(device).train(), theirs.to(device).train()
    check_losses(losses_and_gradients(ours, batch, seed), losses_and_gradients(theirs, plain, seed))
    check_gradients(ours, theirs)
    steps = {
        "here": partial(step, ours, batch, seed, config.precision),
        "transformers": partial(step, theirs, plain, seed, config.precision),
    }
    counts = {name: flops(each) for name, each in steps.items()}
    for each in steps.values():  # once as it will be timed: what was compared was fp32
        each()
    name = f"train step, {device.type} {config.precision}"
    result = race(name, "images", config.batch, steps["here"], steps["transformers"], repeats)
    tokens = config.batch * config.model.vision.tokens + int(batch.mask.sum())
    return replace(result, more=details(result, counts, tokens, peak(config, device)))


def losses_and_gradients(
    model: nn.Module, batch: Batch, seed: int, precision: Precision = "fp32"
) -> dict[str, Tensor]:
    """The losses; the gradients of their sum are left in the parameters."""
    torch.manual_seed(seed)  # so that both sides draw the same negatives, every time
    with autocast(batch.pixels.device, precision):
        losses: dict[str, Tensor] = model(batch)
        total = torch.stack(list(losses.values())).sum()
    model.zero_grad()
    total.backward()
    return {name: loss.detach() for name, loss in losses.items()}


def step(model: nn.Module, batch: Batch, seed: int, precision: Precision) -> None:
    """What is timed. Gradients go at once, or each side would run beside those of the other."""
    losses_and_gradients(model, batch, seed, precision)
    model.zero_grad()
    if batch.pixels.is_cuda:
        torch.cuda.synchronize(batch.pixels.device)


def check_losses(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a loss differs by more than 1e-4."""
    for name, loss in theirs.items():
        difference = abs(float(ours[name]) - float(loss))
        if not difference <= LOSS_CLOSE:  # so written, NaN is refused too
            raise ValueError(
                f"{name} is {float(ours[name]):.6g} here and {float(loss):.6g} in the plain loop, allowed is "
                f"a difference of {LOSS_CLOSE:g}, so nothing is timed; try another seed, and if they differ "
                "again, one side is wrong"
            )


def check_gradients(ours: Blip, theirs: PlainBlip) -> None:
    """Raises ValueError where the gradient of a weight differs by more than 1e-3 of its norm.

    A weight that two stacks there have a copy of has the sum of their gradients here.
    """
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    nothing = NO_GRADIENT * norm(gradients.values())
    for name, parameter in ours.named_parameters():
        names = [other for other in outside_names(name, hugging_face=True) if other in gradients]
        if parameter.grad is None or not names:
            raise ValueError(f"{name} has no gradient on one side, so nothing is timed; one side is wrong")
        expected = torch.stack([gradients[other] for other in names]).sum(0)
        difference = norm([parameter.grad - expected])
        if not difference <= max(GRADIENT_CLOSE * norm([expected]), nothing):
            raise ValueError(
                f"the gradient of {name} here and in the plain loop differs by {difference:.2g} at a norm "
                f"of {norm([expected]):.2g}, allowed are {GRADIENT_CLOSE:g} of it, so nothing is timed; one "
                "side is wrong"
            )


def norm(tensors: Iterable[Tensor]) -> float:
    """Of all numbers in all tensors."""
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def flops(work: Work) -> int:
    """Of matrix products and convolutions. Attention is made of plain products here: fused kernels are not
    counted on a CPU, and on a GPU together with what they compute a second time.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def peak(config: BenchTrainConfig, device: torch.device) -> float | None:
    """TFLOP/s of the device in bf16, None where it is not known."""
    if config.peak_tflops is not None or device.type != "cuda":
        return config.peak_tflops
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device))


def details(
    result: Result, counts: Mapping[str, int], tokens: int, peak_tflops: float | None
) -> dict[str, float]:
    """Of both sides: seconds and GFLOP of a step, tokens a second, and the share of the device's bf16 peak.

    Tokens are those of images and texts, each counted once however often it is used, padding not. FLOP are
    what a side itself computes: its share of the peak says how busy the device is, not with what.
    """
    found = {}
    for side, seconds in result.seconds.items():
        median = statistics.median(seconds)
        found[f"{side} s"] = median
        found[f"{side} GFLOP"] = counts[side] / 1e9
        found[f"{side} tokens/s"] = tokens / median
        if peak_tflops is not None:
            found[f"{side} share of peak"] = counts[side] / 1e12 / median / peak_tflops
    return found
