"""Zero-shot classes of a stage 1 of BLIP-2: the query most like the class, image by image."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import jpeg, put, put_json
from small_run import save_models
from test_pipelines_evaluate import save_stages

from blip.image import decode, image_transform
from pipelines import eval_zeroshot
from pipelines.config import run_main
from qformer import load_stage1

NAMES = ["red circle", "blue square", "green star", "grey ring"]
TEMPLATES = ["a {}", "there is a {}", "{}"]
LABELS = [0, 1, 2, 3, 3, 2, 1, 0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("stage1")
    save_models(found / "models")
    save_stages(found / "models")
    put(found / "classes.txt", "\n".join(NAMES).encode())
    put(found / "templates.txt", "\n".join(TEMPLATES).encode())
    pq.write_table(pa.table({"image": list(map(jpeg, range(9))), "label": LABELS}), found / "x.parquet")
    return found


def config(folder: Path, out: str, **more: object) -> list[str]:
    lists = {name: str(folder / f"{name}.txt") for name in ("classes", "templates")}
    places = {"out": str(folder / out), "model": str(folder / "models/stage1")}
    tree = {"sets": {"x": {"images": str(folder / "x.parquet")}}, "device": "cpu", "batch_size": 4}
    return [put_json(folder / f"{out}.yaml", tree | lists | places | more)]


@torch.no_grad()
def test_the_query_most_like_the_class_counts(folder: Path) -> None:
    """Classes are means of their prompts, made unit again, and a query is compared with these."""
    assert eval_zeroshot.main(config(folder, "plain")) == 0
    found = json.loads((folder / "plain/metrics.json").read_text())
    model = load_stage1(folder / "models/stage1")
    assert model.tokenizer is not None
    classes = []
    for name in NAMES:
        texts = [template.replace("{}", name) for template in TEMPLATES]
        mean = torch.stack([model.encode_texts(*model.tokenizer([text], 35))[0] for text in texts]).mean(0)
        classes.append(mean / mean.norm())
    scores = np.zeros((len(LABELS), len(NAMES)))
    best_queries = set()
    for i in range(len(LABELS)):
        queries = model.encode_images(image_transform(decode(jpeg(i)), 32)[None])[0]  # [Q, E]
        for c, one in enumerate(classes):
            cosines = [float(query @ one) for query in queries]
            scores[i, c] = max(cosines)
            best_queries.add(cosines.index(max(cosines)))
    top1 = float(np.mean(scores.argmax(1) == np.array(LABELS)))
    assert found["zeroshot"]["sets"]["x"]["top1"] == pytest.approx(top1)
    assert len(best_queries) > 1 and len(set(scores.argmax(1))) > 1  # or the test would show little
    images = torch.stack([image_transform(decode(jpeg(i)), 32) for i in range(len(LABELS))])
    own = eval_zeroshot.similarity(model, model.encode_images(images), torch.stack(classes))
    torch.testing.assert_close(own.double(), torch.tensor(scores), atol=1e-5, rtol=0)


def test_no_probe_of_what_was_never_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = {"train": {"images": str(folder / "x.parquet")}}
    with pytest.raises(SystemExit) as stop:
        run_main(eval_zeroshot.main, config(folder, "probe", probe=probe))
    assert stop.value.code == 1 and "frozen vision encoder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_main(eval_zeroshot.main, config(folder, "stage2", model=str(folder / "models/stage2")))
    assert "Stage1" in capsys.readouterr().err
