"""A source leaves all versions at once and never comes back: real runs of a small world, killed in the middle too."""

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from refalign import takedown
from refalign.errors import ArtifactError, BackendUnavailable
from refalign.io import storage
from refalign.pipeline.steps import Step
from refalign.pipeline.tombstones import check_finished, load_tombstones
from refalign.shards.reader import ShardIndex
from refalign.stages.subjects import list_input
from refalign.takedown import close_request, take_down
from refalign.toy.videos import write_world
from tests.curating_here import curate_here, here, make_config  # noqa: F401
from tests.e2e.conftest import run

pytestmark = pytest.mark.usefixtures("here")
CONFIG = make_config("shards.samples_per_shard=2", "pairs.max_references_per_subject=16")
"""Small shards, and a place for every reference: none comes in the place of another that goes."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "videos"
    write_world(folder, num_videos=7, seed=3, split="heldout")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture()
def output(world, made, tmp_path):
    """A finished run, in a folder of its own."""
    if not list(made.iterdir()):
        curate_here(CONFIG, world, made)
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


def clips_of(output: Path, video_id: str) -> set[str]:
    return {row["clip_id"] for row in rows_of(find(output)["subjects"]) if row["video_id"] == video_id}


def find_parts(steps: dict[str, Step], clips: set[str]) -> set[tuple[str, str]]:
    """Parts of subjects and shards in which there is something of the clips, by step and name."""
    found = {("subjects", part) for part in steps["subjects"].list_commits() if clips & ids_in(steps["subjects"], part)}
    for part in steps["shards"].list_commits():
        samples = (steps["shards"].load_commit(part) or {})["samples"]
        if clips & {clip for sample in samples for clip in (sample["clip_id"], *sample["reference_clips"])}:
            found.add(("shards", part))
    return found


def ids_in(subjects: Step, part: str) -> set[str]:
    return set(storage.read_table(subjects.locate(part), ["clip_id"])["clip_id"].to_pylist())


def needles_of(step: Step, clips: set[str]) -> list[bytes]:
    """Ids and pieces of the pictures of clips, to search files for."""
    crops = [each["crop_png"] for row in rows_of(step) if row["clip_id"] in clips for each in row["subjects"]]
    assert crops and min(map(len, crops)) > 200
    return [*(clip_id.encode() for clip_id in clips), *(crop[-150:-50] for crop in crops)]


def list_files(output: Path) -> dict[Path, bytes]:
    """What lies below the output, without the record of the requests."""
    files = (path for path in output.rglob("*") if path.is_file() and path.name not in ("lease", "tombstones.jsonl"))
    return {path.relative_to(output): path.read_bytes() for path in files}


def check_deleted(output: Path, needles: list[bytes]) -> None:
    """Nothing of the clips is in any file, and no step that held them counts as finished."""
    for path, content in list_files(output).items():
        assert not [needle for needle in needles if needle in content], path
    assert not [name for name in ("subjects", "pairs", "shards") if find(output)[name].load_manifest()]


def choose_referred(output: Path) -> tuple[str, str]:
    """A clip whose picture is a reference of another one, and its video."""
    rows = {row["clip_id"]: row for row in rows_of(find(output)["subjects"])}
    pairs = rows_of(find(output)["pairs"])
    pair = next(pair for pair in pairs if rows[pair["clip_id"]]["video_id"] != rows[pair["reference_clip_id"]]["video_id"])
    return pair["reference_clip_id"], rows[pair["reference_clip_id"]]["video_id"]


def check_gone(output: Path, clips: set[str], before: dict) -> None:
    """After the next run: nothing of the clips is left; all else is as it was; everything is accounted for."""
    steps = find(output)
    assert not clips & {row["clip_id"] for row in rows_of(steps["subjects"])}
    pairs = rows_of(steps["pairs"])
    assert pairs and not clips & {pair[key] for pair in pairs for key in ("clip_id", "reference_clip_id")}
    assert not clips & {row["clip_id"] for row in rows_of(steps["pairs"], verdicts=True)}
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
    data = {path for step in steps.values() for path in (step.folder / "parts").iterdir() if path.suffix != ".json"}
    assert data == {Path(step.locate(name)) for step in steps.values() for name in step.list_commits()}, "no old data are left"


def test_a_video_leaves_everything_and_references_to_it_go_with_it(output, world):
    _, video_id = choose_referred(output)
    clips, steps = clips_of(output, video_id), find(output)
    needles = [*needles_of(steps["subjects"], clips), video_id.encode()]
    before, digest = samples_of(steps["shards"]), (steps["shards"].load_manifest() or {})["digest"]
    held = find_parts(steps, clips)
    rest = {
        (name, part): (Path(steps[name].locate(part)).stat().st_mtime_ns, steps[name].load_part(part))
        for name in ("subjects", "shards")
        for part in steps[name].list_commits()
        if (name, part) not in held
    }
    assert {name for name, _ in held} == {name for name, _ in rest} == {"subjects", "shards"}
    stone = take_down(output, video_id, reason="asked to")
    check_deleted(output, needles)
    assert set(stone.clips) == clips and stone.video_ids == [video_id] and stone.held[steps["shards"].folder.name] == [digest]
    assert set(stone.held) == {step.folder.name for step in steps.values()}
    with pytest.raises(ArtifactError, match="takedown of .* was interrupted"):
        check_finished(output)
    with pytest.raises(ArtifactError, match="takedown of .* was interrupted"):
        take_down(output, "another")
    close_request(output, stone)
    check_finished(output)
    files = list_files(output)
    assert take_down(output, video_id).clips == stone.clips and list_files(output) == files, "once more changes nothing"
    check_finished(output)
    again = curate_here(CONFIG, world, output)
    assert {step.folder for step in again.values()} == {step.folder for step in steps.values()}
    check_gone(output, clips, before)
    for (name, part), (changed, commit) in rest.items():
        assert again[name].load_part(part) == commit, "with the same bytes"
        assert Path(again[name].locate(part)).stat().st_mtime_ns == changed, "and not made again"
    assert (again["shards"].load_manifest() or {})["digest"] != digest
    assert (again["subjects"].load_manifest() or {})["counts"]["video"]["filtered"]["TAKEN_DOWN"] == 1
    files = list_files(output)
    assert take_down(output, video_id).clips == stone.clips and list_files(output) == files, "nor after the next run"
    check_finished(output)


def test_one_clip_goes_and_its_video_stays(output, world):
    clip_id, video_id = choose_referred(output)
    needles, before = needles_of(find(output)["subjects"], {clip_id}), samples_of(find(output)["shards"])
    stone = take_down(output, clip_id)
    check_deleted(output, needles)
    assert stone.video_ids == [] and stone.clips[clip_id]["video_id"] == video_id and load_tombstones(output) == [stone]
    close_request(output, stone)
    subjects = curate_here(CONFIG, world, output)["subjects"]
    check_gone(output, {clip_id}, before)
    assert (subjects.load_manifest() or {})["counts"]["clip"]["filtered"]["TAKEN_DOWN"] == 1


def test_more_may_go_before_the_next_run(output, world):
    """The second video was in parts that went with the first one's, so that no row tells of it any more."""
    subjects, shards = find(output)["subjects"], find(output)["shards"]
    before, digest = samples_of(shards), (shards.load_manifest() or {})["digest"]
    (_, first), (name, second) = (subjects.load_part("clips-000000.parquet") or {})["videos"].items()
    clips = clips_of(output, first) | clips_of(output, second)
    needles = needles_of(subjects, clips)
    close_request(output, take_down(output, first))
    stone = take_down(output, name)
    check_deleted(output, needles)
    assert stone.video_ids == [second] and set(stone.clips) == clips - clips_of_stone(output, first)
    assert stone.held[shards.folder.name] == [digest], "models that were trained on it are found"
    close_request(output, stone)
    curate_here(CONFIG, world, output)
    check_gone(output, clips, before)
    third = rows_of(subjects)[0]["video_id"]
    later = (shards.load_manifest() or {})["digest"]
    assert take_down(output, third).held[shards.folder.name] == sorted([digest, later]), "both held the third"


def clips_of_stone(output: Path, source: str) -> set[str]:
    return next(set(stone.clips) for stone in load_tombstones(output) if stone.source == source)


def test_other_parts_stay_after_a_second_takedown(world, tmp_path):
    """Parts keep their places, however few clips are left in one; what is made again is what a run without the source makes."""
    config, output = make_config("shards.samples_per_shard=2", "pairs.max_references_per_subject=1"), tmp_path / "run"
    shards = curate_here(config, world, output)["shards"]
    removed: set[str] = set()
    for number in range(2):
        steps, names = find(output), shards.list_commits()
        before = {part: shards.load_part(part) or {} for part in names}
        clip_id = next(row["clip_id"] for row in before[names[number]]["samples"])
        held = {part for _, part in find_parts(steps, {clip_id})}
        removed.add(clip_id)
        close_request(output, take_down(output, clip_id))
        curate_here(config, world, output)
        emptied = {part for part in names if {sample["clip_id"] for sample in before[part]["samples"]} <= removed}
        assert set(shards.list_commits()) == set(names) - emptied
        same = {part for part in names if shards.load_part(part) == before[part]}
        assert same == set(names) - held and len(same) > 1
    (tmp_path / "fresh").mkdir()
    shutil.copy(output / "tombstones.jsonl", tmp_path / "fresh")
    fresh = curate_here(config, world, tmp_path / "fresh")
    assert {name: step.load_manifest() for name, step in fresh.items()} == {
        name: step.load_manifest() for name, step in find(output).items()
    }


def test_it_does_not_come_back(output, world):
    steps = find(output)
    (name, video_id), *_ = steps["subjects"].load_part("clips-000000.parquet")["videos"].items()
    clip = next(row for row in rows_of(steps["subjects"]) if row["video_id"] != video_id)
    alone = [row["video_id"] for row in rows_of(steps["subjects"])].count(clip["video_id"]) == 1
    plan, _, identity = list_input(CONFIG, world)
    for source in (name, clip["clip_id"]):
        close_request(output, take_down(output, source))
    later, _, same = list_input(CONFIG, world, load_tombstones(output))
    assert same == identity, "what was made of this input stays what it leads to"
    assert {part: len(work) for part, work in later.items()} == {part: len(work) for part, work in plan.items()}
    assert [work.source.name for part in later.values() for work in part if work.taken_down] == [name]
    shutil.copytree(world, output.parent / "copy")
    (output.parent / "copy" / name).rename(output.parent / "copy" / "renamed.mp4")
    renamed = list_input(CONFIG, output.parent / "copy", load_tombstones(output))[0]
    taken_down = [work.source.name for part in renamed.values() for work in part if work.taken_down]
    assert taken_down == ["renamed.mp4"], "by content"
    again = curate_here(make_config("curation.min_area_fraction=0.041"), world, output)
    rows = rows_of(again["subjects"])
    assert rows and not [row for row in rows if row["video_id"] == video_id or row["clip_id"] == clip["clip_id"]]
    counts = (again["subjects"].load_manifest() or {})["counts"]
    assert counts["video"]["filtered"]["TAKEN_DOWN"] == 1 + alone and counts["clip"]["filtered"]["TAKEN_DOWN"] >= 1


def test_a_whole_source_group_goes(output, world):
    rows = rows_of(find(output)["subjects"])
    group = rows[0]["source_group"]
    of_group = {row["clip_id"] for row in rows if row["source_group"] == group}
    assert 1 < len(of_group) < len(rows)
    needles = [*needles_of(find(output)["subjects"], of_group), group.encode()]
    stone = take_down(output, group)
    check_deleted(output, needles)
    assert set(stone.clips) == of_group and stone.source_groups == [group]
    later = [work for part in list_input(CONFIG, world, load_tombstones(output))[0].values() for work in part]
    taken_down = {work.source.source_group for work in later if work.taken_down}
    assert taken_down == {group} and len(later) == 7, "a later video of it would go as well"


def test_killed_anywhere_the_same_command_finishes(output, world, tmp_path, monkeypatch):
    """The process dies at every single thing that it writes or deletes; what is left is what an undisturbed removal leaves."""
    _, video_id = choose_referred(output)
    clips, before = clips_of(output, video_id), samples_of(find(output)["shards"])
    (output / "summary.json").write_text(json.dumps({"outcomes": [], "clips": 1, "story": "s"}))
    (output / "report.html").write_text("pictures")
    shutil.copytree(output, tmp_path / "undisturbed")
    expected = take_down(tmp_path / "undisturbed", video_id)
    left = list_files(tmp_path / "undisturbed")
    assert Path("report.html") not in left and json.loads(left[Path("summary.json")]) == {"clips": 1}
    calls = 0

    def die(real, stop_at):
        def wrapped(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return wrapped

    killed = 0
    while True:
        calls, where = 0, tmp_path / f"killed-{killed}"
        shutil.copytree(output, where)
        with monkeypatch.context() as patch:
            for owner, name in ((takedown, "delete_file"), (takedown, "delete_folder"), (takedown, "write_json")):
                patch.setattr(owner, name, die(getattr(owner, name), killed + 1))
            patch.setattr(Step, "discard_manifest", die(Step.discard_manifest, killed + 1))
            try:
                take_down(where, video_id)
                break
            except KeyboardInterrupt:
                killed += 1
        with pytest.raises(ArtifactError, match="interrupted"):
            check_finished(where)
        stone = take_down(where, video_id)
        assert list_files(where) == left and dataclasses.replace(stone, date=expected.date) == expected
    assert killed > 10
    close_request(where, stone)
    curate_here(CONFIG, world, where)
    check_gone(where, clips, before)


def test_an_unfinished_step_goes_on_without_it(output, world):
    _, video_id = choose_referred(output)
    steps = find(output)
    clips, before = clips_of(output, video_id), samples_of(steps["shards"])
    needles = needles_of(steps["subjects"], clips)
    for step in steps.values():
        (step.folder / "manifest.json").unlink()
    shards = {path.name: path for path in steps["shards"].parts_folder.iterdir()}
    part = next(name for _, name in find_parts(steps, clips) if f"{name}.json" in shards)
    shards[f"{part}.json"].unlink()  # its worker died before it committed
    close_request(output, take_down(output, video_id))
    check_deleted(output, needles)
    again = curate_here(CONFIG, world, output)
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
    needles = [*needles_of(find(output)["subjects"], clips_of(output, video_id)), video_id.encode()]
    remote = curate_here(CONFIG, world, tmp_path / "remote", "s3://takedown/run")
    for where in (output, tmp_path / "remote"):
        close_request(where, take_down(where, video_id))
        check_deleted(where, needles)
    for name in storage.iter_files("s3://takedown/run"):
        content = storage.read_bytes(f"s3://takedown/run/{name}")
        assert not [needle for needle in needles if needle in content], name
    curate_here(CONFIG, world, output)
    curate_here(CONFIG, world, tmp_path / "remote", "s3://takedown/run")
    for name, there in remote.items():
        step = find(output)[name]
        assert there.load_manifest() == step.load_manifest() is not None
        assert there.list_commits() == step.list_commits() != []
        for part in step.list_commits():
            assert there.load_part(part) == step.load_part(part) is not None
            assert storage.read_bytes(there.locate(part)) == storage.read_bytes(step.locate(part))
        data = {file for file in storage.iter_files(f"{there.location}/parts") if not str(file).endswith(".json")}
        assert data == {there.locate(part).rpartition("/")[2] for part in there.list_commits()}


def write_pictures(step: Step, *names: str) -> None:
    for name in names:
        step.write_part(name, lambda path: {"bytes": path.write_bytes(b"picture")})


def test_pictures_of_an_evaluation_go_and_the_others_stay(output):
    clip_id, _ = choose_referred(output)
    step, champion = Step.make(output, "evaluate", 1), Step.make(output, "evaluate", 2)
    benchmark, unfinished = Step.make(output, "evaluate", 3), Step.make(output, "evaluate", 4)
    samples = []
    for key, subject in (("other", f"{clip_id}-s0"), (clip_id, "z-s0"), ("third", "z-s0")):
        write_pictures(step, f"before-{key}.mp4", f"after-{key}.mp4", f"reference-{key}-0.png", f"target-{key}-0.png")
        samples.append({"key": key, "references": [{"subject_id": subject}]})
    step.write_part("separability-after.json", lambda path: {"bytes": path.write_text("null")})
    step.commit({"samples": samples})
    write_pictures(champion, "champion-other.mp4")
    champion.commit({"model": "m"})
    write_pictures(benchmark, "p1.mp4")
    benchmark.commit({"videos": 1})
    write_pictures(unfinished, "reference-other-0.png")
    (output / "report.html").write_text("pictures")
    (output / "ask" / "0123456789ab").mkdir(parents=True)
    (output / "ask" / "0123456789ab" / "001-left.mp4").write_text("pictures")
    stone = take_down(output, clip_id)
    assert step.load_manifest() is None and benchmark.load_manifest() is not None
    left = {path.name for path in step.parts_folder.iterdir() if not path.name.endswith(("mp4.json", "png.json"))}
    third = {"before-third.mp4", "after-third.mp4", "reference-third-0.png", "target-third-0.png"}
    assert left == third | {"separability-after.json", "separability-after.json.json"}
    assert set(step.load_parts(third)) == third, "with their scores"
    assert [each.list_commits() for each in (champion, benchmark, unfinished)] == [[], ["p1.mp4"], []]
    assert {step.folder.name, champion.folder.name} <= stone.held.keys() and benchmark.folder.name not in stone.held
    assert not list(output.glob("*.html")) and not (output / "ask").exists()


def test_the_command_removes_and_says_so_in_one_line_where_it_cannot(output, world):
    clip_id, _ = choose_referred(output)
    needles, before = needles_of(find(output)["subjects"], {clip_id}), samples_of(find(output)["shards"])
    done = run("pipelines/shards.py", "remove", "--source", clip_id, "--reason", "asked to", "--output", str(output))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"removed   1 clips of 1 videos ({clip_id})" in done.stdout and "no model was trained on it" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("next ") and last.endswith("until then the shards are not finished")
    check_deleted(output, needles)
    check_finished(output)
    assert load_tombstones(output)[0].reason == "asked to" and not (output / "mlflow.db").exists()
    curate_here(CONFIG, world, output)
    check_gone(output, {clip_id}, before)
    done = run("pipelines/shards.py", "remove", "--source", "nobody", "--output", str(output))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert run("pipelines/shards.py", "--source", "nobody", "--output", str(output)).returncode == 2
