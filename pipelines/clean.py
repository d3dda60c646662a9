"""Lists the step folders that no current story refers to, with their sizes; --remove deletes them."""

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
    arguments = parser.parse_args()

    def work() -> None:
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


if __name__ == "__main__":
    main()
