"""What a run will take: rows counted by hand, schedules worked out on paper, and a real sample."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import JPEG, make_tar, member
from small_run import make_run

from capfilt.schema import Columns
from capfilt.shards import plan_splits
from pipelines import plan
from pipelines.config import ConfigError, save_config
from pipelines.plan import Measured, count_rows, forecast, longest, spread
from pipelines.run_capfilt import CapFiltRun

ONE_A_SECOND = Measured("cpu", 100, 0, start_seconds=10.0, rows_per_second=1.0)


@pytest.mark.parametrize(
    ("sizes", "workers", "rows"),
    [
        ([5, 5, 5, 5], 1, 20),
        ([5, 5, 5, 5], 2, 10),
        ([5, 5, 5, 5], 3, 10),  # one of three does two
        ([5, 5, 5, 5], 64, 5),
        ([1, 9, 1, 1, 1, 1, 1, 1, 1, 1], 2, 9),  # the large one first, the small ones beside it
        ([7, 5, 4, 3, 1], 2, 10),  # 7 | 5, then 7 | 5+4, 7+3 | 9, 10 | 9+1
        ([0, 0], 2, 0),
    ],
)
def test_the_last_worker_ends_when_it_must(sizes: list[float], workers: int, rows: float) -> None:
    assert longest(sizes, workers) == rows


def test_hours_and_money() -> None:
    found = forecast([3590, 3590], 4, ONE_A_SECOND, price=2.5)
    assert (found.busy, found.hours, found.worker_hours, found.cost) == (2, 1.0, 4.0, 10.0)
    assert forecast([1], 1, ONE_A_SECOND, None).cost is None


def test_a_sample_is_spread_over_the_corpus() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(5), 4) == [0, 1, 2, 3]
    assert spread([7, 8], 4) == [7, 8] and spread([], 4) == []


def test_rows_of_parquet_are_counted_and_those_of_tars_estimated(tmp_path: Path) -> None:
    _, shards = make_run(tmp_path)
    assert count_rows(plan_splits(shards, 5), Columns()) == [5, 5, 2] * 4
    (tmp_path / "tars").mkdir()
    samples = [part for row in range(20) for part in (member(f"{row}.jpg", JPEG), member(f"{row}.txt", b"a"))]
    for number in range(9):
        make_tar(tmp_path / f"tars/{number}.tar", samples)
    (tmp_path / "tars/broken.parquet").write_bytes(b"PAR1 not really")
    found = count_rows(plan_splits(tmp_path / "tars", 5), Columns())
    assert sorted(found) == [0, *[20] * 9]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for four shards of twelve rows, batches of five."""
    config, shards = make_run(tmp_path)
    save_config(CapFiltRun(str(shards), str(tmp_path / "out"), config, engine="local"), tmp_path / "recipe")
    path = tmp_path / "plan.yaml"
    path.write_text(f"out: {tmp_path / 'plan'}\nrecipe: {tmp_path / 'recipe/config.yaml'}\n")
    return path


def test_a_real_sample(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(recipe), "rows=24", "workers=[1,8]", "price=3"]) == 0
    found = json.loads((recipe.parent / "plan/plan.json").read_text())
    assert (found["rows"], found["splits"]) == (48, 4)
    measured = found["measured"]
    assert (measured["rows"], measured["failed"]) == (40, 0)  # of each shard two batches: 10 rows for 6
    one, eight = found["plans"]
    assert (one["busy"], eight["busy"]) == (1, 4)
    for planned, rows in ((one, 48), (eight, 12)):
        seconds = measured["start_seconds"] + rows / measured["rows_per_second"]
        assert planned["hours"] * 3600 == pytest.approx(seconds)
    assert eight["cost"] == pytest.approx(8 * eight["hours"] * 3)
    said = capsys.readouterr().out
    assert "48 rows in 4 splits" in said and "some workers find nothing to do" in said
    assert not (recipe.parent / "out").exists()  # a plan writes nothing there


def test_rows_without_a_score_are_told(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "world/noisy/00000.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("jpg")
    pq.write_table(table.set_column(place, "jpg", pa.array([b"no image"] * len(table))), path)
    plan.main([str(recipe), "rows=24"])
    assert json.loads((tmp_path / "plan/plan.json").read_text())["measured"]["failed"] == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows=7"], "rows is 7; a sample needs at least 8"),
        (["workers=[]"], r"workers is \[\]"),
        (["workers=[0]"], r"workers is \[0\]"),
    ],
)
def test_what_cannot_be_is_refused(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.main([str(recipe), *words])


def test_a_corpus_of_one_batch_is_refused(recipe: Path, tmp_path: Path) -> None:
    one = tmp_path / "world/noisy/00000.parquet"
    pq.write_table(pq.read_table(one).slice(0, 4), one)
    with pytest.raises(ValueError, match="4 rows, which is one batch or none"):
        plan.main([str(recipe), f"input={one}"])
