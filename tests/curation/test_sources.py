import json
import tracemalloc
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refalign.config import InputConfig
from refalign.config.presets import toy
from refalign.curation.sources import SourceVideo, list_sources, open_source
from refalign.curation.sources.opens2v import iter_opens2v
from refalign.errors import ConfigError
from refalign.io.storage import digest_sampled
from refalign.pipeline.outcomes import Outcome
from refalign.stages.subjects import list_input


def list_names(folder, **settings):
    return [source.name for source in list_sources(InputConfig(**settings), folder) if isinstance(source, SourceVideo)]


def test_a_missing_folder_a_file_and_an_empty_folder_are_one_line_each(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"):
        list_sources(InputConfig(), tmp_path / "gone")
    with pytest.raises(ConfigError, match="no file in it"):
        list_sources(InputConfig(), tmp_path)
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(ConfigError, match="of no known kind; give a folder"):
        list_sources(InputConfig(), tmp_path / "a.docx")


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
    faults = {source.item: source.reason for source in sources if isinstance(source, Outcome)}
    broken = dict.fromkeys(("bad.mp4", "deep.mp4", "list.mp4"), "BAD_SIDECAR")
    assert faults == {"notes.md": "NOT_A_VIDEO", "loop": "DUPLICATE", **broken}
    assert [source.name for source in sources if isinstance(source, SourceVideo)] == ["good.mp4"]


def test_a_caption_may_change_with_the_shot(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    shots = [{"start_s": 0, "end_s": 1.5, "caption": "one"}, {"start_s": 1.5, "end_s": 3, "caption": "two"}]
    (tmp_path / "a.json").write_text(json.dumps({"caption": "both", "shots": shots}))
    (source,) = list_sources(InputConfig(), tmp_path)
    assert [source.caption_at(time_s) for time_s in (0.5, 1.5, 9.0)] == ["one", "two", "both"]
    (tmp_path / "a.json").write_text(json.dumps({"shots": [{"start_s": 0}]}))
    (fault,) = list_sources(InputConfig(), tmp_path)
    assert fault.reason == "BAD_SIDECAR" and "shots.0.end_s: Field required" in fault.message


def test_the_id_is_of_the_content(tmp_path):
    for name, content in (("a", b"x" * 5_000_000), ("b", b"x" * 5_000_000), ("c", b"x" * 4_999_999 + b"y")):
        (tmp_path / name).write_bytes(content)
    ids = [digest_sampled(str(tmp_path / name)) for name in "abc"]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 16


def test_an_opens2v_folder_is_recognised(real_data):
    sources = list_sources(InputConfig(), real_data / "opens2v")
    videos = [source for source in sources if isinstance(source, SourceVideo)]
    assert videos[0].caption.startswith("Three women")
    assert {source.source_group for source in videos} == {"gm1252760410-365677148"}
    reasons = [source.reason for source in sources if isinstance(source, Outcome)]
    assert reasons == ["DUPLICATE", "NOT_A_VIDEO", "NOT_A_VIDEO"], "it is in both files; two JSON files are of other kinds"
    for source in videos:
        with open_source(source, max_bytes=2**30) as (annotation, path):
            assert str(list(annotation.cut)) == source.entry.cut and path.stat().st_size > 1_000_000


def test_an_opens2v_path_cannot_leave_the_folder(tmp_path, real_data):
    entries = json.loads((real_data / "opens2v" / "annotations.json").read_text())
    name, entry = next(iter(entries.items()))
    entry["metadata"]["path"] = "../../secret.mp4"
    (tmp_path / "annotations.json").write_text(json.dumps({name: entry, "broken": {"metadata": {"cut": [0, 1]}}}))
    reasons = [source.reason for source in list_sources(InputConfig(), tmp_path)]
    assert reasons == ["OUTSIDE", "BAD_ANNOTATION"]


def make_videos(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_a_pattern_names_videos_below_its_fixed_part(tmp_path):
    make_videos(tmp_path, "set/a.mp4", "set/deep/b.mp4", "set/deep/.hidden.mp4", "set/c.mov", "other/d.mp4")
    (tmp_path / "set/deep/b.txt").write_text("a bee")
    assert list_names(tmp_path / "set/**/*.mp4") == ["a.mp4", "deep/b.mp4"]
    assert list_names(tmp_path / "*/?.mo[vu]") == ["set/c.mov"]
    assert [source.caption for source in list_sources(InputConfig(), tmp_path / "set/**/b.*4")] == ["a bee"]


def test_a_name_with_brackets_is_a_name_first(tmp_path):
    make_videos(tmp_path, "[a].mp4", "a.mp4")
    assert list_names(tmp_path / "[a].mp4") == ["[a].mp4"]


def test_one_video_and_a_list_have_their_sidecars(tmp_path):
    make_videos(tmp_path, "a.mp4", "sub/b.mp4")
    (tmp_path / "sub/b.json").write_text(json.dumps({"caption": "a bee", "consent": "given"}))
    (one,) = list_sources(InputConfig(), tmp_path / "sub/b.mp4")
    assert (one.name, one.caption, one.consent) == ("b.mp4", "a bee", "given")
    (tmp_path / "list.lst").write_text(f"a.mp4\nsub/../sub/b.mp4\nfile://{tmp_path}/a.mp4\n")
    first, second, third = list_sources(InputConfig(), tmp_path / "list.lst")
    assert first.path == third.path == str(tmp_path / "a.mp4") and second.caption == "a bee"
    assert second.path == one.path


def test_the_identity_is_of_the_content_and_what_is_said_not_of_the_place(tmp_path):
    def identify(folder, caption="a"):
        make_videos(tmp_path / folder, "a.mp4")
        (tmp_path / folder / "a.txt").write_text(caption)
        return list_input(toy(), tmp_path / folder)[2]

    assert identify("one") == identify("two") != identify("three", "b")


def test_a_cosmos_curate_folder_gives_captions_by_window_and_the_source_as_group(tmp_path):
    make_videos(tmp_path, "clips/u1.mp4", "clips/u2.mp4", "clips/bare.mp4", "clips/bad.mp4", "filtered_clips/u3.mp4")
    windows = [
        {"start_frame": 0, "end_frame": 127, "qwen_caption": "one", "qwen_lm_enhanced_caption": "one, well said"},
        {"start_frame": 128, "end_frame": 200, "qwen_caption": "two"},
    ]
    metas = {
        "u1": {"source_video": "s3://films/long.mp4", "framerate": 25.0, "framerate_source": 30.0, "windows": windows},
        "u2": {"source_video": "s3://films/long.mp4", "framerate_source": 30.0, "windows": []},
        "u3": {"source_video": "s3://films/long.mp4", "framerate_source": 30.0, "windows": []},
        "u4": {"source_video": "s3://films/long.mp4", "framerate_source": 30.0, "windows": []},
        "bad": {"windows": 7},
    }
    (tmp_path / "metas/v0").mkdir(parents=True)
    for name, meta in metas.items():
        (tmp_path / f"metas/v0/{name}.json").write_text(json.dumps({"span_uuid": name, **meta}))
    make_videos(tmp_path, "processed_videos/long.mp4.json", "previews/u1/0_127.webp")
    sources = list_sources(InputConfig(license="ours"), tmp_path)
    videos = {source.name: source for source in sources if isinstance(source, SourceVideo)}
    assert list(videos) == ["clips/u1.mp4", "clips/u2.mp4", "clips/bare.mp4"]
    first = videos["clips/u1.mp4"]
    assert [first.caption_at(time_s) for time_s in (0.0, 5.11, 5.13, 99.0)] == [
        "one, well said",
        "one, well said",
        "two",
        first.caption,
    ]
    assert first.source_group == "s3://films/long.mp4" and first.license == "ours"
    faults = {source.item: source.reason for source in sources if isinstance(source, Outcome)}
    beside = {"processed_videos/long.mp4.json": "NOT_A_VIDEO", "previews/u1/0_127.webp": "NOT_A_VIDEO"}
    named = {"clips/u3.mp4": "FILTERED_BEFORE", "clips/u4.mp4": "MISSING", "clips/bad.mp4": "BAD_SIDECAR"}
    assert faults == named | beside
    assert Outcome("video", "", "FILTERED_BEFORE").status == "filtered"


def make_pair(vid, as_json=True):
    reference = {"vid": vid, "frame_idx": "0.5", "bbox_loc": [[1, 2, 3, 4]], "bbox_cls": "cat", "scores": 0.9}
    pair = {"a cat": {"obj_from_tgt_video": [{"vid": "x", "frame_idx": "0.5"}], "refer_result": [[reference]]}}
    return json.dumps(pair) if as_json else list(pair.items())


@pytest.mark.parametrize("column", ["vid", "video_id"])
def test_phantom_data_says_its_terms_and_brings_its_reference_clips(tmp_path, capsys, column):
    make_videos(tmp_path, "clips/v1_0.5_9.25.mp4", "clips/v1_20.0_31.5.mkv", "clips/v2_0_7.mp4", "clips/unused_0_1.mp4")
    rows = [
        {column: "v1_0.5_9.25", "video_caption": "a cat", "cross_pair": make_pair("v1_20.0_31.5")},
        {column: "v2_0_7", "video_caption": None, "cross_pair": make_pair("v2_8_9")},
        {column: "v3_0_7", "video_caption": "gone", "cross_pair": make_pair("v3_8_9")},
        {column: "v1_0.5_9.25", "video_caption": "a cat", "cross_pair": "{"},
        {column: None, "video_caption": "a cat", "cross_pair": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "koala36M_multi_ref_merged_filtered.parquet")
    pq.write_table(pa.table({"vid": ["v1"], "youtube_url": ["u"]}), tmp_path / "koala36M_multi_ref_meta_info_merged.parquet")
    sources = list_sources(InputConfig(), tmp_path)
    assert "non-commercial research only" in capsys.readouterr().out
    videos = [source for source in sources if isinstance(source, SourceVideo)]
    assert [(video.name, video.caption, video.source_group) for video in videos] == [
        ("clips/v1_0.5_9.25.mp4", "a cat", "v1"),
        ("clips/v2_0_7.mp4", "", "v2"),
        ("clips/v1_20.0_31.5.mkv", "", "v1"),
    ]
    assert {video.license for video in videos} == {"non-commercial research only (Phantom-Data)"}
    assert [(source.item, source.reason) for source in sources if isinstance(source, Outcome)] == [
        ("v3_0_7", "MISSING"),
        ("v1_0.5_9.25", "BAD_ANNOTATION"),
        ("koala36M_multi_ref_merged_filtered.parquet row 5", "BAD_ROW"),
        ("clips/unused_0_1.mp4", "NOT_ANNOTATED"),
        ("koala36M_multi_ref_meta_info_merged.parquet", "NOT_A_VIDEO"),
    ]
    (first, *_) = list_sources(InputConfig(license="mine"), tmp_path / "koala36M_multi_ref_merged_filtered.parquet")
    assert first == replace(videos[0], license="mine; non-commercial research only (Phantom-Data)")


def test_phantom_data_may_hold_its_pairs_as_a_map(tmp_path):
    make_videos(tmp_path, "v1_0_9.mp4", "v1_20_31.mp4")
    pairs = pa.array([make_pair("v1_20_31", as_json=False)], pa.map_(pa.string(), make_pair_type()))
    pq.write_table(pa.table({"vid": ["v1_0_9"], "video_caption": ["a cat"], "cross_pair": pairs}), tmp_path / "t.parquet")
    assert list_names(tmp_path) == ["v1_0_9.mp4", "v1_20_31.mp4"]
    (tmp_path / "v1_0_9.mp4").unlink()
    (tmp_path / "v1_20_31.mp4").unlink()
    with pytest.raises(ConfigError, match="table without clips"):
        list_sources(InputConfig(), tmp_path)


def make_pair_type():
    target = pa.struct([("vid", pa.string()), ("frame_idx", pa.string())])
    reference = pa.struct([("vid", pa.string()), ("bbox_cls", pa.string())])
    return pa.struct([("obj_from_tgt_video", pa.list_(target)), ("refer_result", pa.list_(pa.list_(reference)))])


def test_annotations_are_streamed_and_read_again_by_position(tmp_path):
    """Of a 12 MB file the planner holds one entry at a time, and a worker reads its own."""
    entry = {"metadata": {"cut": [0, 9], "path": "a.mp4", "cap": "c"}, "annotation": {"ann_frame_data": {"ann_frame_idx": 0}}}
    path = tmp_path / "annotations.json"
    with path.open("w") as file:
        file.write("{\n")
        for number in range(600):
            more = {**entry, "word_tags": {"é": "}{,}" + "x" * 20_000, "number": number}}
            file.write(f"  {json.dumps(f'{number}_part1_é', ensure_ascii=number % 2 == 0)} : {json.dumps(more, indent=1)},\n")
        file.write(f'"last": {json.dumps(entry)}\n}}\n')
    tracemalloc.start()
    try:
        num_clips = sum(1 for _ in iter_opens2v([str(path)], str(tmp_path), InputConfig()))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_clips == 601 and peak_bytes < path.stat().st_size / 3 < 5_000_000
    sources = list_sources(InputConfig(), path)
    assert [source.name for source in sources[-2:]] == ["599_part1_é", "last"]
    for source in (sources[0], sources[17], sources[18], sources[-1]):
        text = path.read_bytes()[source.entry.start : source.entry.end].decode()
        assert list(json.loads("{" + text + "}")) == [source.name]
