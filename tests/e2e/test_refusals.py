"""Bad input ends in one line that says what to do, with the right exit code, and leaves nothing that looks done."""

import subprocess

import pytest

from tests.e2e.conftest import run


def check_one_line(done: subprocess.CompletedProcess, code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for words in said:
        assert words in line


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--input", "/nowhere/at/all"], 2, ["/nowhere/at/all", "no such file or folder"]),
        (["--set", "training.stepz=3"], 2, ["training.stepz", "known:"]),
        (["--preset", "wan3"], 2, ["wan3", "toy_tiny"]),
        (["--set", "video.height_px=100"], 1, ["100", "96 or 104"]),
        (["--set", "models.base=/nowhere/wan"], 1, ["/nowhere/wan", "models.base"]),
        (["--set", "models.detector=/nowhere/yolo.pt"], 1, ["/nowhere/yolo.pt", "models.detector"]),
        (["--set", "evaluation.judge=no.such:judge"], 2, ["no.such:judge", "module:function"]),
        (["--set", "tracking.uri=http://127.0.0.1:9"], 1, ["127.0.0.1:9", "does not answer"]),
    ],
)
def test_a_wrong_start_is_one_line(tmp_path, flags, code, said):
    check_one_line(run("pipelines/full.py", "--preset", "toy_tiny", "--output", str(tmp_path / "out"), *flags), code, *said)
    assert not list((tmp_path / "out").glob("*/manifest.json")) or all(
        path.parent.name.startswith("world-") for path in (tmp_path / "out").glob("*/manifest.json")
    )


def test_an_empty_folder_is_one_line(tmp_path):
    (tmp_path / "in").mkdir()
    done = run("pipelines/full.py", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    check_one_line(done, 2, "no file in it")


def test_a_later_step_alone_names_the_step_before_it(tmp_path):
    check_one_line(run("pipelines/train.py", "--preset", "toy_tiny", "--output", str(tmp_path)), 1, "pipelines/subjects.py")


def test_generate_names_what_is_missing(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"no picture")
    flags = ["--prompt", "a creature", "--output", str(tmp_path / "out.mp4")]
    check_one_line(run("pipelines/generate.py", "--model", str(tmp_path), "--reference", str(picture), *flags), 1, "a.png")
    check_one_line(run("pipelines/generate.py", "--model", str(tmp_path / "none"), *flags), 1, "none")


def test_too_many_faults_stop_the_run_with_the_first_of_them(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.mp4").write_bytes(b"no video %d" % number)
    done = run("pipelines/full.py", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    check_one_line(done, 1, "3 of 3 videos were quarantined (UNREADABLE 3)", "0.mp4", "curation.max_quarantine_fraction")
    assert not list((tmp_path / "out").glob("*/manifest.json"))
