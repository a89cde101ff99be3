"""Which columns are found under whose names, what is refused, and what a scored shard holds."""

import json
import math

import pyarrow as pa
import pytest

from capfilt.schema import (
    CLEAN,
    SCORED,
    STATUSES,
    Chunk,
    ColumnMap,
    Columns,
    Row,
    Scores,
    ShardError,
    best_caption,
    map_columns,
    refuse_unsafe,
    scored_columns,
    scored_schema,
    scored_table,
    short_reason,
)

AUTO = Columns()
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMG2DATASET = {
    "url": pa.string(),
    "caption": pa.string(),
    "key": pa.string(),
    "status": pa.string(),
    "error_message": pa.string(),
    "width": pa.int32(),
    "sha256": pa.string(),
    "jpg": pa.binary(),
}
LAION = {"SAMPLE_ID": pa.int64(), "URL": pa.string(), "TEXT": pa.string(), "similarity": pa.float64()}


def schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (IMG2DATASET, ColumnMap("jpg", "caption", "key", "status")),
        ({"image": HF_IMAGE, "text": pa.string()}, ColumnMap("image", "text", None, None)),
        ({**LAION, "png": pa.binary()}, ColumnMap("png", "TEXT", None, None)),
        (
            {"uid": pa.string(), "text": pa.string(), "sha256": pa.string(), "webp": pa.large_binary()},
            ColumnMap("webp", "text", "uid", None),  # DataComp
        ),
        (
            {"id": pa.int64(), "image": pa.binary(), "alt_text": pa.large_string()},
            ColumnMap("image", "alt_text", "id", None),
        ),
        (
            {"image": pa.string(), "jpg": pa.binary(), "caption": pa.list_(pa.string()), "text": pa.string()},
            ColumnMap("jpg", "text", None, None),  # names that fit, types that do not
        ),
        (
            {"image": pa.binary(), "text": pa.dictionary(pa.int32(), pa.string())},
            ColumnMap("image", "text", None, None),
        ),
        ({"image": pa.binary(), "text": pa.null()}, ColumnMap("image", "text", None, None)),
        (
            {"image": pa.binary(), "text": pa.string(), "status": pa.string()},
            ColumnMap("image", "text", None, None),  # a status that is not img2dataset's
        ),
    ],
)
def test_columns_are_found_under_the_names_of_known_producers(found: dict, expected: ColumnMap) -> None:
    assert map_columns(schema(**found), AUTO, "x.parquet") == expected


def test_a_column_that_is_asked_for_wins() -> None:
    asked = Columns(image="jpg", text="url", key="sha256", status="caption")
    assert map_columns(schema(**IMG2DATASET), asked, "x") == ColumnMap("jpg", "url", "sha256", "caption")


@pytest.mark.parametrize(
    ("found", "columns", "words"),
    [
        (
            IMG2DATASET,
            Columns(text="captoin"),
            ["x.parquet", "'captoin'", "did you mean 'caption'", "'url'", "columns.text"],
        ),
        (IMG2DATASET, Columns(image="width"), ["columns.image = 'width'", "int32"]),
        (LAION, AUTO, ["x.parquet", "no image column", "run img2dataset first", "'URL'", "never downloads"]),
        ({"text": pa.string()}, AUTO, ["no image column", "columns.image"]),
        ({"image": pa.binary(), "score": pa.int8()}, AUTO, ["no text column", "columns.text", "'score'"]),
        ({**IMG2DATASET, "itm_web": pa.float32()}, AUTO, ["'itm_web'", "scored already"]),
        ({}, AUTO, ["no image column", "no columns"]),
    ],
)
def test_what_cannot_be_mapped_says_where_what_and_what_to_do(
    found: dict, columns: Columns, words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        map_columns(schema(**found), columns, "x.parquet")
    for word in words:
        assert word in str(caught.value)


def test_a_name_that_appears_twice_is_refused() -> None:
    twice = pa.schema([("image", pa.binary()), ("text", pa.string()), ("text", pa.int8())])
    with pytest.raises(ValueError, match="'text' appears more than once"):
        map_columns(twice, AUTO, "x")


UUID = pa.uuid()


@pytest.mark.parametrize(
    "hidden",
    [
        UUID,
        pa.list_(UUID),
        pa.large_list(UUID),
        pa.list_(UUID, 2),
        pa.struct([("a", pa.int8()), ("b", pa.list_(pa.struct([("c", UUID)])))]),
        pa.map_(pa.string(), UUID),
        pa.list_(
            pa.field("item", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
        ),
    ],
)
def test_extension_types_are_refused_at_any_depth(hidden: pa.DataType) -> None:
    with pytest.raises(ShardError, match=r"x\.parquet: column 'deep' holds the Arrow extension type"):
        refuse_unsafe(schema(image=pa.binary(), deep=hidden), "x.parquet")


def test_an_extension_type_that_nobody_registered_is_refused_by_its_metadata() -> None:
    field = pa.field("deep", pa.binary(), metadata={"ARROW:extension:name": "some.type"})
    with pytest.raises(ShardError, match=r"some\.type"):
        refuse_unsafe(pa.schema([field]), "x")


def test_plain_nested_columns_are_not_refused() -> None:
    refuse_unsafe(schema(a=pa.list_(pa.struct([("b", pa.map_(pa.string(), pa.float64()))]))), "x")


def test_a_thousand_columns_are_enough() -> None:
    with pytest.raises(ShardError, match="1001 columns"):
        refuse_unsafe(pa.schema([(str(i), pa.int8()) for i in range(1001)]), "x")


def test_reasons_are_one_short_printable_line() -> None:
    assert short_reason("a\x1b]0;title\x07\nb\u202ec") == "a ]0;title b c"
    assert len(short_reason("x" * 10**6)) == 200


# ---- scored shards -------------------------------------------------------------------------------

RAW = schema(url=pa.string(), image=pa.binary())
FOUND = ColumnMap("image", "url", None, None)


def chunk(*rows: Row) -> Chunk:
    return Chunk(
        rows, pa.table({"url": [row.text for row in rows], "image": [row.image for row in rows]}, schema=RAW)
    )


def test_a_scored_row_holds_all_captions_and_repeats_the_best() -> None:
    rows = chunk(Row(0, "k0", "web", b"jpg"))
    scores = Scores("ok", None, ("a", "b", "c"), 0.25, 0.5, (0.125, 0.75, None), (0.0, -0.5, 0.25))
    (row,) = scored_table(rows, [scores], scored_schema(RAW, FOUND)).to_pylist()
    assert row == {
        "url": "web",
        "image": b"jpg",
        "capfilt_key": "k0",
        "capfilt_status": "ok",
        "capfilt_error": None,
        "caption_web": "web",
        "caption_synthetic": "b",
        "captions_synthetic": ["a", "b", "c"],
        "itm_web": 0.25,
        "itc_web": 0.5,
        "itm_synthetic": 0.75,
        "itc_synthetic": -0.5,
        "itms_synthetic": [0.125, 0.75, None],
        "itcs_synthetic": [0.0, -0.5, 0.25],
    }


def test_what_was_not_scored_is_null_and_so_is_nan() -> None:
    rows = chunk(Row(0, "a", None, None, "no_image", "why"), Row(1, "b", "t", b"x"))
    scores = [Scores("no_image", "why"), Scores("score_error", "nan\nin", ("c",), math.nan, math.inf)]
    bad, nan = scored_table(rows, scores, scored_schema(RAW, FOUND)).to_pylist()
    assert (bad["capfilt_status"], bad["capfilt_error"], bad["captions_synthetic"]) == ("no_image", "why", [])
    assert bad["caption_synthetic"] is None and bad["itm_synthetic"] is None
    assert nan["capfilt_error"] == "nan in"
    assert nan["itm_web"] is None and nan["itc_web"] is None
    assert (nan["caption_synthetic"], nan["itms_synthetic"], nan["itcs_synthetic"]) == ("c", [None], [None])


def test_best_caption_is_the_first_of_equals() -> None:
    assert best_caption([0.5, 0.75, 0.75]) == 1
    assert best_caption([None, None]) == 0
    assert best_caption([None, 0.0]) == 1
    assert best_caption([]) is None


def test_the_scored_schema_remembers_the_columns_and_may_leave_out_the_images() -> None:
    with_images = scored_schema(RAW, FOUND, provenance={"seed": 3})
    without = scored_schema(RAW, FOUND, keep_images=False)
    assert with_images.names == ["url", "image", *SCORED.names]
    assert without.names == ["url", *SCORED.names]
    assert scored_columns(with_images, "x") == (FOUND, True)
    assert scored_columns(without, "x") == (FOUND, False)
    assert json.loads(with_images.metadata[b"capfilt"])["seed"] == 3
    assert "image" not in scored_table(chunk(Row(0, "a", "t", b"x")), [Scores("ok")], without).column_names
    with pytest.raises(ShardError, match="not a scored shard"):
        scored_columns(RAW, "x")


def test_every_row_needs_its_score_and_every_caption_its_own() -> None:
    with pytest.raises(ValueError, match="1 scores for 2 rows"):
        scored_table(
            chunk(Row(0, "a", "t", b"x"), Row(1, "b", "t", b"x")), [Scores("ok")], scored_schema(RAW, FOUND)
        )
    with pytest.raises(ValueError, match="1 itms for 2 captions"):
        Scores("ok", None, ("a", "b"), itms=(0.5,))
    with pytest.raises(ValueError, match="'fine' is unknown"):
        Scores("fine")
    assert "ok" in STATUSES


def test_the_clean_schema_tells_hugging_face_that_image_is_an_image() -> None:
    features = json.loads(CLEAN.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert list(features) == CLEAN.names
    assert CLEAN.field("image").type == HF_IMAGE
