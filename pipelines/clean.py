"""Lists the runs of an output folder, and the step folders that no run needs; --remove deletes those folders.

With --quarantined it lists what was quarantined instead; --retry lets the next run of the same command try that again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, run_command  # noqa: E402


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/toy"), metavar="FOLDER", help="output folder of the runs")
    parser.add_argument("--forget", metavar="RUN", help="count the step folders of this run as not needed; delete its reports")
    parser.add_argument("--remove", action="store_true", help="delete the step folders that no run needs")
    parser.add_argument("--quarantined", action="store_true", help="list what was quarantined, and why")
    parser.add_argument("--retry", action="store_true", help="with --quarantined: let the next run try all of it again")
    arguments = parser.parse_args()
    if arguments.quarantined or arguments.retry:
        if arguments.remove or arguments.forget:
            parser.error("--remove and --forget delete; they do not go with --quarantined or --retry")
        leave(run_command(lambda: list_quarantined(arguments.output, retry=arguments.retry)))
    leave(run_command(lambda: clean(arguments.output, arguments.forget, remove=arguments.remove)))


def clean(output: Path, forget: str | None, *, remove: bool) -> None:
    """Lists, and removes what is asked for."""
    from refalign.pipeline.clean import find_unused, forget_run, list_runs, remove_folder

    if forget:
        forget_run(output, forget)
    runs = list_runs(output)
    for run in runs:
        head, note = run.head, f"{'current ' if run.is_current else ''}{run.head.model or ''}"
        print(f"{head.ended or 'unknown time':25}  {head.status:9} {head.name or '?'}  {_show(run.size_bytes)}  {note}".rstrip())
    unused = find_unused(output, runs)
    for folder, size_bytes in unused:
        print(f"{'not needed by any run':25}  {folder.name}  {_show(size_bytes)}")
        if remove:
            remove_folder(folder)
    freed = _show(sum(size_bytes for _, size_bytes in unused)).strip()
    hint = f"removed, {freed} freed" if remove else f"; --remove deletes them and frees {freed}" if unused else ""
    print(f"{len(runs)} runs, {len(unused)} step folders that no run needs{' ' if remove else ''}{hint}")


def _show(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:10.1f} MiB"


def list_quarantined(output: Path, *, retry: bool) -> None:
    """Prints a line for each item; with ``retry`` the parts that hold them are made again."""
    from refalign.pipeline.retries import iter_quarantined, retry_quarantined

    found = list(iter_quarantined(output))
    for step, _, outcome in found:
        print(f"{step.name:8}  {outcome.level:5}  {outcome.reason:14}  {outcome.message}")
    if retry:
        print(f"{len(found)} quarantined; the next run makes {retry_quarantined(output)} parts again")
    else:
        print(f"{len(found)} quarantined{'; --retry lets the next run try them again' if found else ''}")


if __name__ == "__main__":
    main()
