"""The whole story: videos to a registered reference-to-video model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, load_config, make_parser, run_command  # noqa: E402


def main() -> None:
    """Parses the flags, runs the step and says where its result is."""
    arguments = make_parser(__doc__).parse_args()

    def work() -> None:
        from refalign.pipeline.summary import print_ending
        from refalign.run import run_stages

        print_ending(run_stages(*load_config(arguments)))

    leave(run_command(work))


if __name__ == "__main__":
    main()
