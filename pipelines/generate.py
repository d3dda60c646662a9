"""Makes a video from a prompt and reference pictures with a registered model or an exported folder."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, run_command  # noqa: E402


def main() -> None:
    """Parses the flags, generates the video and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="models:/refalign@challenger, models:/refalign/3, or an exported folder")
    parser.add_argument("--tracking", help="MLflow URI that holds the model (default: MLFLOW_TRACKING_URI, else runs/toy)")
    parser.add_argument("--prompt", required=True, help="what happens in the video")
    parser.add_argument("--reference", type=Path, action="append", default=[], metavar="PICTURE", help="a subject; repeatable")
    parser.add_argument("--output", type=Path, default=Path("out.mp4"), metavar="FILE", help="the mp4 to write")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same video")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="num_frames, height, width, guidance_scale ..."
    )
    arguments = parser.parse_args()

    def work() -> None:
        from refalign.generation.generate import generate_file

        generate_file(
            arguments.model,
            prompt=arguments.prompt,
            references=arguments.reference,
            output=arguments.output,
            seed=arguments.seed,
            settings=arguments.set,
            tracking_uri=arguments.tracking,
        )
        print(f"wrote {arguments.output.resolve()}")

    leave(run_command(work))


if __name__ == "__main__":
    main()
