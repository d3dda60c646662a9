"""Six videos, then nine in the same folder: the second data set refers to the first one's parts."""

import json
import shutil

from refalign.io import storage
from refalign.pipeline.steps import Step
from refalign.shards.reader import ShardIndex
from refalign.toy.videos import write_world
from tests.e2e.conftest import run


def test_new_videos_are_added_to_a_new_version(tmp_path):
    first, more, output = tmp_path / "videos", tmp_path / "more", tmp_path / "out"
    write_world(first, num_videos=9, seed=3, split="heldout")
    more.mkdir()
    for video in sorted(first.glob("*.mp4"))[6:]:
        for path in first.glob(f"{video.stem}.*"):
            shutil.move(path, more / path.name)
    settings = ("--set", "pairs.validation_fraction=0")
    done = run("-m", "tests.e2e.curate_program", str(first), str(output), f"+{more}", str(output), *settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("samples to store, about") == 2
    folders = json.loads((output / "summary.json").read_text())["folders"]
    for name in ("subjects", "shards"):
        new = Step.open(output / folders[name])
        (old,) = (Step.open(folder) for folder in output.glob(f"{name}-*") if folder.name != folders[name])
        manifests = [step.load_manifest() or {} for step in (old, new)]
        assert manifests[0]["recipe"] == manifests[1]["recipe"] and manifests[1]["versions"] == [old.folder.name]
        commits = {part: new.load_part(part) or {} for part in manifests[1]["parts"]}
        kept = {part for part, commit in commits.items() if commit.get("location", "").startswith(old.folder.name)}
        digests = {(old.load_part(part) or {})["sha256"] for part in manifests[0]["parts"]}
        assert {commits[part]["sha256"] for part in kept} == digests, "every old part, with the bytes it had"
        assert {storage.sha256_of(old.parts_folder / part) for part in manifests[0]["parts"]} == digests
        data = {path.name for path in new.parts_folder.iterdir() if path.suffix != ".json"}
        assert data == commits.keys() - kept and data, "what is new was made, and nothing else"
    folders_of_shards = sorted(output.glob("shards-*"), key=lambda folder: folder.name == folders["shards"])
    indices = [ShardIndex.open(folder, "train") for folder in folders_of_shards]
    keys = [{sample.key for sample in index.read_many(range(len(index)))} for index in indices]
    assert keys[0] < keys[1]
