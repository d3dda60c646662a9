"""A finished run with a summary, all of whose texts try to become markup."""

from make_run import make_evaluate, make_shards, make_subjects, make_train

from refalign.config.presets import toy
from refalign.pipeline.steps import Step

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


_ATTRIBUTES = {HOSTILE: {"wanted": HOSTILE, "shown": HOSTILE}, "pattern": {"wanted": HOSTILE, "shown": f"not {HOSTILE}"}}
VERDICT = [{"name": HOSTILE, "attributes": _ATTRIBUTES}]


def make_finished_run(output, verdict=VERDICT):
    """Folder, steps and summary."""
    made = (
        make_subjects(output, ["a", "b"], caption=HOSTILE),
        make_shards(output, {"train": ["a"], "validation": ["b"]}, caption=HOSTILE),
        make_train(output),
        make_evaluate(output, prompt=HOSTILE, class_name=HOSTILE, verdict=verdict),
    )
    steps = {step.name: step for step in made}
    for name in ("pairs", "register"):
        steps[name] = Step.make(output, name, 0)
        steps[name].commit({})
    level = {"planned": 3, "written": 1, "filtered": {"TOO_SHORT": 1}, "quarantined": {HOSTILE: 1}}
    summary = {
        "story": "0123456789ab", "output": str(output), "config": toy().model_dump(mode="json"),
        "videos": 3, "clips": 2, "subjects": 2,
        "references": 2, "pairs": 0, "samples": {"train": 1, "validation": 1}, "digest": "d" * 16,
        "counts": {"subjects.video": level},
        "filtered": level["filtered"], "quarantined": level["quarantined"], "seconds": {"start-up": 20.0, "train": 60.0},
        "outcomes": [{"level": "video", "item": HOSTILE, "reason": "UNREADABLE", "message": HOSTILE}],
        "train": steps["train"].load_manifest(), "evaluation": steps["evaluate"].load_manifest(), "untrained": HOSTILE,
        "model": {
            "name": "refalign", "version": "1", "alias": "challenger", "uri": "models:/refalign@challenger", "card": HOSTILE,
            "licenses": {HOSTILE: 2}, "example": {"prompt": HOSTILE, "references": ["it's.png"]}, "tracking_uri": "sqlite:///db",
        },
    }  # fmt: skip
    return output, steps, summary
