"""What a data worker holds does not grow from epoch to epoch."""

from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip.image import thumbnail
from blip.tokenizer import Tokenizer, write_vocabulary
from pipelines.data import DataConfig, training_batches

ROWS, BATCH, GROUP, SIZE = 192, 16, 16, 96
EPOCHS = 6


def workers() -> set[psutil.Process]:
    """The data workers of this process."""
    children = psutil.Process().children()
    return {child for child in children if "multiprocessing.spawn" in " ".join(child.cmdline())}


def test_a_data_worker_holds_no_more_after_six_epochs_than_after_one(tmp_path: Path) -> None:
    """Five epochs of images are 20 MB, and 100 MB as pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (ROWS, 144, 192, 3), dtype=np.uint8)
    images = [thumbnail(Image.fromarray(values), 192, quality=90) for values in noise]
    assert sum(map(len, images)) * (EPOCHS - 1) > 20e6
    table = pa.table({"jpg": pa.array(images, pa.binary()), "caption": ["red"] * ROWS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=GROUP)
    write_vocabulary(["red"], tmp_path / "words")
    data = DataConfig((str(tmp_path / "a.parquet"),), batch_size=BATCH, window=3, workers=1)
    others = workers()
    stream, rows = training_batches(data, Tokenizer(tmp_path / "words"), SIZE, seed=0)
    held = []
    for _ in range(EPOCHS):
        for _ in range(rows // BATCH):
            assert len(next(stream).pixels) == BATCH
        (worker,) = workers() - others
        held.append(worker.memory_info().rss / 2**20)
    print([round(size) for size in held])
    assert rows == ROWS and max(held[1:]) < held[0] + 12, held
