"""How fast shard samples are read by offset in training order, against reading the same tars from front to back.

Samples have the sizes of 81 x 480 x 832 clips with three references (float16 latents, int8 targets or float16 ones). Each round
reads both ways, interleaved; cold rounds drop the files from the page cache first, warm ones keep them there. Stock webdataset
reads the same shards beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_shards import Made, write_shards
from recording import describe_machine, write_result

from refalign.shards.reader import Prefetcher, SampleOrder, ShardIndex
from refalign.shards.sample import Sample, pack_tokens

REFERENCES, TOKENS, WIDTH, TEXT = 3, 1560, 1024, 100
BLOCK_BYTES = 2**20
BATCH = 8


def make_sample(number: int, dtype: str) -> Made:
    """One sample with random content."""
    draw = torch.Generator().manual_seed(number)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).half()

    tensors = {
        "latents": noise(16, 21, 60, 104),
        "prompt_embeds": noise(TEXT, 4096),
        "reference_latents": noise(REFERENCES, 16, 60, 104),
        "foreground": torch.rand(REFERENCES, TOKENS, generator=draw).half(),
        "content": torch.rand(REFERENCES, TOKENS, generator=draw).half(),
        **pack_tokens("target_tokens", noise(REFERENCES, TOKENS, WIDTH).float(), dtype),
    }
    info = {"references": [{"subject_index": subject, "kind": "in_pair"} for subject in range(REFERENCES)]}
    return f"s{number:06d}", tensors, info


def drop_from_cache(folder: Path) -> None:
    """Writes the tars back and forgets their pages."""
    for path in sorted((folder / "parts").glob("*.tar")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(folder: Path) -> None:
    """Every tar from front to back, without looking into it."""
    for path in sorted((folder / "parts").glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.read(BLOCK_BYTES):
                pass


def read_samples(folder: Path) -> None:
    """Every sample in the order of an epoch, ahead in one thread, as training does."""
    index = ShardIndex.open(folder, "train")
    order = SampleOrder(len(index), seed=0)

    def make_batch(number: int) -> list[Sample]:
        return index.read_many([place for _, place in order.global_batch(number * BATCH, BATCH)])

    batches = len(index) // BATCH
    prefetcher = Prefetcher(make_batch, 0, batches - 1)
    for _ in range(batches):
        prefetcher.next()
    prefetcher.close()


def read_webdataset(folder: Path) -> None:
    """Every sample through stock webdataset, undecoded."""
    import webdataset

    urls = [str(path) for path in sorted((folder / "parts").glob("*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        assert sample["safetensors"]


READERS: dict[str, Callable[[Path], None]] = {"raw": read_raw, "samples": read_samples, "webdataset": read_webdataset}


def measure(folder: Path, rounds: int, *, cold: bool) -> dict[str, Any]:
    """GiB/s of each way, median over the rounds, and ours over the raw rate round by round."""
    size_gib = sum(path.stat().st_size for path in (folder / "parts").glob("*.tar")) / 2**30
    rates: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(rounds):
        for name, read in READERS.items():
            if cold:
                drop_from_cache(folder)
            began = time.perf_counter()
            read(folder)
            rates[name].append(size_gib / (time.perf_counter() - began))
    shares = [ours / raw for ours, raw in zip(rates["samples"], rates["raw"], strict=True)]
    return {
        "gib_per_s_median": {name: round(statistics.median(values), 3) for name, values in rates.items()},
        "samples_over_raw": {"median": round(statistics.median(shares), 3), "worst": round(min(shares), 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--per-shard", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the shards; a temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    figures: dict[str, Any] = {}
    count = arguments.shards * arguments.per_shard
    for dtype in ("float16", "int8"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            numbers = [range(first, first + arguments.per_shard) for first in range(0, count, arguments.per_shard)]
            parts = {f"train-{n:06d}.tar": (make_sample(each, dtype) for each in part) for n, part in enumerate(numbers)}
            write_shards(folder, parts)
            sizes = [path.stat().st_size for path in (folder / "parts").glob("*.tar")]
            figures[f"{dtype} targets"] = {
                "mib_per_sample": round(sum(sizes) / 2**20 / count, 2),
                "cold": measure(folder, arguments.rounds, cold=True),
                "warm": measure(folder, arguments.rounds, cold=False),
            }
    write_result("reader", figures, machine)


if __name__ == "__main__":
    main()
