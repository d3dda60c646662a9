"""Kills curation again and again and checks that nothing shows: the same bytes as an undisturbed run, every clip accounted for.

    python benchmarks/chaos_curation.py --kills 20

Subjects, pairs and shards run on a cluster of two raylets. At random moments one of them dies by SIGKILL: the driver, an actor,
or a whole node (which is then replaced). The same command is started again until the step is done; where all steps are done
before there were enough kills, a new output folder begins.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
from chaos import ATTEMPT_TIMEOUT_S, find_differing, kill, main, run_undisturbed, start
from local_cluster import LocalCluster, local_cluster

from refalign.toy.videos import write_world

STEPS = ("subjects", "pairs", "shards")
VICTIMS = ("driver", "actor", "node")
MANY_PARTS = {
    "curation.videos_per_part": 2,
    "shards.samples_per_shard": 3,
    "cluster.subjects.max_actors": 2,
    "cluster.shards.max_actors": 2,
}
_ACTOR_WAIT_S = 15


def take_input(output: Path) -> tuple[str, str]:
    """The flags that name the videos beside an output folder."""
    return "--input", str(output.with_name("videos"))


def kill_actor(driver: subprocess.Popen[bytes], cluster: LocalCluster, draw: random.Random) -> bool:
    """Waits for actors, which are there for the shorter part of a step, and some seconds more, so that they are at work."""
    while driver.poll() is None:
        if not cluster.find_processes("ray::MapWorker"):
            time.sleep(0.2)
            continue
        time.sleep(draw.uniform(0, _ACTOR_WAIT_S))
        actors = cluster.find_processes("ray::MapWorker")
        try:
            draw.choice(actors).kill()
        except (IndexError, psutil.NoSuchProcess):
            continue  # it has ended meanwhile
        return True
    return False


def run_disturbed(
    output: Path, cluster: LocalCluster, seconds: dict[str, float], draw: random.Random, wanted: int
) -> Counter[str]:
    """All steps, with up to ``wanted`` kills; who was killed how often."""
    killed: Counter[str] = Counter()
    for step in STEPS:
        for _ in range(200):
            driver = start(step, output, MANY_PARTS, cluster, *take_input(output))
            while killed.total() < wanted:
                try:
                    driver.wait(draw.uniform(0.2, 1.0) * seconds[step])
                    break
                except subprocess.TimeoutExpired:
                    victim = draw.choice(VICTIMS)
                    if victim != "actor":
                        kill(victim, driver, cluster)
                    elif not kill_actor(driver, cluster, draw):
                        continue
                    killed[victim] += 1
                    print(f"kill {killed.total()}: {victim} in {step}", flush=True)
            if driver.wait(ATTEMPT_TIMEOUT_S) == 0:
                break
        else:
            raise AssertionError(f"{step} was not done after 200 attempts; see {output.with_suffix('.log')}")
    return killed


def digest_output(output: Path) -> dict[str, str]:
    """Relative path -> sha256 of all that the steps left: parts, commits and manifests."""
    files = [path for step in STEPS for path in sorted(output.glob(f"{step}-*/**/*")) if path.is_file() and path.name != "lease"]
    return {path.relative_to(output).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def check_accounts(output: Path) -> dict[str, Any]:
    """planned = written + filtered + quarantined at every level; the counts."""
    counts = {}
    for step in STEPS:
        (manifest,) = output.glob(f"{step}-*/manifest.json")
        for level, count in json.loads(manifest.read_text()).get("counts", {}).items():
            lost = sum(count["filtered"].values()) + sum(count["quarantined"].values())
            assert count["planned"] == count["written"] + lost, (step, level, count)
            counts[f"{step}.{level}"] = count
    return counts


def run_chaos(folder: Path, *, kills: int, videos: int, seed: int = 0) -> dict[str, Any]:
    """The whole experiment; raises where a run differs from the undisturbed one."""
    draw = random.Random(seed)
    write_world(folder / "videos", num_videos=videos, seed=seed, split="heldout")
    killed: Counter[str] = Counter()
    rounds = 0
    with local_cluster(folder / "cluster", head_cpus=1, nodes=1) as cluster:
        output = folder / "undisturbed"
        seconds = {step: run_undisturbed(step, output, MANY_PARTS, cluster, *take_input(output)) for step in STEPS}
        expected = digest_output(output)
        while killed.total() < kills:
            rounds += 1
            output = folder / f"disturbed{rounds}"
            killed += run_disturbed(output, cluster, seconds, draw, kills - killed.total())
            differing = find_differing(expected, digest_output(output))
            assert not differing, f"{output}: {differing} differ from the undisturbed run"
            counts = check_accounts(output)
            shutil.rmtree(output)
    return {
        "kills": killed.total(),
        "killed": dict(killed),
        "rounds": rounds,
        "files_compared": len(expected),
        "identical": True,
        "counts": counts,
        "undisturbed_s": {step: round(value, 1) for step, value in seconds.items()},
    }


if __name__ == "__main__":
    main("chaos_curation", __doc__, run_chaos, kills=20, videos=24, seed=0)
