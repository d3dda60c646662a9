"""A source leaves all finished versions and never comes back: real runs of a small world, killed in the middle too."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from refalign import takedown
from refalign.curation.launch import plan_subjects
from refalign.errors import ArtifactError, BackendUnavailable
from refalign.io import storage
from refalign.pipeline.steps import Step
from refalign.pipeline.tombstones import check_finished, load_tombstones
from refalign.shards.reader import ShardIndex
from refalign.takedown import close_requests, take_down
from refalign.toy.videos import write_world
from tests.curating_here import curate_here, here, make_config  # noqa: F401
from tests.e2e.conftest import run

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "videos"
    write_world(folder, num_videos=6, seed=3, split="heldout")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture()
def output(world, made, tmp_path):
    """A finished run, in a folder of its own."""
    if not list(made.iterdir()):
        curate_here(make_config(), world, made)
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def find(output: Path) -> dict[str, Step]:
    return {folder.name.partition("-")[0]: Step.open(folder) for folder in sorted(output.glob("*-*")) if folder.is_dir()}


def rows_of(step: Step, *, verdicts: bool = False) -> list[dict]:
    parts = ["clips.parquet"] if verdicts else (step.load_manifest() or {})["parts"]
    return [row for part in parts for row in storage.read_table(step.locate(part)).to_pylist()]


def samples_of(step: Step) -> dict[str, tuple[dict, dict, bytes]]:
    """Tensors, JSON and picture of every sample, read from the tars by name."""
    samples: dict = {}
    for part in (step.load_manifest() or {})["parts"]:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(step.locate(part)))) as tar:
            for entry in tar:
                key, suffix = entry.name.split(".")
                samples.setdefault(key, {})[suffix] = tar.extractfile(entry).read()
    return {key: (load(each["safetensors"]), json.loads(each["json"]), each["jpg"]) for key, each in samples.items()}


def choose_referred(output: Path) -> tuple[str, str]:
    """A clip whose picture is a reference of another one, and its video."""
    rows = {row["clip_id"]: row for row in rows_of(find(output)["subjects"])}
    pairs = rows_of(find(output)["pairs"])
    pair = next(pair for pair in pairs if rows[pair["clip_id"]]["video_id"] != rows[pair["reference_clip_id"]]["video_id"])
    return pair["reference_clip_id"], rows[pair["reference_clip_id"]]["video_id"]


def check_gone(output: Path, clips: set[str], before: dict) -> None:
    """Nothing of the clips is left; all else is as it was; everything is accounted for."""
    steps = find(output)
    assert not clips & {row["clip_id"] for row in rows_of(steps["subjects"])}
    pairs = rows_of(steps["pairs"])
    assert pairs and not clips & {pair[key] for pair in pairs for key in ("clip_id", "reference_clip_id")}
    reasons = {row["clip_id"]: row["reason"] for row in rows_of(steps["pairs"], verdicts=True)}
    assert {clip for clip, reason in reasons.items() if reason == "TAKEN_DOWN"} == clips
    after = samples_of(steps["shards"])
    assert set(after) == set(before) - clips
    for key, (tensors, info, sheet) in after.items():
        old_tensors, old_info, old_sheet = before[key]
        kept = [number for number, each in enumerate(old_info["references"]) if each["clip_id"] not in clips]
        assert info == {**old_info, "references": [old_info["references"][number] for number in kept]}
        assert (sheet == old_sheet) == (len(kept) == len(old_info["references"]))
        for name, tensor in tensors.items():
            per_reference = name in ("reference_latents", "target_tokens", "foreground", "content")
            assert torch.equal(tensor, old_tensors[name][kept] if per_reference else old_tensors[name]), name
    manifest = steps["shards"].load_manifest() or {}
    index = {split: ShardIndex.open(steps["shards"].folder, split) for split in ("train", "validation")}
    assert {split: len(each) for split, each in index.items()} == manifest["samples"]
    for each in index.values():
        assert all(sample.key not in clips for sample in each.read_many(range(len(each))))
    assert manifest["references"] == sum(len(info["references"]) for _, info, _ in after.values())
    for step in steps.values():
        for level in (step.load_manifest() or {}).get("counts", {}).values():
            assert level["planned"] == level["written"] + sum(level["filtered"].values()) + sum(level["quarantined"].values())
        for name in step.list_commits():
            commit = step.load_part(name)
            assert commit and commit["sha256"] == storage.sha256_of(Path(step.locate(name)))
    assert manifest["counts"]["clip"]["filtered"]["TAKEN_DOWN"] == len(clips & set(before))
    data = {path for step in steps.values() for path in (step.folder / "parts").iterdir() if path.suffix != ".json"}
    assert data == {Path(step.locate(name)) for step in steps.values() for name in step.list_commits()}, "no old data are left"


def test_a_video_leaves_everything_and_references_to_it_go_with_it(output):
    _, video_id = choose_referred(output)
    clips = {row["clip_id"] for row in rows_of(find(output)["subjects"]) if row["video_id"] == video_id}
    before, digest = samples_of(find(output)["shards"]), (find(output)["shards"].load_manifest() or {})["digest"]
    stone = take_down(output, video_id, reason="asked to")
    check_gone(output, clips, before)
    assert set(stone.clips) == clips and stone.digests == [digest] and stone.video_ids == [video_id]
    manifest = find(output)["shards"].load_manifest() or {}
    assert manifest["digest"] != digest and manifest["earlier_digests"] == [digest]
    assert (find(output)["subjects"].load_manifest() or {})["counts"]["video"]["filtered"]["TAKEN_DOWN"] == 1
    with pytest.raises(ArtifactError, match="takedown of .* was interrupted"):
        check_finished(output)
    close_requests(output)
    check_finished(output)
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and path.name != "lease"}
    assert take_down(output, video_id).clips == stone.clips, "once more changes nothing"
    now = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and path.name != "lease"}
    assert {path for path in stamps if stamps[path] != now.get(path)} <= {output / "tombstones.jsonl"}


def test_one_clip_goes_and_its_video_stays(output):
    clip_id, video_id = choose_referred(output)
    before = samples_of(find(output)["shards"])
    take_down(output, clip_id)
    check_gone(output, {clip_id}, before)
    (stone,) = load_tombstones(output)
    assert stone.video_ids == [] and stone.clips[clip_id]["video_id"] == video_id


def test_the_contact_sheet_keeps_the_other_pictures(output):
    from refalign.io.images import decode_image

    clip_id, _ = choose_referred(output)
    before = samples_of(find(output)["shards"])
    take_down(output, clip_id)
    for key, (_, info, sheet) in samples_of(find(output)["shards"]).items():
        if sheet != before[key][2]:
            new, old = (decode_image(data).astype(int) for data in (sheet, before[key][2]))
            assert np.abs(new[4:100] - old[4:100, : new.shape[1]]).mean() < 4, "the frames"
            kept = [n for n, each in enumerate(before[key][1]["references"]) if each["clip_id"] != clip_id]
            for place, number in enumerate(kept):
                tiles = [picture[104:200, 4 + 164 * n : 164 + 164 * n] for picture, n in ((new, place), (old, number))]
                assert np.abs(tiles[0] - tiles[1]).mean() < 4
            assert len(info["references"]) == len(kept)


def test_it_does_not_come_back(output, world):
    steps = find(output)
    (name, video_id), *_ = steps["subjects"].load_part("clips-000000.parquet")["videos"].items()
    clip = next(row for row in rows_of(steps["subjects"]) if row["video_id"] != video_id)
    plan, _, identity = plan_subjects(make_config(), world)
    for source in (name, clip["clip_id"]):
        take_down(output, source)
        close_requests(output)
    later, _, same = plan_subjects(make_config(), world, load_tombstones(output))
    assert same == identity, "what was made of this input stays what it leads to"
    assert {part: len(work) for part, work in later.items()} == {part: len(work) for part, work in plan.items()}
    assert [work["name"] for part in later.values() for work in part if "taken_down" in work] == [name]
    shutil.copytree(world, output.parent / "copy")
    (output.parent / "copy" / name).rename(output.parent / "copy" / "renamed.mp4")
    renamed = plan_subjects(make_config(), output.parent / "copy", load_tombstones(output))[0]
    taken_down = [work["name"] for part in renamed.values() for work in part if "taken_down" in work]
    assert taken_down == ["renamed.mp4"], "by content"
    again = curate_here(make_config("curation.min_area_fraction=0.041"), world, output)
    rows = rows_of(again["subjects"])
    assert rows and not [row for row in rows if row["video_id"] == video_id or row["clip_id"] == clip["clip_id"]]
    counts = (again["subjects"].load_manifest() or {})["counts"]
    alone = [row["video_id"] for row in rows_of(steps["subjects"])].count(clip["video_id"]) == 0
    assert counts["video"]["filtered"]["TAKEN_DOWN"] == 1 + alone and counts["clip"]["filtered"]["TAKEN_DOWN"] >= 1


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 6, 7])
def test_killed_anywhere_the_same_command_finishes(output, stop_at, monkeypatch):
    _, video_id = choose_referred(output)
    clips = {row["clip_id"] for row in rows_of(find(output)["subjects"]) if row["video_id"] == video_id}
    before, digest = samples_of(find(output)["shards"]), (find(output)["shards"].load_manifest() or {})["digest"]
    calls = 0

    def die_at_a_write(real):
        def wrapped(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return wrapped

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        from refalign.pipeline import steps

        patch.setattr(steps, "write_json", die_at_a_write(steps.write_json))
        patch.setattr(takedown, "delete_file", die_at_a_write(takedown.delete_file))
        take_down(output, video_id)
    with pytest.raises(ArtifactError, match="interrupted"):
        check_finished(output)
    stone = take_down(output, video_id)
    check_gone(output, clips, before)
    assert digest in stone.digests


def test_an_unfinished_step_begins_again_without_it(output, world):
    _, video_id = choose_referred(output)
    steps = find(output)
    before = samples_of(steps["shards"])
    clips = {row["clip_id"] for row in rows_of(steps["subjects"]) if row["video_id"] == video_id}
    for step in steps.values():
        (step.folder / "manifest.json").unlink()
    take_down(output, video_id)
    close_requests(output)
    assert steps["shards"].list_commits() == []
    again = curate_here(make_config(), world, output)
    assert {step.folder for step in again.values()} == {step.folder for step in steps.values()}
    assert set(samples_of(again["shards"])) == set(before) - clips


def test_what_is_not_there_or_not_one_is_refused(output):
    before = {path: path.read_bytes() for path in output.rglob("*.json")}
    with pytest.raises(ArtifactError, match="no video, source group or clip is called nobody.mp4.*Nothing was changed"):
        take_down(output, "nobody.mp4")
    assert before == {path: path.read_bytes() for path in output.rglob("*.json")} and not load_tombstones(output)
    _, video_id = choose_referred(output)
    with find(output)["shards"].lease(), pytest.raises(BackendUnavailable, match="held by"):
        take_down(output, video_id)
    assert not load_tombstones(output)


def test_parts_in_a_store_become_what_local_ones_do(output, world, s3, tmp_path):
    s3.create_bucket(Bucket="takedown")
    _, video_id = choose_referred(output)
    remote = curate_here(make_config(), world, tmp_path / "remote", "s3://takedown/run")
    for where in (output, tmp_path / "remote"):
        take_down(where, video_id)
    for name, there in remote.items():
        step = find(output)[name]
        assert there.load_manifest() == step.load_manifest()
        assert there.list_commits() == step.list_commits() != []
        for part in step.list_commits():
            assert there.load_part(part) == step.load_part(part) is not None
            assert storage.read_bytes(there.locate(part)) == storage.read_bytes(step.locate(part))
        data = {file for file in storage.iter_files(f"{there.location}/parts") if not str(file).endswith(".json")}
        assert data == {there.locate(part).rpartition("/")[2] for part in there.list_commits()}


def test_pictures_of_an_evaluation_go_and_the_scores_are_of_the_rest(output):
    clip_id, _ = choose_referred(output)
    step = Step.make(output, "evaluate", 1)
    samples = []
    for number, (key, subject) in enumerate((("other", f"{clip_id}-s0"), (clip_id, "z-s0"), ("third", "z-s0"))):
        files = [f"before-{key}.mp4", f"after-{key}.mp4", f"reference-{key}-0.png"]
        for name in files:
            step.write_part(name, lambda path: {"bytes": path.write_bytes(b"picture")})
        scores = {label: {"fidelity": number / 2, "chance": None, "own_above_other": None} for label in ("before", "after")}
        videos = {"before": f"parts/{files[0]}", "after": f"parts/{files[1]}"}
        references = [{"subject_id": subject, "file": f"parts/{files[2]}"}]
        samples.append({"key": key, "videos": videos, "references": references, "scores": scores})
    step.commit({"samples": samples, "num_samples": 3, "scores": {"before": {}, "after": {}}})
    for name in ("report.html", "ask-0123456789ab.html"):
        (output / name).write_text("pictures")
    stone = take_down(output, clip_id)
    manifest = step.load_manifest() or {}
    assert [sample["key"] for sample in manifest["samples"]] == ["third"] and manifest["num_samples"] == 1
    assert manifest["scores"]["after"] == {"fidelity": 1.0}
    left = {path.name for path in step.parts_folder.iterdir() if path.suffix != ".json"}
    assert left == {"before-third.mp4", "after-third.mp4", "reference-third-0.png"}
    assert step.folder.name in stone.folders and not list(output.glob("*.html"))


def test_the_command_removes_and_says_so_in_one_line_where_it_cannot(output):
    clip_id, _ = choose_referred(output)
    before = samples_of(find(output)["shards"])
    done = run("pipelines/shards.py", "remove", "--source", clip_id, "--reason", "asked to", "--output", str(output))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"removed   1 clips of 1 videos ({clip_id})" in done.stdout and "no model was trained on it" in done.stdout
    check_gone(output, {clip_id}, before)
    check_finished(output)
    assert load_tombstones(output)[0].reason == "asked to"
    done = run("pipelines/shards.py", "remove", "--source", "nobody", "--output", str(output))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert run("pipelines/shards.py", "--source", "nobody", "--output", str(output)).returncode == 2
