"""Inputs that go away, come back, move or change while a run works on them: real runs of a small world, in this process.

Faults of the place or the moment are tried again, and nothing shows in the end. A video is found by its id, wherever it lies.
"""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from refalign.cli import run_command
from refalign.errors import BackendUnavailable, ConfigError, DataError, RefAlignError, TooManyQuarantined
from refalign.io import storage
from refalign.pipeline.outcomes import Outcome
from refalign.pipeline.places import judge_fault
from refalign.pipeline.retries import find_retries, iter_quarantined, retry_quarantined
from refalign.pipeline.steps import Step
from refalign.shards.plan import plan_shards
from refalign.stages.pairs import Pairs
from refalign.stages.shards import ShardsWorker
from refalign.stages.subjects import Subjects, SubjectsWorker, list_input
from refalign.toy.videos import write_world
from tests.curating_here import CURATION, curate_here, here, make_config, make_loop  # noqa: F401
from tests.test_takedown import samples_of

pytestmark = pytest.mark.usefixtures("here")
CONFIG = make_config("pairs.validation_fraction=0", "curation.max_quarantine_fraction=1")
STRICT = make_config("pairs.validation_fraction=0")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "videos"
    write_world(folder, num_videos=6, seed=3, split="heldout")
    return folder


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """An input folder, and what an undisturbed run makes of it."""
    root = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(world, root / "in")
    with pytest.MonkeyPatch.context() as patch:
        from tests.curating_here import do_without_ray

        do_without_ray(patch)
        return root / "in", digest(curate_here(CONFIG, root / "in", root / "out"))


@pytest.fixture()
def folder(world, tmp_path):
    shutil.copytree(world, tmp_path / "in")
    return tmp_path / "in"


def digest(steps):
    """Relative path -> sha256 of all that the steps hold, save what says who works there."""
    return {
        f"{step.folder.name}/{path.relative_to(step.folder)}": storage.sha256_of(path)
        for step in steps.values()
        for path in sorted(step.folder.rglob("*"))
        if path.is_file() and path.name != "lease"
    }


def stamps(*steps):
    """When each file of data was written."""
    return {path: path.stat().st_mtime_ns for step in steps for path in step.parts_folder.iterdir() if path.suffix != ".json"}


class Disturbance:
    """Moves a folder away and back at moments that are counted in files opened below another folder, not in seconds."""

    def __init__(self, folder: Path, beside: Path, seed: int) -> None:
        self.folder, self.away, self.beside = folder, folder.with_name("away"), str(beside)
        self.draw, self.lock = random.Random(seed), threading.RLock()
        self.count, self.removals, self.is_on = 0, 0, False
        self.next = self.draw.randint(1, 12)

    def tick(self, event: str, args: tuple) -> None:
        if not self.is_on or event != "open" or not str(args[0]).startswith(self.beside):
            return
        with self.lock:
            self.count += 1
            if self.count < self.next:
                return
            if self.away.exists():
                self.put_back()
                self.next = self.count + self.draw.randint(1, 30)
            else:
                self.folder.rename(self.away)
                self.removals += 1
                self.next = self.count + self.draw.randint(1, 8)

    def put_back(self) -> None:
        with self.lock:
            if self.away.exists():
                self.away.rename(self.folder)


_DISTURBANCES: list[Disturbance] = []


def _hook(event, args):
    for each in _DISTURBANCES:
        each.tick(event, args)


@pytest.fixture(scope="module")
def hooked():
    sys.addaudithook(_hook)  # stays as long as the process: it does nothing while there is no disturbance


def disturb(where, tmp_path, seed, removals):
    """Runs until the input went away so often, and then until all is done; the steps, and what the attempts ended with."""
    disturbance = Disturbance(where, tmp_path, seed)
    _DISTURBANCES.append(disturbance)
    ended = []
    try:
        while disturbance.removals < removals:
            output = tmp_path / f"out{len([each for each in ended if each == 'done'])}"
            disturbance.is_on = True
            try:
                steps = curate_here(CONFIG, where, output)
                ended.append("done")
                ended += ["lost some"] if any("MISSING" in json.dumps(step.load_manifest()) for step in steps.values()) else []
            except RefAlignError as error:
                ended.append(type(error).__name__)
            finally:
                disturbance.is_on = False
                disturbance.put_back()
            assert len(ended) < 20 * removals, ended
    finally:
        _DISTURBANCES.remove(disturbance)
    return curate_here(CONFIG, where, output), ended


def check_disturbed(undisturbed, tmp_path, seed, removals):
    where, expected = undisturbed
    steps, ended = disturb(where, tmp_path, seed, removals)
    assert digest(steps) == expected, ended
    return ended


def test_a_moments_fault_leaves_the_bytes_of_an_undisturbed_run(undisturbed, hooked, tmp_path):
    """The input is removed and put back at 10 random moments of subjects, pairs and shards."""
    ended = check_disturbed(undisturbed, tmp_path, 4, 10)
    assert {"done", "lost some", "BackendUnavailable"} <= set(ended), ended


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1, 9))
def test_a_moments_fault_leaves_the_bytes_whatever_the_moments(undisturbed, hooked, tmp_path, seed):
    check_disturbed(undisturbed, tmp_path, seed, 20)


def test_a_moments_fault_an_input_that_is_gone_stops_before_anything_is_stored(folder, tmp_path):
    plan, _, _ = list_input(CONFIG, folder)
    step = Step.make(tmp_path, "subjects", 0)
    folder.rename(tmp_path / "away")
    actor = SubjectsWorker(CONFIG)
    for _ in range(2 * CONFIG.curation.max_worker_deaths):
        for name, work in plan.items():
            with pytest.raises(BackendUnavailable, match="gone since this run was planned.*same command again"):
                actor.make_part(step, name, work)
    assert step.list_commits() == []
    with pytest.raises(ConfigError, match="no such file or folder"):
        list_input(CONFIG, folder)
    (tmp_path / "away").rename(folder)
    record = actor.make_part(step, *next(iter(plan.items())))
    assert {outcome["reason"] for outcome in record["outcomes"]} == {""}, "a run that was stopped is no dead worker"


def test_a_moments_fault_an_empty_mount_point_is_a_gone_input(folder, tmp_path):
    config = make_config(f"input.path={folder}")
    plan, _, _ = list_input(config, folder)
    folder.rename(tmp_path / "away")
    folder.mkdir()
    (name, work), *_ = plan.items()
    with pytest.raises(BackendUnavailable, match="gone since"):
        SubjectsWorker(config).make_part(Step.make(tmp_path, "subjects", 0), name, work)
    (tmp_path / "list.txt").write_text("in/a.mp4\nin/b.mp4\n")
    with pytest.raises(BackendUnavailable, match="nor any other of 2 videos"):
        list_input(config, tmp_path / "list.txt")


def test_a_moments_fault_in_shards_stops_before_anything_is_stored(folder, tmp_path, undisturbed):
    steps = curate_here(CONFIG, folder, tmp_path / "out")
    kept = digest({"shards": steps["shards"]})
    shutil.rmtree(steps["shards"].folder)
    plan = plan_shards(CONFIG.shards, steps["subjects"], steps["pairs"])
    folder.rename(tmp_path / "away")
    actor = ShardsWorker(CONFIG)
    for name, work in plan.items():
        with pytest.raises(BackendUnavailable, match="gone since"):
            actor.make_part(steps["shards"], name, work)
    assert steps["shards"].list_commits() == []
    (tmp_path / "away").rename(folder)
    assert digest({"shards": curate_here(CONFIG, folder, tmp_path / "out")["shards"]}) == kept


@pytest.mark.parametrize("config", [CONFIG, STRICT])
def test_a_moments_fault_of_one_video_is_tried_again(folder, tmp_path, config):
    """It goes after it was planned, and is back for the next run of the same command, above the limit of faults and below."""
    loop, stage = make_loop(config, folder, tmp_path / "out"), Subjects()
    subjects = loop.make_step(stage)
    plan = stage.listing.plan
    lost = Path(next(iter(plan.values()))[0].source.path)
    lost.rename(tmp_path / "lost.mp4")
    try:
        loop.manifests["subjects"] = loop._perform(stage, subjects)
    except TooManyQuarantined:
        assert config is STRICT
    commit = subjects.load_commit(next(iter(plan))) or {}
    assert [each["reason"] for each in commit["outcomes"] if each["item"] == lost.name] == ["MISSING"]
    assert (subjects.load_manifest() is None) == (config is STRICT)
    if config is CONFIG:  # what is made of it is made of too little
        loop._perform(Pairs(), loop.make_step(Pairs()))
    (tmp_path / "lost.mp4").rename(lost)
    steps = curate_here(config, folder, tmp_path / "out")
    assert steps["subjects"].folder == subjects.folder
    assert (steps["subjects"].load_manifest() or {})["counts"]["video"]["written"] == 6
    assert digest(steps) == digest(curate_here(config, folder, tmp_path / "fresh"))


def test_a_moments_fault_that_comes_again_holds_until_a_person_says_so(folder, tmp_path):
    """A file that kills its workers in two runs is settled; `--retry` takes it up again."""
    steps = curate_here(CONFIG, folder, tmp_path / "out")
    name, *_ = (steps["subjects"].load_manifest() or {})["parts"]
    item = Outcome("video", "x.mp4", "CRASH", "x.mp4: crashed")

    def fail(path):
        path.write_bytes(b"rows")
        return {"outcomes": [dataclasses.asdict(item)], "work": []}

    for tries in (1, 2):
        assert (steps["subjects"].write_part(name, fail)["tries"]) == tries
        (steps["subjects"].folder / "manifest.json").unlink(missing_ok=True)
        assert find_retries(steps["subjects"], {}) == ([name] if tries == 1 else [])
        steps["subjects"].reopen([name] if tries == 1 else [])
    assert [(step.name, part, outcome) for step, part, outcome in iter_quarantined(tmp_path / "out")] == [
        ("subjects", name, item)
    ]
    done = subprocess.run(
        [sys.executable, "pipelines/clean.py", "--output", str(tmp_path / "out"), "--quarantined"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "CRASH" in done.stdout and "x.mp4: crashed" in done.stdout and "1 quarantined; --retry" in done.stdout
    assert retry_quarantined(tmp_path / "out") == 1 and steps["subjects"].load_part(name) is None
    assert list(iter_quarantined(tmp_path / "out")) == []
    again = curate_here(CONFIG, folder, tmp_path / "out")
    assert digest(again) == digest(curate_here(CONFIG, folder, tmp_path / "fresh"))


def test_a_moments_fault_is_told_from_a_files_own(folder, tmp_path):
    path = next(folder.glob("*.mp4"))
    video_id = storage.digest_sampled(str(path))
    own = DataError("TRUNCATED", "cut")
    assert judge_fault(own, str(path), video_id) is own
    assert judge_fault(own, str(path), "0" * 16).reason == "CHANGED"
    assert judge_fault(own, str(tmp_path / "gone.mp4"), video_id).reason == "MISSING"
    for number, reason in ((116, "UNREACHABLE"), (5, "IO_ERROR"), (13, "FORBIDDEN"), (22, "TRUNCATED")):
        error = DataError("TRUNCATED", "cut")
        error.__cause__ = OSError(number, "said by the system")
        assert judge_fault(error, str(path), video_id).reason == reason


def test_known_by_content_moved_between_every_two_stages(world, tmp_path):
    """Nothing is made twice and nothing is missing; then it grows in its new place."""
    places = [tmp_path / name for name in ("a", "b/deep", "c", "d")]
    for place in places:
        place.parent.mkdir(exist_ok=True)
    shutil.copytree(world, places[0], ignore=shutil.ignore_patterns("*-5.*", "*0005*"))
    made = {}
    for number, stage in enumerate(("subjects", "pairs", "shards", None)):
        steps = run_stages(places[number], tmp_path / "out", until=stage)
        for step in steps.values():
            if step.load_manifest():
                made.setdefault(step.name, (step.folder, stamps(step)))
        assert {step.name: (step.folder, stamps(step)) for step in steps.values() if step.load_manifest()} == made
        if number < 3:
            places[number].rename(places[number + 1])
    counts = (steps["shards"].load_manifest() or {})["counts"]["clip"]
    assert counts["planned"] == counts["written"] > 5
    fresh = curate_here(CONFIG, places[3], tmp_path / "fresh")
    assert digest({"shards": steps["shards"]}) == digest({"shards": fresh["shards"]})


def run_stages(where, output, until):
    """The stages up to one, each as its own command would find it."""
    names = [stage.name for stage in CURATION]
    stages = CURATION[: names.index(until) + 1] if until else CURATION
    steps = curate_here(CONFIG, where, output, stages=stages)
    return {name: steps[name] for name in names if name in steps}


def test_known_by_content_copied_to_a_bucket_between_stages(world, tmp_path, s3):
    s3.create_bucket(Bucket="moved")
    shutil.copytree(world, tmp_path / "in")
    run_stages(tmp_path / "in", tmp_path / "out", until="subjects")
    for path in (tmp_path / "in").iterdir():
        s3.upload_file(str(path), "moved", f"set/{path.name}")
    shutil.rmtree(tmp_path / "in")
    steps = run_stages("s3://moved/set", tmp_path / "out", until="shards")
    local = curate_here(CONFIG, world, tmp_path / "local")
    assert digest({"shards": steps["shards"]}) == digest({"shards": local["shards"]})
    assert samples_of(steps["shards"])


def test_known_by_content_a_moved_input_that_grows_makes_only_what_is_new(world, tmp_path):
    videos = sorted(world.glob("*.mp4"))
    for path in (path for video in videos[:4] for path in world.glob(f"{video.stem}.*")):
        (tmp_path / "a").mkdir(exist_ok=True)
        shutil.copy2(path, tmp_path / "a")
    old = curate_here(CONFIG, tmp_path / "a", tmp_path / "out")
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.copytree(world, tmp_path / "b", dirs_exist_ok=True)
    new = curate_here(CONFIG, tmp_path / "b", tmp_path / "out")
    assert (new["subjects"].load_manifest() or {})["versions"] == [old["subjects"].folder.name]
    assert len(stamps(new["subjects"])) == 1, "two videos of six were new"


def test_the_command_says_what_does_not_go_together(tmp_path):
    done = subprocess.run(
        [sys.executable, "pipelines/clean.py", "--output", str(tmp_path), "--remove", "--retry"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "--remove and --forget delete; they do not go with" in " ".join(done.stderr.split())
    assert run_command(lambda: retry_quarantined(tmp_path)) == 0
