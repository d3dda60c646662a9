"""A whole run as a user starts it: one command, real processes, the smallest preset."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.e2e.conftest import run

MARGIN = 0.05


def manifest_of(output: Path, step: str) -> dict:
    (path,) = output.glob(f"{step}-*/manifest.json")
    return json.loads(path.read_text())


def test_every_planned_item_is_written_filtered_or_quarantined(finished_run):
    _, _, summary = finished_run
    assert summary["counts"]["subjects.video"]["planned"] == 18
    for level in summary["counts"].values():
        lost = sum(level["filtered"].values()) + sum(level["quarantined"].values())
        assert level["planned"] == level["written"] + lost
    assert summary["samples"]["train"] + summary["samples"]["validation"] == summary["clips"]
    assert summary["samples"]["validation"] > 0


def test_it_learns(finished_run):
    """On held-out clips at fixed noise and timesteps."""
    output, _, _ = finished_run
    validation = manifest_of(output, "train")["validation"]
    assert validation["flow_matching"]["last"] < 0.9 * validation["flow_matching"]["first"]
    assert validation["pull"]["last"] < 0.9 * validation["pull"]["first"]


def test_the_trained_model_is_judged_better_than_the_base(finished_run):
    """By the share of attributes and actions that the judge of the drawn world finds as wanted, on held-out clips."""
    _, done, summary = finished_run
    scores = summary["evaluation"]["scores"]
    assert scores["after"]["judged"] - scores["before"]["judged"] >= MARGIN, scores
    assert "% before training, " in done.stdout


def iou(a, b) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def find_identities(output: Path) -> dict[str, int | None]:
    """Subject id to the drawn identity whose true box it overlaps by more than half; None for a false alarm."""
    identities = {}
    for clip in [row for path in output.glob("subjects-*/parts/*.parquet") for row in pq.read_table(path).to_pylist()]:
        truth = json.loads(Path(clip["video_path"]).with_suffix(".json").read_text())["ground_truth"]
        for subject in clip["subjects"]:
            frame = round(subject["frame_time_s"] * truth["fps"])
            there = {
                each["identity"]: iou(subject["box_xyxy_px"], each["boxes_xyxy_px"][frame - shot["first_frame"]])
                for shot in truth["shots"]
                if shot["first_frame"] <= frame < shot["first_frame"] + shot["num_frames"]
                for each in shot["subjects"]
            }
            best = max(there, key=lambda identity: there[identity])
            identities[subject["subject_id"]] = best if there[best] > 0.5 else None
    return identities


def test_subjects_and_pairs_agree_with_the_ground_truth(finished_run):
    output, _, summary = finished_run
    identities = find_identities(output)
    assert len(identities) == summary["subjects"] >= summary["clips"]
    assert list(identities.values()).count(None) <= 0.05 * len(identities)
    pairs = [row for path in output.glob("pairs-*/parts/pairs-*.parquet") for row in pq.read_table(path).to_pylist()]
    right = [identities[pair["subject_id"]] == identities[pair["reference_subject_id"]] for pair in pairs]
    assert len(pairs) >= 20 and np.mean(right) >= 0.9, "casts hold twins of one shape and colour; chance is about a third"


def test_shards_open_with_stock_webdataset(finished_run):
    import webdataset

    output, _, _ = finished_run
    shards = sorted(str(path) for path in output.glob("shards-*/parts/*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == sum(manifest_of(output, "shards")["samples"].values())
    for sample in samples:
        assert set(sample) >= {"__key__", "safetensors", "json", "jpg"}
        assert json.loads(sample["json"])["license"] == "CC0-1.0"


def test_the_model_is_registered_and_generates_the_same_video_twice(finished_run):
    output, done, summary = finished_run
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


def test_mlflow_holds_one_run_with_a_child_per_step(finished_run):
    import mlflow

    output, _, summary = finished_run
    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "refalign"]
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert set(children) == {"subjects", "pairs", "shards", "train", "evaluate", "register"}
    assert all(run.info.status == "FINISHED" for run in children.values())
    history = client.get_metric_history(children["train"].info.run_id, "flow_matching")
    assert [point.step for point in history] == sorted({point.step for point in history})
    version = client.get_model_version_by_alias("refalign", "challenger")
    assert str(version.version) == str(summary["model"]["version"])


def test_a_second_run_skips_every_step_and_changes_nothing(finished_run):
    output, _, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and "-shm" not in path.name}
    done = run("pipelines/full.py", "--preset", "toy_tiny", "--output", str(output))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("done before, skipped") == 7
    assert "generate" in done.stdout
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert not changed


def test_single_steps_that_find_all_done_say_where_all_is(finished_run, tmp_path):
    output, _, summary = finished_run
    copy = tmp_path / "out"
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns("mlflow*", "mlruns*"))
    for step in ("subjects", "pairs", "shards"):
        done = run(
            f"pipelines/{step}.py", "--preset", "toy_tiny", "--output", str(copy), "--set", "training.optimizer.ema_decay=0.9"
        )
        assert done.returncode == 0 and f"{step}: done before, skipped" in done.stdout, done.stderr[-2000:]
    (partial,) = copy.glob("runs/*/summary.json")
    folders = json.loads(partial.read_text())["folders"]
    assert folders == {name: summary["folders"][name] for name in ("world", "subjects", "pairs", "shards")}
    assert (copy / "summary.json").read_bytes() == (output / "summary.json").read_bytes(), (
        "the finished run stays the current one"
    )


def test_report_holds_pictures_and_videos_in_one_file(finished_run):
    _, _, summary = finished_run
    html = Path(summary["report"]).read_text()
    assert html.count("data:video/mp4;base64,") >= 2 and "data:image/" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
