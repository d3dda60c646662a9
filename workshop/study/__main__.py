"""Does reference alignment help? Paired trainings of the toy model, read by its judge. The endpoint is fixed beforehand.

    for step in subjects pairs shards; do python pipelines/$step.py --preset toy_from_base --output runs/study_world \\
        --set input.world_videos=2400 --set input.world_seed=3001 --set input.world_split=train; done    # once: some data
    python -m workshop.study pilot  --shards SHARDS --subjects SUBJECTS --seeds 3    # settings of every arm, and power
    python -m workshop.study main   --shards SHARDS --subjects SUBJECTS --seeds 8
    python -m workshop.study report                                                     # table, figure, verdict

``arms.py`` says what is compared and what decides. Each arm, seed, kind of references and settings is a job with one JSON, which
is made once: after a kill the same command goes on. Every arm starts from the base that never saw a reference, with the text
encoder frozen. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from pydantic import BaseModel

from refalign.config.presets import load_preset
from refalign.errors import ConfigError, RefAlignError
from refalign.io.storage import load_json
from refalign.io.writing import write_json
from refalign.models.dinov3 import VisionEncoder
from refalign.toy import WEIGHTS_FOLDER
from workshop.study.arms import ARMS, GRID, PRIMARY, Budget, Job, plan_main, plan_pilot
from workshop.study.figures import write_report
from workshop.study.report import choose_settings
from workshop.study.results import load_results
from workshop.study.run import Place, is_done, run_job
from workshop.study.targets import Kind, derive_shards, encode_again, encode_frames, load_clips, shuffle_targets
from workshop.weights.initial_weights import make_vision_encoder

BUDGETS = {"pilot": Budget(steps=300, points=1, per_tier=3, curve=()), "main": Budget()}


class Plan(BaseModel):
    """What a phase runs, kept before its first run; ``commands`` grows."""

    primary: str = PRIMARY
    budget: Budget
    settings: dict[str, str] = {}
    commands: list[str] = []

    @classmethod
    def load(cls, output: Path, phase: str) -> Plan | None:
        """The plan that a phase began with, if it began."""
        kept = load_json(str(output / f"plan-{phase}.json"))
        return cls.model_validate(kept) if kept else None


def find_shards(arguments: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Shards by kind of target, made if they are missing, and for each arm that cannot run the reason."""
    shards, not_run = {"own": arguments.shards}, {}
    for arm in arguments.arms:
        kind = ARMS[arm].targets
        try:
            shards[kind] = shards.get(kind) or make_shards(arguments, kind)
        except RefAlignError as error:
            not_run[arm] = str(error)
            print(f"{arm}: not run: {error}", flush=True)
    return shards, not_run


def make_shards(arguments: argparse.Namespace, kind: Kind) -> Path:
    """Shards with other targets.

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
    folder = arguments.supervised_encoder if kind == "supervised" else arguments.vision_encoder
    if folder is None:
        advice = "python -m workshop.weights.train_vision_encoder --supervised FOLDER trains one"
        raise ConfigError(f"no --supervised-encoder; {advice}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = VisionEncoder.from_pretrained(str(folder), device=device)
    if kind == "random":
        encoder = VisionEncoder(make_vision_encoder(seed=1).to(device))
    print(f"making targets of kind {kind!r}, once", flush=True)
    encode = encode_frames if kind == "frames" else encode_again
    change = encode(load_clips(arguments.subjects), encoder, load_preset("toy_from_base"))
    return derive_shards(arguments.shards, target, kind, change)


def freeze_plan(output: Path, phase: str, budget: Budget, jobs: list[Job]) -> None:
    """Writes the plan before the first run of a phase; later commands are added to it.

    Raises:
        ConfigError: the phase began under another plan.
    """
    settings = {job.arm: job.settings.name for job in jobs} if phase == "main" else {}
    path, plan = output / f"plan-{phase}.json", Plan.load(output, phase) or Plan(budget=budget)
    if (plan.primary, plan.budget) != (PRIMARY, budget):
        raise ConfigError(f"{path}: this phase began with {plan.budget}, now {budget}; use another --output.")
    if changed := [arm for arm, name in settings.items() if plan.settings.get(arm, name) != name]:
        raise ConfigError(f"{path}: settings of {', '.join(changed)} were others when this phase began; use another --output.")
    command = shlex.join(["python", "-m", "workshop.study", *sys.argv[1:]])
    plan = Plan(budget=budget, settings=plan.settings | settings, commands=list(dict.fromkeys([*plan.commands, command])))
    write_json(path, plan.model_dump())


def tell_commands(output: Path) -> str:
    """The commands that led to the results, and the one that reads them."""
    commands = [command for phase in BUDGETS if (plan := Plan.load(output, phase)) for command in plan.commands]
    return "\n".join([*commands, f"python -m workshop.study report --output {output}"])


def run_phase(arguments: argparse.Namespace) -> None:
    """Runs the unfinished jobs of a phase, and starts none after ``--hours``."""
    phase, output = arguments.command, arguments.output
    changes = {name: value for name in vars(BUDGETS[phase]) if (value := getattr(arguments, name)) is not None}
    budget = Plan.model_validate({"budget": vars(BUDGETS[phase]) | changes}).budget
    shards, not_run = find_shards(arguments)
    arms = [arm for arm in arguments.arms if arm not in not_run]
    if phase == "pilot":
        jobs = plan_pilot(arms, arguments.references, arguments.seeds, GRID[: arguments.grid])
    else:
        jobs = plan_main(arms, arguments.references, arguments.seeds, choose_settings(load_results(output)))
    freeze_plan(output, phase, budget, jobs)
    place = Place(output, arguments.start, shards)
    write_json(output / "not_run.json", (load_json(str(output / "not_run.json")) or {}) | not_run)
    todo, started = [job for job in jobs if not is_done(place, job)], time.monotonic()
    print(f"{phase}: {len(jobs)} jobs, {len(todo)} to do", flush=True)
    for number, job in enumerate(todo, 1):
        if time.monotonic() - started > arguments.hours * 3600:
            print(f"stopped after {arguments.hours} hours; the same command goes on", flush=True)
            return
        run_job(place, load_preset("toy_from_base"), job, budget)
        print(f"{number}/{len(todo)} {job.name}: done, {time.monotonic() - started:.0f} s so far", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pilot", "main", "report"))
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--shards", type=Path, help="a finished shards step with stored targets")
    parser.add_argument("--subjects", type=Path, help="its subjects step, whose crops other targets are made from")
    parser.add_argument("--start", type=Path, default=WEIGHTS_FOLDER / "wan", help="base weights that every arm starts from")
    encoder = "vision encoder of the shards' own targets"
    parser.add_argument("--vision-encoder", type=Path, default=WEIGHTS_FOLDER / "dinov3", help=encoder)
    parser.add_argument("--supervised-encoder", type=Path, help="vision encoder of the upper bound")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--references", nargs="+", choices=("cross_pair", "in_pair"), default=["cross_pair", "in_pair"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grid", type=int, default=len(GRID), help="number of points of the pilot's grid, from its first")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--points", type=int, help="evaluations per run")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of subjects of the prompts")
    parser.add_argument("--per-tier", type=int)
    parser.add_argument("--curve", type=float, nargs="*", help="further reference guidance scales at the last step")
    parser.add_argument("--inference-steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--hours", type=float, default=12.0, help="no job is started after so many hours")
    arguments = parser.parse_args()
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
