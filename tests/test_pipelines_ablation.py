"""The plan of the ablation: arms differ in their texts alone. Its table, against numbers found by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_pipelines_bootstrap import recipes

from pipelines.ablation import AblationRun, interval, plan_seed, read_arm, share_right, table
from pipelines.bootstrap import Recipes
from pipelines.config import load_config
from pipelines.steps import Step, check_steps
from pipelines.testset import server_id
from pipelines.train_blip import InitConfig
from pipelines.world import WorldConfig, write_world

CONTROLS = ("beam", "shared", "best_of_k", "continued")


@pytest.fixture
def run(tmp_path: Path) -> AblationRun:
    paths = recipes(tmp_path)
    paths.pop("eval_filter")
    world = tmp_path / "world.yaml"
    world.write_text("out: unset\nworld: {noisy_rows: 24}\n")
    return AblationRun("runs/a", (4, 5), Recipes(**paths), world=str(world), controls=CONTROLS)


def loaded(steps: list[Step]) -> dict[str, Any]:
    """Step -> the config it will read, overrides and all."""
    check_steps(steps)
    return {step.name: load_config(step.entry.config, step.config, step.overrides) for step in steps}


def test_arms_are_trained_alike_but_for_their_texts(run: AblationRun) -> None:
    found = loaded(plan_seed(run, 4))
    meds = {arm: found[f"4/{arm}/med"] for arm in run.arms if arm != "continued"}
    assert {arm: med.data.shards for arm, med in meds.items()} == {
        "X": ("runs/a/4/world/noisy",),
        **{arm: (f"runs/a/4/{arm}/clean",) for arm in ("F", "C", "CF", "beam", "shared", "best_of_k")},
    }
    alike = {replace(med, out="", data=replace(med.data, shards=())) for med in meds.values()}
    assert len(alike) == 1 and alike.pop().train.seed == 4
    later = loaded(plan_seed(run, 5))["5/X/med"]
    assert later.train.seed == 5 and later.data.shards == ("runs/a/5/world/noisy",)
    goes_on = found["4/continued/med"]
    assert goes_on.start.weights == "runs/a/4/X/med/model" and goes_on.model is None
    assert goes_on.init == InitConfig() and goes_on.data.shards == ("runs/a/4/continued/clean",)


def test_each_arm_selects_its_texts(run: AblationRun) -> None:
    found = loaded(plan_seed(run, 4))
    chosen = {arm: found[f"4/{arm}/select"] for arm in run.arms if arm != "X"}
    both = ("web", "synthetic")
    assert {arm: (c.sources, c.threshold, c.out, c.clean) for arm, c in chosen.items()} == {
        "F": (("web",), 0.5, "runs/a/4/corpus", "runs/a/4/F/clean"),
        "C": (both, 0.0, "runs/a/4/corpus", "runs/a/4/C/clean"),
        "CF": (both, 0.5, "runs/a/4/corpus", "runs/a/4/CF/clean"),
        "continued": (both, 0.5, "runs/a/4/corpus", "runs/a/4/continued/clean"),
        **{
            arm: (both, 0.5, f"runs/a/4/{arm}/corpus", f"runs/a/4/{arm}/clean")
            for arm in ("beam", "shared", "best_of_k")
        },
    }


def test_controls_change_one_thing_of_the_corpus(run: AblationRun) -> None:
    found = loaded(plan_seed(run, 4))
    plain = found["4/corpus"]
    assert plain.capfilt.captioner == "runs/a/4/captioner/model" and plain.input == "runs/a/4/world/noisy"
    assert found["4/captioner"].start.weights == found["4/filter"].start.weights == "runs/a/4/X/med/model"
    assert found["4/captioner"].data.shards == ("runs/a/4/world/clean",)
    assert found["4/beam/corpus"].capfilt == replace(
        plain.capfilt, decoding=replace(plain.capfilt.decoding, beams=3, top_p=None)
    )
    assert found["4/best_of_k/corpus"].capfilt == replace(plain.capfilt, captions=4)
    both = "runs/a/4/shared/model"
    assert found["4/shared/corpus"].capfilt == replace(plain.capfilt, captioner=both, filter=both)
    assert found["4/shared"].start.reads is None and found["4/captioner"].start.reads is False


def test_an_arm_comes_after_all_it_needs(run: AblationRun) -> None:
    names = [step.name for step in plan_seed(run, 4)]
    order = ["world", "X/med", "captioner", "filter", "corpus", "CF/select", "CF/med", "CF/retrieval"]
    places = [names.index(f"4/{name}") for name in order]
    assert places == sorted(places) and len(set(names)) == len(names)
    for arm in ("beam", "shared", "best_of_k"):
        assert names.index(f"4/{arm}/corpus") < names.index(f"4/{arm}/select") < names.index(f"4/{arm}/med")


def test_given_models_and_shards_are_used_by_all_seeds(run: AblationRun) -> None:
    given = replace(run, world=None, web="w", clean="c", test="t", captioner="cap", filter="fil", controls=())
    found = loaded(plan_seed(given, 5))
    assert not {"5/world", "5/captioner", "5/filter"} & found.keys()
    assert (found["5/corpus"].capfilt.captioner, found["5/corpus"].capfilt.filter) == ("cap", "fil")
    assert found["5/X/med"].data.shards == ("w",) and found["5/CF/retrieval"].shards == ("t",)
    one = loaded(plan_seed(replace(given, shared="both", controls=("shared",)), 5))
    assert "5/shared" not in one
    assert one["5/shared/corpus"].capfilt == replace(
        found["5/corpus"].capfilt, captioner="both", filter="both"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": (1,)}, "2 to 10 different"),
        ({"seeds": (1, 1)}, "2 to 10 different"),
        ({"web": "w", "clean": "c", "test": "t"}, "either world, or web"),
        ({"world": None, "web": "w"}, "either world, or web"),
        ({"captioner": "c"}, "captioner and filter, or neither"),
        ({"shared": "s"}, "shared is s and captioner None"),
        ({"captioner": "c", "filter": "f"}, "shared is None and captioner c"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    run: AblationRun, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(run, **change)


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])  # deviation 1, of the mean 1 / sqrt(3); t for two degrees 4.303
    assert (mean, half) == pytest.approx((2.0, 4.303 / 3**0.5))
    # Gosset's sleep data, group 2 (R: t.test(extra[group == 2]) gives 0.898 to 3.762)
    mean, half = interval([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    assert (mean - half, mean + half) == pytest.approx((0.8976775, 3.7623225), abs=1e-3)


def test_the_table_is_of_what_lies_in_the_folders(tmp_path: Path) -> None:
    for seed, (tr, ir) in {4: (0.2, 0.1), 5: (0.4, 0.3)}.items():
        for name, tree in (
            ("retrieval", {"itc": {"tr@1": 0.0, "ir@1": 0.0}, "itm": {"tr@1": tr, "ir@1": ir}}),
            ("captions", {"metrics": {"cider_d": 2 * tr, "bleu4": ir}}),
        ):
            path = tmp_path / str(seed) / "X" / name / "metrics.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(tree))
    found = {"X": [read_arm(tmp_path / str(seed), "X", of_world=False) for seed in (4, 5)]}
    assert found["X"][0]["mean R@1"] == pytest.approx(0.15)
    head, rule, line = table(found).splitlines()
    assert head == "| arm, times 100 | TR@1 | IR@1 | mean R@1 | CIDEr-D | BLEU-4 |"
    assert rule.count("|") == head.count("|")
    assert line.startswith("| X | 30.0 +- 127.1 | 20.0 +- 127.1 | 25.0 +-")  # 12.706 x 14.14 / sqrt(2)


def test_captions_are_right_by_the_truth_of_the_world(tmp_path: Path) -> None:
    write_world(WorldConfig(seed=1, noisy_rows=1, clean_rows=0, test_rows=4, shard_rows=4), tmp_path)
    texts = {row["key"]: row["captions"][0]["text"] for row in pq.read_table(tmp_path / "test").to_pylist()}
    said = [*list(texts.values())[:3], "nothing that the world can say"]  # a person's captions are true
    rows = [{"image_id": server_id(key), "caption": text} for key, text in zip(texts, said, strict=True)]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    assert share_right(tmp_path / "captions.json", tmp_path / "test_truth.parquet") == 0.75
