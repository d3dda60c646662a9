"""The subjects step without Ray, in this process and with the embedded weights."""

import json

import pyarrow.parquet as pq

from refalign.config.presets import toy
from refalign.curation.launch import plan_subjects
from refalign.pipeline.outcomes import Outcome, count_outcomes
from refalign.pipeline.steps import Step


def make_config():
    config = toy()
    settings = {"max_video_bytes": 2**30, "videos_per_part": 1000, "max_quarantine_fraction": 1.0}
    return config.model_copy(update={"curation": config.curation.model_copy(update=settings)})


def curate(actor, where, output, *, level="video"):
    """The outcomes of one level (None: of all) and the rows of an input."""
    config = make_config()
    plan, planned, _ = plan_subjects(config, where)
    step = Step.make(output, "subjects", str(where))
    outcomes, rows = list(planned), []
    for name, work in plan.items():
        record = actor.make_part(step, name, json.loads(json.dumps(work)))
        outcomes += [Outcome(**outcome) for outcome in record["outcomes"]]
        rows += pq.read_table(step.parts_folder / name).to_pylist()
    videos = [outcome for outcome in outcomes if outcome.level == "video"]
    assert len(videos) == len(planned) + sum(map(len, plan.values())), "planned = written + filtered + quarantined"
    for count in count_outcomes(outcomes).values():
        assert count["planned"] == count["written"] + sum(count["filtered"].values()) + sum(count["quarantined"].values())
    return [outcome for outcome in outcomes if level in (None, outcome.level)], rows
