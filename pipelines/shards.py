"""Encodes clips, prompts and references into WebDataset shards; `remove` takes a source out again."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, load_config, make_parser, run_command, run_from_flags  # noqa: E402


def main() -> None:
    """Parses the flags, runs the step or the removal."""
    parser = make_parser(__doc__)
    parser.add_argument("action", nargs="?", choices=["remove"], help="take --source out of all clips, pairs and shards")
    parser.add_argument("--source", help="what to remove: a video's name, location or id, a source group, or a clip's id")
    parser.add_argument("--reason", default="", help="why, for the record")
    arguments = parser.parse_args()
    if bool(arguments.action) != bool(arguments.source):
        parser.error("remove needs --source, and --source needs remove")

    def work() -> None:
        if not arguments.action:
            run_from_flags(arguments, "shards")
            return
        from refalign.takedown import run_takedown

        config, output = load_config(arguments)
        run_takedown(output, arguments.source, reason=arguments.reason, tracking_uri=config.tracking.uri)

    leave(run_command(work))


if __name__ == "__main__":
    main()
