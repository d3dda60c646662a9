"""Says what a data set would take: storage, GPU-hours, GPUs that fit, hours and cost. Nothing is fetched, read or started."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, number, run_command  # noqa: E402
from refalign.config.presets import PRESETS  # noqa: E402


def main() -> None:
    """Parses the flags and prints the plan."""
    positive, amount, share = number(above=0), number(at_least=0), number(above=0, at_most=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="wan2_1_1_3b", help=f"where settings start from: {', '.join(PRESETS)}")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting; repeatable")
    parser.add_argument("--clips", type=positive, help="number of clips (give this or --hours)")
    parser.add_argument("--hours", type=positive, help="hours of video, cut into clips of --clip-seconds without loss")
    parser.add_argument("--clip-seconds", type=positive, help="seconds of a clip; default: what the preset trains on")
    parser.add_argument("--subjects", type=positive, default=2, help="subjects in a clip, on average")
    parser.add_argument("--references", type=positive, help="stored pictures of each; default: its own and all from other clips")
    parser.add_argument("--caption-tokens", type=amount, default=100, help="tokens in a caption")
    parser.add_argument("--kept", type=share, default=1, help="share of the clips that is left after curation")
    parser.add_argument("--gpu", default="H100", help="kind of GPU")
    parser.add_argument("--gpu-memory-gib", type=positive, default=80, help="memory of one")
    parser.add_argument("--gpus", type=int, help="how many; default: training.parallel.ranks")
    parser.add_argument("--price", type=amount, help="of a GPU-hour")
    parser.add_argument("--mfu", type=share, default=0.3, help="share of its peak that is used; an assumption")
    parser.add_argument("--detector-fps", type=positive, default=50, help="frames per second and GPU; an assumption")
    parser.add_argument("--vae-megapixels", type=positive, default=8, help="encoded per second and GPU; an assumption")
    parser.add_argument("--json", action="store_true", help="print plain values")
    arguments = parser.parse_args()
    if (arguments.clips is None) == (arguments.hours is None):
        parser.error("give --clips or --hours, one of them")
    leave(run_command(lambda: plan(arguments)))


def plan(arguments: argparse.Namespace) -> None:
    """Makes the plan and prints it."""
    from refalign.config import apply_overrides
    from refalign.config.presets import load_preset
    from refalign.estimates.plan import DataSet, Machines, count_clips, describe_plan, make_plan

    config = apply_overrides(load_preset(arguments.preset), arguments.set)
    seconds = config.video.num_frames / config.video.fps if arguments.clip_seconds is None else arguments.clip_seconds
    references = 1 + config.pairs.max_references_per_subject if arguments.references is None else arguments.references
    clips = count_clips(clips=arguments.clips, hours=arguments.hours, clip_seconds=seconds)
    data = DataSet(clips, arguments.subjects, arguments.kept, references, arguments.caption_tokens)
    machines = Machines(
        gpu=arguments.gpu,
        memory_gib=arguments.gpu_memory_gib,
        mfu=arguments.mfu,
        detector_fps=arguments.detector_fps,
        vae_megapixels=arguments.vae_megapixels,
        gpus=arguments.gpus,
        price=arguments.price,
    )
    found = make_plan(config, data, machines)
    print(json.dumps(found, indent=2) if arguments.json else describe_plan(found))


if __name__ == "__main__":
    main()
