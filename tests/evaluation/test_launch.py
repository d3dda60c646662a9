"""Videos of held-out prompts with the real, tiny models: made once, scored, reproducible."""

import shutil
from types import SimpleNamespace

import av
import pytest
import torch
from make_run import make_shards, make_subjects, make_train

from refalign.config.presets import toy_tiny
from refalign.evaluation.worker import EvaluateWorker, VideoWork
from refalign.io.images import read_image
from refalign.models.wan import load_transformer
from refalign.pipeline.stage import Run
from refalign.pipeline.steps import Step
from refalign.stages.evaluate import Evaluate


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Plan, records and manifest of an evaluation of two samples, with a trained model that differs from the base.

    The toy world's judge would not know what a ball is; this one does.
    """
    output = tmp_path_factory.mktemp("evaluation")
    config, settings = toy_tiny(), {"num_inference_steps": 2, "num_samples": 2, "judge": "make_run:judge_ball"}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=settings)})
    shards = make_shards(output, {"train": ["c"], "validation": ["a", "b"]}, cross_pair={"a": "c", "b": "d"})
    train = make_train(output)
    export = train.folder / "export"
    shutil.copytree(config.models.base, export)
    trained = load_transformer(str(export))
    torch.nn.init.normal_(trained.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    trained.save_pretrained(export / "transformer")

    run = Run(config.model_copy(update={"seed": 3}), output)
    run.steps = {"shards": shards, "subjects": make_subjects(output, ["a", "b", "c", "d"]), "train": train}
    run.manifests["train"] = SimpleNamespace(**train.load_manifest())
    step, stage, actor = Step.make(output, "evaluate", 0), Evaluate(), EvaluateWorker(config)
    plan = stage.plan(run, step)
    records = [actor.make_part(step, name, work) for name, work in plan.items()]
    return step, actor, plan, records, stage.finish(run, step, plan, records).model_dump(mode="json")


def test_each_sample_has_playable_videos_of_both_models(evaluated):
    step, actor, _, _, manifest = evaluated
    video = actor.config.video
    assert manifest["num_samples"] == 2 and manifest["held_out"]
    for sample in manifest["samples"]:
        for reference in sample["references"]:
            assert read_image(step.folder / reference["file"]).shape[2] == 3
        data = [(step.folder / sample["videos"][label]) for label in ("before", "after")]
        for path in data:
            with av.open(str(path)) as file:
                frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            assert (len(frames), *frames[0].shape) == (video.num_frames, video.height_px, video.width_px, 3)
        assert data[0].read_bytes() != data[1].read_bytes(), "before and after are two models"


def test_scores_compare_with_references_the_video_was_not_given(evaluated):
    _, _, plan, _, manifest = evaluated
    videos = [work for work in plan.values() if isinstance(work, VideoWork)]
    assert len(videos) == 4 and all(
        not set(work.pictures.own) & set(work.pictures.other) and work.pictures.other for work in videos
    )
    for averages in manifest["scores"].values():
        assert set(averages) == {"judged", "fidelity", "chance", "own_above_other", "copy_paste"}
        assert -1 <= averages["fidelity"] <= 1 and 0 <= averages["own_above_other"] <= 1


def test_what_the_judge_says_is_kept_with_each_video_and_its_share_of_right_attributes_is_a_score(evaluated):
    _, _, _, records, manifest = evaluated
    colour, shape = ({"wanted": "red", "shown": None}, {"wanted": "ball", "shown": "ball"})
    verdict = [{"name": "alone", "attributes": {"shape": shape, "colour": colour}}]
    for sample in manifest["samples"]:
        assert sample["verdicts"] == {"before": verdict, "after": verdict}
        assert [sample["scores"][side]["judged"] for side in ("before", "after")] == [0.5, 0.5]
    assert [manifest["scores"][side]["judged"] for side in ("before", "after")] == [0.5, 0.5]
    assert [record["verdict"] for record in records if "scores" in record] == [verdict] * 4


def test_a_video_that_the_judge_does_not_know_or_that_nobody_judges_has_no_such_score(evaluated):
    step, _, plan, _, _ = evaluated
    name, work = next((name, work) for name, work in plan.items() if isinstance(work, VideoWork))
    for judge in ("refalign.toy.verdict:judge_video", None):
        config = toy_tiny()
        settings = {"num_inference_steps": 1, "judge": judge}
        actor = EvaluateWorker(config.model_copy(update={"evaluation": config.evaluation.model_copy(update=settings)}))
        other = Step.make(step.folder.parent / "other", "evaluate", judge)
        shutil.copytree(step.parts_folder, other.parts_folder, dirs_exist_ok=True)
        record = actor.make_part(other, f"again-{name}", work)
        assert record["verdict"] is None and record["scores"]["judged"] is None and record["scores"]["fidelity"] is not None


def test_separability_is_measured_of_both_models_on_held_out_pictures(evaluated):
    _, actor, _, records, manifest = evaluated
    told = manifest["separability"]
    for side in ("before", "after"):
        assert len(told[side]["blocks"]) == 5 and told[side]["picture_block"] == actor.config.objective.alignment_blocks - 1
        assert told[side]["subjects"] == [0, 0, 1, 1] and len(told[side]["points"]) == 4
        assert all(block["chance"] == pytest.approx(1 / 3, abs=1e-5) for block in told[side]["blocks"])
    # The trained model differs in its last layer alone: the blocks' own tokens are those of the base.
    # Sums of equal numbers may differ in their last digit, and so may the fifth decimal that is told.
    for before, after in zip(told["before"]["blocks"], told["after"]["blocks"], strict=True):
        assert before == pytest.approx(after, abs=1.5e-5)
    assert len([record for record in records if "scores" in record]) == 4


def test_the_same_seed_makes_the_same_video(evaluated, tmp_path):
    step, actor, plan, records, _ = evaluated
    again = Step.make(tmp_path, "evaluate", 0)
    shutil.copytree(step.parts_folder, again.parts_folder)
    (again.parts_folder / records[0]["part"]).unlink()
    assert actor.make_part(again, records[0]["part"], plan[records[0]["part"]]) == records[0]
