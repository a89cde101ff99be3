"""Saving and loading: whole or not at all, strict, and never running code."""

import json
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import pixels, tiny_blip, tiny_config, tiny_tokenizer
from torch import Tensor

from blip.checkpoint import digest, load_model, load_state, save_model, save_state
from blip.model import Blip, BlipConfig
from blip.momentum import MomentumConfig

IDS = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


class Bomb:
    """Pickled, it runs a command when unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def load(folder: Path) -> Blip:
    return load_model(folder, Blip, BlipConfig)


def weight(blip: Blip) -> Tensor:
    return blip.state_dict()["heads.itm.weight"]


def edit_weights(folder: Path, change: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tiny_blip(), tmp_path / "med")
    return tmp_path / "med"


@pytest.mark.parametrize(("reads", "writes"), [(True, True), (True, False), (False, True)])
def test_a_model_comes_back_bit_equal(tmp_path: Path, reads: bool, writes: bool) -> None:
    blip = tiny_blip(reads=reads, writes=writes)
    blip.tokenizer = tiny_tokenizer(tmp_path / "words")
    blip.config = replace(blip.config, label_smoothing=0.05, text=replace(blip.config.text, dropout=0.25))
    save_model(blip, tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.config == blip.config
    assert not back.training
    assert back.state_dict().keys() == blip.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in blip.state_dict().items())
    assert all(parameter.requires_grad for parameter in back.parameters())
    assert torch.equal(back.image_tokens(pixels(2)), blip.image_tokens(pixels(2)))
    assert back.tokenizer is not None
    assert (back.tokenizer.dec, back.tokenizer.enc, len(back.tokenizer)) == (48, 49, 50)
    assert torch.equal(back.tokenizer(["w3 w1"], 9)[0], blip.tokenizer(["w3 w1"], 9)[0])


def test_training_a_loaded_model_leaves_its_file_alone(saved: Path) -> None:
    before, blip = digest(saved), load(saved)
    with torch.no_grad():
        for parameter in blip.parameters():
            parameter.add_(1)
    assert digest(saved) == before
    assert not torch.equal(weight(load(saved)), weight(blip))


def test_the_teacher_stays_behind(tmp_path: Path) -> None:
    blip = tiny_blip().with_teacher(MomentumConfig(queue_size=8))
    save_model(blip, tmp_path / "med")
    names = load_file(tmp_path / "med" / "model.safetensors").keys()
    assert names == {name for name in blip.state_dict() if not name.startswith("teacher.")}
    assert load(tmp_path / "med").teacher is None


def test_weights_keep_their_dtype_on_disk_and_load_as_float32(tmp_path: Path) -> None:
    save_model(tiny_blip().bfloat16(), tmp_path / "med")
    assert {t.dtype for t in load_file(tmp_path / "med" / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path / "med").parameters()} == {torch.float32}


def test_all_weights_that_do_not_fit_are_named_at_once(saved: Path) -> None:
    edit_weights(
        saved,
        {
            "heads.itm.bias": None,
            "med.embeddings.word.weight": None,
            "extra.weight": torch.zeros(1),
            "heads.itm.weight": torch.zeros(3, 32),
        },
    )
    with pytest.raises(
        ValueError, match=r"missing: heads\.itm\.bias, med\.embeddings\.word\.weight"
    ) as error:
        load(saved)
    assert "unexpected: extra.weight" in str(error.value)
    assert "heads.itm.weight [3, 32] instead of [2, 32]" in str(error.value)
    assert str(saved) in str(error.value)


def test_truncated_weights_are_an_error(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "med-0"}, "format med-0; a Blip of format med-1 is wanted"),
        ({"model": "BlipVQA"}, "a BlipVQA of format"),
        (
            {"config": {"embed": 16, "embedd": 3}},
            r"config has unknown entries embedd; allowed: vision, text, embed",
        ),
        ({"config": {"text": {"wdth": 16}}}, r"config\.text has unknown entries wdth"),
    ],
)
def test_a_config_that_is_not_ours_is_an_error(
    saved: Path, change: dict[str, object], complaint: str
) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=complaint):
        load(saved)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load(tmp_path)


def test_saving_replaces_a_model_and_leaves_nothing_else(tmp_path: Path, saved: Path) -> None:
    other = tiny_blip(seed=1)
    save_model(other, saved)
    assert torch.equal(weight(load(saved)), weight(other))
    assert [path.name for path in tmp_path.iterdir()] == ["med"]


def test_saving_never_deletes_what_it_did_not_write(tmp_path: Path, saved: Path) -> None:
    (saved / "thesis.tex").write_text("years of work")
    before = digest(saved)
    with pytest.raises(ValueError, match=r"would delete thesis\.tex"):
        save_model(tiny_blip(seed=1), saved)
    assert (saved / "thesis.tex").exists() and digest(saved) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_model(tiny_blip(), tmp_path / "file")


def test_a_save_that_fails_leaves_the_former_model(tmp_path: Path, saved: Path) -> None:
    before, blip = digest(saved), tiny_blip(seed=1)
    blip.heads["vision_proj"].weight = blip.heads["text_proj"].weight  # safetensors refuses shared memory
    with pytest.raises(RuntimeError, match="share memory"):
        save_model(blip, saved)
    assert digest(saved) == before
    assert [path.name for path in tmp_path.iterdir()] == ["med"]


def test_a_death_between_two_renames_names_the_former_model(saved: Path) -> None:
    saved.rename(saved.parent / ".med.former")
    with pytest.raises(ValueError, match=r"rename .*\.med\.former"):
        load(saved)


def test_digest_is_that_of_sha256sum(saved: Path) -> None:
    file = saved / "model.safetensors"
    expected = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    assert digest(file) == digest(saved) == expected
    edit_weights(saved, {"heads.itm.bias": torch.ones(2)})
    assert digest(saved) != expected


def test_the_digest_of_the_same_weights_is_the_same(tmp_path: Path, saved: Path) -> None:
    save_model(load(saved), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(saved)


def test_digest_covers_every_shard(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = digest(tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    assert digest(tmp_path) != before
    with pytest.raises(ValueError, match="holds no weights"):
        digest(tmp_path.parent)


def test_a_trainer_state_comes_back(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(weights)
    weights[0].sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "step": 7,
        "name": "a",
        "none": None,
    }
    save_state(tmp_path / "run" / "state.pt", state)
    back = load_state(tmp_path / "run" / "state.pt")
    assert back["step"] == 7 and torch.equal(back["rng"], torch.get_rng_state())
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], optimizer.state[weights[0]]["exp_avg"])
    save_state(tmp_path / "run" / "state.pt", {"step": 8})
    assert load_state(tmp_path / "run" / "state.pt") == {"step": 8}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["state.pt"]


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    torch.save({"model": {"a": Bomb(trace)}}, tmp_path / "zip.pth")
    torch.save({"model": {"a": Bomb(trace)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Bomb(trace)}, protocol=2))
    for name in ("zip.pth", "old.pth", "plain.pth"):
        with pytest.raises(ValueError, match=rf"{name} is refused.*can run code"):
            load_state(tmp_path / name)
    assert not trace.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert trace.exists()  # the bomb was real


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    save_state(tmp_path / "state.pt", {"step": 1})
    with pytest.raises(ValueError, match="not written, it could not be loaded again"):
        save_state(tmp_path / "state.pt", {"step": 2, "config": tiny_config()})
    assert load_state(tmp_path / "state.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_files_from_before_torch_1_6_can_be_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_state(tmp_path / "old.pth")["a"], torch.arange(3))


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    save_state(tmp_path / "state.pt", {"a": torch.randn(1000)})
    content = (tmp_path / "state.pt").read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "state.pt").write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"state\.pt is (damaged|refused)"):
            load_state(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is not a file"):
        load_state(tmp_path / "absent.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dict, but holds a list"):
        load_state(tmp_path / "list.pt")


def test_a_killed_save_leaves_a_whole_model(saved: Path) -> None:
    """A process that saves over and over is killed; whatever stands there afterwards loads."""
    blip = tiny_blip()
    for attempt in range(12):
        child = os.fork()
        if child == 0:
            while True:
                save_model(blip, saved)
        time.sleep(0.02 + 0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        load(saved if saved.exists() else saved.parent / ".med.former")


@contextmanager
def stuck(save: Callable[[], None]) -> Iterator[None]:
    """Beside us, a process that has written what it saves and not yet renamed it. In the end it is killed."""
    written, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.fsync = lambda descriptor: os.write(tell, b".") and signal.pause()
            save()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(written, 1) == b".", "it died before"
        yield
    finally:
        os.close(written)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def save_as_state(blip: Blip, path: Path) -> None:
    save_state(path, {"model": blip.state_dict()})


@pytest.mark.parametrize("save", [save_as_state, save_model])
def test_the_next_save_removes_what_a_killed_one_left(
    tmp_path: Path, save: Callable[[Blip, Path], None]
) -> None:
    blip, target, mine = tiny_blip(), tmp_path / "med.1", tmp_path / ".med.1.new-ideas"
    mine.touch()
    with stuck(partial(save, blip, target)):
        (left,) = set(tmp_path.iterdir()) - {mine}
        save(blip, target)
        assert left.exists()  # its process lives and may go on
    save(blip, tmp_path / "other")
    assert left.exists()  # this is another's business
    save(blip, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".med.1.new-ideas", "med.1", "other"]


def test_a_leftover_under_our_own_process_number_is_removed(tmp_path: Path) -> None:
    """In a container the process that was killed and the one that goes on often have the same."""
    (tmp_path / f".state.pt.new-{os.getpid()}-ab_c9xyz").touch()
    save_state(tmp_path / "state.pt", {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
