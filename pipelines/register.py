"""Registers the evaluated model with MLflow, or looks after the champion.

Without an action the register step runs; the steps before it must be done. promote compares the model of this output folder with
the champion, and makes it champion if evaluation.gate allows it. ask exports videos of both in pairs, so that people can choose
without knowing which is which. rollback gives the alias back to the previous champion. list prints all versions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, load_config, make_parser, run_command  # noqa: E402


def main() -> None:
    """Parses the flags, runs the action and prints its result."""
    parser = make_parser(__doc__)
    parser.add_argument("action", nargs="?", choices=["promote", "ask", "rollback", "list"], help="default: register")
    arguments = parser.parse_args()

    def register() -> None:
        from refalign.run import run_stages

        run_stages(*load_config(arguments), only="register")

    def act() -> None:
        from refalign.evaluation import promotion

        getattr(promotion, f"run_{arguments.action}")(*load_config(arguments))

    leave(run_command(act if arguments.action else register))


if __name__ == "__main__":
    main()
