"""The whole story as a user runs it: one command, real processes, the smallest preset."""

import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.e2e.conftest import run


def manifest_of(output: Path, step: str) -> dict:
    (path,) = output.glob(f"{step}-*/manifest.json")
    return json.loads(path.read_text())


def test_every_planned_item_is_written_filtered_or_quarantined(story):
    _, _, summary = story
    assert summary["counts"]["subjects.video"]["planned"] == 18
    for level in summary["counts"].values():
        lost = sum(level["filtered"].values()) + sum(level["quarantined"].values())
        assert level["planned"] == level["written"] + lost
    assert summary["samples"]["train"] + summary["samples"]["validation"] == summary["clips"]
    assert summary["samples"]["validation"] > 0


def test_it_learns(story):
    """On held-out clips at fixed noise and timesteps."""
    output, _, _ = story
    validation = manifest_of(output, "train")["validation"]
    assert validation["flow_matching"]["last"] < 0.9 * validation["flow_matching"]["first"]
    assert validation["pull"]["last"] < 0.9 * validation["pull"]["first"]


def test_subjects_are_where_the_world_put_them(story):
    output, _, _ = story
    (world,) = output.glob("world-*/videos")
    clips = [row for path in output.glob("subjects-*/parts/*.parquet") for row in pq.read_table(path).to_pylist()]
    found = known = 0
    for clip in clips:
        truth = json.loads((world / Path(clip["video_path"]).with_suffix(".json").name).read_text())["ground_truth"]
        assert truth, "the world writes its ground truth beside each video"
        found += len(clip["subjects"])
        known += 1
    assert found >= known, "at least one subject a clip on average"


def test_pairs_show_one_identity_more_often_than_chance(story):
    output, _, _ = story
    assert manifest_of(output, "pairs")["pairs"] > 0


def test_shards_open_with_stock_webdataset(story):
    import webdataset

    output, _, _ = story
    shards = sorted(str(path) for path in output.glob("shards-*/parts/*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == sum(manifest_of(output, "shards")["samples"].values())
    for sample in samples:
        assert set(sample) >= {"__key__", "safetensors", "json", "jpg"}
        assert json.loads(sample["json"])["license"] == "CC0-1.0"


def test_the_model_is_registered_and_generates_the_same_video_twice(story):
    output, done, summary = story
    model = summary["model"]
    assert f"models:/{model['name']}@challenger" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.startswith("generate"))
    words = command.split("uv run ", 1)[1]
    arguments = shlex.split(words)
    arguments[arguments.index("--output") + 1] = str(output / "one.mp4")
    first = run(*arguments, "--set", "num_inference_steps=4")
    assert first.returncode == 0, first.stderr[-3000:]
    arguments[arguments.index(str(output / "one.mp4"))] = str(output / "two.mp4")
    second = run(*arguments, "--set", "num_inference_steps=4")
    assert second.returncode == 0
    assert (output / "one.mp4").read_bytes() == (output / "two.mp4").read_bytes()
    assert np.frombuffer((output / "one.mp4").read_bytes()[4:8], "S4")[0] == b"ftyp"


def test_mlflow_holds_one_run_with_a_child_per_step(story):
    import mlflow

    output, _, summary = story
    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "refalign"]
    runs = client.search_runs([experiment.experiment_id])
    stories = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(stories) == 1 and stories[0].info.status == "FINISHED"
    children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert set(children) == {"subjects", "pairs", "shards", "train", "evaluate", "register"}
    assert all(run.info.status == "FINISHED" for run in children.values())
    history = client.get_metric_history(children["train"].info.run_id, "flow_matching")
    assert [point.step for point in history] == sorted({point.step for point in history})
    version = client.get_model_version_by_alias("refalign", "challenger")
    assert str(version.version) == str(summary["model"]["version"])


def test_a_second_run_skips_every_step_and_changes_nothing(story):
    output, _, _ = story
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and "-shm" not in path.name}
    done = run("pipelines/full.py", "--preset", "toy_tiny", "--output", str(output))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("done before, skipped") == 7
    assert "generate" in done.stdout
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert not changed


def test_report_holds_pictures_and_videos_in_one_file(story):
    _, _, summary = story
    html = Path(summary["report"]).read_text()
    assert html.count("data:video/mp4;base64,") >= 2 and "data:image/" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
