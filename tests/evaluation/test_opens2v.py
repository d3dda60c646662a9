"""OpenS2V-Eval: published totals, published motion, upstream's files, and a run of its own prompts."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from refalign.config.presets import toy_tiny
from refalign.errors import ArtifactError
from refalign.evaluation.opens2v import load_prompts, motion_amplitude, run_opens2v, score_folder, total

NAMES = ("aesthetics", "motion_smoothness", "motion_amplitude", "face_similarity", "gme", "nexus", "natural")
LEADERBOARD = {
    "RefAlign-14B": (60.42, 46.84, 97.61, 22.48, 55.23, 68.32, 48.52, 73.63),
    "RefAlign-1.3B": (56.30, 42.96, 94.74, 20.74, 53.06, 66.85, 43.97, 66.25),
    "Phantom-14B": (56.77, 46.39, 96.31, 33.42, 51.46, 70.65, 37.43, 69.35),
    "Phantom-1.3B": (54.89, 46.67, 93.30, 14.29, 48.56, 69.43, 42.48, 62.50),
    "VINO": (57.85, 45.92, 94.73, 12.30, 52.00, 69.69, 42.67, 71.99),
    "Kling1.6": (56.23, 44.59, 86.93, 41.60, 40.10, 66.20, 45.89, 74.59),
}


@pytest.mark.parametrize("model", LEADERBOARD)
def test_the_published_totals_come_out(model):
    published, *scores = LEADERBOARD[model]
    found = total(dict(zip(NAMES, scores, strict=True)), "open")
    assert found == pytest.approx(published, abs=0.02)


def test_the_published_motion_comes_out(real_data):
    with av.open(str(real_data / "eval" / "faceobj_14.mp4")) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    published = json.loads((real_data / "eval" / "output_json" / "motionscore.json").read_text())
    assert motion_amplitude(frames) == pytest.approx(published["faceobj_14"]["motion_fb"], rel=0.02)


def test_upstreams_files_are_read_and_what_was_not_run_is_said(real_data):
    result = score_folder(real_data / "eval" / "output_json", "open")
    assert result.scores["aesthetics"] == pytest.approx(((4.811809 + 5.659755) / 2 - 4) / 3, abs=1e-6)
    assert result.scores["natural"] == pytest.approx((3.5 - 1) / 4)
    assert result.scores["nexus"] == pytest.approx((0.01300048828125 + 0.01030731201171875) / 2 / 0.05)
    assert result.scores["motion_smoothness"] is None and result.total is None
    assert "motion_smoothness  not run" in result.describe() and "no total: motion_smoothness" in result.describe()


def test_faces_zeros_and_clipping_follow_the_leaderboard(tmp_path):
    def write(name, table):
        (tmp_path / name).write_text(json.dumps(table))

    write("facesim.json", {"singleface_1": {"cur_score": 0.5}, "multiobject_1": {"cur_score": 0.9}})
    write("nexusscore.json", {"a_1": {"nexus_score": 0}, "a_2": {"nexus_score": 0.2}, "a_3": {"nexus_score": 0.02}})
    write("aesthetic_score.json", {"a_1": {"aes_score": 9.0}, "a_2": {"aes_score": 4.0}})
    write("naturalscore_1.json", {"a_1": "5"})
    write("naturalscore_2.json", {"a_1": "2"})
    write("naturalscore_3.json", {"a_1": None})
    for name, field in (("motion_smoothness", "motion_smoothness"), ("gmescore", "gme_score"), ("motionscore", "motion_fb")):
        write(f"{name}.json", {"a_1": {field: 0.5}})
    result = score_folder(tmp_path, "open")
    assert result.scores == pytest.approx(
        {
            "face_similarity": 0.5,
            "nexus": 0.7,
            "aesthetics": 0.5,
            "natural": 0.625,
            "motion_smoothness": 0.5,
            "gme": 0.5,
            "motion_amplitude": 0.5,
        }
    )
    assert result.total == pytest.approx(0.5 + 0.2 * 0.2 + 0.24 * 0.125)
    assert score_folder(tmp_path, "human").total == pytest.approx(0.5 + 0.3 * 0.125)


@pytest.mark.parametrize("entry", [{"gme_score": "high"}, {"gme_score": float("nan")}])
def test_a_score_that_is_no_number_is_named(tmp_path, entry):
    (tmp_path / "gmescore.json").write_text(json.dumps({"a_1": entry}))
    with pytest.raises(ArtifactError, match=r"gmescore\.json.*a_1"):
        score_folder(tmp_path, "open")


def test_all_180_prompts_are_read_and_paths_stay_below(real_data, tmp_path):
    assert len(load_prompts(real_data / "eval" / "Open-Domain_Eval.json")) == 180
    path = tmp_path / "x.json"
    for key, picture in (("a", "../secret.png"), ("a/../../b", "a.png"), ("a", "/etc/hosts")):
        path.write_text(json.dumps({key: {"prompt": "p", "img_paths": [picture]}}))
        with pytest.raises(ArtifactError, match="outside"):
            load_prompts(path)
    path.write_text(json.dumps({"a": {"text": "p"}}))
    with pytest.raises(ArtifactError, match="img_paths"):
        load_prompts(path)


def test_videos_are_made_once_and_scored_by_the_given_command(tmp_path, ray_cluster):
    base = toy_tiny()
    (tmp_path / "Images").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "Images" / "a.png")
    prompts = tmp_path / "Open-Domain_Eval.json"
    entry = {"prompt": "a creature", "img_paths": ["Images/a.png"]}
    prompts.write_text(json.dumps({"singleobj_1": entry, "singleface_2": entry}))
    script = tmp_path / "evaluate.sh"
    scored = json.dumps({"singleobj_1": {"gme_score": 0.5}})
    script.write_text(f"ls $VIDEOS/*.mp4 | wc -l > $SCORES/count; echo '{scored}' > $SCORES/gmescore.json")
    settings = {"num_inference_steps": 2, "opens2v_evaluator": f"sh {script}"}
    config = base.model_copy(update={"evaluation": base.evaluation.model_copy(update=settings)})
    manifest = run_opens2v(config, Path(config.models.base), prompts, tmp_path / "out")
    assert manifest.scores["gme"] == 0.5 and manifest.scores["motion_amplitude"] is not None and manifest.total is None
    folder = Path(manifest.folder)
    assert int((folder.parent / "scores" / "count").read_text()) == 2
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    assert set(before) == {"singleobj_1.mp4", "singleface_2.mp4"}
    assert run_opens2v(config, Path(config.models.base), prompts, tmp_path / "out") == manifest
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")} == before
    (tmp_path / "Images" / "a.png").unlink()
    with pytest.raises(ArtifactError, match=r"2 of 2 pictures.*a\.png"):
        run_opens2v(config, Path(config.models.base), prompts, tmp_path / "out")
