"""A clip's scene as a reference: which frame, what is cut out, and its way to the shards."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from refalign.config import apply_overrides
from refalign.config.presets import toy
from refalign.curation.shots import Window
from refalign.curation.subjects import Candidate, find_scene, make_subject_row
from refalign.errors import ConfigError
from refalign.io.looks import Look
from refalign.io.tables import is_scene
from refalign.shards.reader import ShardIndex
from refalign.toy.videos import write_world
from tests.curating_here import curate_here, here, make_config  # noqa: F401
from tests.test_takedown import rows_of

SIZE = 100
LOOK = Look(0, SIZE, SIZE, 1.0, 0, False, "sdr", "bt709", False, False)
ON = "curation.scene_references=true"


def make_candidate(box, *, track=0, frame=0):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Candidate(track, "thing", frame, box, mask, 0.9, 1.0)


def make_scene(*candidates, crop=(0, 0, SIZE, SIZE), frames=3):
    texture = 3 * (np.indices((SIZE, SIZE)).sum(0) % 2)[..., None]  # a picture of one colour is no reference
    pixels = [(10 * number + texture).repeat(3, 2).astype(np.uint8) for number in range(frames)]
    window = Window(0, (SIZE, SIZE), LOOK, pixels, [2 * number for number in range(frames)])
    config = apply_overrides(toy(), [ON, "video.height_px=96", "video.width_px=96"])
    scene = find_scene(candidates, window, crop, config.curation)
    return scene and make_subject_row("clip-scene", scene, window, crop, config)


def open_crop(row) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row.crop_png)))


def frames_of(row) -> set[int]:
    """The numbers of the frames that are shown, by their grey level."""
    picture = open_crop(row)
    return set((picture[picture[..., 3] == 255][:, :3] / 10).round().astype(int).flatten().tolist())


def test_subjects_are_cut_out_with_a_margin():
    row = make_scene(make_candidate((20, 20, 60, 60), frame=1))
    picture = open_crop(row)
    assert picture.shape == (96, 96, 4) and frames_of(row) == {1} and row.frame_time_s == 2 / 16
    hidden = np.asarray(Image.fromarray(picture[..., 3] == 0).resize((SIZE, SIZE)))
    assert hidden[21:59, 21:59].all() and 38 * 38 < hidden.sum() < 46 * 46  # within a pixel of the frame, which was scaled twice
    assert row.score == pytest.approx(1 - 42 * 42 / SIZE**2, abs=0.005) and row.box_xyxy_px == (0, 0, SIZE, SIZE)


def test_a_frame_in_which_a_subject_was_missed_is_not_taken():
    both = [make_candidate((0, 0, 50, 50), track=0), make_candidate((60, 60, 90, 90), track=1)]
    missed = make_candidate((0, 0, 10, 10), track=0, frame=1)
    smaller = [make_candidate((0, 0, 40, 40), track=0, frame=2), make_candidate((60, 60, 90, 90), track=1, frame=2)]
    assert frames_of(make_scene(*both, missed)) == {0}
    assert frames_of(make_scene(*both, missed, *smaller)) == {2}


def test_what_fills_the_frame_is_the_scene_and_what_hides_it_leaves_none():
    park = make_candidate((0, 0, 99, 99), track=1)
    row = make_scene(make_candidate((20, 20, 60, 60)), park)
    assert row is not None and row.score > 0.8
    assert make_scene(make_candidate((0, 0, 90, 80))) is None
    assert make_scene(park) is None and make_scene() is None
    assert make_scene(make_candidate((0, 0, 70, 70)), crop=(10, 10, 70, 70)) is None, "within the crop all is hidden"


def test_a_scene_needs_a_place_beside_a_subject():
    with pytest.raises(ConfigError, match=r"scene_references=true takes the one place of curation\.max_references=1"):
        apply_overrides(toy(), [ON, "curation.max_references=1"])


def test_scenes_reach_the_shards_upright_and_are_paired_with_scenes_alone(here, tmp_path):  # noqa: F811
    write_world(tmp_path / "videos", num_videos=6, seed=3, split="heldout")
    settings = (ON, "curation.max_references=2", "shards.augmented_references=2", "pairs.min_similarity=0.5")
    steps = curate_here(make_config(*settings, "pairs.validation_fraction=0"), tmp_path / "videos", tmp_path / "out")
    rows = rows_of(steps["subjects"])
    scenes = [subject for row in rows for subject in row["subjects"] if is_scene(subject["subject_id"])]
    assert len(scenes) == len(rows) > 4 and all(len(row["subjects"]) == 2 for row in rows), "one subject and the scene"
    pairs = rows_of(steps["pairs"])
    kinds = Counter((is_scene(pair["subject_id"]), is_scene(pair["reference_subject_id"])) for pair in pairs)
    assert set(kinds) == {(False, False), (True, True)}
    index = ShardIndex.open(steps["shards"].folder, "train")
    for sample in index.read_many(range(len(index))):
        references = sample.info["references"]
        own = [each for each in references if each["kind"] == "in_pair"]
        assert [each["subject_index"] for each in own] == [0, 0, 1], "two augmented views of the subject, the scene as it is"
        assert all(("variant" in each) != is_scene(each["subject_id"]) for each in references)
        number = references.index(own[-1])
        assert 0.4 < sample.tensors["foreground"][number].float().mean() < 1 and (sample.tensors["content"][number] == 1).all()
