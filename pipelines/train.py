"""Fine-tunes the Wan transformer with the reference alignment loss. The steps before it must be done."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, load_config, make_parser, run_command  # noqa: E402


def main() -> None:
    """Parses the flags, runs the step and says where its result is."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only find out whether it would run, how long and in how much memory"
    )
    arguments = parser.parse_args()

    def work() -> None:
        from refalign.run import check_train, run_stages

        if arguments.check:
            check_train(*load_config(arguments))
        else:
            run_stages(*load_config(arguments), only="train")

    leave(run_command(work))


if __name__ == "__main__":
    main()
