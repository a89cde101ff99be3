"""What a row's texts become: several of them for a captioner, and one made wrong for a filter."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_blip

from blip.tokenizer import Tokenizer, write_vocabulary
from pipelines.data import DataConfig, training_batches
from pipelines.train_blip import InitConfig, TrainRun, build
from pipelines.trainer import TrainConfig
from pipelines.world import WorldConfig, read_truth, write_world
from pipelines.world_captions import VOCABULARY
from pipelines.world_text import COLOURS, judge

TEXTS = 3
WORLD = WorldConfig(
    noisy_rows=0, clean_rows=12, test_rows=0, shard_rows=12, side=32, captions_per_image=TEXTS
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(WORLD, folder)
    write_vocabulary(VOCABULARY, folder / "vocabulary")
    return folder


def test_a_captioner_gets_every_text_before_one_again(world: Path) -> None:
    """The texts of an image are next to each other: true of it, different, and as many as asked."""
    tokenizer = Tokenizer(world / "vocabulary")
    scenes = [scene for _, scene in read_truth(world / "clean_truth.parquet").values()]
    for count in (1, 2, 3, 5):
        config = DataConfig((str(world / "clean"),), batch_size=12, texts_per_image=count, workers=0)
        batch = next(training_batches(config, tokenizer, 32, seed=0)[0])
        assert len(batch.ids) == len(batch.mask) == 12 * count
        assert len(batch.pixels) == len(batch.image_ids) == 12
        texts = tokenizer.decode(batch.ids)
        for i in range(12):
            own = texts[i * count : (i + 1) * count]
            assert any(all(judge(text, scene).true for text in own) for scene in scenes)
            most = max(own.count(text) for text in own)
            assert most <= -(-count // TEXTS) + 1  # +1: two captions of a scene may be the same sentence


@torch.no_grad()
def test_several_texts_are_a_mean_over_all_their_words(world: Path) -> None:
    model = tiny_blip(reads=False)
    config = DataConfig((str(world / "clean"),), batch_size=4, texts_per_image=3, workers=0)
    batch = next(training_batches(config, Tokenizer(world / "vocabulary"), 32, seed=0)[0])
    batch.ids.remainder_(48)  # words that the tiny model has
    image = model.med.project_image(model.image_tokens(batch.pixels))
    total, words = 0.0, 0
    for i in range(12):
        one = [(k[[i // 3]], v[[i // 3]]) for k, v in image]
        length = int(batch.mask[i].sum())
        ids = torch.cat([torch.tensor([model.config.dec_id]), batch.ids[i, 1:length]])[None]
        states, _ = model.med.write(ids[:, :-1], one)
        total += float(torch.nn.functional.cross_entropy(
            model.med.logits(states)[0], ids[0, 1:], label_smoothing=0.1, reduction="sum"))  # fmt: skip
        words += length - 1
    assert float(model(batch)["lm"]) == pytest.approx(total / words, abs=1e-5)


def test_only_a_captioner_takes_several_texts(world: Path) -> None:
    data = DataConfig((str(world / "clean"),), texts_per_image=2)
    run = TrainRun("out", data, TrainConfig(1), init=InitConfig(tokenizer=str(world / "vocabulary")))
    with pytest.raises(ValueError, match=r"texts_per_image is 2; it must be 1 but for a captioner"):
        build(run)


def test_a_filter_gets_texts_made_wrong(world: Path) -> None:
    """Only where a word of the sets occurs; the other rows are marked by an empty mask."""
    tokenizer = Tokenizer(world / "vocabulary")
    plain = DataConfig((str(world / "clean"),), batch_size=12, workers=0)
    assert next(training_batches(plain, tokenizer, 32, seed=0)[0]).wrong_ids is None
    for sets in ((COLOURS,), (("heart", "cup"), ("left", "right"))):
        config = DataConfig((str(world / "clean"),), batch_size=12, workers=0, contrasts=sets)
        batch = next(training_batches(config, tokenizer, 32, seed=0)[0])
        assert batch.wrong_ids is not None
        assert batch.wrong_mask is not None
        words = {word for entries in sets for word in entries}
        made = batch.wrong_mask.any(1).tolist()
        texts = zip(tokenizer.decode(batch.ids), tokenizer.decode(batch.wrong_ids), made, strict=True)
        for text, wrong, is_made in texts:
            assert is_made == bool(words & set(text.split()))
            assert not is_made or (text != wrong and len(text.split()) == len(wrong.split()))
        assert any(made)
        assert sets == (COLOURS,) or not all(made)


def test_the_numbers_of_texts_are_checked() -> None:
    with pytest.raises(ValueError, match="texts_per_image is 0; it must be at least 1"):
        DataConfig(("x",), texts_per_image=0)
    with pytest.raises(ValueError, match="name red twice"):
        DataConfig(("x",), contrasts=(("red", "blue"), ("red", "green")))
