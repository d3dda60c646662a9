"""Files of the toy world: byte for byte the same, with ground truth that fits what a decoder sees."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest

from refalign.errors import ConfigError
from refalign.toy.identities import Attributes, identity_of
from refalign.toy.rendering import boxes_of, render_scenes
from refalign.toy.scenes import make_caption
from refalign.toy.videos import VIDEOS_PER_CHANNEL, plan_world, write_world

NUM_VIDEOS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_videos=NUM_VIDEOS, seed=5)
    return folder


def read(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    write_world(tmp_path, num_videos=NUM_VIDEOS, seed=5)
    assert plan_world(NUM_VIDEOS, seed=5) != plan_world(NUM_VIDEOS, seed=6)
    names = sorted(path.name for path in world.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir()) and len(names) == 2 * NUM_VIDEOS
    assert all((world / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_a_longer_world_begins_with_the_shorter():
    assert plan_world(20, seed=5)[:8] == plan_world(8, seed=5)


def test_the_sidecar_says_what_a_source_must(world):
    for sidecar in read(world).values():
        assert set(sidecar) == {"caption", "shots", "license", "consent", "source_group", "ground_truth"}
        assert sidecar["license"] == "CC0-1.0" and sidecar["consent"] == "synthetic" and sidecar["caption"].endswith(".")


def test_the_sidecar_is_the_truth_of_what_was_rendered_and_the_video_shows_it(world):
    for plan in plan_world(NUM_VIDEOS, seed=5):
        sidecar, frames = read(world)[plan.name], decode(world / f"{plan.name}.mp4")
        truth, shots = sidecar["ground_truth"], render_scenes(plan.shots)
        assert sidecar["caption"] == " ".join(shot["caption"] for shot in truth["shots"])
        assert [shot["caption"] for shot in sidecar["shots"]] == [make_caption(shot) for shot in plan.shots]
        drawn = np.concatenate([shot.frames for shot in shots])
        assert frames.shape == drawn.shape == (len(frames), truth["height_px"], truth["width_px"], 3)
        assert np.square(frames.astype(float) - drawn).mean() < 20**2, "colours at half the resolution cost a little"
        for shot, told in zip(shots, truth["shots"], strict=True):
            for number, subject in enumerate(told["subjects"]):
                np.testing.assert_array_equal(boxes_of(shot.masks[number]), subject["boxes_xyxy_px"])
                assert identity_of(Attributes(**subject["attributes"])) == subject["identity"]
                assert subject["phrase"].split(" ", 1)[1] in told["caption"]


def test_identities_recur_within_a_channel_and_never_across():
    channels, appearances = defaultdict(set), defaultdict(Counter)
    for plan in plan_world(10 * VIDEOS_PER_CHANNEL, seed=2):
        seen = {subject.identity for shot in plan.shots for subject in shot.subjects}
        channels[plan.source_group] |= seen
        appearances[plan.source_group].update(seen)
    assert len(channels) == 10
    for group, cast in channels.items():
        assert 3 <= len(cast) <= 4
        assert sum(count >= 2 for count in appearances[group].values()) >= 3, "most of a cast must be found in several videos"
        assert all(not cast & other for name, other in channels.items() if name != group)


def test_one_video_in_six_has_a_cut():
    shots = [len(plan.shots) for plan in plan_world(240, seed=4)]
    assert set(shots) == {1, 2} and 25 <= shots.count(2) <= 58
    assert all(len({shot.place for shot in plan.shots}) == len(plan.shots) for plan in plan_world(240, seed=4))


def test_an_empty_world_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_videos = 0"):
        write_world(tmp_path, num_videos=0, seed=1)
