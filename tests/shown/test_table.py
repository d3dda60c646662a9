"""Odd files as phones, cameras, recorders and scrapers make them, each curated by real actors, and its right outcome."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from refalign.evaluation.report.curation import make_curation_report
from refalign.pipeline.steps import Step
from refalign.stages.subjects import Subjects, SubjectsWorker, describe_subjects, list_input
from refalign.toy.videos import write_world
from tests.curation.bad_files import read_frames
from tests.curation.curating import curate, make_config
from tests.shown.making import SDR, WIDE, encode_pq, joined, pack_fields, with_cover, write
from tests.shown.test_kinds import damage, lose

MIRROR = (-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
QUARTER = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
TILTED = (46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Three drawn videos of 27 frames: to their end, back and again."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_videos=3, seed=5, split="heldout")
    frames = [read_frames(path) for path in sorted(folder.glob("*.mp4"))]
    return [np.concatenate([each, each[::-1], each]) for each in frames]


def make_table(folder, parts):
    """Name to (clips or the reason, what is unusual), for files that are written to ``folder``."""
    one, two, three = parts
    long = np.concatenate([one, one[::-1]])
    clear = np.full((*one.shape[:3], 1), 255, np.uint8)
    clear[:, :, -16:] = 0
    wide = np.repeat(np.repeat(one[:12], 16, axis=1), 16, axis=2)
    joined(folder / "joined.ts", parts, kind="mpegts", b_frames=0)
    write(folder / "gap300.mkv", long, pts=[*range(27), *range(4827, 4854)])
    (folder / "rescale.ts").write_bytes(
        write(folder / "rescale.ts", one, kind="mpegts", b_frames=0).read_bytes()
        + write(folder / "b.ts", two.repeat(2, axis=2), kind="mpegts", pts=np.arange(27, 54), b_frames=0).read_bytes()
    )
    (folder / "b.ts").unlink()
    write(folder / "skip.avi", long, codec="mpeg4", rate=32, pts=2 * np.arange(54) + (np.arange(54) > 20))
    (folder / "whole.ogv").write_bytes(Path(__file__).with_name("duplicates.ogv").read_bytes())
    with_cover(folder / "cover_first.mp4", one, one[0])
    write(folder / "hflip.mp4", one[:, :, ::-1], matrix=MIRROR)
    write(folder / "rotated.mp4", np.rot90(one, 1, axes=(1, 2)), matrix=QUARTER)
    write(folder / "tilted.mp4", one, matrix=TILTED)
    write(folder / "sar2.mp4", one[:, :, ::2], aspect="2/1")
    bright = encode_pq(100 * (one / 255) ** 2.4)
    write(
        folder / "hdrpq.mp4", bright, codec="libx265", pix_fmt="yuv420p10le", tags={**WIDE, "color_trc": 16}, colorspace="BT2020"
    )
    write(folder / "alpha.webm", np.concatenate([one, clear], axis=3), codec="libvpx-vp9", pix_fmt="yuva420p")
    write(folder / "interlaced.mp4", pack_fields(long), options={"x264-params": "bff=1"})
    damage(write(folder / "damaged.mp4", long, gop=18, options={"x264-params": "scenecut=0"}))
    lose(write(folder / "lossy.ts", np.concatenate([long, long]), kind="mpegts", gop=12))
    write(folder / "hd_untagged_709.mp4", wide, colorspace="ITU709")
    write(folder / "hd_tagged_709.mp4", wide, tags=SDR, colorspace="ITU709")
    return {
        "joined.ts": (3, {"step back", "broken frames"}),
        "gap300.mkv": (4, {"gap"}),
        "rescale.ts": (4, {"new picture", "broken frames"}),
        "skip.avi": (4, set()),
        "whole.ogv": (2, set()),
        "cover_first.mp4": (3, {"not the first stream"}),
        "hflip.mp4": (3, {"mirrored"}),
        "rotated.mp4": (3, {"rotated"}),
        "tilted.mp4": ("UNSUPPORTED_PICTURE", set()),
        "sar2.mp4": (3, {"pixels not square"}),
        "hdrpq.mp4": (3, {"HDR"}),
        "alpha.webm": (3, {"transparent"}),
        "interlaced.mp4": (3, {"interlaced"}),
        "damaged.mp4": (2, {"broken frames"}),
        "lossy.ts": (4, {"broken frames"}),
        "hd_untagged_709.mp4": (1, set()),
        "hd_tagged_709.mp4": (1, set()),
    }


@pytest.fixture(scope="module")
def curated(parts, tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    (root / "in").mkdir()
    table = make_table(root / "in", parts)
    actor = SubjectsWorker(make_config())
    seen = {}
    curate_video = actor.curate_video

    def watch(source, *arguments):
        before = Counter(actor.tally.unusual)
        made = curate_video(source, *arguments)
        seen[source.name] = set(actor.tally.unusual - before)
        return made

    actor.curate_video = watch
    outcomes, rows = curate(actor, root / "in", root, level=None)
    return {"root": root, "table": table, "outcomes": outcomes, "rows": rows, "unusual": seen}


def test_each_odd_file_has_its_right_outcome(curated):
    clips = Counter(outcome.item.partition("-")[0] for outcome in curated["outcomes"] if outcome.level == "clip")
    plan, _, _ = list_input(make_config(), curated["root"] / "in")
    ids = {work.source.name: work.video_id for part in plan.values() for work in part}
    videos = {outcome.item: outcome for outcome in curated["outcomes"] if outcome.level == "video"}
    got = {name: clips[ids[name]] if outcome.reason in ("", "NO_SUBJECT") else outcome.reason for name, outcome in videos.items()}
    messages = {name: outcome.message for name, outcome in videos.items() if outcome.reason}
    assert got == {name: clips_or_reason for name, (clips_or_reason, _) in curated["table"].items()}, messages
    assert {name: kinds for name, kinds in curated["unusual"].items() if kinds} == {
        name: kinds for name, (_, kinds) in curated["table"].items() if kinds
    }


def test_rows_hold_what_was_read_of_the_file(curated):
    looks = {row["video_path"].rpartition("/")[2]: row["look"] for row in curated["rows"]}
    plain = {"stream": 0, "pixel_aspect": 1.0, "rotation_deg": 0, "mirrored": False, "transfer": "sdr", "primaries": "bt709"}
    plain |= {"interlaced": False, "alpha": False, "width_px": 80, "height_px": 48}
    assert looks["gap300.mkv"] == plain
    assert looks["hflip.mp4"] == plain | {"mirrored": True}
    assert looks["rotated.mp4"] == plain | {"rotation_deg": 270, "width_px": 48, "height_px": 80}
    assert looks["sar2.mp4"] == plain | {"pixel_aspect": 2.0, "width_px": 40}
    assert looks["cover_first.mp4"] == plain | {"stream": 1}
    assert looks["alpha.webm"] == plain | {"alpha": True}
    assert looks["interlaced.mp4"] == plain | {"interlaced": True}


def test_the_same_pictures_give_the_same_scores(curated):
    """Mirrored, turned, squeezed or beside a cover, a video shows what the plain one shows."""
    scores = {}
    for row in curated["rows"]:
        scores.setdefault(row["video_path"].rpartition("/")[2], row["exposure"])
    assert scores["hdrpq.mp4"] == pytest.approx(scores["gap300.mkv"], abs=0.05), "save that white is compressed"
    for name in ("hflip.mp4", "rotated.mp4", "sar2.mp4", "cover_first.mp4"):
        assert scores[name] == pytest.approx(scores["gap300.mkv"], abs=0.01), name
    assert scores["hd_untagged_709.mp4"] == pytest.approx(scores["hd_tagged_709.mp4"], abs=0.002)


def test_counts_say_what_was_unusual(curated):
    wanted = Counter(kind for _, kinds in curated["table"].values() for kind in kinds)
    config = make_config()
    plan, planned, _ = list_input(config, curated["root"] / "in")
    step = Step.make(curated["root"], "subjects", str(curated["root"] / "in"))
    described = describe_subjects(list(plan), [step.load_part(name) for name in plan], planned, set())
    assert described.unusual == dict(sorted(wanted.items()))
    line = Subjects().describe(described)
    assert f"; unusual videos: {', '.join(f'{n} {kind}' for kind, n in sorted(wanted.items()))};" in line
    manifest = step.commit(described.model_dump(mode="json"))
    page = make_curation_report({"unusual": manifest["unusual"]}, output=curated["root"], steps={"subjects": step}).read_text()
    assert "Unusual videos" in page and "pixels not square" in page
