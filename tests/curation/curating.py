"""The subjects step without Ray, in this process and with the embedded weights."""

import pyarrow.parquet as pq
from pydantic_core import to_json

from refalign.config.presets import toy
from refalign.pipeline.outcomes import Outcome, count_outcomes
from refalign.pipeline.ray_data import read_work
from refalign.pipeline.steps import Step
from refalign.stages.subjects import list_input


def make_config():
    config = toy()
    settings = {"max_video_bytes": 2**30, "videos_per_part": 1000, "max_quarantine_fraction": 1.0}
    return config.model_copy(update={"curation": config.curation.model_copy(update=settings)})


def curate(actor, where, output, *, level="video"):
    """The outcomes of one level (None: of all) and the rows of an input."""
    config = make_config()
    plan, planned, _ = list_input(config, where)
    step = Step.make(output, "subjects", str(where))
    outcomes, rows = list(planned), []
    for name, work in plan.items():
        record = actor.make_part(step, name, read_work(actor, to_json(work).decode()))
        outcomes += [Outcome(**outcome) for outcome in record["outcomes"]]
        rows += pq.read_table(step.parts_folder / name).to_pylist()
    videos = [outcome for outcome in outcomes if outcome.level == "video"]
    assert len(videos) == len(planned) + sum(map(len, plan.values())), "planned = written + filtered + quarantined"
    for count in count_outcomes(outcomes).values():
        assert count.planned == count.written + sum(count.lost.values())
    return [outcome for outcome in outcomes if level in (None, outcome.level)], rows
