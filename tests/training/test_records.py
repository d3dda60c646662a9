"""The metrics file: no step doubled, no half line read."""

from __future__ import annotations

from pathlib import Path

from refalign.training.records import RecordReader, append_record, read_records, summarize_records, truncate_records


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(6):
        append_record(path, {"step": step, "total": step / 10})
    with path.open("a") as file:
        file.write('{"step": 6, "tot')  # a process killed while writing
    assert [record["step"] for record in read_records(path)] == list(range(6))
    truncate_records(path, 3)
    append_record(path, {"step": 4, "total": 9.0})
    totals = {record["step"]: record["total"] for record in read_records(path)}
    assert totals == {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3, 4: 9.0} and len(read_records(path)) == 5


def test_a_follower_sees_new_lines_once_and_starts_again_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = RecordReader(path)
    assert reader.read_new() == []
    append_record(path, {"step": 1})
    append_record(path, {"step": 2})
    assert [record["step"] for record in reader.read_new()] == [1, 2]
    assert reader.read_new() == []
    truncate_records(path, 1)
    append_record(path, {"step": 2})
    append_record(path, {"step": 3})
    assert [record["step"] for record in reader.read_new()] == [1, 2, 3]


def test_first_and_last_are_of_the_lines_that_have_the_number() -> None:
    records = [{"step": 0, "v": 4.0}, {"step": 1, "t": 3.0}, {"step": 2, "t": 2.0, "v": 1.0}]
    assert summarize_records(records, ("t", "v", "w")) == {"t": {"first": 3.0, "last": 2.0}, "v": {"first": 4.0, "last": 1.0}}
