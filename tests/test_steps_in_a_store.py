"""Parts in an object store: a step is written, killed, resumed and read as on a disk; against a real S3 server."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from refalign.config.presets import toy_tiny
from refalign.errors import ArtifactError, BackendUnavailable, ConfigError
from refalign.io import storage
from refalign.io.writing import check_store, delete_file, delete_folder, open_aside, write_bytes
from refalign.pipeline.stage import Run
from refalign.pipeline.steps import Step
from refalign.run import Loop
from refalign.shards.reader import ShardIndex
from refalign.stages.world import World, WorldManifest
from tests.training.make_shards import write_shards

STORE = "s3://parts/run one"


@pytest.fixture(scope="module")
def bucket(s3):
    s3.create_bucket(Bucket="parts")
    return s3


def keys(s3, prefix="") -> list[str]:
    found = s3.list_objects_v2(Bucket="parts", Prefix=prefix).get("Contents", [])
    return sorted(each["Key"] for each in found if not each["Key"].endswith("/"))


def write_hello(path: Path) -> dict:
    path.write_text("hello")
    return {"rows": 1}


def test_files_are_written_and_deleted_by_location(bucket, tmp_path):
    for folder in (str(tmp_path), "s3://parts/files"):
        location = storage.join(folder, "a/50% #1.bin")
        assert storage.find_size(location) is None and storage.load_json(location) is None
        write_bytes(location, b"one")
        write_bytes(location, b"two!")
        assert storage.read_bytes(location) == b"two!" and storage.find_size(location) == 4
        with pytest.raises(ZeroDivisionError), open_aside(location) as aside:
            aside.write_bytes(b"half")
            raise ZeroDivisionError
        assert storage.read_bytes(location) == b"two!"
        with pytest.raises(ArtifactError, match="damaged"):
            storage.load_json(location)
        delete_file(location)
        delete_file(location)
        write_bytes(location, b"three")
        delete_folder(storage.join(folder, "a"))
        delete_folder(storage.join(folder, "a"))
        assert storage.find_size(location) is None
    assert keys(bucket, "files") == [] and list(tmp_path.glob("*")) == []


def test_tables_are_read_by_column(bucket, tmp_path):
    table = pa.table({"a": [1, 2], "s": [{"x": 1, "y": "p"}, {"x": 2, "y": "q"}]})
    for location in (f"{tmp_path}/t.parquet", "s3://parts/t.parquet"):
        with open_aside(location) as aside:
            pq.write_table(table, aside)
        assert storage.read_table(location).equals(table)
        assert storage.read_table(location, ["s.y"]).to_pydict() == {"s": [{"y": "p"}, {"y": "q"}]}


def test_a_large_part_arrives_whole(bucket, tmp_path):
    data = os.urandom(23_000_001)  # several pieces of a multipart upload
    step = Step.make(tmp_path, "shards", 1, store=STORE)
    step.write_part("train-000000.tar", lambda path: {"bytes": path.write_bytes(data)})
    assert storage.read_bytes(step.locate("train-000000.tar")) == data


def test_a_part_without_its_commit_does_not_exist(bucket, tmp_path):
    step = Step.make(tmp_path, "shards", 2, store=STORE)
    assert step.load_part("one") is None
    record = step.write_part("one", write_hello)
    assert step.load_part("one") == record and step.locate("one") == f"{STORE}/{step.folder.name}/parts/one"
    assert not step.folder.exists(), "nothing of it is on the disk"
    delete_file(step.locate_commit("one"))
    assert step.load_part("one") is None
    step.write_part("one", write_hello)
    write_bytes(step.locate("one"), b"hel")
    assert step.load_part("one") is None, "of another size than was committed"
    delete_file(step.locate("one"))
    assert step.load_part("one") is None


def test_a_worker_killed_between_data_and_commit_leaves_no_part(bucket, tmp_path):
    """A real process dies by SIGKILL at the moment it would commit; the next one does the part again."""
    program = f"""
import os, signal, sys
from refalign.pipeline import steps
step = steps.Step.make({str(tmp_path)!r}, "shards", 3, store={STORE!r})
if sys.argv[1] == "die":
    steps.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def write(path):
    path.write_text("hello")
    return {{"rows": 1}}
print(step.load_part("one") is None, step.write_part("one", write)["rows"])
"""
    died = subprocess.run([sys.executable, "-c", program, "die"], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    step = Step.make(tmp_path, "shards", 3, store=STORE)
    assert keys(bucket, f"run one/{step.folder.name}/") == [f"run one/{step.folder.name}/parts/one"], "data, and no commit"
    again = subprocess.run([sys.executable, "-c", program, "live"], capture_output=True, text=True)
    assert again.stdout.split() == ["True", "1"], again.stderr
    assert step.load_part("one") == {**(step.load_part("one") or {}), "rows": 1, "size_bytes": 5}


def test_the_journal_of_a_part_is_seen_by_workers_elsewhere(bucket, tmp_path):
    for machine in ("a", "b", "c"):
        step = Step.make(tmp_path / machine, "subjects", 4, store=STORE)
        journal = step.open_journal("p.parquet")
        assert journal.begin("poison") == "abc".index(machine)
    assert step.open_journal("q.parquet").begin("poison") == 0
    with journal:  # the part is made
        pass
    assert Step.make(tmp_path, "subjects", 4, store=STORE).open_journal("p.parquet").begin("poison") == 0


def test_a_finished_step_keeps_its_parts_where_they_are(bucket, tmp_path):
    Step.make(tmp_path, "pairs", 5, store=STORE).commit({"parts": []})
    for step in (Step.make(tmp_path, "pairs", 5), Step.make(tmp_path, "pairs", 5, store="s3://other")):
        assert step.store == STORE and Step.open(step.folder) == step
    Step.make(tmp_path, "pairs", 6).commit({"parts": []})
    assert Step.make(tmp_path, "pairs", 6, store=STORE).store is None


def test_samples_are_read_from_a_store_as_from_a_disk(bucket, tmp_path):
    folder = write_shards(tmp_path / "shards", train=10, validation=2, per_shard=4)
    local = ShardIndex.open(folder, "train")
    step = Step("shards", "", folder, STORE)
    for path in (folder / "parts").iterdir():
        write_bytes(storage.join(step.location, f"parts/{path.name}"), path.read_bytes())
        path.unlink()
    step.commit(step.load_manifest() or {})
    remote = ShardIndex.open(folder, "train")
    assert remote.digest == local.digest and len(remote) == 10 and remote.load_null_prompt() is None
    write_shards(tmp_path / "again", train=10, validation=2, per_shard=4)
    local = ShardIndex.open(tmp_path / "again", "train")
    for ours, theirs in zip(remote.read_many(range(10)), local.read_many(range(10)), strict=True):
        assert (ours.key, ours.info) == (theirs.key, theirs.info)
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)
    delete_file(step.locate("train-000001.tar"))
    with pytest.raises(ArtifactError, match=r"s3://parts/run one/shards/parts/train-000001\.tar: this shard is missing"):
        ShardIndex.open(folder, "train")


def test_a_store_that_cannot_be_written_is_found_before_the_start(bucket, monkeypatch):
    check_store("s3://parts")
    check_store(STORE)
    assert not [key for key in keys(bucket) if key.endswith(".writable")]
    with pytest.raises(ConfigError, match=r"storage.parts=s3://no-such-bucket/x: .*create the bucket"):
        check_store("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(BackendUnavailable, match="does not answer") as caught:
        check_store(STORE)
    assert "\n" not in str(caught.value)


def test_a_step_whose_parts_were_deleted_from_the_store_is_made_again(bucket, tmp_path, capsys):
    class Hello(World):
        name, parts_in_store, made = "hello", True, 0

        def perform(self, run: Run, step: Step) -> WorldManifest:
            Hello.made += 1
            step.write_part("a.txt", write_hello)
            return WorldManifest(videos=Hello.made)

    storage = toy_tiny().storage.model_copy(update={"parts": "s3://parts/deleted"})
    loop = Loop(toy_tiny().model_copy(update={"storage": storage}), tmp_path, ExitStack(), stages=[Hello])

    def make() -> int:
        loop.go_through()
        return loop.manifest_of(Hello).videos

    assert [make(), make()] == [1, 1]
    step = loop.step_of(Hello)
    delete_folder(step.location)
    assert make() == 2 and step.load_part("a.txt")
    assert f"hello: its parts are gone from {step.location}" in capsys.readouterr().out
