"""Annotations and image files -> clean shards: all formats, all images accounted for, nothing done twice."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.schema import CLEAN, Columns
from pipelines.annotations import (
    Annotation,
    Karpathy,
    Table,
    read_blip_list,
    read_coco,
    read_folder,
    read_karpathy,
    read_table,
)
from pipelines.config import run_main
from pipelines.data import find_groups, read_group
from pipelines.ingest import IngestRun, ingest, main

Record = dict[str, Any]


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(values).resize((24, 16)).save(file, "JPEG")
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def put_json(path: Path, tree: Any) -> str:
    return str(put(path, json.dumps(tree).encode()))


def rows(out: Path) -> list[Record]:
    """All rows of all shards, read by pyarrow alone."""
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def texts(out: Path) -> dict[str, list[str]]:
    return {row["key"]: [caption["text"] for caption in row["captions"]] for row in rows(out)}


def table_of(folder: Path, lines: Sequence[tuple[str, str]], name: str = "pairs.tsv") -> Table:
    """A table of (image path, caption)."""
    text = "".join(f"{image}\t{caption}\n" for image, caption in [("filepath", "title"), *lines])
    return Table(str(put(folder / name, text.encode())))


def numbered(folder: Path, count: int, absent: Sequence[int] = (), **values: Any) -> IngestRun:
    """A run over a table of `count` images named 000.jpg, ..., of which some files are missing."""
    for i in set(range(count)) - set(absent):
        put(folder / f"images/{i:03d}.jpg", jpeg(i))
    table = table_of(folder, [(f"{i:03d}.jpg", f"picture {i}") for i in range(count)])
    places: Record = {"images": str(folder / "images"), "out": str(folder / "out"), "table": table}
    return IngestRun(**(places | values))


# ---- the formats ---------------------------------------------------------------------------------

KARPATHY_COCO = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000042.jpg",
            "imgid": 0,
            "cocoid": 42,
            "split": "test",
            "sentids": [1],
            "sentences": [{"raw": "a test", "tokens": ["a", "test"], "imgid": 0, "sentid": 1}],
        },
        {
            "filepath": "train2014",
            "filename": "COCO_train2014_000000000007.jpg",
            "imgid": 1,
            "cocoid": 7,
            "split": "train",
            "sentences": [{"raw": "a cat"}, {"raw": "a small cat"}],
        },
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000009.jpg",
            "imgid": 2,
            "cocoid": 9,
            "split": "restval",
            "sentences": [{"raw": "a dog"}],
        },
    ],
    "dataset": "coco",
}


def test_karpathy_of_coco(tmp_path: Path) -> None:
    file = put_json(tmp_path / "dataset_coco.json", KARPATHY_COCO)
    train, rest = "train2014/COCO_train2014_000000000007.jpg", "val2014/COCO_val2014_000000000009.jpg"
    assert list(read_karpathy(file, ["train", "restval"])) == [
        Annotation("7", train, ("a cat", "a small cat")),
        Annotation("9", rest, ("a dog",)),
    ]
    assert [a.key for a in read_karpathy(file, ["train"])] == ["7"]
    assert [a.key for a in read_karpathy(file, ["test"])] == ["42"]
    with pytest.raises(ValueError, match=r"'val'; there are test \(1\), train \(1\), restval \(1\)"):
        list(read_karpathy(file, ["train", "val"]))


def test_karpathy_of_flickr_has_neither_folders_nor_ids_of_its_own(tmp_path: Path) -> None:
    image = {"filename": "1000092795.jpg", "imgid": 0, "split": "train", "sentences": [{"raw": "Two men."}]}
    file = put_json(tmp_path / "dataset_flickr30k.json", {"images": [image], "dataset": "flickr30k"})
    assert list(read_karpathy(file, ["train"])) == [Annotation("1000092795", "1000092795.jpg", ("Two men.",))]


def test_training_list_of_blip_is_grouped_by_image(tmp_path: Path) -> None:
    cat, dog = "val2014/COCO_val2014_000000000007.jpg", "train2014/COCO_train2014_000000000009.jpg"
    lines = [(cat, "a cat", "coco_7"), (dog, "a dog", "coco_9"), (cat, "one cat", "coco_7")]
    records = [{"caption": text, "image": image, "image_id": name} for image, text, name in lines]
    file = put_json(tmp_path / "coco_karpathy_train.json", records)
    assert list(read_blip_list(file)) == [
        Annotation("7", cat, ("a cat", "one cat")),
        Annotation("9", dog, ("a dog",)),
    ]


@pytest.mark.parametrize(
    ("image", "key"),
    [
        ("val2014/COCO_val2014_000000391895.jpg", "391895"),
        ("flickr30k-images/1007129816.jpg", "1007129816"),
        ("186348874_75b2cf1ec5.jpg", "186348874_75b2cf1ec5"),  # BLIP's own code would cut this one
    ],
)
def test_test_list_of_blip_names_images_as_its_evaluation_does(tmp_path: Path, image: str, key: str) -> None:
    file = put_json(tmp_path / "test.json", [{"image": image, "caption": ["one", "two"]}])
    assert list(read_blip_list(file)) == [Annotation(key, image, ("one", "two"))]


def test_list_with_ids_of_its_own(tmp_path: Path) -> None:
    records = [{"image": f"{folder}/1.jpg", "caption": "x", "image_id": i} for i, folder in enumerate("ab")]
    file = put_json(tmp_path / "mine.json", records)
    assert [a.key for a in read_blip_list(file)] == ["0", "1"]


def test_coco_in_the_order_of_the_images(tmp_path: Path) -> None:
    tree = {
        "info": {},
        "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 7, "file_name": "a.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "a cat"},
            {"id": 2, "image_id": 9, "caption": "a dog"},
            {"id": 3, "image_id": 7, "caption": "one cat"},
            {"id": 4, "image_id": 8, "caption": "of an image that is not listed"},
        ],
    }
    assert list(read_coco(put_json(tmp_path / "captions.json", tree))) == [
        Annotation("9", "b.jpg", ("a dog",)),
        Annotation("7", "a.jpg", ("a cat", "one cat")),
        Annotation("8", "", ("of an image that is not listed",)),
    ]


def test_nocaps(tmp_path: Path) -> None:
    image = {"id": 0, "open_images_id": "0013ea", "domain": "near-domain", "file_name": "0013ea.jpg"}
    tree = {"images": [image], "annotations": [{"image_id": 0, "id": 0, "caption": "A toddler."}]}
    assert list(read_coco(put_json(tmp_path / "val.json", tree))) == [
        Annotation("0", "0013ea.jpg", ("A toddler.",))
    ]
    del tree["annotations"]  # as in nocaps_test_image_info.json
    assert list(read_coco(put_json(tmp_path / "test.json", tree))) == [Annotation("0", "0013ea.jpg", ())]


def test_table(tmp_path: Path) -> None:
    lines = [("a/1.jpg", "a cat"), ("b/1.jpg", "a dog"), ("a/1.jpg", "one cat, asleep")]
    found = list(read_table(table_of(tmp_path, lines)))
    assert found == [
        Annotation("a/1", "a/1.jpg", ("a cat", "one cat, asleep")),
        Annotation("b/1", "b/1.jpg", ("a dog",)),
    ]


def test_table_as_excel_writes_it_with_other_columns(tmp_path: Path) -> None:
    text = '\ufeffid,file,text\r\n5,x.png,"red, ""very"" red"\r\n6,y.png,\u732b\r\n'
    file = put(tmp_path / "mine.csv", text.encode())
    found = list(read_table(Table(str(file), image="file", caption="text", key="id")))
    assert found == [Annotation("5", "x.png", ('red, "very" red',)), Annotation("6", "y.png", ("\u732b",))]


def test_table_with_bare_quotation_marks(tmp_path: Path) -> None:
    file = table_of(tmp_path, [("a.jpg", '"Stop" on a sign'), ("b.jpg", 'a 5" gun')]).file
    with pytest.raises(ValueError, match=r"line 2: .*table\.quotes"):
        list(read_table(Table(file)))
    found = list(read_table(Table(file, quotes=False)))
    assert [a.captions for a in found] == [('"Stop" on a sign',), ('a 5" gun',)]


def test_folder(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/10.png", "a.webp", ".hidden/x.jpg", ".x.jpg", "b/notes.md"):
        put(tmp_path / name, b"never opened")
    put(tmp_path / "a.txt", "a cat\r\n\n  one \u732b  \n".encode())
    put(tmp_path / "b/10.txt", b"caf\xe9\n")  # Latin-1
    assert list(read_folder(tmp_path)) == [
        Annotation("a", "a.webp", ("a cat", "  one \u732b  ")),
        Annotation("b/10", "b/10.png", ("caf\udce9",)),
        Annotation("b/2", "b/2.JPG", ()),
    ]


def test_text_beside_an_image_may_not_be_a_link_out_of_the_folder(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret", b"root:x:0:0")
    put(tmp_path / "images/a.jpg", b"")
    (tmp_path / "images/a.txt").symlink_to(secret)
    assert list(read_folder(tmp_path / "images")) == [Annotation("a", "a.jpg", ())]


# ---- annotations that are not what they must be --------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ([], r"x\.json: is a list.*blip_list\.file"),
        ({"info": 1}, r"x\.json: has no key 'images'; it has 'info'"),
        ({"images": 3}, r"x\.json: images is 3, expected a list"),
        ({"images": [{"filename": "a.jpg"}]}, r"images\[0\] has no key 'split'; it has 'filename'"),
        ({"images": ["a.jpg"]}, r'images\[0\] is "a\.jpg", expected an object'),
        (
            {"images": [{"split": "train", "filename": "a.jpg", "cocoid": True, "sentences": []}]},
            r"images\[0\] cocoid is true, expected a whole number",
        ),
        (
            {"images": [{"split": "train", "filename": "a.jpg", "sentences": [{"raw": "x"}, {"raw": None}]}]},
            r"images\[0\] sentences\[1\] raw is null, expected text",
        ),
    ],
)
def test_bad_karpathy(tmp_path: Path, tree: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        list(read_karpathy(put_json(tmp_path / "x.json", tree), ["train"]))


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"images": []}, r"x\.json: is no list; name it karpathy\.file"),
        ([{"image": "a.jpg"}], r"record\[0\] has no key 'caption'; it has 'image'"),
        ([{"url": "http://x", "caption": "y"}], r"record\[0\] has no key 'image'; it has 'url', 'caption'"),
        ([{"image": "a.jpg", "caption": ["x", 5]}], r"record\[0\] caption\[1\] is 5, expected text"),
        ([{"image": "a.jpg", "caption": {}}], r"record\[0\] caption is {}, expected text or a list"),
    ],
)
def test_bad_list(tmp_path: Path, tree: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        list(read_blip_list(put_json(tmp_path / "x.json", tree)))


def test_coco_s_boxes_are_not_its_captions(tmp_path: Path) -> None:
    tree = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}],
    }
    with pytest.raises(ValueError, match=r"annotations\[0\] has no key 'caption'; it has 'image_id', 'bbox'"):
        list(read_coco(put_json(tmp_path / "instances.json", tree)))


@pytest.mark.parametrize("data", [b'{"images": [', b"", b"\xff\xfe\xff", b"[" * 100_000, b"{}\n{}"])
def test_bad_json(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"x\.json: is not JSON \(.+\); is it whole\?"):
        list(read_coco(str(put(tmp_path / "x.json", data))))


def test_annotation_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.json: cannot be read \(No such file or directory\)"):
        list(read_coco(str(tmp_path / "x.json")))
    with pytest.raises(ValueError, match=r"x\.tsv: cannot be read"):
        list(read_table(Table(str(tmp_path / "x.tsv"))))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "has no column 'filepath'; set table.image to one of none"),
        (b"path\ttext\n", "has no column 'filepath'; set table.image to one of 'path', 'text'"),
        (b"filepath\ttext\n", "has no column 'title'; set table.caption to one of 'filepath', 'text'"),
        (b"filepath\ttitle\na.jpg\n", "line 2 has fewer fields"),
        (b"filepath\ttitle\na.jpg\tx\ty\n", "line 2 has more fields"),
        (b"filepath\ttitle\na.jpg\tcaf\xe9\n", "is not UTF-8"),
    ],
)
def test_bad_table(tmp_path: Path, data: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        list(read_table(Table(str(put(tmp_path / "x.tsv", data)))))


# ---- shards --------------------------------------------------------------------------------------


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
