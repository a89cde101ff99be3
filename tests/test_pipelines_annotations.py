"""Annotations of every layout, and those that are not what they must be."""

from pathlib import Path
from typing import Any

import pytest
from image_files import KARPATHY_COCO, put, put_json, table_of

from pipelines.annotations import (
    Annotation,
    Table,
    read_blip_list,
    read_coco,
    read_folder,
    read_karpathy,
    read_table,
)


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
    assert [a.texts for a in found] == [('"Stop" on a sign',), ('a 5" gun',)]


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
