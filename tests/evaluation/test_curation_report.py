"""The curation report: counts, reasons, scores and pictures; nothing from a caption or a message becomes markup."""

import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
from make_run import make_subjects

from refalign.evaluation.report.charts import ACCENT, draw_histogram
from refalign.evaluation.report.curation import FILE_NAME, make_curation_report
from refalign.io.tables import PAIR_SCHEMA
from refalign.pipeline.steps import Step

HOSTILE = "<script>alert(1)</script>"


def make_pairs(output):
    step = Step.make(output, "pairs")
    pair = {"clip_id": "a", "subject_id": "a-s0", "reference_clip_id": "b", "reference_subject_id": "b-s0", "similarity": 0.93}

    def write(path):
        pq.write_table(pa.Table.from_pylist([pair], schema=PAIR_SCHEMA), path)
        return {}

    step.write_part("pairs-000000.parquet", write)
    step.commit({"parts": ["pairs-000000.parquet"]})
    return step


def make_page(output):
    steps = {"subjects": make_subjects(output, ["a", "b", "c"]), "pairs": make_pairs(output)}
    outcomes = [{"reason": "TRUNCATED", "item": f"v{n}.mp4", "message": f"v{n}.mp4: {HOSTILE}"} for n in range(5)]
    summary = {
        "videos": 8,
        "clips": 3,
        "counts": {"subjects.video": {"planned": 8, "written": 3, "filtered": {}, "quarantined": {"TRUNCATED": 5}}},
        "quarantined": {"TRUNCATED": 5},
        "outcomes": outcomes,
    }
    path = make_curation_report(summary, output=output, steps=steps)
    assert path == output / FILE_NAME
    return path.read_text()


def test_everything_a_person_wants_to_see_is_there(tmp_path):
    page = make_page(tmp_path)
    for title in ("Data flow", "Reasons", "Licences and consent", "Scores", "Subjects", "Pairs"):
        assert f"<h2>{title}" in page, title
    assert page.count("score 0.90") == 3 and "similarity 0.930" in page
    assert "clip: motion" in page and "pair: similarity" in page
    assert "text image score" not in page, "a score that was computed for no clip has no histogram"


def test_hostile_messages_stay_texts_and_nothing_can_run(tmp_path):
    page = make_page(tmp_path)
    assert HOSTILE not in page and "&lt;script&gt;alert(1)" in page
    assert "script-src 'none'" in page and "<script" not in page


def test_without_a_finished_subjects_step_there_is_no_report(tmp_path):
    assert make_curation_report({}, output=tmp_path, steps={"subjects": Step.make(tmp_path, "subjects")}) is None
    assert not (tmp_path / FILE_NAME).exists()


def test_histograms_survive_outliers_and_missing_values():
    def measure(values, **settings):
        """Heights of the bars."""
        svg = draw_histogram("x", values, **settings).svg
        bars = re.findall(rf'd="([^"]*)" style="fill: {ACCENT}"', svg)
        ends = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar)] for bar in bars]
        return [max(each) - min(each) for each in ends]

    heights = measure([*range(1000), 1e9, math.nan, math.inf], bins=10)
    assert len(heights) == 10
    assert min(heights) > 0.8 * max(heights), "the outlier does not squeeze the rest into one bar"
    assert draw_histogram("x", [math.nan]) is None
    assert len(measure([3.0, 3.0])) == 24
