"""Finds each subject again in other clips of its source group. The steps before it must be done."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, load_config, make_parser, run_command  # noqa: E402


def main() -> None:
    """Parses the flags, runs the step and says where its result is."""
    arguments = make_parser(__doc__).parse_args()

    def work() -> None:
        from refalign.run import run_story

        run_story(*load_config(arguments), only="pairs")

    leave(run_command(work))


if __name__ == "__main__":
    main()
