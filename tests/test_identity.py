"""What a file is, is told by samples of its content; where they miss a change, its time tells that a fault may have passed."""

import struct

import pytest

from refalign.io import storage
from refalign.stages.subjects import list_input
from refalign.toy.videos import write_world
from tests.curating_here import curate_here, here, make_config  # noqa: F401
from tests.test_retries import digest, stamps

pytestmark = pytest.mark.usefixtures("here")
CONFIG = make_config("pairs.validation_fraction=0", "curation.max_quarantine_fraction=1")


@pytest.fixture()
def folder(tmp_path):
    write_world(tmp_path / "in", num_videos=6, seed=3, split="heldout")
    return tmp_path / "in"


def test_identity_samples_the_middle(tmp_path):
    head, tail = b"h" * 2**20, b"t" * 2**20
    one, two, three = (tmp_path / name for name in ("one.mp4", "two.mp4", "three.mp4"))
    one.write_bytes(head + b"a" * 2**22 + tail)
    two.write_bytes(head + b"b" * 2**22 + tail)
    three.write_bytes(head + bytes(2**22) + tail)
    assert len({storage.digest_sampled(str(path)) for path in (one, two, three)}) == 3
    plan, planned, _ = list_input(CONFIG, tmp_path)
    assert len([work for part in plan.values() for work in part]) == 3 and not planned
    for size in (0, 1, 2**20, 2**21 - 1, 2**21):
        one.write_bytes(b"x" * size)
        two.write_bytes(b"x" * size)
        three.write_bytes(b"x" * max(size - 1, 0) + b"y")
        ids = [storage.digest_sampled(str(path)) for path in (one, two, three)]
        assert ids[0] == ids[1] != ids[2], size


def test_identity_a_completed_download_is_tried_again(folder, tmp_path):
    """The hole lies where no sample does, so that the id stays; the time of change tells that the file is another."""
    video = sorted(folder.glob("*.mp4"))[0]
    whole = pad(video.read_bytes())
    start, length = find_hole(whole)
    video.write_bytes(whole[:start] + bytes(length) + whole[start + length :])
    name = video.name
    holed, first = storage.digest_sampled(str(video)), curate_here(CONFIG, folder, tmp_path / "out")
    reasons = {each["item"]: each["reason"] for each in (first["subjects"].load_manifest() or {})["outcomes"]}
    assert reasons[name] in ("TRUNCATED", "UNREADABLE", "NO_FRAMES"), reasons
    unchanged = stamps(first["subjects"])
    assert stamps(curate_here(CONFIG, folder, tmp_path / "out")["subjects"]) == unchanged, (
        "a file that is as it was is left alone"
    )
    video.write_bytes(whole)
    assert storage.digest_sampled(str(video)) == holed
    second = curate_here(CONFIG, folder, tmp_path / "out")
    assert second["subjects"].folder == first["subjects"].folder
    assert (second["subjects"].load_manifest() or {})["counts"]["video"]["written"] == 6
    assert digest(second) == digest(curate_here(CONFIG, folder, tmp_path / "fresh"))


def pad(data):
    """The mp4 with padding before and behind its pictures, so that they lie between the sampled parts."""
    start = data.index(b"ftyp") - 4
    size = struct.unpack(">I", data[start : start + 4])[0]
    free = [struct.pack(">I4s", length, b"free").ljust(length, b"p") for length in (11 * 2**18, 3 * 2**20)]
    at = data.index(b"stco") + 8  # offsets of the pictures in the file
    (count,) = struct.unpack_from(">I", data, at)
    offsets = struct.unpack_from(f">{count}I", data, at + 4)
    moved = struct.pack(f">{count}I", *(offset + len(free[0]) for offset in offsets))
    data = data[: at + 4] + moved + data[at + 4 + len(moved) :]
    return data[: start + size] + free[0] + data[start + size :] + free[1]


def find_hole(whole):
    """First byte and length of the most part of the pictures."""
    return whole.index(b"mdat") + 4, 4000
