"""What lies under an input is planned or has an outcome: nothing is lost without a word.

Each test is named after the kind of fault that it stands for.
"""

import json
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refalign.config import InputConfig
from refalign.config.presets import toy
from refalign.curation.sources import SourceVideo, check_apart, list_sources
from refalign.errors import ConfigError
from refalign.pipeline.outcomes import Outcome
from refalign.stages.subjects import list_input
from refalign.toy.videos import write_world
from tests.curation.test_bad_input import make_entry


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Bytes of a real video."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_videos=1, seed=5, split="heldout")
    return next(folder.glob("*.mp4")).read_bytes()


def put(folder, *names, content=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content or name.encode())


def tell(where, **settings):
    """Names of the planned, and reasons by item."""
    sources = list_sources(InputConfig(**settings), where)
    planned = [source.name for source in sources if isinstance(source, SourceVideo)]
    return planned, {source.item: source.reason for source in sources if isinstance(source, Outcome)}


def write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def fill_mixed(folder, elsewhere, video):
    """Links, hidden files, sidecars, annotations and tables in one folder; returns the files that only describe others."""
    put(folder, "a.mp4", "sub/b.mkv", "sub/deep/c.MOV", "orphan.txt", ".DS_Store", "sub/._b.mkv", "notes.md", "d.mts", "wait.mp4")
    put(folder, "a.json", "a.txt", content=b"{}")
    put(folder, "wait.mp4.aria2", "half.mp4.part", "table.csv")
    put(folder, "camera.bin", content=video)
    write_table(folder / "rows.parquet", [{"path": "a.mp4"}])
    put(elsewhere, "linked/e.mp4", "linked/deep/f.mp4", "single.mp4")
    (folder / "disk2").symlink_to(elsewhere / "linked")
    (folder / "disk2-again").symlink_to(elsewhere / "linked")
    (folder / "loop").symlink_to(folder / "sub")
    (folder / "up").symlink_to(folder.parent)
    (folder / "single.mp4").symlink_to(elsewhere / "single.mp4")
    (folder / "dangling").symlink_to(elsewhere / "gone")
    put(folder, "opens2v/clips/named.mp4", "opens2v/clips/unnamed.mp4", "opens2v/readme.txt")
    entry = {"named": make_entry()}
    (folder / "opens2v/ann.json").write_text(json.dumps(entry).replace("<own>", "clips/named.mp4"))
    put(folder, "old/subjects-0123456789ab/lease", "old/artifacts/ours.mp4", "old/summary.json")
    return {"a.json", "a.txt", "opens2v/ann.json"}


def test_planned_and_outcomes_are_what_find_finds(tmp_path, video):
    folder = tmp_path / "in"
    describing = fill_mixed(folder, tmp_path / "elsewhere", video)
    done = subprocess.run(["find", ".", "!", "-type", "d"], cwd=folder, capture_output=True, text=True, check=True)
    found = {line.removeprefix("./") for line in done.stdout.splitlines()}
    own = {name for name in found if name.startswith("old/")}
    planned, reasons = tell(folder)
    through_link = {"disk2/e.mp4", "disk2/deep/f.mp4"}
    names = {*planned, *reasons} - {"named"} | {"opens2v/clips/named.mp4"}
    assert names == found - describing - own - {"disk2"} | through_link | {"old"}
    assert sorted(planned) == sorted(
        ["a.mp4", "camera.bin", "d.mts", "disk2/deep/f.mp4", "disk2/e.mp4", "named", "single.mp4", "sub/b.mkv", "sub/deep/c.MOV"]
    )
    assert len(planned) + len(reasons) == len(names), "each once"
    assert reasons == {
        **dict.fromkeys((".DS_Store", "sub/._b.mkv"), "HIDDEN"),
        **dict.fromkeys(
            ("orphan.txt", "notes.md", "half.mp4.part", "wait.mp4.aria2", "table.csv", "rows.parquet"), "NOT_A_VIDEO"
        ),
        **dict.fromkeys(("dangling", "opens2v/readme.txt"), "NOT_A_VIDEO"),
        **{"loop": "DUPLICATE", "disk2-again": "DUPLICATE", "up": "NOT_A_FILE", "wait.mp4": "INCOMPLETE", "old": "OWN_OUTPUT"},
        "opens2v/clips/unnamed.mp4": "NOT_ANNOTATED",
    }


def test_own_output_is_left_out_and_never_an_input(tmp_path):
    put(tmp_path, "in/a.mp4", "in/runs/one/subjects-0123456789ab/lease", "in/runs/one/mlruns/1/artifacts/sample.mp4")
    put(tmp_path, "in/runs/one/evaluate-0123456789ab/parts/after-x.mp4", "in/runs/notes.mp4")
    assert tell(tmp_path / "in") == (["a.mp4", "runs/notes.mp4"], {"runs/one": "OWN_OUTPUT"})
    planned, reasons = tell(tmp_path / "in/**/*.mp4")
    assert planned == ["a.mp4", "runs/notes.mp4"] and set(reasons.values()) == {"OWN_OUTPUT"} and len(reasons) == 2
    with pytest.raises(ConfigError, match="the output folder of a run"):
        list_sources(InputConfig(), tmp_path / "in/runs/one")


def test_own_output_makes_no_other_input(tmp_path):
    put(tmp_path, "in/a.mp4")
    _, _, before = list_input(toy(), tmp_path / "in")
    put(tmp_path, "in/run/subjects-0123456789ab/lease", "in/run/evaluate-0123456789ab/parts/a.mp4", "in/.DS_Store")
    _, planned, after = list_input(toy(), tmp_path / "in")
    assert before == after and {outcome.reason for outcome in planned} == {"OWN_OUTPUT", "HIDDEN"}


@pytest.mark.parametrize(
    ("where", "output", "is_refused"),
    [
        ("in", "in/out", True),
        ("in", "in", True),
        ("in", "in-out", False),
        ("in/world", "in", False),
        ("in/**/*.mp4", "in/deep/out", True),
        ("i*/**/*.mp4", "in/out", True),
        ("in/*.mp4", "in/out", False),
        ("in/a.mp4", "in/out", False),
        ("link", "in/out", True),
    ],
)
def test_an_output_inside_the_input_is_refused(tmp_path, where, output, is_refused):
    put(tmp_path, "in/a.mp4", "in/world/b.mp4")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    if not is_refused:
        check_apart(str(tmp_path / where), (tmp_path / output, None))
        return
    with pytest.raises(ConfigError, match="lies in --input.*give an output outside of it") as caught:
        check_apart(str(tmp_path / where), (tmp_path / output, None))
    assert "\n" not in str(caught.value)


def test_parts_inside_the_input_are_refused(s3):
    s3.create_bucket(Bucket="apart")
    s3.put_object(Bucket="apart", Key="videos/a.mp4", Body=b"a")
    with pytest.raises(ConfigError, match="s3://apart/videos/run lies in"):
        check_apart("s3://apart/videos/", (None, "s3://apart/videos/run"))
    check_apart("s3://apart/videos/", (None, "s3://apart/videos-run"))


def test_never_listed_a_quote_that_is_not_closed_names_its_line(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text('path,caption\na.mp4,one\nb.mp4,"two\nc.mp4,three\nd.mp4,four\n')
    with pytest.raises(ConfigError, match="row that begins in line 3 is no CSV.*a quote in it that is not closed"):
        list_sources(InputConfig(), file)
    file.write_text('path,caption\na.mp4,"one "quoted" word"\n')
    with pytest.raises(ConfigError, match="begins in line 2"):
        list_sources(InputConfig(), file)
    file.write_text('path,caption\na.mp4,"one\ntwo ""quoted"""\nb.mp4,"with, comma"\nc.mp4,without, comma\n')
    sources = list_sources(InputConfig(), file)
    assert [source.caption for source in sources[:2]] == ['one\ntwo "quoted"', "with, comma"]
    assert sources[2].reason == "BAD_ROW" and "3 cells, expected 2" in sources[2].message
    file.write_text("path,caption,caption\na.mp4,1,2\n")
    with pytest.raises(ConfigError, match="column 'caption' occurs twice; rename one"):
        list_sources(InputConfig(), file)


def test_never_listed_a_huge_caption_costs_no_table(tmp_path):
    long = "word " * 28_000
    (tmp_path / "t.csv").write_text(f"path,caption\na.mp4,one\nb.mp4,{long}\nc.mp4,three\n")
    sources = list_sources(InputConfig(), tmp_path / "t.csv")
    assert [source.caption for source in sources] == ["one", long, "three"]


def test_never_listed_a_name_that_begins_with_a_hash(tmp_path):
    put(tmp_path, "#1.mp4", "a.mp4")
    (tmp_path / "list.txt").write_text("# a comment\n#\n#1.mp4\n#old.mp4\na.mp4\n")
    assert tell(tmp_path / "list.txt") == (["#1.mp4", "a.mp4"], {"#old.mp4": "COMMENT"})


def test_never_listed_an_annotation_somewhere_hides_no_video(tmp_path):
    put(tmp_path, "own/a.mp4", "b.mp4", "set/clips/c.mp4", "set/clips/d.mp4")
    (tmp_path / "set/ann.json").write_text(json.dumps({"c": make_entry()}).replace("<own>", "clips/c.mp4"))
    planned, reasons = tell(tmp_path)
    assert planned == ["c", "b.mp4", "own/a.mp4"] and reasons == {"set/clips/d.mp4": "NOT_ANNOTATED"}
    assert tell(tmp_path / "set") == (["c"], {"clips/d.mp4": "NOT_ANNOTATED"})


def test_never_listed_a_pattern_says_what_it_leaves_out(tmp_path):
    put(tmp_path, "v/a.mp4", "v/a.txt", "v/deep/b.mp4", "v/.c.mp4", "v/notes.md", "v/d.json")
    planned, reasons = tell(tmp_path / "v/*")
    assert planned == ["a.mp4"], "its sidecar is no video"
    assert reasons == {".c.mp4": "HIDDEN", "deep": "NOT_A_VIDEO", "notes.md": "NOT_A_VIDEO", "d.json": "NOT_A_VIDEO"}
    assert tell(tmp_path / "v/**/*")[0] == ["a.mp4", "deep/b.mp4"]
    put(tmp_path, "elsewhere/e.mp4")
    (tmp_path / "v/disk2").symlink_to(tmp_path / "elsewhere")
    assert tell(tmp_path / "v/**/*.mp4") == (["a.mp4", "deep/b.mp4"], {".c.mp4": "HIDDEN", "disk2": "NOT_A_VIDEO"})
    assert tell(tmp_path / "v/*/*.mp4")[0] == ["deep/b.mp4", "disk2/e.mp4"]
    put(tmp_path, "wait/f.mp4", "wait/f.mp4.aria2", "wait/g.mp4")
    assert tell(tmp_path / "wait/*.mp4") == (["g.mp4"], {"f.mp4": "INCOMPLETE"})


@pytest.mark.parametrize("name", ["caption", "text", "prompt", "video_caption"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_missing_or_empty_usual_names_of_captions_are_read(tmp_path, capsys, name, suffix):
    put(tmp_path, "a.mp4", "b.mp4")
    file = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        file.write_text(f"path,{name}\na.mp4,a cat\nb.mp4,\n")
    else:
        write_table(file, [{"path": "a.mp4", name: "a cat"}, {"path": "b.mp4", name: None}])
    assert [source.caption for source in list_sources(InputConfig(), file)] == ["a cat", ""]
    said = capsys.readouterr().out
    assert said.count("captions are read from") == (name != "caption")


def test_missing_or_empty_both_sidecars_are_read(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "a.txt").write_text("a red cat\n")
    (tmp_path / "a.json").write_text(json.dumps({"license": "CC-BY-4.0", "caption": None}))
    (tmp_path / "b.txt").write_text("not this one")
    (tmp_path / "b.json").write_text(json.dumps({"prompt": "a dog", "text": 7}))
    (tmp_path / "c.json").write_text(json.dumps({"caption": "", "license": "", "source_group": " ", "consent": None}))
    sources = list_sources(InputConfig(license="ours"), tmp_path)
    assert [(source.caption, source.license) for source in sources] == [
        ("a red cat", "CC-BY-4.0"),
        ("a dog", "ours"),
        ("", "ours"),
    ]
    assert [source.source_group for source in sources] == ["a.mp4", "b.mp4", "c.mp4"], "blank is not a group of its own"
    (one,) = list_sources(InputConfig(), tmp_path / "a.mp4")
    assert (one.caption, one.license) == ("a red cat", "CC-BY-4.0")


def test_missing_or_empty_a_table_may_say_nan(tmp_path):
    put(tmp_path, "a.mp4")
    pq.write_table(pa.table({"path": ["a.mp4"], "caption": [float("nan")], "license": [float("nan")]}), tmp_path / "t.parquet")
    (source,) = list_sources(InputConfig(), tmp_path / "t.parquet")
    assert (source.caption, source.license) == ("", "unknown")


@pytest.mark.parametrize("suffix", ["mts", "m2ts", "vob", "mxf", "bin", "docx"])
def test_advice_what_can_be_decoded_is_a_video(tmp_path, video, suffix):
    put(tmp_path, f"a.{suffix}", content=video)
    put(tmp_path, "b.bin", "c.jpg", "d.heic")
    os.mkfifo(tmp_path / "pipe.bin")
    planned, reasons = tell(tmp_path)
    assert planned == [f"a.{suffix}"] and set(reasons.values()) == {"NOT_A_VIDEO"} and len(reasons) == 4
    assert [source.name for source in list_sources(InputConfig(), tmp_path / f"a.{suffix}")] == [f"a.{suffix}"]


def test_cases_of_tables_and_sidecars_have_their_right_outcomes(cases):
    """The real odd files; the tests above make their like."""
    with pytest.raises(ConfigError, match="begins in line 2"):
        list_sources(InputConfig(), cases / "unclosed_quote.csv")
    assert [source.caption for source in list_sources(InputConfig(), cases / "caption_column_text.csv")] == ["a yellow creature"]
    lengths = [len(source.caption) for source in list_sources(InputConfig(), cases / "huge_caption.csv")]
    assert len(lengths) == 3 and max(lengths) > 131_072
    (both,) = list_sources(InputConfig(), cases / "both_sidecars")
    assert both.caption == "a red cat runs" and both.license == "CC-BY-4.0"


@pytest.fixture()
def cases(real_data) -> Path:
    """The folder of odd files beside the real ones."""
    folder = real_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip("no cases beside REFALIGN_REAL_DATA")
    return folder
