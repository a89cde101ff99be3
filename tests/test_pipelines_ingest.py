"""Annotations and image files -> clean shards: all images accounted for, nothing done twice."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from image_files import KARPATHY_COCO, Record, jpeg, numbered, put, put_json, rows, table_of, texts

from capfilt.schema import CLEAN, Columns
from pipelines.annotations import Karpathy
from pipelines.config import run_main
from pipelines.data import find_groups, read_group
from pipelines.ingest import IngestRun, ingest, main


def test_rows_are_the_files_byte_for_byte(tmp_path: Path) -> None:
    file = put_json(tmp_path / "dataset_coco.json", KARPATHY_COCO)
    cat = put(tmp_path / "train2014/COCO_train2014_000000000007.jpg", jpeg(7)).read_bytes()
    dog = put(tmp_path / "val2014/COCO_val2014_000000000009.jpg", jpeg(9)).read_bytes()
    out = tmp_path / "out"
    run = IngestRun(str(tmp_path), str(out), karpathy=Karpathy(file, ("restval", "train")))
    ingest(run)
    schema = pq.read_schema(out / "00000.parquet")
    assert schema.equals(CLEAN) and schema.metadata[b"huggingface"] == CLEAN.metadata[b"huggingface"]

    def human(*captions: str) -> list[Record]:
        return [{"text": text, "source": "human", "itm": None} for text in captions]

    assert rows(out) == [
        {
            "key": "7",
            "image": {"bytes": cat, "path": "COCO_train2014_000000000007.jpg"},
            "captions": human("a cat", "a small cat"),
        },
        {
            "key": "9",
            "image": {"bytes": dog, "path": "COCO_val2014_000000000009.jpg"},
            "captions": human("a dog"),
        },
    ]


def test_training_reads_the_shards(tmp_path: Path) -> None:
    run = numbered(tmp_path, 5, absent=[1], rows_per_shard=2)
    ingest(run)
    groups = find_groups((run.out,), Columns())
    found = [row for group in groups for row in read_group(group, Columns())]
    assert found == [(jpeg(i), [f"picture {i}"]) for i in (0, 2, 3, 4)]


def test_shards_and_row_groups_have_their_size(tmp_path: Path) -> None:
    summary = ingest(numbered(tmp_path, 250, absent=[3, 7], rows_per_shard=240))
    metadata = [pq.read_metadata(tmp_path / "out" / name) for name in summary.shards]
    groups = [[file.row_group(i).num_rows for i in range(file.num_row_groups)] for file in metadata]
    assert groups == [[100, 100, 38], [10]]  # what is missing leaves a hole in its own shard
    assert summary.shards == {"00000.parquet": 238, "00001.parquet": 10}
    assert [row["key"] for row in rows(tmp_path / "out")] == [
        f"{i:03d}" for i in range(250) if i not in (3, 7)
    ]


def test_images_without_captions_if_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / f"images/{name}.jpg", jpeg(0))
    put(tmp_path / "images/a.txt", b"a cat\n")
    images = str(tmp_path / "images")
    assert ingest(IngestRun(images, str(tmp_path / "strict"))).reasons == {"no_caption": 1}
    assert texts(tmp_path / "strict") == {"a": ["a cat"]}
    assert not ingest(IngestRun(images, str(tmp_path / "all"), require_captions=False)).dropped
    assert texts(tmp_path / "all") == {"a": ["a cat"], "b": []}


# ---- what is dropped -----------------------------------------------------------------------------

DAMAGED = ("cut.jpg", "empty.jpg", "page.jpg", "huge.jpg", "bare.jpg")


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """The config of a COCO file in which nearly everything is wrong once, and the reasons by key."""
    folder = tmp_path / "images"
    put(folder / "good.jpg", jpeg(1))
    put(folder / "more.jpg", jpeg(2))
    put(folder / "cut.jpg", jpeg(3)[:-200])
    put(folder / "empty.jpg", b"")
    put(folder / "page.jpg", b"<html>404 not found</html>")
    put(folder / "bare.jpg", jpeg(4))
    os.truncate(put(folder / "huge.jpg", jpeg(5)), (32 << 20) + 1)
    (folder / "folder.jpg").mkdir()
    files = ["good.jpg", "gone.jpg", *DAMAGED, "folder.jpg", "more.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(files)]
    images += [{"id": 0, "file_name": "more.jpg"}, {"id": "\ud800", "file_name": "more.jpg"}]
    images += [{"id": "nul", "file_name": "a\0b.jpg"}]
    captions: list[tuple[int | str, str]] = [(i, f"text {i}") for i in range(9) if files[i] != "bare.jpg"]
    captions += [(0, "  \n"), (0, "\u732b "), (0, "half \ud83d"), (0, "x" * 32_769), (6, ""), ("nul", "x")]
    captions += [(99, "nowhere")]
    tree = {"images": images, "annotations": [{"image_id": i, "caption": text} for i, text in captions]}
    run = {"images": str(folder), "out": str(tmp_path / "out"), "coco": {"file": str(tmp_path / "c.json")}}
    put_json(tmp_path / "c.json", tree)
    reasons = {
        "1": "missing_image",
        "2": "decode_error",
        "3": "no_image",
        "4": "decode_error",
        "5": "too_large",
        "6": "no_caption",
        "7": "missing_image",
        "0": "duplicate_id",
        "\ud800": "bad_name",
        "nul": "bad_name",
        "99": "missing_image",
    }
    return put_json(tmp_path / "run.yaml", run), reasons


def test_everything_is_a_row_or_has_a_reason(damaged: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    config, reasons = damaged
    assert main([config]) == 3
    out = tmp_path / "out"
    assert texts(out) == {"0": ["text 0", "\u732b"], "8": ["text 8"]}
    report = json.loads((out / "ingest.json").read_text())
    assert {image["key"]: image["reason"] for image in report["dropped"]} == reasons
    assert report["images"] == 13 == report["rows"] + len(report["dropped"])
    assert sum(report["reasons"].values()) == len(report["dropped"]) == 11
    assert report["rows"] == sum(report["shards"].values()) == 2
    parts = ("captions_written", "captions_unusable", "captions_of_dropped")
    # 8 texts of files, 4 unusable and 1 more of image 0, an empty one, one of `nul`, one of no image
    assert report["captions"] == 15 == sum(report[part] for part in parts)
    assert [report[part] for part in parts] == [3, 4, 8]


def test_exit_code_is_0_where_only_annotations_are_dropped(tmp_path: Path) -> None:
    put(tmp_path / "images/a.jpg", jpeg(0))
    table = table_of(tmp_path, [("a.jpg", "a cat"), ("gone.jpg", " ")])
    tree = {"images": str(tmp_path / "images"), "out": str(tmp_path / "out"), "table": {"file": table.file}}
    assert main([put_json(tmp_path / "run.yaml", tree)]) == 0
    assert json.loads((tmp_path / "out/ingest.json").read_text())["reasons"] == {"no_caption": 1}


def test_no_path_leaves_the_folder_of_the_images(tmp_path: Path) -> None:
    images, outside = tmp_path / "images", put(tmp_path / "private/secret.jpg", jpeg(1))
    put(images / "sub/in.jpg", jpeg(2))
    put(tmp_path / "images-too/x.jpg", jpeg(3))
    (images / "link.jpg").symlink_to(outside)
    (images / "linked").symlink_to(outside.parent)
    (images / "fine.jpg").symlink_to("sub/in.jpg")
    (images / "loop.jpg").symlink_to("loop.jpg")
    paths = {
        "sub/in.jpg": None,
        "fine.jpg": None,
        "sub/../sub/in.jpg": None,
        "../private/secret.jpg": "outside",
        "sub/../../images-too/x.jpg": "outside",
        str(outside): "outside",
        str(images / "sub/in.jpg"): "outside",
        "link.jpg": "outside",
        "linked/secret.jpg": "outside",
        "/dev/zero": "outside",
        "loop.jpg": "missing_image",
        "": "missing_image",
        "a" * 300 + ".jpg": "unreadable",
        "http://example.invalid/x.jpg": "missing_image",
    }
    records = [{"image": path, "caption": "x", "image_id": i} for i, path in enumerate(paths)]
    source = {"blip_list": {"file": put_json(tmp_path / "list.json", records)}}
    config = {"images": str(images), "out": str(tmp_path / "out"), **source}
    assert main([put_json(tmp_path / "run.yaml", config)]) == 3
    report = json.loads((tmp_path / "out/ingest.json").read_text())
    assert {image["image"]: image["reason"] for image in report["dropped"]} == {
        path: reason for path, reason in paths.items() if reason
    }
    assert [row["image"]["bytes"] for row in rows(tmp_path / "out")] == [jpeg(2)] * 3


def test_nothing_is_written_where_no_image_is_found(tmp_path: Path) -> None:
    run = numbered(tmp_path, 2, absent=[0, 1], images=str(tmp_path))
    with pytest.raises(ValueError, match=r"none of the 2 images of .*pairs\.tsv is there; .*000\.jpg"):
        ingest(run)
    empty = IngestRun(str(tmp_path), run.out, table=table_of(tmp_path, [("000.jpg", " ")]))
    with pytest.raises(ValueError, match=r"no image can become a row \(1 no_caption"):
        ingest(empty)
    with pytest.raises(ValueError, match=r"images is .*nowhere, which is no folder"):
        ingest(IngestRun(str(tmp_path / "nowhere"), run.out))
    assert not Path(run.out).exists()


# ---- resume --------------------------------------------------------------------------------------


def written(out: Path) -> dict[str, int]:
    """Shard -> inode: a file that is written again and renamed has another one."""
    return {path.name: path.stat().st_ino for path in sorted(out.glob("*.parquet"))}


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    run, whole = numbered(tmp_path, 6, rows_per_shard=2), tmp_path / "whole"
    ingest(numbered(tmp_path, 6, rows_per_shard=2, out=str(whole)))
    ingest(run)
    out = Path(run.out)
    (out / "_done/00001.json").unlink()  # killed between the rename and the mark
    (out / "_done/00002.json").unlink()
    (out / "00002.parquet").rename(out / f".00002.parquet.{'0' * 32}.tmp")  # and before the rename
    (out / "ingest.json").unlink()
    before = written(out)
    ingest(run)
    assert written(out)["00000.parquet"] == before["00000.parquet"]
    assert written(out)["00001.parquet"] != before["00001.parquet"]
    assert not list(out.glob(".*"))
    for name in ("00000.parquet", "00001.parquet", "00002.parquet"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert (out / "ingest.json").read_bytes() == (whole / "ingest.json").read_bytes()
    after = written(out)
    ingest(run)
    assert written(out) == after


def test_only_shards_that_lack_files_are_written_again(tmp_path: Path) -> None:
    run = numbered(tmp_path, 6, absent=[0, 2], rows_per_shard=2)
    put(tmp_path / "images/003.jpg", jpeg(3)[:-200])
    assert ingest(run).reasons == {"missing_image": 2, "decode_error": 1}
    before = written(Path(run.out))
    put(tmp_path / "images/003.jpg", jpeg(3))
    summary = ingest(run)
    after = written(Path(run.out))
    assert [name for name in before if before[name] != after[name]] == ["00001.parquet"]
    assert summary.reasons == {"missing_image": 2} and summary.rows == 4
    assert list(texts(Path(run.out))) == ["001", "003", "004", "005"]


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run = numbered(tmp_path, 4, rows_per_shard=2)
    ingest(run)
    before = written(Path(run.out))
    with pytest.raises(ValueError, match=r"rows_per_shard was 2, is 3.*Choose another OUT"):
        ingest(numbered(tmp_path, 4, rows_per_shard=3))
    with pytest.raises(ValueError, match="require_captions was true, is false"):
        ingest(numbered(tmp_path, 4, rows_per_shard=2, require_captions=False))
    table_of(tmp_path, [("000.jpg", "another text"), ("001.jpg", "picture 1")])
    with pytest.raises(ValueError, match="made with another annotations"):
        ingest(run)
    assert written(Path(run.out)) == before


def test_shards_of_others_are_not_overwritten(tmp_path: Path) -> None:
    run = numbered(tmp_path, 2)
    foreign = put(tmp_path / "out/00000.parquet", b"of someone else")
    with pytest.raises(ValueError, match=r"00000\.parquet: is no shard of this run; choose another out"):
        ingest(run)
    assert foreign.read_bytes() == b"of someone else"
    foreign.unlink()
    ingest(run)
    put(tmp_path / "out/00007.parquet", b"would be read as part of the set")
    with pytest.raises(ValueError, match=r"00007\.parquet: is no shard of this run"):
        ingest(run)


# ---- the command ---------------------------------------------------------------------------------


def status(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as leaving:
        run_main(main, arguments)
    return leaving.value.code


def test_exit_codes_and_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered(tmp_path, 3, absent=[1])
    tree = {"images": str(tmp_path / "images"), "out": str(tmp_path / "out")}
    config = put_json(tmp_path / "run.yaml", tree)
    table = f"table.file={tmp_path}/pairs.tsv"
    assert status([config, table]) == 3
    shown = capsys.readouterr().out
    assert "2 rows with 2 captions in 1 shards; 1 of 3 images dropped" in shown
    assert "1  missing_image, e.g. 001.jpg: there is no such file" in shown
    assert status([config, table, "rows_per_shard=0"]) == 2
    assert status([config, table, "coco.file=x.json"]) == 2
    assert "coco and table are all given" in capsys.readouterr().err
    assert status([config, "karpathy.file=x.json", "karpathy.splits=[]"]) == 2
    assert status([config, "coco.file=nowhere.json"]) == 1
    assert "nowhere.json: cannot be read" in capsys.readouterr().err
