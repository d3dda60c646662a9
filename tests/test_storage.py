"""Local and remote files by one name, against a real S3 server on the loopback."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from refalign.cli import load_config, make_parser
from refalign.config import CurationConfig, InputConfig, VideoConfig
from refalign.curation.sources import identify_sources, list_sources, open_source
from refalign.errors import BackendUnavailable, ConfigError, DataError
from refalign.io import storage
from refalign.io.images import write_mp4
from refalign.io.video import ClipSpec, read_clips
from tests.curation.curating import curate, make_config

MOVIE = np.repeat(np.arange(24, dtype=np.uint8)[:, None, None, None] * 8, 32, axis=1).repeat(48, axis=2).repeat(3, axis=3)


@pytest.fixture(scope="module")
def bucket(s3, tmp_path_factory):
    """Two videos, one with a sidecar and an awkward key, and a file that is no video."""
    folder = tmp_path_factory.mktemp("upload")
    write_mp4(folder / "a.mp4", MOVIE, fps=8)
    write_mp4(folder / "b.mp4", MOVIE[::-1], fps=8)
    s3.create_bucket(Bucket="films")
    s3.upload_file(str(folder / "a.mp4"), "films", "set/a.mp4")
    s3.upload_file(str(folder / "b.mp4"), "films", "set/deep/50% of #1 b.mp4")
    s3.put_object(Bucket="films", Key="set/a.json", Body=json.dumps({"caption": "grey", "consent": "given"}).encode())
    s3.put_object(Bucket="films", Key="set/notes.md", Body=b"hello")
    return folder


def left_over():
    return sorted(path.name for path in Path(tempfile.gettempdir()).glob("refalign-*.mp4"))


def test_locations_are_absolute_paths_or_uris(tmp_path):
    assert storage.resolve("a b.mp4", str(tmp_path)) == f"{tmp_path}/a b.mp4"
    assert storage.resolve("../a.mp4", f"{tmp_path}/sub") == f"{tmp_path}/a.mp4"
    assert storage.resolve("file:///data/a%20b.mp4") == "/data/a b.mp4"
    assert storage.resolve("sub/a.mp4", "s3://films/set") == "s3://films/set/sub/a.mp4"
    assert storage.resolve("S3://films/50%.mp4") == "s3://films/50%.mp4", "keys are taken as they are"
    assert storage.resolve("/data/a.mp4", "s3://films/set") == "/data/a.mp4"


def test_the_command_line_leaves_a_uri_alone_and_makes_paths_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parser = make_parser("test")
    for given, kept in (("s3://films/set/", "s3://films/set/"), ("videos/**/*.mp4", f"{tmp_path}/videos/**/*.mp4")):
        config, _ = load_config(parser.parse_args(["--input", given]))
        assert config.input.path == kept


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("ftp://host/a.mp4", "BAD_URI"),
        ("http://host/a.mp4", "BAD_URI"),
        ("file://host/a.mp4", "BAD_URI"),
        ("s3://key:secret@films/a.mp4", "BAD_URI"),
        ("s3:///a.mp4", "BAD_URI"),
        ("s3://films/../other/a.mp4", "BAD_URI"),
        ("", "BAD_NAME"),
        ("a\0.mp4", "BAD_NAME"),
        (os.fsdecode(b"\xff.mp4"), "BAD_NAME"),
    ],
)
def test_other_locations_are_refused_without_repeating_secrets(location, reason):
    with pytest.raises(DataError) as caught:
        storage.resolve(location)
    assert caught.value.reason == reason and "secret" not in str(caught.value)


def test_a_bucket_is_a_folder_like_any_other(bucket):
    sources = list_sources(InputConfig(license="ours"), "s3://films/set/")
    assert [getattr(source, "name", None) or source.reason for source in sources] == [
        "a.mp4",
        "deep/50% of #1 b.mp4",
        "NOT_A_VIDEO",
    ]
    assert (sources[0].caption, sources[0].consent, sources[0].license) == ("grey", "given", "ours")
    assert list_sources(InputConfig(), "s3://films/set/a.mp4")[0].caption == "grey"


def test_a_copy_has_the_identity_of_the_original(bucket):
    assert storage.digest_sampled("s3://films/set/a.mp4") == storage.digest_sampled(str(bucket / "a.mp4"))
    (_, video_id), *_ = identify_sources(list_sources(InputConfig(), "s3://films/set/a.mp4"), CurationConfig())
    assert video_id == storage.digest_sampled(str(bucket / "a.mp4"))


def test_large_files_are_identified_by_two_ranges(s3, bucket, tmp_path):
    data = np.random.default_rng(0).integers(0, 255, 5_000_001, dtype=np.uint8).tobytes()
    (tmp_path / "large").write_bytes(data)
    s3.put_object(Bucket="films", Key="large", Body=data)
    assert storage.digest_sampled("s3://films/large") == storage.digest_sampled(str(tmp_path / "large"))


def test_the_copy_lasts_as_long_as_its_block_and_errors_name_the_original(bucket):
    before = left_over()
    (source,) = list_sources(InputConfig(), "s3://films/set/a.mp4")
    with open_source(source, max_bytes=2**20) as (_, path):
        assert path.read_bytes() == (bucket / "a.mp4").read_bytes() and path.suffix == ".mp4"
        assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(DataError, match=r"^s3://films/set/a.mp4: broken$"), storage.fetch("s3://films/set/a.mp4") as path:
        raise DataError("UNREADABLE", f"{path}: broken")
    with pytest.raises(ZeroDivisionError), storage.fetch("s3://films/set/a.mp4"):
        raise ZeroDivisionError
    with pytest.raises(DataError, match="max_video_bytes"), storage.fetch("s3://films/set/a.mp4", max_bytes=10):
        pass
    assert left_over() == before


def test_clips_are_read_from_a_bucket_as_from_a_disk(bucket):
    video = VideoConfig(height_px=32, width_px=48, num_frames=5, fps=8.0)
    specs = [ClipSpec(0.5, (0, 0, 48, 32))]
    (remote,) = read_clips("s3://films/set/a.mp4", specs, video, CurationConfig())
    (local,) = read_clips(bucket / "a.mp4", specs, video, CurationConfig())
    np.testing.assert_array_equal(remote, local)


def test_lists_and_tables_name_videos_anywhere(s3, bucket, tmp_path):
    s3.put_object(Bucket="films", Key="set/list.txt", Body=b"# two\na.mp4\n\ndeep/50% of #1 b.mp4\r\n")
    remote = list_sources(InputConfig(), "s3://films/set/list.txt")
    assert [source.path for source in remote] == ["s3://films/set/a.mp4", "s3://films/set/deep/50% of #1 b.mp4"]
    assert remote[0].caption == "grey", "the sidecar beside it"
    (tmp_path / "table.jsonl").write_text('{"uri": "s3://films/set/a.mp4", "caption": "mine"}\n')
    (row,) = list_sources(InputConfig(), tmp_path / "table.jsonl")
    assert (row.path, row.caption) == ("s3://films/set/a.mp4", "mine")


def test_what_is_not_there_is_named(bucket):
    with pytest.raises(ConfigError, match="no such file or folder"):
        list_sources(InputConfig(), "s3://films/nothing/")
    with pytest.raises(ConfigError, match="no such"):
        list_sources(InputConfig(), "s3://no-such-bucket/")
    with pytest.raises(DataError) as caught, storage.fetch("s3://films/gone.mp4"):
        pass
    assert caught.value.reason == "MISSING"


def test_an_unreachable_store_stops_the_run_in_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with pytest.raises(BackendUnavailable, match="does not answer") as caught:
        list_sources(InputConfig(), "s3://films/set/")
    assert "\n" not in str(caught.value)


def test_videos_in_a_bucket_are_curated_as_on_a_disk(s3, tmp_path):
    from refalign.stages.subjects import SubjectsWorker
    from refalign.toy.videos import write_world

    write_world(tmp_path / "world", num_videos=2, seed=5, split="heldout")
    s3.create_bucket(Bucket="world")
    for path in (tmp_path / "world").iterdir():
        s3.upload_file(str(path), "world", f"set/{path.name}")
    before = left_over()
    actor = SubjectsWorker(make_config())
    remote, remote_rows = curate(actor, "s3://world/set", tmp_path / "out")
    local, local_rows = curate(actor, tmp_path / "world", tmp_path / "out")
    assert remote == local and not any(video.reason for video in remote)
    assert {row["video_path"].rpartition("/")[0] for row in remote_rows} == {"s3://world/set"}
    assert repr([{**row, "video_path": ""} for row in remote_rows]) == repr([{**row, "video_path": ""} for row in local_rows])
    assert left_over() == before, "each copy is gone"
