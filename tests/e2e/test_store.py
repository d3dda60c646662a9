"""Videos to shards with all parts in an object store: the same bytes as on a disk, and read by the same code."""

import json
from pathlib import Path

from refalign.evaluation.samples import choose_samples
from refalign.io import storage
from refalign.pipeline.steps import Step
from refalign.shards.reader import ShardIndex
from refalign.toy.videos import write_world
from tests.e2e.conftest import run


def find_step(output: Path, name: str) -> Step:
    (folder,) = output.glob(f"{name}-*")
    return Step.open(folder)


def test_parts_in_a_store_are_byte_identical_to_local_ones(s3, tmp_path):
    s3.create_bucket(Bucket="training")
    write_world(tmp_path / "videos", num_videos=6, seed=3, split="heldout")
    local, remote = tmp_path / "local", tmp_path / "remote"
    done = run("-m", "tests.e2e.curate_program", str(tmp_path / "videos"), str(local), f"{remote}=s3://training/first run")
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("subjects", "pairs", "shards"):
        here, there = find_step(local, name), find_step(remote, name)
        assert there.store == "s3://training/first run" and not there.parts_folder.exists()
        manifest = there.load_manifest() or {}
        assert manifest == here.load_manifest()
        parts = [*manifest["parts"], *(["clips.parquet"] if name == "pairs" else [])]
        assert len(parts) >= 2
        for part in parts:
            assert there.load_part(part) == here.load_part(part) is not None
            assert storage.read_bytes(there.locate(part)) == (here.parts_folder / part).read_bytes()
    shards, subjects = find_step(remote, "shards"), find_step(remote, "subjects")
    index, on_disk = (ShardIndex.open(step.folder, "train") for step in (shards, find_step(local, "shards")))
    assert [sample.info for sample in index.read_many(range(len(index)))] == [
        sample.info for sample in on_disk.read_many(range(len(on_disk)))
    ]
    assert index.load_null_prompt() is not None
    samples, _ = choose_samples(shards.folder, subjects.folder, count=2, seed=0)
    assert all(sample.references for sample in samples)
    summaries = [json.loads((output / "summary.json").read_text()) for output in (local, remote)]
    assert summaries[0]["counts"] == summaries[1]["counts"] and summaries[0]["story"] == summaries[1]["story"]
    assert (remote / "curation_report.html").stat().st_size == (local / "curation_report.html").stat().st_size
    left = s3.list_objects_v2(Bucket="training")["Contents"]
    assert not [each["Key"] for each in left if "/attempts/" in each["Key"] and not each["Key"].endswith("/")]
