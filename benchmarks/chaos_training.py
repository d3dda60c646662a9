"""Kills training again and again and checks that nothing shows.

Weights, moments and averages are those of an undisturbed run, bit for bit, and the curve is one unbroken line, in the run's own
record and in MLflow.

    python benchmarks/chaos_training.py --kills 12

Two ranks, one on each of two raylets. At random moments one of them dies by SIGKILL: the driver, a rank, or a whole node (which
is then replaced). The same command is started again until the run is done; where it is done before there were enough kills, a new
output folder begins.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import torch
from chaos import ATTEMPT_TIMEOUT_S, find_differing, kill, main, run_undisturbed, start
from local_cluster import LocalCluster, local_cluster
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from refalign.training.checkpoint import latest_checkpoint
from refalign.training.records import FILE_NAME, Record, read_records

VICTIMS = ("driver", "rank", "node")
DATA_STEPS = ("subjects", "pairs", "shards")
TWO_RANKS = {
    "training.parallel.ranks": 2,
    "training.micro_batch": 4,
    "training.checkpoint.every": 3,
    "training.optimizer.ema_decay": 0.9,
    "training.stages.0.steps": 24,
    "training.stages.1.steps": 12,
    "cluster.train.cpus": 1,
}
"""float32, sharded over both ranks; two stages."""
_START_S = 30.0  # until a rank trains, about: kills fall into it as well
_MEASURED = ("step_s", "data_wait_s", "data_wait_share", "tokens_per_s", "tflops_per_rank", "peak_memory_bytes")


def copy_data(source: Path, output: Path) -> None:
    """What training needs of ``source``: the steps before it."""
    for folder in source.iterdir():
        if folder.name.split("-")[0] in ("world", *DATA_STEPS) and folder.is_dir():
            shutil.copytree(folder, output / folder.name)


def find_run(output: Path) -> Path:
    """The folder of the training run, which may not exist yet."""
    return next(output.glob("train-*"), output / "train-none")


def load_records(output: Path) -> list[Record]:
    """What the run has recorded so far."""
    return read_records(find_run(output) / FILE_NAME)


def watch(driver: subprocess.Popen[bytes], cluster: LocalCluster, is_due: Callable[[], bool]) -> bool:
    """Waits for ``is_due``; False if the driver has ended before."""
    end = time.monotonic() + ATTEMPT_TIMEOUT_S
    while driver.poll() is None:
        assert time.monotonic() < end, "the driver hangs"
        if is_due():
            return True
        cluster.mend()
        time.sleep(0.1)
    return False


def draw_moment(output: Path, draw: random.Random) -> Callable[[], bool]:
    """Says when a random moment has come: some time from now, most likely in a start, or so many steps from now."""
    if draw.random() < 1 / 3:
        moment = time.monotonic() + draw.uniform(0.0, _START_S)
        return lambda: time.monotonic() > moment
    wanted, known = draw.randint(1, 8), len(load_records(output))

    def is_due() -> bool:
        nonlocal wanted, known
        now = len(load_records(output))
        wanted -= max(0, now - known)  # a resumed run shortens the record
        known = now
        return wanted <= 0

    return is_due


def kill_rank(cluster: LocalCluster, draw: random.Random) -> bool:
    """Kills a rank; False if there is none at this moment."""
    ranks = cluster.find_processes("RayTrainWorker")
    try:
        draw.choice(ranks).kill()
    except (IndexError, psutil.NoSuchProcess):
        return False
    return True


def run_disturbed(
    output: Path, settings: dict[str, Any], cluster: LocalCluster, draw: random.Random, victims: list[str]
) -> list[dict[str, Any]]:
    """The training step until it is done, taking from ``victims`` whoever has died; who that was, and after which step."""
    killed: list[dict[str, Any]] = []
    for _ in range(200):
        driver = start("train", output, settings, cluster)
        while victims and watch(driver, cluster, draw_moment(output, draw)):
            step = max((record["step"] for record in load_records(output)), default=None)
            if victims[-1] != "rank":
                kill(victims[-1], driver, cluster)
            elif not kill_rank(cluster, draw):
                continue
            killed.append({"victim": victims.pop(), "last_step": step})
            print(f"{time.strftime('%X')} killed {killed[-1]}, {len(victims)} to go", flush=True)
        watch(driver, cluster, lambda: False)
        if driver.returncode == 0:
            return killed
    raise AssertionError(f"the run was not done after 200 attempts; see {output.with_suffix('.log')}")


def describe_run(folder: Path, aside: Path) -> dict[str, Any]:
    """All that two runs are compared by: bytes of exported files, every tensor of the last checkpoint, the record's numbers."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None, f"{folder}: no checkpoint"
    files = [folder / "projectors.safetensors", *sorted(path for path in (folder / "export").rglob("*") if path.is_file())]
    described: dict[str, Any] = {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}
    dcp_to_torch_save(checkpoint, aside)
    described |= {f"{checkpoint.name}: {name}": digest for name, digest in _digest_tensors(torch.load(aside))}
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"] = sorted(state["files"])  # not their digests: torch writes the folder's name into ``.metadata``
    described["state.json"] = state
    records = read_records(folder / FILE_NAME)
    described["steps"] = [record["step"] for record in records]
    for record in records:
        described[f"step {record['step']}"] = {name: value for name, value in record.items() if name not in _MEASURED}
    return described


def _digest_tensors(tree: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, dict):
        return [found for key, value in tree.items() for found in _digest_tensors(value, f"{name}.{key}".strip("."))]
    return [(name, sha256(tree.contiguous().numpy().tobytes()).hexdigest())]


def count_tracked_points(output: Path) -> Counter[int]:
    """Step -> how often MLflow's run of the training has its loss."""
    with sqlite3.connect(f"file:{output / 'mlflow.db'}?mode=ro", uri=True) as database:
        return Counter(step for (step,) in database.execute("SELECT step FROM metrics WHERE key = 'total'"))


def check_same(expected: dict[str, Any], output: Path, aside: Path) -> None:
    """Raises where the run in ``output`` differs from the undisturbed one, or MLflow's curve has a gap or a double."""
    found = describe_run(find_run(output), aside)
    differing = find_differing(expected, found)
    assert not differing, f"{output}: {len(differing)} differ from the undisturbed run: {differing[:5]}"
    assert found["steps"] == list(range(len(found["steps"]))), f"{output}: steps {found['steps']}"
    tracked = count_tracked_points(output)
    assert tracked == Counter(found["steps"][1:]), f"{output}: MLflow has steps {tracked}"


def run_chaos(
    folder: Path, *, kills: int, settings: dict[str, Any] = TWO_RANKS, undisturbed: Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """The whole experiment; raises where a run differs from the undisturbed one.

    Args:
        settings: of the training, over the preset's.
        undisturbed: an output folder with a finished run whose result these settings must give; None makes one.
    """
    draw = random.Random(seed)
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(kills)]
    draw.shuffle(victims)
    moments: list[dict[str, Any]] = []
    seconds = rounds = 0
    # A single rank must be on the node that dies.
    with local_cluster(folder / "cluster", head_cpus=settings.get("training.parallel.ranks", 1) - 1, nodes=1) as cluster:
        if undisturbed is None:
            undisturbed = folder / "undisturbed"
            for step in DATA_STEPS:
                run_undisturbed(step, undisturbed, {}, cluster)
            seconds = run_undisturbed("train", undisturbed, settings, cluster)
        expected = describe_run(find_run(undisturbed), folder / "aside.pt")
        while victims:
            rounds += 1
            output = folder / f"disturbed{rounds}"
            copy_data(undisturbed, output)
            moments += run_disturbed(output, settings, cluster, draw, victims)
            check_same(expected, output, folder / "aside.pt")
    return {
        "kills": len(moments),
        "killed": dict(Counter(each["victim"] for each in moments)),
        "moments": moments,
        "rounds": rounds,
        "steps": len(expected["steps"]) - 1,
        "compared": len(expected),
        "identical": True,
        "undisturbed_s": round(seconds, 1),
    }


if __name__ == "__main__":
    main("chaos_training", __doc__, run_chaos, kills=12, seed=0)
