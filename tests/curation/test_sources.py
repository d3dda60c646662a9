import json

import pytest

from refalign.config import InputConfig
from refalign.curation.sources import SourceVideo, list_sources
from refalign.errors import ConfigError, DataError
from refalign.steps import digest_sampled


def list_names(folder, **settings):
    return [source.name for source in list_sources(InputConfig(**settings), folder) if isinstance(source, SourceVideo)]


def test_a_missing_folder_a_file_and_an_empty_folder_are_one_line_each(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        list_sources(InputConfig(), tmp_path / "gone")
    with pytest.raises(ConfigError, match="no file in it"):
        list_sources(InputConfig(), tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match="not a folder"):
        list_sources(InputConfig(), tmp_path / "a.mp4")


def test_sidecars_describe_and_are_no_videos(tmp_path):
    for name in ("b.mp4", "a.MKV", "sub/c.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "b.json").write_text(json.dumps({"caption": "a cat", "license": "CC-BY-4.0", "source_group": "g"}))
    (tmp_path / "a.txt").write_text("a dog\n")
    sources = list_sources(InputConfig(license="ours"), tmp_path)
    assert [source.name for source in sources] == ["a.MKV", "b.mp4", "sub/c.mov"]
    assert [source.caption for source in sources] == ["a dog", "a cat", ""]
    assert [source.license for source in sources] == ["ours", "CC-BY-4.0", "ours"]
    assert [source.source_group for source in sources] == ["a.MKV", "g", "sub/c.mov"]


def test_other_files_and_broken_sidecars_are_named_and_the_rest_goes_on(tmp_path):
    for name in ("good.mp4", "bad.mp4", "deep.mp4", "list.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "loop").symlink_to(tmp_path)
    sources = list_sources(InputConfig(), tmp_path)
    faults = {str(source).partition(":")[0]: source.reason for source in sources if isinstance(source, DataError)}
    assert faults == {"notes.md": "NOT_A_VIDEO", "bad.mp4": "BAD_SIDECAR", "deep.mp4": "BAD_SIDECAR", "list.mp4": "BAD_SIDECAR"}
    assert [source.name for source in sources if isinstance(source, SourceVideo)] == ["good.mp4"]


def test_a_caption_may_change_with_the_shot(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    shots = [{"start_s": 0, "end_s": 1.5, "caption": "one"}, {"start_s": 1.5, "end_s": 3, "caption": "two"}]
    (tmp_path / "a.json").write_text(json.dumps({"caption": "both", "shots": shots}))
    (source,) = list_sources(InputConfig(), tmp_path)
    assert [source.caption_at(time_s) for time_s in (0.5, 1.5, 9.0)] == ["one", "two", "both"]
    (tmp_path / "a.json").write_text(json.dumps({"shots": [{"start_s": 0}]}))
    (fault,) = list_sources(InputConfig(), tmp_path)
    assert fault.reason == "BAD_SIDECAR"


def test_the_id_is_of_the_content(tmp_path):
    for name, content in (("a", b"x" * 5_000_000), ("b", b"x" * 5_000_000), ("c", b"x" * 4_999_999 + b"y")):
        (tmp_path / name).write_bytes(content)
    ids = [digest_sampled(tmp_path / name) for name in "abc"]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 16


def test_an_opens2v_folder_is_recognised(real_data):
    sources = list_sources(InputConfig(), real_data / "opens2v")
    assert all(isinstance(source, SourceVideo) and source.annotation for source in sources)
    assert sources[0].caption.startswith("Three women")
    assert {source.source_group for source in sources} == {"gm1252760410-365677148"}


def test_an_opens2v_path_cannot_leave_the_folder(tmp_path, real_data):
    entries = json.loads((real_data / "opens2v" / "annotations.json").read_text())
    name, entry = next(iter(entries.items()))
    entry["metadata"]["path"] = "../../secret.mp4"
    (tmp_path / "annotations.json").write_text(json.dumps({name: entry, "broken": {"metadata": {"cut": [0, 1]}}}))
    reasons = [source.reason for source in list_sources(InputConfig(), tmp_path)]
    assert reasons == ["BAD_ANNOTATION", "OUTSIDE"]
