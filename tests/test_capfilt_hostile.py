"""What is in no shard's power: to have something opened, fetched or run, to be many rows, to reach Ray."""

import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile.mutations import huge_footer
from hostile_files import ROOT, make_tar, member, shard
from image_files import jpeg
from packaging.requirements import Requirement
from packaging.version import Version
from small_run import save_models

from blip.generate import Decoding
from capfilt import CapFiltConfig, parquet, run_local
from capfilt.schema import IMAGE, Columns, ShardError, refuse_unsafe
from capfilt.shards import Split, open_split, plan_splits
from capfilt.tar import index_tar
from pipelines.data import find_groups, read_group

# ---- numbers and sizes that are not true ---------------------------------------------------------


@pytest.mark.parametrize("number", [40, 7], ids=["of the file", "of its row groups"])
def test_a_footer_that_lies_about_its_rows_is_one_failed_split(tmp_path: Path, number: int) -> None:
    """Believed, 500 rows are 62 splits too many; 2^60 would keep the plan busy until the memory is full."""
    path = shard(tmp_path / "a.parquet", 40)
    whole = path.read_bytes()
    assert len(plan_splits(tmp_path, 8)) == 5
    path.write_bytes(huge_footer(whole, number, 500))
    for split in plan_splits(tmp_path, 8):
        assert (split.start, split.stop) == (0, None)
        with pytest.raises(ShardError, match=r"a\.parquet: says that it has \d+ rows, and its row groups"):
            open_split(split, Columns())
    assert len(plan_splits(tmp_path, 8)) == 1


def test_a_file_of_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "a.parquet", 40)
    monkeypatch.setattr(parquet, "MAX_ROWS", 40)
    assert len(plan_splits(path, 8)) == 5
    monkeypatch.setattr(parquet, "MAX_ROWS", 39)
    (split,) = plan_splits(path, 8)
    with pytest.raises(ShardError, match=r"a\.parquet: has 40 rows; at most 39 are read from one file"):
        open_split(split, Columns())


def clean_table(rows: int, image: pa.Array) -> pa.Table:
    captions = [[{"text": "a cat", "source": "web", "itm": None}]] * rows
    images = pa.StructArray.from_arrays([image, pa.nulls(rows, pa.string())], names=["bytes", "path"])
    return pa.table({"key": ["a"] * rows, "image": images, "captions": captions})


def test_a_row_group_of_fewer_rows_than_promised_is_not_trained_on(tmp_path: Path) -> None:
    """The counts of two groups are exchanged, so that their sum is what the file says."""
    path = tmp_path / "a.parquet"
    table = clean_table(50, pa.array([jpeg(0)] * 50))
    pq.write_table(table, path, row_group_size=37, write_statistics=False)
    whole = path.read_bytes()
    assert [len(read_group(group, Columns())) for group in find_groups((str(path),), Columns())] == [37, 13]
    for old, new in ((37, 99), (13, 37), (99, 13)):
        whole = huge_footer(whole, old, new)
    path.write_bytes(whole)
    with pytest.raises(ShardError, match=r"a\.parquet: row group \d "):
        for group in find_groups((str(path),), Columns()):
            assert len(read_group(group, Columns())) == group.rows


def test_a_dictionary_bomb_is_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([bytes(80 << 20)]))
    large_page = {"dictionary_pagesize_limit": 1 << 30, "store_schema": False, "write_statistics": False}
    pq.write_table(clean_table(64, image), path, compression="zstd", **large_page)
    (group,) = find_groups((str(path),), Columns())
    before = pa.total_allocated_bytes()
    with pytest.raises(ShardError, match=r"bomb\.parquet: the dictionaries of row group 0 unpack to 80 MiB"):
        read_group(group, Columns())
    assert pa.total_allocated_bytes() - before < 40 << 20


def test_a_column_whose_name_is_no_text_is_an_error_of_the_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.parquet", 40, caption_two=["x"] * 40)
    parts = path.read_bytes().rsplit(b"caption_two", 7)
    assert len(parts) == 8  # in the schema and in 6 row groups
    path.write_bytes(b"caption\xfftwo".join(parts))
    assert len(plan_splits(tmp_path, 8)) == 1
    with pytest.raises(ShardError, match=r"a\.parquet: .*(not UTF-8|utf-8)"):
        list(open_split(Split("a", path), Columns()).chunks)
    path.write_bytes(b"caption\xfftwo".join((b"caption_two".join(parts[:-1]), parts[-1])))
    rows = [row for chunk in open_split(Split("a", path), Columns()).chunks for row in chunk.rows]
    assert len(rows) == 40  # a row group may call its columns what it likes: Arrow goes by the schema


def test_a_sparse_member_of_no_bytes_is_no_image_of_megabytes(tmp_path: Path) -> None:
    """Its type is that of a regular file; the headers beside it say that it is 32 MiB of zeros."""
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("0.jpg", "1.jpg"):
            info = tarfile.TarInfo(name)
            info.pax_headers = {**sparse, "GNU.sparse.name": name, "GNU.sparse.size": str(32 << 20)}
            archive.addfile(info, io.BytesIO())
        for info, content in (member("2.jpg", jpeg(2)), member("2.txt", b"a text")):
            archive.addfile(info, io.BytesIO(content))
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert [(info.isreg(), info.size >> 20) for info in archive][:2] == [(True, 32)] * 2
    (chunk,) = open_split(Split("a", tmp_path / "a.tar"), Columns()).chunks
    assert [(row.key, row.status) for row in chunk.rows] == [("2", "ok")]
    assert [part.rows for part in index_tar(tmp_path / "a.tar", Columns())] == [1]


def test_an_extension_type_in_a_dictionary_is_refused() -> None:
    hidden = pa.list_(pa.dictionary(pa.int32(), pa.uuid()))
    with pytest.raises(ShardError, match=r"x\.parquet: column 'deep' holds the Arrow extension type"):
        refuse_unsafe(pa.schema([("image", pa.binary()), ("deep", hidden)]), "x.parquet")


# ---- names that lead somewhere -------------------------------------------------------------------


@pytest.fixture
def address() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine that has an image at every address, and what it was asked for."""
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(jpeg(0))

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


# What planning, importing and the lock of the output folder do.
QUIET = ("os.listdir", "os.scandir", "os.putenv", "exec", "socket.gethostname")


class Watched:
    """What Python is asked to open, run, unpickle or connect to while `on`, as (event, what). A hook stays
    for the life of the process, so there is one."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        kinds = ("open", "socket.", "subprocess.", "os.", "shutil.", "urllib.", "pickle.", "exec")
        if self.on and event.startswith(kinds):
            self.seen.append((event, str(arguments[0]) if arguments else ""))


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


def names_that_lead(folder: Path, url: str) -> list[str]:
    """To an image on this disk and to one on a server, in the ways that readers have been seen to take."""
    secret = folder / "secret/image.jpg"
    return [
        *(str(secret), f"file://{secret}", "../secret/image.jpg", "../../secret/image.jpg", "link.jpg"),
        *(f"{url}/a.jpg", f"pipe:curl {url}/b.jpg", f"zip://image.jpg::{url}/c.zip", "/etc/passwd"),
    ]


def shards_that_lead(folder: Path, url: str) -> Path:
    """A parquet of Hugging Face's form and one of img2dataset's, and a tar, whose images are elsewhere."""
    names, shards = names_that_lead(folder, url), folder / "in"
    for place in ("secret/image.jpg", "in/link.jpg"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / "secret/image.jpg").write_bytes(jpeg(0))
    (shards / "link.jpg").symlink_to(folder / "secret/image.jpg")
    structs = pa.array([{"bytes": None, "path": name} for name in names], IMAGE)
    pq.write_table(pa.table({"image": structs, "text": names, "url": names}), shards / "a.parquet")
    empty = pa.nulls(len(names), pa.binary())
    table = {"jpg": empty, "caption": names, "url": names, "path": names, "key": names}
    pq.write_table(pa.table(table), shards / "b.parquet")
    members = [member(f"{i}.jpg", kind=kind, link=name) for i, (name, kind) in enumerate(
        (name, kind) for name in names for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE))]  # fmt: skip
    members += [member(f"{folder}/stray{i}.txt", name.encode()) for i, name in enumerate(names)]
    members += [member("../stray.json", json.dumps({"caption": "x", "url": url, "path": names[0]}).encode())]
    members += [member("stray.pyd", b"cos\nsystem\n(S'touch stray'\ntR."), member("__init__.py", b"1/0")]
    make_tar(shards / "c.tar", members)
    return shards


def test_nothing_that_a_row_names_is_opened_fetched_or_run(
    tmp_path: Path, address: tuple[str, list[str]], watched: Watched
) -> None:
    url, asked = address
    shards = shards_that_lead(tmp_path, url)
    captioner, judge = save_models(tmp_path / "models")
    config = CapFiltConfig(
        str(captioner), str(judge), decoding=Decoding(top_p=0.9, min_length=5, max_length=8), device="cpu"
    )
    before = {path for path in tmp_path.rglob("*")}
    watched.seen, watched.on = [], True
    try:
        summary = run_local(config, shards, tmp_path / "out")
        marked = len(watched.seen)
        (tmp_path / "secret/image.jpg").read_bytes()
    finally:
        watched.on = False
    assert summary.failed == {} and summary.stats.statuses == {"no_image": summary.stats.rows}
    assert summary.stats.rows == 2 * 9 + 9 + 1
    assert asked == []
    ours = [str(tmp_path / name) for name in ("in/a.", "in/b.", "in/c.", "out", "models")]
    libraries = tuple({sys.prefix, sys.base_prefix, str(ROOT), "/proc", "/sys", "/dev"})
    strange = [
        (event, what)
        for event, what in watched.seen[:marked]
        if not event.startswith(QUIET)
        and not what.startswith((*ours, *libraries))
        and not what.isdigit()  # a file that is open already
    ]
    assert strange == []
    assert watched.seen[marked] == ("open", str(tmp_path / "secret/image.jpg"))  # it would have been seen
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")}
    assert after == before and not Path("stray").exists()


# ---- what comes with the libraries ---------------------------------------------------------------

# The last known holes: CVE-2026-24747 in torch < 2.10 (weights_only), CVE-2023-47248 in pyarrow < 14.0.1 and
# GHSA-mw35-8rx3-xf9r in Ray < 2.55 (extension types), decoders of Pillow < 12.3.
SAFE = {"torch": "2.10", "pyarrow": "14.0.1", "ray": "2.55", "pillow": "12.3"}


@pytest.mark.parametrize("library", SAFE)
def test_versions_with_known_holes_are_not_installed(library: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = (found for line in project["dependencies"] if (found := Requirement(line)).name == library)
    (least,) = (Version(limit.version) for limit in asked.specifier if limit.operator == ">=")
    assert least >= Version(SAFE[library])
    assert Version(version(library)) >= least


CLUSTER = """
import json, os, subprocess, sys, time
import psutil, ray
from capfilt.cluster import _connect
from capfilt.job import RayConfig
from capfilt.worker import CapFiltConfig
_connect(RayConfig(), CapFiltConfig("", ""))
address = ray.get_runtime_context().gcs_address
family = psutil.Process().children(recursive=True)
ports = sorted({c.laddr.port for p in family for c in p.net_connections("tcp") if c.status == "LISTEN"})
guest = [sys.executable, "-c", "import ray, sys; ray.init(address=sys.argv[1]); print('let in')", address]
wrong = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "disabled"}
guests = [subprocess.Popen(guest, env=os.environ | more, stdout=-1, stderr=-3) for more in ({}, *wrong)]
began = time.monotonic()
said = [guests[0].communicate(timeout=300)[0]]  # the others have as long again, and are then still outside
for other in guests[1:]:
    try:
        said.append(other.communicate(timeout=5 + time.monotonic() - began)[0])
    except subprocess.TimeoutExpired:
        other.kill()
        said.append(other.communicate()[0])
in_ = [b"let in" in one for one in said]
print(json.dumps({"dashboard": ray._private.worker.global_worker.node.webui_url, "ports": ports, "in": in_}))
"""


def test_a_cluster_of_our_own_has_no_dashboard_and_lets_in_only_who_has_its_token() -> None:
    pytest.importorskip("ray")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER], capture_output=True, text=True, cwd=ROOT, env=settings, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["dashboard"] and 8265 not in found["ports"]
    assert found["in"] == [True, False, False]
