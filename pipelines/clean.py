"""Lists the step folders that no current story refers to, with their sizes; --remove deletes them.

With --quarantined it lists what was quarantined instead; --retry lets the next run of the same command try that again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, run_command  # noqa: E402


def main() -> None:
    """Parses the flags and lists or removes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/toy"), metavar="FOLDER", help="output folder of the run")
    parser.add_argument("--remove", action="store_true", help="delete what is listed")
    parser.add_argument("--quarantined", action="store_true", help="list what was quarantined, and why")
    parser.add_argument("--retry", action="store_true", help="of --quarantined: the next run tries all of it again")
    arguments = parser.parse_args()
    if arguments.remove and (arguments.quarantined or arguments.retry):
        parser.error("--remove deletes folders; it does not go with --quarantined or --retry")

    def work() -> None:
        if arguments.quarantined or arguments.retry:
            list_quarantined(arguments.output, retry=arguments.retry)
            return
        from refalign.cleaning import find_unused, remove_folder

        unused = find_unused(arguments.output)
        for folder, size_bytes in unused:
            print(f"{size_bytes / 2**20:10.1f} MiB  {folder}")
            if arguments.remove:
                remove_folder(folder)
        print(
            f"{len(unused)} unused step folders{' removed' if arguments.remove else '; --remove deletes them' if unused else ''}"
        )

    leave(run_command(work))


def list_quarantined(output: Path, *, retry: bool) -> None:
    """Prints a line for each item, and reopens the parts that hold them."""
    from refalign.retries import iter_quarantined, retry_quarantined

    found = list(iter_quarantined(output))
    for step, _, outcome in found:
        print(f"{step.name:8}  {outcome.level:5}  {outcome.reason:14}  {outcome.message}")
    if retry:
        print(f"{len(found)} quarantined; the next run makes {retry_quarantined(output)} parts again")
    else:
        print(f"{len(found)} quarantined{'; --retry lets the next run try them again' if found else ''}")


if __name__ == "__main__":
    main()
