"""Kept tokens: to train with them is to train without, a killed writer goes on, nothing wrong is read."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_pipelines_stages import stage1, stage2
from tiny_language import opt_folder

from blip.image import Augmentation, image_transform
from blip.model import Batch
from blip.tokenizer import Tokenizer, write_vocabulary
from blip.vision import VisionConfig, VisionEncoder
from capfilt.schema import ShardError
from pipelines import cache_features
from pipelines.cache_features import FeaturesRun, load_vision
from pipelines.config import ConfigError, load_config
from pipelines.data import DataConfig, image_id, training_batches
from pipelines.features import check_kind, find_kind, open_features
from pipelines.world import WorldConfig, write_world
from pipelines.world_captions import VOCABULARY

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/tiny/features.yaml"
ENCODER = ROOT / "weights/tiny/captioner"
WORLD = WorldConfig(seed=4, noisy_rows=0, clean_rows=24, test_rows=0, shard_rows=8, brief=True)
BROKEN = (1, 3)  # shard, row
WHOLE = Augmentation(min_scale=1.0, flip=False, randaugment=False)


def keep(folder: Path, out: Path, *settings: str) -> Path:
    """The tokens of `folder`/world/clean, written below `out`; their folder."""
    arguments = (f"out={out}", f"shards=[{folder}/world/clean]", f"source={ENCODER}", "batch_size=5")
    assert cache_features.main([str(CONFIG), *arguments, *settings]) == 0
    (kind,) = out.glob("*/kind.json")
    return kind.parent


def bytes_of(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.glob("*.npy")}


def marks_of(place: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (place / "_done").glob("*.json")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 8 rows, one of them broken, and their tokens as an encoder in fp32 makes them."""
    folder = tmp_path_factory.mktemp("features")
    write_world(WORLD, folder / "world")
    write_vocabulary(VOCABULARY, folder / "words")
    path = folder / f"world/clean/{BROKEN[0]:05d}.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[BROKEN[1]]["image"]["bytes"] = b"broken"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path, row_group_size=3)
    keep(folder, folder / "kept")
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "world/clean").glob("*.parquet"))


def images(path: Path) -> list[bytes]:
    return [row["image"]["bytes"] for row in pq.read_table(path, columns=["image"]).to_pylist()]


# What is kept


def test_every_row_has_the_tokens_of_its_image_or_none(folder: Path) -> None:
    """Against an encoder asked for one image after the other, by Pillow and the eval transform."""
    run = load_config(FeaturesRun, CONFIG)
    assert run.vision is not None
    vision = load_vision(run.vision, str(ENCODER))
    found = open_features(str(folder / "kept"), shards(folder))
    for number, path in enumerate(shards(folder)):
        for row, data in enumerate(images(path)):
            tokens = found.read(path, row, image_id(data))
            if (number, row) == BROKEN:
                assert tokens is None
                continue
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            expected = vision(image_transform(picture, 64)[None])[0]
            assert tokens is not None and tokens.dtype == torch.float16
            torch.testing.assert_close(tokens.float(), expected, atol=2e-3, rtol=1e-3)
    marks = marks_of(find_kind(str(folder / "kept"))[0])
    assert sorted(mark["counts"]["without_image"] for mark in marks.values()) == [0, 0, 1]
    assert all(mark["counts"]["rows"] == 8 for mark in marks.values())


def test_a_kept_file_is_plain_numpy(folder: Path) -> None:
    place, kind = find_kind(str(folder / "kept"))
    (path,) = place.glob("00000-*.npy")
    records = np.load(path)
    assert records.shape == (8,) and records["tokens"].shape == (8, kind.tokens, kind.width)
    assert records["image"].tolist() == [image_id(data) for data in images(shards(folder)[0])]
    assert np.isfinite(records["tokens"].view(np.float16)).all()


# Training


def test_stage1_with_kept_tokens_is_stage1_without(folder: Path, tmp_path: Path) -> None:
    settings = ("train.steps=3", "optim.warmup_steps=1")
    plain = stage1(folder, tmp_path / "plain", *settings)
    kept = stage1(folder, tmp_path / "kept", *settings, f"data.features={folder}/kept")
    assert [line["step"] for line in kept] == [1, 2, 3]
    for one, other in zip(plain, kept, strict=True):
        for loss in ("itc", "itm", "itg", "grounding_gap"):
            assert other[loss] == pytest.approx(one[loss], abs=2e-3), loss
    assert any(one["itg"] != other["itg"] for one, other in zip(plain, kept, strict=True))  # they were read


def test_in_bf16_both_stages_compute_the_same_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """Its encoder computes in bf16, and that is what is kept."""
    opt_folder(tmp_path / "opt")
    keep(folder, tmp_path / "tokens", "precision=bf16", "batch_size=8")
    settings = ("train.steps=3", "optim.warmup_steps=1", "train.precision=bf16")
    reading = f"data.features={tmp_path}/tokens"
    first = [stage1(folder, tmp_path / name, *settings, *more) for name, more in both(reading)]
    assert len(first[0]) == 3
    assert computed(first[0]) == computed(first[1])
    (tmp_path / "world").symlink_to(folder / "world")
    (tmp_path / "plain").rename(tmp_path / "stage1")
    second = [
        stage2(tmp_path, "opt", tmp_path / f"2{name}", *settings, *more) for name, more in both(reading)
    ]
    assert computed(second[0]) == computed(second[1])


def both(reading: str) -> list[tuple[str, list[str]]]:
    return [("plain", []), ("kept", [reading])]


def computed(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    measured = {"seconds", "rows_per_s", "peak_memory_gib"}
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def read(folder: Path, count: int, rank: int = 0, world: int = 1, **values: Any) -> list[Batch]:
    chosen = {"batch_size": 3, "window": 2, "workers": 0, "augmentation": WHOLE} | values
    data = DataConfig((str(folder / "world/clean"),), **chosen)
    stream, rows = training_batches(data, Tokenizer(folder / "words"), 64, 0, 0, rank, world)
    assert rows == 24
    return list(itertools.islice(stream, count))


def test_one_process_and_two_read_every_row_once_in_the_order_of_those_without(folder: Path) -> None:
    kept = str(folder / "kept")
    good = {
        image_id(d) for i, p in enumerate(shards(folder)) for j, d in enumerate(images(p)) if (i, j) != BROKEN
    }
    plain = read(folder, 8)
    alone = read(folder, 8, features=kept)
    for one, other in zip(plain, alone, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.image_ids, other.image_ids)
        assert one.pixels.shape[1:] == (3, 64, 64) and other.pixels.shape[1:] == (65, 96)
    assert Counter(i for batch in alone for i in batch.image_ids.tolist()) == Counter(good)
    # Two processes, one of them with a data worker: 6 rows at once, 4 times.
    ranks = [read(folder, 4, rank, 2, features=kept, workers=rank) for rank in range(2)]
    seen = Counter(i for run in ranks for batch in run for i in batch.image_ids.tolist())
    assert seen == Counter(good)
    tokens = dict(pair for b in alone for pair in zip(b.image_ids.tolist(), b.pixels, strict=True))
    for batch in itertools.chain(*ranks):
        for image, found in zip(batch.image_ids.tolist(), batch.pixels, strict=True):
            assert torch.equal(found, tokens[image])


# Writing

STOP = """
import os, signal, sys
import torch
from blip.vision import VisionConfig, VisionEncoder
from pipelines import cache_features
left = int(sys.argv[1])

def count(module, *_):
    global left
    if isinstance(module, VisionEncoder):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

torch.nn.modules.module.register_module_forward_hook(count)
cache_features.main(sys.argv[2:])
"""


def test_a_killed_writer_goes_on_with_the_shard_it_was_in(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard of 8 rows is batches of 5 and 3; killed at the fourth, the last of the second shard."""
    arguments = [f"out={tmp_path}", f"shards=[{folder}/world/clean]", f"source={ENCODER}", "batch_size=5"]
    command = [sys.executable, "-c", STOP, "3", str(CONFIG), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    (place,) = (kind.parent for kind in tmp_path.glob("*/kind.json"))
    assert len(marks_of(place)) == 1 and len(list(place.glob(".*.tmp"))) == 1
    (first,) = place.glob("*.npy")
    before = first.stat().st_mtime_ns
    with pytest.raises(ValueError, match="2 of 3 shards have no tokens here"):
        read(folder, 1, features=str(tmp_path))
    assert keep(folder, tmp_path) == place
    assert "24 rows in 3 shards, 1 of them are done" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == before
    assert bytes_of(place) == bytes_of(find_kind(str(folder / "kept"))[0])
    assert not list(place.glob(".*.tmp"))


def test_two_processes_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = [f"out={tmp_path}", f"shards=[{folder}/world/clean]", f"source={ENCODER}", "batch_size=5"]
    command = [*launch, "pipelines.cache_features", str(CONFIG), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout and "1 of 1" in done.stdout
    assert bytes_of(find_kind(str(tmp_path))[0]) == bytes_of(find_kind(str(folder / "kept"))[0])


def test_a_disk_without_room_is_told_in_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 24 * (65 * 96 * 2 + 12)  # an id and a checksum beside the tokens
    usage = shutil.disk_usage(tmp_path)._replace(free=free - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ValueError, match=r"tokens of 24 rows need 0\.00 GB \(65 x 96 x 2 bytes a row\), free are"
    ):
        keep(folder, tmp_path)
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("kind.json"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    keep(folder, tmp_path)


class Peak(NamedTuple):
    grown: int  # bytes, of memory
    written: int  # bytes, of files


def peak_of(folder: Path, out: Path, rows: int) -> Peak:
    """Of writing `rows` rows as one shard, of 200 kB each: 257 tokens of 384 numbers."""
    vision = VisionConfig(image_size=64, patch_size=4, width=384, depth=1, heads=6)
    (record,) = pq.read_table(shards(folder)[0]).slice(0, 1).to_pylist()
    (out / "world/clean").mkdir(parents=True)
    table = pa.Table.from_pylist([record] * rows, schema=pq.read_schema(shards(folder)[0]))
    pq.write_table(table, out / "world/clean/0.parquet", row_group_size=20)
    torch.save(VisionEncoder(vision).vit.state_dict(), out / "tower.pth")
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts
    before = memory("VmRSS")
    place = keep(out, out / "kept", f"vision={json.dumps(asdict(vision))}", f"source={out}/tower.pth")
    return Peak(memory("VmHWM") - before, sum(path.stat().st_size for path in place.glob("*.npy")))


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def test_memory_does_not_grow_with_the_shard(folder: Path, tmp_path: Path) -> None:
    peak_of(folder, tmp_path / "warm", 40)  # what torch and numpy keep from now on
    small, large = (peak_of(folder, tmp_path / str(rows), rows) for rows in (40, 200))
    assert large.written - small.written == 160 * (257 * 384 * 2 + 12)  # 32 MB
    assert large.grown - small.grown < (large.written - small.written) / 4


# What is refused


def other_tower(path: Path, scale: float) -> Path:
    """The encoder with another last norm, in timm's names."""
    run = load_config(FeaturesRun, CONFIG)
    assert run.vision is not None
    weights = load_vision(run.vision, str(ENCODER)).module.vit.state_dict()
    torch.save(weights | {"norm.weight": weights["norm.weight"] * scale}, path)
    return path


def test_tokens_of_another_encoder_size_or_precision_are_refused(folder: Path, tmp_path: Path) -> None:
    tower = other_tower(tmp_path / "tower.pth", 1.5)
    reading = ("train.steps=1", f"data.features={folder}/kept")
    for settings, told in (
        (
            (f"init.vision={tower}",),
            r"\(encoder was [0-9a-f]{12}, is [0-9a-f]{12}\); write those with make feat",
        ),
        (("model.vision.image_size=32",), r"image_size was 64, is 32; tokens was 65, is 17\)"),
        (("train.precision=bf16",), r"\(dtype was float16, is bfloat16\)"),
    ):
        with pytest.raises(ValueError, match=told):
            stage1(folder, tmp_path / "out", *reading, *settings)
    run = load_config(FeaturesRun, CONFIG)
    assert run.vision is not None
    with pytest.raises(ValueError, match=r"those of a frozen encoder, but this run trains its own"):
        check_kind(str(folder / "kept"), VisionEncoder(run.vision), run.vision)


def test_augmentation_is_refused(folder: Path, tmp_path: Path) -> None:
    kept = f"data.features={folder}/kept"
    for setting in ("min_scale=0.5", "flip=true", "randaugment=true"):
        with pytest.raises(ConfigError, match=r"are tokens of whole images, but augmentation draws others"):
            stage1(folder, tmp_path, "train.steps=1", kept, f"data.augmentation.{setting}")


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(find_kind(str(folder / "kept"))[0], to)
    return to


def test_damaged_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    place = copy(folder, tmp_path / "flipped")
    (path,) = place.glob("00000-*.npy")
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"00000-\w+\.npy: the tokens of row 7 are damaged; delete it, and"):
        read(folder, 8, features=str(place))
    place = copy(folder, tmp_path / "cut")
    (path,) = place.glob("00000-*.npy")
    path.write_bytes(data[:-1000])
    lacking = (
        r"1 of 3 shards have no tokens here, or no longer all of them, the first is \S+00000\.parquet; run"
    )
    with pytest.raises(ValueError, match=lacking):
        read(folder, 1, features=str(place))
    path.unlink()
    with pytest.raises(ValueError, match=lacking):
        read(folder, 1, features=str(place))
    place = copy(folder, tmp_path / "kind")
    (place / "kind.json").write_text('{"encoder": "a"}')
    with pytest.raises(ValueError, match=r"kind\.json: cannot be read"):
        read(folder, 1, features=str(place))


def test_tokens_of_another_image_are_refused(folder: Path, tmp_path: Path) -> None:
    place = copy(folder, tmp_path / "swapped")
    paths = [path for number in (0, 2) for path in place.glob(f"{number:05d}-*.npy")]
    shutil.copy(paths[0], paths[1])
    with pytest.raises(ShardError, match=r"row \d is of another image than row \d of \S+00002\.parquet"):
        read(folder, 8, features=str(place))


def test_a_new_shard_has_no_tokens_and_one_in_another_folder_keeps_its(folder: Path, tmp_path: Path) -> None:
    place = copy(folder, tmp_path / "kept/place")
    clean = tmp_path / "world/clean"
    clean.mkdir(parents=True)
    for path in shards(folder):
        shutil.copy(path, clean)
    found = open_features(str(place), sorted(clean.iterdir()))
    assert len(found.shards) == 3
    extra = pq.read_table(shards(folder)[0]).slice(2, 4)
    pq.write_table(extra, clean / "new.parquet")
    with pytest.raises(ValueError, match=r"1 of 4 shards have no tokens here.* the first is \S+new\.parquet"):
        open_features(str(place), sorted(clean.iterdir()))


def test_a_place_must_be_or_hold_one_folder_of_tokens(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nowhere: data\.features must be a folder of kept tokens; write them"
    ):
        read(folder, 1, features="nowhere")
    copy(folder, tmp_path / "a")
    copy(folder, tmp_path / "b")
    with pytest.raises(ValueError, match=r"name one of those that it holds: a, b"):
        read(folder, 1, features=str(tmp_path))


def test_tokens_that_fp16_cannot_hold_are_refused_and_bf16_keeps_them(folder: Path, tmp_path: Path) -> None:
    source = f"source={other_tower(tmp_path / 'tower.pth', 1e6)}"
    told = (
        r"00000\.parquet, rows 0 to 4: tokens reach .*e\+06, which float16 cannot hold; use precision: bf16"
    )
    with pytest.raises(ValueError, match=told):
        keep(folder, tmp_path / "kept", source)
    assert not list((tmp_path / "kept").rglob("*.npy")) and not list((tmp_path / "kept").rglob("*.tmp"))
    keep(folder, tmp_path / "bf16", source, "precision=bf16")
