"""The rows of real actors on drawn videos: every score is there, every crop is embedded once, limits are in the right step."""

from contextlib import ExitStack

import numpy as np
import pyarrow.parquet as pq
import pytest

from refalign.config import apply_overrides
from refalign.config.presets import toy
from refalign.pipeline.steps import Step
from refalign.run import Loop
from refalign.stages import Pairs, Subjects
from refalign.stages.subjects import SubjectsWorker, list_input
from refalign.toy.videos import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "videos"
    write_world(folder, num_videos=3, seed=5, split="heldout")
    return folder


class StubCaptioner:
    name = "stub@0123"

    def __init__(self):
        self.shapes = []

    def caption(self, frames, prompt, max_tokens):
        self.shapes.append(frames.shape)
        return "a creature walks"


def test_rows_hold_every_score_and_every_crop_is_embedded_once(world, tmp_path):
    config = apply_overrides(toy(), ["curation.caption=all", "models.captioner=org/name"])
    plan, _, _ = list_input(config, world)
    (name, work), *_ = plan.items()
    actor = SubjectsWorker(config)
    actor.captioner = StubCaptioner()
    embedded = []
    embed = actor.encoder.embed
    actor.encoder.embed = lambda images: embedded.append(len(images)) or embed(images)
    step = Step.make(tmp_path, "subjects", 0)
    record = actor.make_part(step, name, work)
    rows = pq.read_table(step.parts_folder / name).to_pylist()
    assert len(rows) == record["clips"] >= 2
    assert record["crops"] == record["embeddings"] == sum(embedded) == record["subjects"]
    assert record["subjects"] == sum(len(row["subjects"]) for row in rows)
    for row in rows:
        assert row["sharpness"] > 100 and 0.1 < row["exposure"] < 0.95 and 0 <= row["clipped_fraction"] < 0.5
        assert 0 < row["motion"] < 0.1, "creatures move, less than a tenth of the picture a frame"
        assert np.isnan([row["text_image_score"], row["aesthetic_score"]]).all(), "no such model is set"
        assert (row["caption"], row["caption_source"]) == ("a creature walks", "model:stub@0123")
    assert len({row["phash"] for row in rows}) == len(rows)
    video = config.video
    assert set(actor.captioner.shapes) == {(config.curation.detection_frames, video.height_px, video.width_px, 3)}


def make_fingerprints(world, tmp_path, *settings):
    config = apply_overrides(toy(), [f"input.path={world}", *settings])
    loop = Loop(config, tmp_path, ExitStack())
    return {stage.name: loop.make_step(stage).fingerprint for stage in (Subjects(), Pairs())}


def test_a_limit_redoes_pairs_and_not_subjects(world, tmp_path):
    """What is decoded is decoded once: thresholds apply to columns."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"one")
    plain = make_fingerprints(world, tmp_path)
    limits = ["quality.min_sharpness=10", "quality.max_phash_distance=3", f"quality.evaluation_references={pictures}"]
    seen = {plain["pairs"]}
    for limit in limits:
        changed = make_fingerprints(world, tmp_path, limit)
        assert changed["subjects"] == plain["subjects"] and changed["pairs"] not in seen
        seen.add(changed["pairs"])
    (pictures / "a.png").write_bytes(b"two")
    assert make_fingerprints(world, tmp_path, limits[2])["pairs"] not in seen, "another picture of the same name"
    for setting in ("curation.crop=box", 'curation.classes=["creature"]', "models.text_image=org/name"):
        assert make_fingerprints(world, tmp_path, setting)["subjects"] != plain["subjects"]
    assert make_fingerprints(world, tmp_path, "models.captioner=org/name")["subjects"] == plain["subjects"], "not used"
