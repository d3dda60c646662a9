"""Runs of one output folder: which is current, what is kept, and what may be deleted."""

import json

import pytest

from refalign.errors import ArtifactError, BackendUnavailable, ConfigError
from refalign.io.writing import write_json
from refalign.pipeline.clean import choose_place, find_unused, forget_run, list_runs, remove_folder
from refalign.pipeline.steps import Step
from refalign.pipeline.summary import load_summary


def end_run(output, name, status="FINISHED", *, steps=("shards", "train"), day=1, **more):
    """Writes what a run leaves: step folders with a manifest, summary and report, in the place that is chosen for them."""
    folders = {step: Step.make(output, step, name) for step in steps}
    for step in folders.values():
        step.commit({})
        (step.folder / "data").write_bytes(b"x" * 100)
    names = {step: each.folder.name for step, each in folders.items()}
    summary = {"story": name, "status": status, "ended": f"2026-01-{day:02d}T00:00:00+00:00", "folders": names, **more}
    place = choose_place(output, summary)
    write_json(place / "summary.json", summary)
    (place / "report.html").write_text(name)
    return names


def test_a_failed_run_never_takes_the_place_of_a_finished_one(tmp_path):
    end_run(tmp_path, "good", model={"name": "refalign", "version": "3"})
    end_run(tmp_path, "bad", "FAILED", day=2)
    end_run(tmp_path, "killed", "KILLED", day=3)
    end_run(tmp_path, "partial", steps=("shards",), day=4)
    assert load_summary(tmp_path)["story"] == (tmp_path / "report.html").read_text() == "good"
    assert {path.parent.name for path in tmp_path.glob("runs/*/report.html")} == {"bad", "killed", "partial"}
    assert {run.head.name: (run.head.status, run.is_current) for run in list_runs(tmp_path)} == {
        "good": ("FINISHED", True), "bad": ("FAILED", False), "killed": ("KILLED", False), "partial": ("FINISHED", False),
    }  # fmt: skip
    assert str(list_runs(tmp_path)[0].head.model) == "refalign version 3" and list_runs(tmp_path)[0].size_bytes > 200


def test_a_finished_run_takes_the_place_of_any_other_which_is_set_aside(tmp_path):
    for day, (name, status) in enumerate([("first", "FAILED"), ("second", "FINISHED"), ("first", "FINISHED")], 1):
        end_run(tmp_path, name, status, day=day)
        assert load_summary(tmp_path)["story"] == name and (tmp_path / "report.html").read_text() == name
    assert [run.head.name for run in list_runs(tmp_path)] == ["first", "second"]
    assert load_summary(tmp_path / "runs" / "second")["ended"].startswith("2026-01-02")


def test_only_what_no_finished_run_and_not_the_last_one_names_is_unused(tmp_path):
    with pytest.raises(ArtifactError, match="no summary.json"):
        list_runs(tmp_path)
    kept = {*end_run(tmp_path, "good").values(), *end_run(tmp_path, "better", day=2).values()}
    failed = end_run(tmp_path, "bad", "FAILED", day=3)
    last = end_run(tmp_path, "worse", "FAILED", day=4)
    lost = Step.make(tmp_path, "pairs", "nobody")
    lost.commit({})
    unused = find_unused(tmp_path, list_runs(tmp_path))
    assert {folder.name for folder, _ in unused} == {*failed.values(), lost.folder.name} and all(size > 20 for _, size in unused)
    for folder, _ in unused:
        remove_folder(folder)
    assert all((tmp_path / name).is_dir() for name in (*kept, *last.values())) and not lost.folder.exists()


def test_a_forgotten_run_needs_its_folders_no_more(tmp_path):
    old = end_run(tmp_path, "old")
    end_run(tmp_path, "new", day=2)
    for name in ("new", "none"):
        with pytest.raises(ConfigError, match="expected a run that is not the current one: old"):
            forget_run(tmp_path, name)
    forget_run(tmp_path, "old")
    assert {folder.name for folder, _ in find_unused(tmp_path, list_runs(tmp_path))} == set(old.values())


def test_a_summary_of_before_runs_were_kept_counts_as_finished(tmp_path):
    write_json(tmp_path / "summary.json", {"folders": {"shards": "shards-000000000000"}, "story": "old"})
    end_run(tmp_path, "bad", "FAILED")
    assert json.loads((tmp_path / "summary.json").read_text())["story"] == "old"


def test_a_folder_in_use_is_not_removed(tmp_path):
    step = Step.make(tmp_path, "train", 1)
    step.commit({})
    with step.lease(), pytest.raises(BackendUnavailable):
        remove_folder(step.folder)
    assert step.load_manifest() is not None
