"""The worker on real shards: every row accounted for, scores as the models give them one by one."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_run import hashes, make_run, save_models

from blip.generate import generate
from blip.image import decode, image_transform
from blip.tokenizer import clean_caption
from blip.weights import load_blip
from capfilt import CapFiltConfig, run_local
from capfilt.captioner import Captioner, caption_seed
from capfilt.job import Watch, finish, prepare
from capfilt.shards import FingerprintMismatch
from capfilt.worker import CapFiltWorker


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[CapFiltConfig, Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    config, shards = make_run(folder)
    summary = run_local(config, shards, folder / "out")
    assert (summary.done, summary.failed, summary.stats.rows) == (4, {}, 48)
    return config, shards, folder / "out"


def test_models_are_found_by_their_names_on_the_hub(run: tuple[CapFiltConfig, Path, Path], tmp_path: Path):
    """In another process, as the hub's library reads its settings once; its cache stands for the network."""
    config, shards, out = run
    for source in (config.captioner, config.filter):
        model = tmp_path / "hub" / f"models--someone--{Path(source).name}"
        shutil.copytree(source, model / "snapshots" / ("0" * 40))
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("0" * 40)
    named = replace(config, captioner="someone/captioner", filter="someone/filter")
    code = (
        "from blip.generate import Decoding\nfrom capfilt import CapFiltConfig, run_local\n"
        "from capfilt.schema import Columns\n"
        f"print(run_local({named!r}, {str(shards)!r}, {str(tmp_path / 'out')!r}).stats.rows)\n"
    )
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    settings["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "48"
    assert hashes(tmp_path / "out") == hashes(out)


def rows_of(out: Path) -> list[dict]:
    return [
        row for path in sorted((out / "scored").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def test_scores_equal_the_models_asked_one_image_and_text_at_a_time(run: tuple[CapFiltConfig, Path, Path]):
    config, _, out = run
    captioner, judge = load_blip(config.captioner), load_blip(config.filter)
    for row in rows_of(out)[:7]:
        pixels = image_transform(decode(row["jpg"]), 32)[None]
        med, tokenizer = captioner.med, captioner.tokenizer
        start = tokenizer.prompt(config.prompt)
        image = med.project_image(captioner.image_tokens(pixels))
        ids = generate(med, image, start, tokenizer.sep, config.decoding, [caption_seed(0, row["key"], 0)])
        assert row["caption_synthetic"] == tokenizer.decode(ids[:, len(start) :])[0]
        for text, itm, itc in (
            (row["caption"], row["itm_web"], row["itc_web"]),
            (row["caption_synthetic"], row["itm_synthetic"], row["itc_synthetic"]),
        ):
            ids, mask = judge.tokenizer([clean_caption(text)], 35)
            with torch.no_grad():
                logits = judge.match(ids, mask, judge.image_tokens(pixels))[0]
                cosine = (judge.encode_images(pixels) * judge.encode_texts(ids, mask)).sum()
            assert itm == pytest.approx(float(torch.softmax(logits, 0)[1]), abs=1e-5)
            assert itc == pytest.approx(float(cosine), abs=1e-5)


def test_itm_is_scored_with_the_enc_token(run: tuple[CapFiltConfig, Path, Path]):
    """Some ports leave [CLS] in place; the score then differs."""
    config, _, out = run
    judge, row = load_blip(config.filter), rows_of(out)[0]
    ids, mask = judge.tokenizer([clean_caption(row["caption"])], 35)
    with torch.no_grad():
        image = judge.med.project_image(judge.image_tokens(image_transform(decode(row["jpg"]), 32)[None]))
        as_cls = judge.heads["itm"](judge.med.match(ids, mask, image)[:, 0]).softmax(-1)[0, 1]
    assert row["itm_web"] != pytest.approx(float(as_cls), abs=1e-4)


def test_k_captions_are_kept_with_their_scores(run: tuple[CapFiltConfig, Path, Path], tmp_path: Path):
    config, shards, _ = run
    run_local(replace(config, captions=3), shards / "00000.parquet", tmp_path)
    for row in rows_of(tmp_path):
        assert len(row["captions_synthetic"]) == len(row["itms_synthetic"]) == len(row["itcs_synthetic"]) == 3
        assert len(set(row["captions_synthetic"])) > 1
        assert row["itm_synthetic"] == max(row["itms_synthetic"])


def test_a_caption_depends_on_its_seed_and_key_alone(run: tuple[CapFiltConfig, Path, Path]):
    config, _, out = run
    rows = rows_of(out)[:6]
    captioner = Captioner(load_blip(config.captioner), config.decoding, config.prompt, 1, seed=0)
    pixels = torch.stack([image_transform(decode(row["jpg"]), 32) for row in rows])
    keys = [row["key"] for row in rows]
    with torch.inference_mode():
        together = [texts[0] for texts in captioner(pixels, keys)]
        turned = [texts[0] for texts in captioner(pixels.flip(0), keys[::-1])][::-1]
        alone = [captioner(pixels[i : i + 1], keys[i : i + 1])[0][0] for i in range(len(keys))]
        captioner.seed = 1
        other = [texts[0] for texts in captioner(pixels, keys)]
    assert together == turned == alone
    assert together != other


def test_bad_rows_keep_their_place_and_reason(run: tuple[CapFiltConfig, Path, Path], tmp_path: Path):
    config, shards, clean_out = run
    table = pq.read_table(shards / "00000.parquet")
    rows = table.to_pylist()
    rows[1]["jpg"] = rows[1]["jpg"][: len(rows[1]["jpg"]) // 2]  # half a JPEG
    rows[3]["jpg"] = b"GIF89a but no"  # not an image
    rows[4] |= {"jpg": None, "status": "failed_to_download", "error_message": "404"}
    rows[6]["caption"] = None
    rows[7]["jpg"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "bad.parquet")
    run_local(config, tmp_path / "bad.parquet", tmp_path / "out")
    found = rows_of(tmp_path / "out")
    assert [row["key"] for row in found] == [row["key"] for row in rows]
    status = [row["capfilt_status"] for row in found]
    bad = {1: "decode_error", 3: "decode_error", 4: "skipped_upstream", 7: "no_image"}
    assert status == [bad.get(i, "ok") for i in range(12)]
    assert all(bool(row["capfilt_error"]) == (row["capfilt_status"] != "ok") for row in found)
    assert found[6]["itm_web"] is None and found[6]["itm_synthetic"] is not None
    # A bad row leaves a hole: the captions of its neighbours are what they were.
    before = rows_of(clean_out)
    assert all(
        found[i]["caption_synthetic"] == before[i]["caption_synthetic"] for i in range(12) if i not in bad
    )


def test_a_broken_shard_fails_alone(run: tuple[CapFiltConfig, Path, Path], tmp_path: Path):
    config, shards, _ = run
    (tmp_path / "in").mkdir()
    whole = (shards / "00000.parquet").read_bytes()
    (tmp_path / "in" / "a.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "b.parquet").write_bytes(whole)
    pq.write_table(pq.read_table(shards / "00000.parquet").slice(0, 0), tmp_path / "in" / "c.parquet")
    summary = run_local(config, tmp_path / "in", tmp_path / "out")
    assert list(summary.failed) == ["a"] and "a.parquet" in summary.failed["a"]
    assert summary.stats.rows == 12 and summary.done == 2
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failed"] == summary.failed
    assert not list((tmp_path / "out" / "scored").glob(".*"))


def test_changed_config_model_or_input_is_refused(run: tuple[CapFiltConfig, Path, Path], tmp_path: Path):
    config, shards, out = run
    before = hashes(out)
    with pytest.raises(FingerprintMismatch, match="config"):
        run_local(replace(config, seed=1), shards, out)
    other, _ = save_models(tmp_path / "other", seed=9)
    with pytest.raises(FingerprintMismatch, match="captioner"):
        run_local(replace(config, captioner=str(other)), shards, out)
    with pytest.raises(FingerprintMismatch):
        run_local(config, shards / "00000.parquet", out)  # the other three done splits are not in this input
    assert hashes(out) == before


def test_parquet_carries_its_provenance(run: tuple[CapFiltConfig, Path, Path]):
    config, _, out = run
    note = json.loads(pq.read_schema(out / "scored" / "00000.parquet").metadata[b"capfilt"])
    assert set(note["fingerprint"]) == {"captioner", "filter", "config", "input"}
    assert note["settings"]["decoding"]["top_p"] == 0.9 and note["settings"]["seed"] == 0
    assert config.captioner not in json.dumps(note)  # no paths: equal runs elsewhere give equal bytes


def test_processes_give_the_same_bytes_and_count_the_same_rows(
    run: tuple[CapFiltConfig, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, shards, out = run
    for workers in (1, 2):
        run_local(replace(config, decoders=5), shards, tmp_path / str(workers), workers=workers)
        assert hashes(tmp_path / str(workers)) == hashes(out)
        assert "shards 4/4 | rows 48 at" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("captioner", "judge"), [("filter", "filter"), ("captioner", "captioner")])
def test_the_wrong_kind_of_model_is_named(
    run: tuple[CapFiltConfig, Path, Path], tmp_path: Path, captioner, judge
):
    config, shards, _ = run
    models = Path(config.captioner).parent
    wrong = replace(config, captioner=str(models / captioner), filter=str(models / judge))
    with pytest.raises(ValueError, match=r"captioner's|filter's"):
        run_local(wrong, shards, tmp_path)


class SmallDevice:
    """As a device where only so many images fit: more are what torch says on a GPU that is full."""

    def __init__(self, call, most: int):
        self.call, self.most = call, most

    def __call__(self, pixels, *rest):
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.call(pixels, *rest)


def test_out_of_memory_the_batch_is_halved_and_said_once(
    run: tuple[CapFiltConfig, Path, Path], tmp_path: Path
) -> None:
    config, shards, out = run
    job = prepare(config, shards, tmp_path)
    worker = CapFiltWorker(config, tmp_path, job.fingerprint)
    worker.score = SmallDevice(worker.score, 2)  # type: ignore[assignment]
    said = io.StringIO()
    watch = Watch(job, stream=said)
    for split in job.todo:
        for message in worker.steps(split):
            watch.hear(message)
    assert finish(job, watch).failed == {}
    assert said.getvalue().count("not enough memory for 5 images at a time; going on with 2.") == 1
    assert said.getvalue().count("not enough memory") == 1
    for mine, whole in zip(rows_of(tmp_path), rows_of(out), strict=True):
        assert (mine["key"], mine["caption_synthetic"]) == (whole["key"], whole["caption_synthetic"])
        assert (mine["itm_web"], mine["itm_synthetic"]) == pytest.approx(
            (whole["itm_web"], whole["itm_synthetic"]), abs=1e-5
        )


def test_where_not_even_one_image_fits_the_shard_says_so(
    run: tuple[CapFiltConfig, Path, Path], tmp_path: Path
) -> None:
    config, shards, _ = run
    job = prepare(config, shards, tmp_path)
    worker = CapFiltWorker(config, tmp_path, job.fingerprint)
    worker.score = SmallDevice(worker.score, 0)  # type: ignore[assignment]
    found = worker(job.todo[0])
    assert found.error is not None and "not enough memory for one image" in found.error
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.tmp"))
