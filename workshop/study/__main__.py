"""Does reference alignment help? Paired trainings of the toy model, read by its judge; the endpoint is fixed beforehand.

    for step in subjects pairs shards; do python pipelines/$step.py --preset toy_from_base --output runs/study_world \\
        --set input.world_videos=2400 --set input.world_seed=3001 --set input.world_split=train; done    # once: some data
    python -m workshop.study pilot  --shards SHARDS --subjects SUBJECTS --seeds 3    # settings for every arm alike, and power
    python -m workshop.study main   --shards SHARDS --subjects SUBJECTS --seeds 8
    python -m workshop.study report                                                     # table, figure, verdict

What is compared and what decides is in ``arms.py``. One JSON per arm, seed, kind of references and settings; what is there
is not made again, so that any command goes on after a kill. Every arm starts from the base that never saw a reference, with the
text encoder frozen. No Ray is needed; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from refalign.config.presets import load_preset
from refalign.errors import ConfigError, RefAlignError
from refalign.io.storage import load_json
from refalign.io.writing import write_json
from refalign.toy import WEIGHTS_FOLDER
from workshop.study.arms import ARMS, GRID, PRIMARY, Budget, Job, plan_main, plan_pilot
from workshop.study.figures import write_report
from workshop.study.report import choose_settings
from workshop.study.results import load_results
from workshop.study.run import Place, is_done, run_job
from workshop.study.targets import derive_shards, encode_again, encode_frames, load_clips, load_pictures, shuffle_targets

BUDGETS = {"pilot": Budget(steps=300, points=1, per_tier=3, curve=()), "main": Budget()}


def find_shards(arguments: argparse.Namespace, arms: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Shards by kind of target, made where they are missing, and for each arm that cannot run the reason."""
    shards: dict[str, Path] = {"own": arguments.shards}
    not_run: dict[str, str] = {}
    for arm in arms:
        kind = ARMS[arm].targets
        if kind not in shards:
            try:
                shards[kind] = make_shards(arguments, kind)
            except RefAlignError as error:
                not_run[arm] = str(error)
                print(f"{arm}: not run: {error}", flush=True)
    return shards, not_run


def make_shards(arguments: argparse.Namespace, kind: str) -> Path:
    """Shards with other targets, or the given ones where they hold frame tokens already.

    Raises:
        RefAlignError: what they are made from is missing.
    """
    target = arguments.output / "shards" / kind
    if (target / "manifest.json").is_file():
        return target
    if kind == "shuffled":
        return derive_shards(arguments.shards, target, kind, shuffle_targets)
    if arguments.subjects is None:
        raise ConfigError(f"targets of kind {kind!r} are made from the crops of the subjects step; give --subjects.")
    config, clips = load_preset("toy_from_base"), load_clips(arguments.subjects)
    print(f"making targets of kind {kind!r}, once", flush=True)
    if kind == "frames":
        return derive_shards(arguments.shards, target, kind, encode_frames(clips, load_encoder(arguments, "own"), config))
    change = encode_again(load_pictures(clips), load_encoder(arguments, kind), config.video.height_px, config.video.width_px)
    return derive_shards(arguments.shards, target, kind, change)


def load_encoder(arguments: argparse.Namespace, kind: str) -> Any:
    """The vision encoder behind a kind of target.

    Raises:
        ConfigError: no folder of a supervised one was given.
    """
    from refalign.models.dinov3 import VisionEncoder
    from workshop.weights.initial_weights import make_vision_encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "random":
        return VisionEncoder(make_vision_encoder(seed=1).to(device))
    folder = arguments.vision_encoder if kind == "own" else arguments.supervised_encoder
    if folder is None:
        command = "python -m workshop.study.teacher --output FOLDER"
        raise ConfigError(f"no --supervised-encoder; {command} makes one.")
    return VisionEncoder.from_pretrained(str(folder), device=device)


def find_start(arguments: argparse.Namespace) -> Path:
    """The model that every arm starts from: that of ``--start``, or its parts around another Transformer."""
    if arguments.transformer is None:
        return arguments.start
    start = arguments.output / "start"
    shutil.copytree(arguments.start, start, dirs_exist_ok=True)
    shutil.copytree(arguments.transformer, start / "transformer", dirs_exist_ok=True)
    return start


def freeze_plan(output: Path, phase: str, budget: Budget, jobs: list[Job]) -> None:
    """Keeps what is to be run before the first run of a phase, and each command that ran some of it.

    Raises:
        ConfigError: the phase began under another plan.
    """
    settings = {job.arm: job.settings.name for job in jobs} if phase == "main" else {}
    plan = json.loads(json.dumps({"primary": PRIMARY, "budget": vars(budget), "settings": settings, "commands": []}))
    path = output / f"plan-{phase}.json"
    before = load_json(str(path)) or plan
    if (before["primary"], before["budget"]) != (plan["primary"], plan["budget"]):
        raise ConfigError(f"{path}: this phase began with {before['budget']}, now {plan['budget']}; use another --output.")
    if changed := [arm for arm, name in settings.items() if before["settings"].get(arm, name) != name]:
        raise ConfigError(f"{path}: settings of {', '.join(changed)} were others when this phase began; use another --output.")
    commands = dict.fromkeys([*before["commands"], shlex.join(["python", "-m", "workshop.study", *sys.argv[1:]])])
    write_json(path, plan | {"settings": before["settings"] | settings, "commands": list(commands)})


def tell_commands(output: Path) -> str:
    """The commands that led to the results, and the one that reads them."""
    plans = [load_json(str(output / f"plan-{phase}.json")) or {} for phase in BUDGETS]
    report = f"python -m workshop.study report --output {output}"
    return "\n".join([*(command for plan in plans for command in plan.get("commands", [])), report])


def run_phase(arguments: argparse.Namespace) -> None:
    """Every job of a phase that is not done, until they are or the hours are over."""
    budget = BUDGETS[arguments.command]
    changes = {name: getattr(arguments, name) for name in vars(budget)}
    budget = Budget(**vars(budget) | {name: value for name, value in changes.items() if value is not None})
    shards, not_run = find_shards(arguments, arguments.arms)
    arms = [arm for arm in arguments.arms if arm not in not_run]
    if arguments.command == "pilot":
        jobs = plan_pilot(arms, arguments.references, arguments.seeds, GRID[: arguments.grid])
    else:
        jobs = plan_main(arms, arguments.references, arguments.seeds, choose_settings(load_results(arguments.output)))
    freeze_plan(arguments.output, arguments.command, budget, jobs)
    tracking = arguments.tracking or f"sqlite:///{arguments.output.resolve()}/mlflow.db"
    place = Place(arguments.output, find_start(arguments), shards, tracking)
    write_json(arguments.output / "not_run.json", (load_json(str(arguments.output / "not_run.json")) or {}) | not_run)
    todo, started = [job for job in jobs if not is_done(place, job)], time.monotonic()
    print(f"{arguments.command}: {len(jobs)} jobs, {len(todo)} to do", flush=True)
    for number, job in enumerate(todo, 1):
        if time.monotonic() - started > arguments.hours * 3600:
            print(f"stopped after {arguments.hours} hours; the same command goes on", flush=True)
            return
        run_job(place, load_preset("toy_from_base"), job, budget)
        print(f"{number}/{len(todo)} {job.name}: done, {time.monotonic() - started:.0f} s so far", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pilot", "main", "report"))
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--shards", type=Path, help="a finished shards step with stored targets")
    parser.add_argument("--subjects", type=Path, help="its subjects step, whose crops other targets are made from")
    parser.add_argument("--start", type=Path, default=WEIGHTS_FOLDER / "wan", help="base weights that every arm starts from")
    parser.add_argument("--transformer", type=Path, help="folder of another Transformer to start from")
    parser.add_argument(
        "--vision-encoder", type=Path, default=WEIGHTS_FOLDER / "dinov3", help="the one behind the shards' targets"
    )
    parser.add_argument("--supervised-encoder", type=Path, help="the one behind the upper bound")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--references", nargs="+", choices=("cross_pair", "in_pair"), default=["cross_pair", "in_pair"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grid", type=int, default=len(GRID), help="the first so many points of the pilot's grid")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--points", type=int, help="evaluations per run")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of subjects that prompts have")
    parser.add_argument("--per-tier", type=int)
    parser.add_argument("--curve", type=float, nargs="*", help="further reference guidances at the last step")
    parser.add_argument("--inference-steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--hours", type=float, default=12.0, help="no job is started after so many")
    parser.add_argument("--tracking", help="MLflow's address; by default a database in the output folder")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.command == "report":
        not_run = load_json(str(arguments.output / "not_run.json")) or {}
        print(write_report(load_results(arguments.output), arguments.output, tell_commands(arguments.output), not_run))
        return
    if arguments.shards is None:
        parser.error("--shards is needed")
    run_phase(arguments)


if __name__ == "__main__":
    main()
