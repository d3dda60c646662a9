"""Says what a data set would take: storage, GPU-hours, GPUs that fit, hours and cost. Nothing is fetched, read or started."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, run_command  # noqa: E402
from refalign.config import apply_overrides  # noqa: E402
from refalign.config.presets import PRESETS, load_preset  # noqa: E402
from refalign.estimates.plan import Assumptions, make_plan  # noqa: E402


def main() -> None:
    """Parses the flags, which are the fields of `Assumptions`, and prints the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="wan2_1_1_3b", help=f"where settings start from: {', '.join(PRESETS)}")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting; repeatable")
    for field in Assumptions.model_fields.values():
        parser.add_argument(str(field.alias), default=field.default, metavar="VALUE", help=field.description)
    parser.add_argument("--json", action="store_true", help="print plain values")
    arguments = vars(parser.parse_args())

    def work() -> None:
        config = apply_overrides(load_preset(arguments["preset"]), arguments["set"])
        plan = make_plan(config, Assumptions.of(**{name: arguments[name] for name in Assumptions.model_fields}))
        print(json.dumps(asdict(plan), indent=2) if arguments["json"] else plan.describe())

    leave(run_command(work))


if __name__ == "__main__":
    main()
