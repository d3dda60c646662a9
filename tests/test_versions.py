"""New data are added to a new version; parts of the old one are referred to, not made again; real runs of a small world."""

import json
import shutil
from pathlib import Path

import pytest

from refalign.evaluation.samples import choose_samples
from refalign.io import storage
from refalign.io.writing import write_json
from refalign.pipeline.clean import find_unused, list_runs, remove_folder
from refalign.pipeline.reuse import adopt_parts
from refalign.pipeline.steps import CODE_SCHEMA, Step
from refalign.shards.reader import ShardIndex
from refalign.takedown import close_request, take_down
from refalign.toy.videos import write_world
from tests.curating_here import curate_here, here, make_config  # noqa: F401
from tests.test_takedown import find_parts, list_files, needles_of, rows_of, samples_of

pytestmark = pytest.mark.usefixtures("here")
CONFIG = make_config("pairs.validation_fraction=0")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A folder that first holds six videos of one source group, and then three more, of another."""
    root = tmp_path_factory.mktemp("worlds")
    write_world(root / "all", num_videos=9, seed=3, split="heldout")
    return root / "all", sorted(path.name for path in (root / "all").glob("*.mp4"))[6:]


@pytest.fixture()
def grow(worlds, tmp_path):
    """Fills the input folder: with six videos, or with all nine."""
    source, added = worlds

    def fill(complete: bool) -> Path:
        for path in source.iterdir():
            if complete or path.with_suffix(".mp4").name not in added:
                (tmp_path / "in").mkdir(exist_ok=True)
                shutil.copy2(path, tmp_path / "in" / path.name)
        return tmp_path / "in"

    return fill


def adopted_parts(step: Step) -> dict[str, str]:
    """Part name to the folder that holds its data, where that is another one."""
    parts = (step.load_manifest() or {})["parts"]
    owners = {part: step.locate(part).split("/")[-3] for part in parts}
    return {part: owner for part, owner in owners.items() if owner != step.folder.name}


def data_of(step: Step) -> list[str]:
    folder = f"{step.location}/parts"
    return sorted(name for name in storage.iter_files(folder) if not str(name).endswith(".json"))


def check_same_samples(ours: Step, fresh: Step) -> None:
    left, right = samples_of(ours), samples_of(fresh)
    assert left.keys() == right.keys() and len(left) > 5
    for key, (_, info, sheet) in left.items():
        assert (info, sheet) == right[key][1:]
    index = {name: ShardIndex.open(step.folder, "train") for name, step in (("ours", ours), ("fresh", fresh))}
    bytes_of = {
        name: {
            entry.key: {
                suffix: storage.read_bytes(entry.shard)[at : at + size] for suffix, (at, size, _) in entry.members.items()
            }
            for entry in each.entries
        }
        for name, each in index.items()
    }
    assert bytes_of["ours"] == bytes_of["fresh"]


@pytest.mark.parametrize("store", [None, "s3://versions/run"])
def test_only_what_is_new_is_made(grow, tmp_path, store, request):
    if store:
        request.getfixturevalue("s3").create_bucket(Bucket="versions")
    output = tmp_path / "out"
    old = curate_here(CONFIG, grow(complete=False), output, store)
    before = {name: step.load_manifest() for name, step in old.items()}
    kept = {part: storage.read_bytes(old["shards"].locate(part)) for part in (before["shards"] or {})["parts"]}
    new = curate_here(CONFIG, grow(complete=True), output, store)
    assert all(new[name].folder != old[name].folder for name in new)
    for name, count in (("subjects", 3), ("shards", len(kept))):
        adopted = adopted_parts(new[name])
        assert len(adopted) == count and set(adopted.values()) == {old[name].folder.name}
        parts = (new[name].load_manifest() or {})["parts"]
        assert len(parts) > count and len(data_of(new[name])) == len(parts) - count, "data of new parts alone"
        assert (new[name].load_manifest() or {})["versions"] == [old[name].folder.name]
        outcomes = (new[name].load_manifest() or {})["counts"]
        assert all(level["planned"] == level["written"] + sum(level["filtered"].values()) for level in outcomes.values())
    assert (new["subjects"].load_manifest() or {})["counts"]["video"]["planned"] == 9
    assert {name: step.load_manifest() for name, step in old.items()} == before
    assert {part: storage.read_bytes(old["shards"].locate(part)) for part in kept} == kept
    assert len(ShardIndex.open(old["shards"].folder, "train")) == sum((before["shards"] or {})["samples"].values())
    assert ShardIndex.open(new["shards"].folder, "train").load_null_prompt() is not None
    assert choose_samples(new["shards"].folder, new["subjects"].folder, count=9, seed=0)[0]
    fresh = curate_here(CONFIG, tmp_path / "in", tmp_path / "fresh")
    check_same_samples(new["shards"], fresh["shards"])
    order = [sorted(rows_of(step["subjects"]), key=lambda row: row["clip_id"]) for step in (new, fresh)]
    assert repr(order[0]) == repr(order[1])


def test_a_resumed_version_keeps_its_plan(grow, tmp_path):
    output = tmp_path / "out"
    curate_here(CONFIG, grow(complete=False), output)
    new = curate_here(CONFIG, grow(complete=True), output)
    whole = {part: new["shards"].load_part(part) for part in new["shards"].list_commits()}
    for step in new.values():
        (step.folder / "manifest.json").unlink()
    lost = next(part for part in whole if part not in adopted_parts_of(new["shards"], whole))
    Path(new["shards"].locate_commit(lost)).unlink()
    again = curate_here(CONFIG, tmp_path / "in", output)
    assert {part: again["shards"].load_part(part) for part in again["shards"].list_commits()} == whole


def adopted_parts_of(step: Step, commits: dict) -> set[str]:
    return {part for part, commit in commits.items() if not step.locate(part, commit).startswith(step.location)}


def test_a_version_that_another_refers_to_is_not_cleaned_away(grow, tmp_path):
    output = tmp_path / "out"
    old = curate_here(CONFIG, grow(complete=False), output)
    new = curate_here(CONFIG, grow(complete=True), output)
    write_json(output / "summary.json", {"folders": {name: step.folder.name for name, step in new.items()}})
    unused = [folder for folder, _ in find_unused(output, list_runs(output))]
    assert unused == [old["pairs"].folder], "pairs refer to none"
    for folder in unused:
        remove_folder(folder)
    ShardIndex.open(new["shards"].folder, "train").read(0)
    (output / "summary.json").unlink()
    before = samples_of(new["shards"])
    shutil.rmtree(old["shards"].folder)
    (new["shards"].folder / "manifest.json").unlink()
    again = curate_here(CONFIG, tmp_path / "in", output)["shards"]
    assert again.folder == new["shards"].folder and not adopted_parts(again), "what it referred to is made again"
    assert {key: each[1:] for key, each in samples_of(again).items()} == {key: each[1:] for key, each in before.items()}


def test_what_changed_is_made_again(grow, tmp_path):
    output = tmp_path / "out"
    where = grow(complete=False)
    curate_here(CONFIG, where, output)
    sidecar = sorted(where.glob("*.json"))[0]
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "license": "theirs"}))
    new = curate_here(CONFIG, where, output)
    assert len(adopted_parts(new["subjects"])) == 2
    assert {row["license"] == "theirs" for row in rows_of(new["subjects"])} == {True, False}
    fresh = curate_here(CONFIG, where, tmp_path / "fresh")
    check_same_samples(new["shards"], fresh["shards"])


def test_takedown_reaches_every_version(grow, tmp_path):
    output = tmp_path / "out"
    versions = [curate_here(CONFIG, grow(complete=False), output), curate_here(CONFIG, grow(complete=True), output)]
    subjects, shards = versions[1]["subjects"], versions[1]["shards"]
    video_id = rows_of(versions[0]["subjects"])[0]["video_id"]
    clips = {row["clip_id"] for row in rows_of(subjects) if row["video_id"] == video_id}
    needles, before = needles_of(subjects, clips), samples_of(shards)
    held, owners = find_parts(versions[1], clips), {"subjects": adopted_parts(subjects), "shards": adopted_parts(shards)}
    assert {part for name, part in held if part in owners[name]} == {part for _, part in held}, "all lie in the older version"
    commits = {(name, part): step.load_part(part) for name, step in versions[1].items() for part in step.list_commits()}
    stone = take_down(output, video_id)
    assert len({digest for digests in stone.held.values() for digest in digests}) == 2
    for path, content in list_files(output).items():
        assert not [needle for needle in needles if needle in content], path
    assert not [step for steps in versions for step in steps.values() if step.load_manifest()]
    close_request(output, stone)
    for complete, steps in ((True, versions[1]), (False, versions[0])):
        where = grow(complete=True) if complete else remove_added(tmp_path / "in")
        again = curate_here(CONFIG, where, output)
        assert {step.folder for step in again.values()} == {step.folder for step in steps.values()}
        assert not clips & {row["clip_id"] for row in rows_of(steps["subjects"])}
        samples = samples_of(steps["shards"])
        assert samples and not clips & samples.keys()
        assert not [each for _, info, _ in samples.values() for each in info["references"] if each["clip_id"] in clips]
        index = ShardIndex.open(steps["shards"].folder, "train")
        assert {sample.key for sample in index.read_many(range(len(index)))} == samples.keys()
    assert samples_of(shards).keys() == before.keys() - clips
    for (name, part), commit in commits.items():
        if name != "pairs":
            assert (versions[1][name].load_part(part) == commit) == ((name, part) not in held), "only what held it is made again"
    third = curate_here(make_config("pairs.validation_fraction=0", "shards.samples_per_shard=5"), grow(complete=True), output)
    assert samples_of(third["shards"]).keys() == samples_of(versions[1]["shards"]).keys()


def remove_added(folder: Path) -> Path:
    for path in sorted(folder.iterdir())[12:]:
        path.unlink()
    return folder


def test_parts_that_older_code_made_are_not_adopted(tmp_path, monkeypatch):
    """The same settings and work, but other bytes: what `CODE_SCHEMA` is raised for."""

    def make(setting):
        return Step.make(tmp_path, "subjects", setting, recipe=["settings"])

    monkeypatch.setattr("refalign.pipeline.steps.CODE_SCHEMA", CODE_SCHEMA - 1)
    old = make("input")
    old.write_part("clips-000000.parquet", lambda path: path.write_bytes(b"old") and {"work": ["a"]})
    old.commit({"parts": ["clips-000000.parquet"]})
    assert adopt_parts(make("more input"), {"a", "b"}), "another version by the same code is adopted"
    monkeypatch.undo()
    assert not adopt_parts(make("still more input"), {"a", "b"})
