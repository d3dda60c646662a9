"""A stage of one's own between two others: the example of ARCHITECTURE.md, run on real parts and killed once."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from refalign.config.presets import toy_tiny
from refalign.io.images import decode_image
from refalign.pipeline.outcomes import Commit, Outcome
from refalign.pipeline.stage import Inputs, PartsManifest, PartStage, Run
from refalign.pipeline.steps import Step
from refalign.toy.videos import write_world
from tests.curating_here import do_without_ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "videos"
    write_world(folder, num_videos=6, seed=3, split="heldout")
    return folder


def run(*arguments):
    command = [sys.executable, "-m", "tests.stages.program", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def parts_of(output):
    (folder,) = output.glob("sheets-*")
    return {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}, json.loads(
        (folder / "manifest.json").read_text()
    )


def test_a_new_stage_is_made_once_whatever_kills_it(world, tmp_path):
    undisturbed = run(world, tmp_path / "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    killed = run(world, tmp_path / "out", 2)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "out").glob("sheets-*")
    assert len(list((folder / "parts").glob("*.json"))) == 1 and not (folder / "manifest.json").exists()
    first = next(path for path in (folder / "parts").glob("*.png"))
    made_at = first.stat().st_mtime_ns
    resumed = run(world, tmp_path / "out")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    order = [line.partition(":")[0] for line in resumed.stdout.splitlines() if "started" in line or "skipped" in line]
    assert order == ["subjects", "sheets", "pairs", "shards"] and "subjects: done before, skipped" in resumed.stdout
    assert first.stat().st_mtime_ns == made_at, "what was committed is not made again"
    parts, manifest = parts_of(tmp_path / "out")
    assert (parts, manifest["crops"]) == (parts_of(tmp_path / "whole")[0], parts_of(tmp_path / "whole")[1]["crops"])
    assert f"sheets: {manifest['crops']} crops on 3 sheets" in resumed.stdout and manifest["crops"] > 6
    assert all(decode_image(data).shape[0] >= 96 for name, data in parts.items() if name.endswith(".png"))


def test_the_example_is_that_of_the_document_and_short():
    code = (ROOT / "tests" / "stages" / "contact_sheets.py").read_text()
    assert code.count("\n") <= 40
    assert code in (ROOT / "ARCHITECTURE.md").read_text()


class AsModel(BaseModel):
    words: int
    outcomes: tuple[Outcome, ...]


@dataclass
class AsDataclass:
    words: int
    outcomes: tuple[Outcome, ...]


class CountWords:
    def __init__(self, config):
        pass

    def make_part(self, step, name, work: list[str]):
        recorded = AsModel(words=len(work), outcomes=(Outcome("clip", "a"), Outcome("clip", "b", "NO_MOTION")))
        return step.write_part(name, lambda path: path.write_text(" ".join(work)) and recorded)


@pytest.mark.parametrize("kind", [AsModel, AsDataclass, Commit], ids=lambda kind: kind.__name__)
def test_finish_gets_every_commit_as_the_class_that_the_stage_names(kind, tmp_path, monkeypatch):
    class Words(PartStage):
        name, manifest, worker, commit = "words", PartsManifest, CountWords, kind

        def find_inputs(self, run):
            return Inputs(())

        def plan(self, run, step):
            return {"one": ["a"], "two": ["b", "c"]}

        def finish(self, run, step, plan, commits):
            self.commits = commits
            return PartsManifest(parts=tuple(plan))

        def describe(self, manifest):
            return ""

    do_without_ray(monkeypatch)
    for stage in (Words(), Words()):  # parts that are made, and parts that are read
        stage.perform(Run(toy_tiny(), tmp_path), Step.make(tmp_path, "words"))
        words = [each["words"] if isinstance(each, dict) else each.words for each in stage.commits]
        assert words == [1, 2] and all(isinstance(each, kind) for each in stage.commits)
        assert [outcome.status for each in stage.commits for outcome in each.outcomes] == ["written", "filtered"] * 2
