"""Curates one input for several outputs in a process of its own: ``curate_program.py INPUT OUTPUT[=STORE] ...``."""

import sys
from contextlib import ExitStack
from pathlib import Path

from refalign.config import apply_overrides
from refalign.flow import Story, check_start
from refalign.parts import connect
from refalign.presets import toy_tiny


def main(where: str, *outputs: str) -> None:
    for output, _, store in (each.partition("=") for each in outputs):
        config = apply_overrides(
            toy_tiny(),
            [f"input.path={where}", "curation.videos_per_part=2", "shards.samples_per_shard=4"]
            + ([f"storage.parts={store}"] if store else []),
        )
        with ExitStack() as stack:
            check_start(config, Path(output))
            story = Story(config, Path(output), stack, None)
            story._subjects()
            story._pairs()
            story._shards()
            story.close("FINISHED")


if __name__ == "__main__":
    with connect(toy_tiny().cluster):  # one cluster for all
        main(*sys.argv[1:])
