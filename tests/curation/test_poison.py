"""A video that kills its workers is left out after the third; its neighbours are curated."""

from refalign.pipeline.steps import Step
from refalign.stages.subjects import SubjectsWorker, list_input
from refalign.toy.videos import write_world
from tests.curation.curating import make_config


def test_a_video_on_which_workers_died_is_quarantined_and_the_rest_is_made(tmp_path):
    write_world(tmp_path / "videos", num_videos=3, seed=5, split="heldout")
    config = make_config()
    plan, _, _ = list_input(config, tmp_path / "videos")
    ((name, work),) = plan.items()
    poison = work[1].source.name
    step = Step.make(tmp_path, "subjects", 0)
    for _ in range(config.curation.max_worker_deaths):
        step.open_journal(name).begin(poison)  # and then the worker was gone
    record = SubjectsWorker(config).make_part(step, name, work)
    outcomes = {each["item"]: each["reason"] for each in record["outcomes"] if each["level"] == "video"}
    assert outcomes[poison] == "KILLS_WORKERS"
    assert [reason for item, reason in outcomes.items() if item != poison] == ["", ""]
    assert not list(step.parts_folder.glob(".*")), "the commit ends the notes"
