import json
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refalign.errors import ArtifactError, BackendUnavailable
from refalign.io.storage import check_disk_space
from refalign.io.writing import write_json
from refalign.pipeline.steps import Step, iter_step_folders


def make_step(tmp_path: Path) -> Step:
    return Step.make(tmp_path, "shards", {"a": 1})


def write_hello(path: Path) -> dict:
    path.write_text("hello")
    return {"rows": 1}


def test_a_part_is_complete_or_absent(tmp_path):
    step = make_step(tmp_path)
    record = step.write_part("one", write_hello)
    assert record["rows"] == 1 and record["size_bytes"] == 5
    assert step.load_part("one") == record

    def fail(path: Path) -> dict:
        path.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        step.write_part("two", fail)
    assert step.load_part("two") is None
    assert sorted(path.name for path in step.parts_folder.iterdir()) == ["one", "one.json"]


def test_a_part_that_was_cut_off_is_done_again(tmp_path):
    step = make_step(tmp_path)
    step.write_part("one", write_hello)
    (step.parts_folder / "one").write_text("hel")
    assert step.load_part("one") is None


def test_a_commit_without_its_file_is_no_commit(tmp_path):
    step = make_step(tmp_path)
    step.write_part("one", write_hello)
    (step.parts_folder / "one").unlink()
    assert step.load_part("one") is None


def test_done_means_that_the_manifest_exists(tmp_path):
    step = make_step(tmp_path)
    assert step.load_manifest() is None
    step.commit({"clips": 3})
    assert step.load_manifest() == {"step": "shards", "fingerprint": step.fingerprint, "clips": 3}


def test_a_damaged_manifest_is_named(tmp_path):
    step = make_step(tmp_path)
    step.commit({})
    (step.folder / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="manifest.json: damaged"):
        step.load_manifest()


def hold_lease(folder: str, ready, done) -> None:
    with make_step(Path(folder)).lease():
        ready.set()
        done.wait(30)


def test_a_folder_has_one_worker_and_the_lease_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold_lease, args=(str(tmp_path), ready, done))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(BackendUnavailable, match=f"held by process {holder.pid}"), make_step(tmp_path).lease():
        pass
    holder.kill()
    holder.join()
    with make_step(tmp_path).lease():
        pass


def test_the_lease_clears_what_a_killed_writer_left(tmp_path):
    step = make_step(tmp_path)
    step.parts_folder.mkdir(parents=True)
    (step.parts_folder / ".one.host-1.tmp").write_text("half")
    with step.lease():
        assert list(step.parts_folder.iterdir()) == []


def test_step_folders_are_told_from_others(tmp_path):
    make_step(tmp_path).commit({})
    (tmp_path / "artifacts").mkdir()
    assert [folder.name.partition("-")[0] for folder in iter_step_folders(tmp_path)] == ["shards"]


def test_too_little_disk_space_is_refused_before_the_start(tmp_path):
    check_disk_space(tmp_path / "not" / "there", 1)
    with pytest.raises(ArtifactError, match="PiB needed; free some space, or give"):
        check_disk_space(tmp_path, 10**18)


def test_json_is_written_whole_and_sorted(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "ü"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "ü", "b": 1}
    assert (tmp_path / "a.json").read_text().index('"a"') < (tmp_path / "a.json").read_text().index('"b"')
    assert list(tmp_path.glob(".*")) == []


def test_an_item_that_kills_its_workers_is_found_out(tmp_path: Path) -> None:
    """Real processes die by SIGKILL at one item; the next attempt learns how many, and the commit forgets it."""
    program = (
        "import os, signal, sys; from pathlib import Path; from refalign.pipeline.steps import Step\n"
        f"journal = Step('s', 'f', Path({str(tmp_path)!r})).open_journal('p.parquet')\n"
        "for item in ('good', 'poison'):\n"
        "    deaths = journal.begin(item)\n"
        "    print(item, deaths, flush=True)\n"
        "    if item == 'poison': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = []
    for _ in range(3):
        died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        said.append(died.stdout.split())
    assert said == [["good", "0", "poison", str(deaths)] for deaths in range(3)]
    journal = Step("s", "f", tmp_path).open_journal("p.parquet")
    assert journal.begin("good") == 0 and journal.begin("poison") == 3
    assert Step("s", "f", tmp_path).open_journal("q.parquet").begin("poison") == 0, "each part has its own notes"
    with journal:  # the part is made
        pass
    assert Step("s", "f", tmp_path).open_journal("p.parquet").begin("poison") == 0


def test_what_a_killed_worker_was_writing_is_gone_when_the_step_is_done(tmp_path):
    step = make_step(tmp_path)
    with step.lease():
        step.write_part("a", lambda path: path.write_bytes(b"a") and {})
        left_over = step.parts_folder / ".a.elsewhere-1.tmp"  # its driver lived on, and another worker made the part
        left_over.write_bytes(b"half")
        step.commit({})
    assert sorted(path.name for path in step.parts_folder.iterdir()) == ["a", "a.json"]
