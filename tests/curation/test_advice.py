"""What a run without a clip says, by what has happened."""

import pytest

from refalign.config import apply_overrides
from refalign.config.presets import toy
from refalign.pipeline.outcomes import Outcome
from refalign.stages.subjects import describe_subjects, explain_no_clip


def explain(outcomes, *settings, needs_detector=True):
    manifest = describe_subjects([], [], outcomes, set())
    return explain_no_clip(manifest, apply_overrides(toy(), settings), needs_detector=needs_detector)


UNSEEN = [Outcome("video", "a.mp4", "TRUNCATED", "a.mp4: cut"), Outcome("video", "b.md", "NOT_A_VIDEO", "b.md: text")]
SEEN = [Outcome("video", "c.mp4", "NO_SUBJECT", "c.mp4: none"), Outcome("clip", "c-0", "NO_SUBJECT", "c.mp4 at 0.00 s: none")]


@pytest.mark.parametrize("settings", [[], ["models.detector=yolo11n-seg.pt"]])
def test_advice_where_nothing_was_looked_at_no_detector_is_blamed(settings):
    said = explain(UNSEEN, *settings)
    assert "no clip in 2 files (TRUNCATED 1, NOT_A_VIDEO 1)" in said and "detector" not in said


def test_advice_on_the_embedded_detector_is_for_it_alone(tmp_path):
    assert "no subject in 1 clips of 3 files: the embedded detector knows only" in explain([*UNSEEN, *SEEN])
    own = tmp_path / "weights" / "detector"
    said = explain(SEEN, f"models.detector={own}", "curation.min_confidence=0.7")
    assert "knows only" not in said and f"{own} found none above curation.min_confidence=0.7" in said


def test_advice_on_annotations_names_their_limits():
    said = explain(SEEN, needs_detector=False)
    assert "curation.min_aesthetic" in said and "detector" not in said
