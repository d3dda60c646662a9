"""Makes the videos of OpenS2V-Eval with a model and scores them. With --scores it only reads the files of an evaluator."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, load_config, make_parser, run_command  # noqa: E402


def main() -> None:
    """Parses the flags, makes the videos and prints the scores."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="models:/refalign@champion, or an exported folder")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="Open-Domain_Eval.json or Human-Domain_Eval.json")
    parser.add_argument("--scores", type=Path, metavar="FOLDER", help="only read the evaluator's JSON files in this folder")
    parser.add_argument("--domain", choices=("open", "human"), default="open", help="of --scores (default: open)")
    arguments = parser.parse_args()
    if not arguments.scores and not (arguments.model and arguments.prompts):
        parser.error("give --model and --prompts, or --scores")

    def work() -> None:
        from refalign.evaluation.opens2v import run_opens2v, score_folder
        from refalign.generation.generate import find_model

        if arguments.scores:
            print(score_folder(arguments.scores, arguments.domain).describe())
            return
        config, output = load_config(arguments)
        manifest = run_opens2v(config, find_model(arguments.model, config.tracking.uri), arguments.prompts, output)
        print(f"videos: {manifest.folder}\n{manifest.describe()}")

    leave(run_command(work))


if __name__ == "__main__":
    main()
