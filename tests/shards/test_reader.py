"""Reading by byte offset, the order of samples, prefetching."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from make_shards import make_sample, write_shards  # noqa: E402

from refalign.errors import ArtifactError, SchemaError  # noqa: E402
from refalign.shards.reader import Prefetcher, SampleOrder, ShardIndex, random_words, view_tensors  # noqa: E402


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", train=10, validation=2, per_shard=4)


def test_every_sample_is_read_back_from_its_offset(folder: Path) -> None:
    index = ShardIndex.open(folder, "train")
    assert len(index) == 10 and index.digest == "d1"
    for number in range(10):
        sample = index.read(number)
        tensors, info = make_sample(number, subjects=1 + number % 3)
        assert sample.key == f"train{number:04d}" and sample.info == info
        assert all(torch.equal(sample.tensors[name], tensor) for name, tensor in tensors.items())


def test_splits_are_apart(folder: Path) -> None:
    assert {entry.key for entry in ShardIndex.open(folder, "validation").entries} == {"validation0500", "validation0501"}
    assert len(ShardIndex.open(folder, "test")) == 0


def test_an_unfinished_step_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json: not found; the shards step has not finished"):
        ShardIndex.open(folder, "train")


def test_a_missing_or_short_shard_is_named_with_the_way_out(folder: Path) -> None:
    shard = folder / "parts" / "train-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(ArtifactError, match=rf"train-000001\.tar: {len(data) - 512} bytes, {len(data)} were committed; delete"):
        ShardIndex.open(folder, "train")
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"train-000001\.tar: this shard is missing; delete"):
        ShardIndex.open(folder, "train")


@pytest.mark.parametrize("offset", [0, 1, 512])
def test_tensors_are_views_and_equal_the_librarys(offset: int) -> None:
    from safetensors.torch import load, save

    draw = torch.Generator().manual_seed(0)
    made = {
        "halves": torch.randn(3, 5, generator=draw).half(),
        "brain": torch.randn(2, generator=draw).bfloat16(),
        "scales": torch.randn(7, generator=draw),
        "bytes": torch.arange(13, dtype=torch.uint8),
        "signed": torch.arange(-5, 6, dtype=torch.int8),
        "sizes": torch.tensor([3, 0, 2**40]),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
    }
    file = save(made, metadata={"format": "pt"})
    data = np.frombuffer(bytearray(offset) + file, np.uint8)[offset:]
    ours, theirs = view_tensors(data), load(file)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape and torch.equal(ours[name], tensor)
    start = data.__array_interface__["data"][0]
    assert all(start <= tensor.data_ptr() < start + len(data) for tensor in ours.values() if tensor.numel()) or offset % 8


@pytest.mark.parametrize("end", [4, 100, -1])
def test_a_cut_off_file_of_tensors_is_no_file_of_tensors(end: int) -> None:
    from safetensors.torch import save

    file = save({"a": torch.ones(4, 4)})
    with pytest.raises((ValueError, KeyError, TypeError)):
        view_tensors(np.frombuffer(file[:end], np.uint8).copy())
    lying = file.replace(b"[4,4]", b"[4,9]")
    with pytest.raises(ValueError, match=r"bytes 0 to 64 of 64 for a tensor of \[4, 9\] F32"):
        view_tensors(np.frombuffer(lying, np.uint8).copy())


def test_damaged_bytes_and_damaged_commits_are_named(folder: Path) -> None:
    index = ShardIndex.open(folder, "train")
    entry = index.entries[5]
    with Path(entry.shard).open("r+b") as file:
        file.seek(entry.members["safetensors"][0])
        file.write(b"\xff" * 64)
    with pytest.raises(ArtifactError, match=rf"{entry.shard}: sample {entry.key} is damaged"):
        index.read(5)
    (folder / "parts" / "train-000002.tar.json").write_text('{"part": "train-0')
    with pytest.raises(ArtifactError, match=r"train-000002\.tar\.json: damaged"):
        ShardIndex.open(folder, "train")
    (folder / "parts" / "train-000002.tar.json").unlink()
    with pytest.raises(ArtifactError, match=r"train-000002\.tar\.json: not found; delete"):
        ShardIndex.open(folder, "train")


def test_overwritten_bytes_are_noticed_wherever_they_are_in_a_sample(folder: Path) -> None:
    index = ShardIndex.open(folder, "train")
    rng = np.random.default_rng(0)
    for _ in range(20):
        number = int(rng.integers(len(index)))
        entry = index.entries[number]
        offset, size, _ = entry.members[str(rng.choice(["safetensors", "json"]))]
        at = offset + int(rng.integers(size))
        with Path(entry.shard).open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([255 - byte]))
            file.flush()
            with pytest.raises(ArtifactError, match=rf"sample {entry.key} is damaged \(the bytes of its \w+ are not those"):
                index.read(number)
            file.seek(at)
            file.write(bytes([byte]))
        assert index.read(number).key == entry.key


def test_a_sample_that_contradicts_its_commit_is_a_schema_error(folder: Path) -> None:
    path = folder / "parts" / "train-000000.tar.json"
    commit = json.loads(path.read_text())
    commit["samples"][0]["subjects"] = 2
    path.write_text(json.dumps(commit))
    with pytest.raises(SchemaError, match=r"train0000: 2 subjects, but references for subjects \[0\]"):
        ShardIndex.open(folder, "train").read(0)


def test_a_null_prompt_is_read_where_there_is_one(folder: Path) -> None:
    from safetensors.torch import save_file

    index = ShardIndex.open(folder, "train")
    assert index.load_null_prompt() is None
    save_file({"prompt_embeds": torch.ones(1, 12, dtype=torch.bfloat16)}, folder / "null_prompt.safetensors")
    null_prompt = index.load_null_prompt()
    assert null_prompt is not None and torch.equal(null_prompt.float(), torch.ones(1, 12))


def test_each_epoch_is_another_permutation_and_nothing_repeats_or_is_left_out() -> None:
    order = SampleOrder(size=11, seed=3)
    batches = [order.global_batch(position, 4) for position in range(0, 44, 4)]
    positions = [position for batch in batches for position, _ in batch]
    indices = [index for batch in batches for _, index in batch]
    assert positions == list(range(44))
    epochs = [indices[start : start + 11] for start in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_does_not_depend_on_where_it_is_entered() -> None:
    order = SampleOrder(size=7, seed=0)
    stream = [pair for position in range(0, 21, 3) for pair in order.global_batch(position, 3)]
    assert stream[15:18] == SampleOrder(size=7, seed=0).global_batch(15, 3)
    assert stream == order.global_batch(0, 21)


def test_random_words_are_fixed_for_good() -> None:
    words = random_words(0, "order", 0, 2)
    assert [int(word) for word in words] == [int(word) for word in random_words(0, "order", 0, 3)[:2]]
    streams = [(0, "order", 0), (0, "order", 1), (0, "draw", 0), (1, "order", 0)]
    assert len({int(random_words(*stream, 1)[0]) for stream in streams}) == 4


def test_prefetching_keeps_order_and_stays_bounded() -> None:
    made: list[int] = []
    prefetcher = Prefetcher(lambda number: made.append(number) or number, 1, 50, depth=2)
    assert [prefetcher.next() for _ in range(10)] == list(range(1, 11))
    assert len(made) <= 10 + 2 + 1  # what was taken, the queue, one in the maker's hands
    prefetcher.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_a_fault_in_the_prefetch_thread_reaches_the_consumer() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ArtifactError("broken.tar: damaged")
        return number

    prefetcher = Prefetcher(make, 1, 5)
    assert prefetcher.next() == 1
    with pytest.raises(ArtifactError, match=r"broken\.tar"):
        prefetcher.next()
    prefetcher.close()
