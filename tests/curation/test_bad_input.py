"""Each kind of bad input ends with its named reason, costs nothing but itself, and is counted.

`bad_files` makes the kinds. What only looks odd (a rotated video, a name with a newline) must be used.
"""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refalign.config import InputConfig
from refalign.curation.sources import SourceVideo, list_sources
from refalign.errors import ConfigError
from refalign.io.storage import show_name
from refalign.pipeline.outcomes import Outcome
from refalign.stages.subjects import SubjectsWorker, list_input
from tests.curation.bad_files import SIDECARS, make_entries, make_files, read_frames, vary
from tests.curation.curating import curate, make_config


@pytest.fixture(scope="module")
def actor():
    return SubjectsWorker(make_config())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two good videos."""
    from refalign.toy.videos import write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_videos=2, seed=5, split="heldout")
    return sorted(folder.glob("*.mp4"))


def list_everything(folder):
    """All that lies in a folder, with its size and time of change."""
    found = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in found]


@pytest.fixture(scope="module")
def batch(actor, world, tmp_path_factory):
    """All kinds in one folder between the good videos, curated at once."""
    root = tmp_path_factory.mktemp("batch")
    folder = root / "in"
    folder.mkdir()
    for number, path in enumerate(world):
        (folder / f"good-{number}.mp4").write_bytes(path.read_bytes())
    frames = read_frames(world[0])
    kinds = {show_name(name): reason for name, (_, reason) in make_files(world[0], frames).items()} | {".kept": "HIDDEN"}
    for name, (make, _) in make_files(world[0], frames).items():
        (folder / name).parent.mkdir(exist_ok=True)
        make(folder / name)
    for name, content in SIDECARS.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".mp4").write_bytes(vary(world[0].read_bytes(), name))
        kinds[f"{Path(name).stem}.mp4"] = "BAD_SIDECAR"
    before = list_everything(root), sorted(Path(tempfile.gettempdir()).glob("refalign-*.mp4"))
    videos, rows = curate(actor, folder, tmp_path_factory.mktemp("out"))
    after = list_everything(root), sorted(Path(tempfile.gettempdir()).glob("refalign-*.mp4"))
    return {"kinds": kinds, "videos": videos, "rows": rows, "before": before, "after": after}


def test_every_kind_of_file_ends_as_its_table_says(batch):
    got = {video.item: video.reason for video in batch["videos"]}
    wrong = {name: (got.get(name, "not planned"), want) for name, want in batch["kinds"].items() if got.get(name) != want}
    messages = {video.item: video.message for video in batch["videos"] if video.item in wrong}
    assert not wrong, f"(got, want) by file: {wrong}\n{messages}"
    assert len(batch["kinds"]) >= 55
    assert set(got) == {*batch["kinds"], "good-0.mp4", "good-1.mp4"}, "each file once, and nothing else"
    assert max(Counter(video.item for video in batch["videos"]).values()) == 1


def test_the_rest_of_the_batch_is_unaffected(batch, actor, world, tmp_path):
    for number, path in enumerate(world):
        (tmp_path / f"good-{number}.mp4").write_bytes(path.read_bytes())
    _, alone = curate(actor, tmp_path, tmp_path / "out")
    ids = {row["video_id"] for row in alone}
    within = [row for row in batch["rows"] if row["video_id"] in ids]
    assert repr([{**row, "video_path": ""} for row in within]) == repr([{**row, "video_path": ""} for row in alone])
    assert len(ids) == 2


def test_nothing_is_written_beside_the_output(batch):
    assert batch["before"] == batch["after"]


def test_messages_say_what_and_where(batch):
    for video in batch["videos"]:
        if video.reason:
            assert video.message and video.reason.isupper() and len(video.message) < 1000, video
            assert Path(video.item).stem in video.message, f"{video.message!r} does not name {video.item!r}"
    assert not [video.message for video in batch["videos"] if video.reason == "CRASH"]


def make_entry():
    """An OpenS2V entry over an 80 x 48 video, with one subject in a rectangle."""
    from pycocotools import mask as coco

    pixels = np.zeros((48, 80), np.uint8, order="F")
    pixels[10:40, 20:50] = 1
    counts = coco.encode(pixels)["counts"].decode()
    found = {"class_name": "creature", "bbox": [20.0, 10.0, 50.0, 40.0], "gme_score": 0.9, "aes_score": 5.0}
    return {
        "metadata": {"cut": [0, 9], "crop": [0, 80, 0, 48], "path": "<own>", "cap": ["a creature"], "fps": 16.0},
        "word_tags": {"background": []},
        "annotation": {
            "ann_frame_data": {"ann_frame_idx": 0, "annotations": [found]},
            "mask_map": {"1": {"class_name": "creature"}},
            "mask_annotation": {"0": {"1": {"size": [48, 80], "counts": counts, "score": 0.9}}},
        },
    }


@pytest.fixture(scope="module")
def annotated(actor, world, tmp_path_factory):
    """All kinds of annotation entries in one file."""
    root = tmp_path_factory.mktemp("annotated")
    folder = root / "in"
    folder.mkdir()
    data = world[0].read_bytes()
    (root / "secret.mp4").write_bytes(data)
    (folder / "out.mp4").symlink_to(root / "secret.mp4")
    entries = make_entries(make_entry())
    texts = []
    for name, (entry, _) in entries.items():
        (folder / f"{name}.mp4").write_bytes(vary(data, name))
        texts.append(f"{json.dumps(name)}: {json.dumps(entry)}".replace("<own>", f"{name}.mp4").replace("Infinity", "1e999"))
    texts.append('"deep": {"metadata": {"cut": [0, 9]}, "x": ' + "[" * 10**6 + "]" * 10**6 + "}")
    texts.append(texts[0])
    texts.append(texts[0].replace('"fine"', '"caf\\u00e9 \\ud83d"', 1))
    (folder / "annotations.json").write_text("{" + ", ".join(texts) + "}")
    wanted = Counter((name, reason) for name, (_, reason) in entries.items())
    wanted.update([("deep", "BAD_ANNOTATION"), ("fine", "DUPLICATE"), ("café \\ud83d", "BAD_ANNOTATION")])
    own = {name for name, (entry, _) in entries.items() if entry and entry["metadata"]["path"] == "<own>"}
    wanted.update((f"{name}.mp4", "NOT_ANNOTATED") for name in [*(entries.keys() - own), "out"])
    videos, rows = curate(actor, folder, tmp_path_factory.mktemp("out"))
    return {"wanted": wanted, "videos": videos, "rows": rows}


def test_every_kind_of_annotation_ends_as_its_table_says(annotated):
    got = Counter((video.item, video.reason) for video in annotated["videos"])
    messages = {video.item: video.message for video in annotated["videos"]}
    wrong = {key: messages.get(key[0], "") for key in (got - annotated["wanted"]) | (annotated["wanted"] - got)}
    assert not wrong, wrong
    (row,) = annotated["rows"]
    assert [subject["class_name"] for subject in row["subjects"]] == ["creature"] and row["caption"] == "a creature"
    assert row["license"] == "Apache-2.0 (annotation)"


def test_an_annotation_that_changes_under_a_run_is_noticed(actor, world, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "fine.mp4").write_bytes(world[0].read_bytes())
    text = json.dumps({"fine": make_entry()}).replace("<own>", "fine.mp4")
    (folder / "annotations.json").write_text(text)
    (source,) = list_sources(InputConfig(), folder)
    (folder / "annotations.json").write_text(text.replace("creature", "pictures"))
    rows, outcomes = actor.curate_video(source, "0" * 16)
    assert not rows and [outcome.reason for outcome in outcomes] == ["BAD_ANNOTATION"]
    assert "run the command again" in outcomes[0].message


LINES = {
    "good.mp4": "",
    "gone.mp4": "MISSING",
    ".": "NOT_A_FILE",
    "ftp://host/a.mp4": "BAD_URI",
    "s3://key:secret@bucket/a.mp4": "BAD_URI",
    "nul\0.mp4": "BAD_NAME",
    f"{'long' * 2000}.mp4": "UNREADABLE",
    "notes.md": "UNREADABLE",
    "~nobody-at-all/a.mp4": "MISSING",
}


def test_a_list_with_bad_lines_loses_these_lines_only(actor, world, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.mp4").write_bytes(world[0].read_bytes())
    (folder / "notes.md").write_text("hello " * 100)
    text = "\ufeff# a comment\n\n" + "\n".join(LINES) + "\r\n  good.mp4  \n"
    (folder / "list.txt").write_bytes(text.encode() + b"latin-\xe9.mp4\n")
    videos, rows = curate(actor, folder / "list.txt", tmp_path / "out")
    got = Counter((video.item, video.reason) for video in videos)
    others = [("good.mp4", "DUPLICATE"), ("latin-\\udce9.mp4", "BAD_NAME")]
    assert got == Counter([*((show_name(line), reason) for line, reason in LINES.items()), *others])
    assert "secret" not in "".join(video.item + video.message for video in videos)
    assert rows


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_a_table_with_bad_rows_loses_these_rows_only(tmp_path, suffix):
    rows = [
        {"path": "a.mp4", "caption": "a cat", "license": "CC0-1.0", "consent": "given", "source_group": "g"},
        {"path": None, "caption": "nothing"},
        {"path": "file:///data/b%20c.mp4", "caption": None},
        {"path": "x://y/z.mp4"},
    ]
    file = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif suffix == "csv":
        lines = [",".join(row.get(key) or "" for key in rows[0]) for row in rows]
        file.write_text("\n".join([",".join(rows[0]), *lines]))
    else:
        odd = ["{", "[1]", json.dumps({"path": 7}), json.dumps({"path": "d.mp4", "caption": [1]}), "[" * 10**5]
        file.write_text("\n".join([*map(json.dumps, rows), *odd]))
    sources = list_sources(InputConfig(license="ours"), file)
    good = [source for source in sources if isinstance(source, SourceVideo)]
    assert [source.path for source in good] == [str(tmp_path / "a.mp4"), "/data/b c.mp4"]
    assert (good[0].caption, good[0].license, good[0].consent, good[0].source_group) == ("a cat", "CC0-1.0", "given", "g")
    assert (good[1].caption, good[1].license, good[1].consent) == ("", "ours", "unknown")
    reasons = [source.reason for source in sources if isinstance(source, Outcome)]
    assert reasons == ["BAD_ROW", "BAD_URI"] + (["BAD_ROW"] * 5 if suffix == "jsonl" else [])


def spoil_parquet(path):
    pq.write_table(pa.table({"path": ["a.mp4"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-9] + b"PAR1")


INPUTS = {
    "gone": (None, "no such file or folder"),
    "video.docx": (b"x", "of no known kind"),
    "empty.txt": (b"# nothing\n", "no file in it"),
    "other.json": (b"{}", "of no known kind"),
    "footer.parquet": (spoil_parquet, "damaged"),
    "zero.parquet": (b"", "damaged"),
    "columns.parquet": (lambda path: pq.write_table(pa.table({"a": [1]}), path), "its columns are a; expected one of path"),
    "columns.csv": (b"a,b\n1,2\n", "its columns are a, b"),
    "latin.csv": (b"path\ncaf\xe9.mp4\n", "no CSV in UTF-8"),
    "half.json": (b'{"a": {"metadata": {"cut": [0, 1]}}, "b": {"meta', "not valid JSON before byte"),
    "nan.json": (b'{"a": {"metadata": {"cut": [0, NaN]}}}', "not valid JSON before byte"),
    "loop": (lambda path: path.symlink_to(path), "not a file"),
    "pipe": (lambda path: os.mkfifo(path), "not a file"),
    "empty": (lambda path: path.mkdir(), "no file in it"),
    "*.mp4": (None, "no file in it"),
    "**.mp4": (None, r"'\*\*' stands alone"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_is_none_is_one_line(tmp_path, name):
    make, message = INPUTS[name]
    if isinstance(make, bytes):
        (tmp_path / name).write_bytes(make)
    elif make:
        make(tmp_path / name)
    with pytest.raises(ConfigError, match=message) as caught:
        list_sources(InputConfig(), tmp_path / name)
    assert "\n" not in str(caught.value) and "--input" in str(caught.value) or name.endswith(".json")


@pytest.mark.parametrize("where", ["ftp://host/videos", "s3://key:secret@bucket/", "file://host/videos"])
def test_an_input_of_unknown_scheme_is_one_line(where):
    with pytest.raises(ConfigError, match=r"--input \w+://"):
        list_sources(InputConfig(), where)


def test_files_without_permission_are_named(world):
    """Root may read everything, so a test that runs as root puts its rights down for a moment."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for file, mode in (("good.mp4", 0o644), ("locked.mp4", 0o000)):
            (folder / file).write_bytes(vary(world[0].read_bytes(), file))
            (folder / file).chmod(mode)
        (folder / "hidden").mkdir(mode=0o000)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            plan, planned, _ = list_input(make_config(), folder)
        finally:
            if is_root:
                os.seteuid(0)
            (folder / "hidden").chmod(0o755)
    assert [video.source.name for work in plan.values() for video in work] == ["good.mp4"]
    assert {outcome.item: outcome.reason for outcome in planned} == {"locked.mp4": "UNREADABLE", "hidden": "UNREADABLE"}
