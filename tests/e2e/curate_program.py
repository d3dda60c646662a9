"""Curates one input for several outputs in a process of its own.

curate_program.py INPUT (OUTPUT[=STORE] | +FOLDER) ... [--set section.field=value ...]; +FOLDER adds its files to the input.
"""

import argparse
import shutil
from contextlib import ExitStack
from pathlib import Path

from refalign.config import apply_overrides
from refalign.config.presets import toy_tiny
from refalign.pipeline.ray_data import connect
from refalign.run import Loop, check_start
from refalign.stages import Pairs, Shards, Subjects

_SETTINGS = ["curation.videos_per_part=2", "shards.samples_per_shard=4"]


def main(where: str, actions: list[str], settings: list[str]) -> None:
    for action in actions:
        if action.startswith("+"):
            shutil.copytree(action[1:], where, dirs_exist_ok=True)
            continue
        output, _, store = action.partition("=")
        settings_here = [f"input.path={where}", *_SETTINGS, *settings, *([f"storage.parts={store}"] if store else [])]
        config = apply_overrides(toy_tiny(), settings_here)
        with ExitStack() as stack:
            check_start(config, Path(output))
            loop = Loop(config, Path(output), stack, stages=(Subjects, Pairs, Shards))
            loop.go_through()
            loop.close("FINISHED")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input")
    parser.add_argument("actions", nargs="+")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    with connect(toy_tiny().cluster):  # one cluster for all
        main(arguments.input, arguments.actions, arguments.set)
