"""What each task of the schedule runs: one command of pipelines/ as one Ray job. No Airflow in here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import NotRequired, TypedDict

NOTHING_NEW = "register: done before, skipped"
"""What the register step prints if all steps are done for the present input, settings and models."""


@dataclass(frozen=True)
class Stage:
    """One task; ``accepted`` are the exit codes of its command that are results."""

    name: str
    script: str
    action: str = ""
    accepted: tuple[int, ...] = (0,)


class Params(TypedDict):
    """Of a DAG run; ``repository`` is the folder of the code on the cluster, ``settings`` a list of ``section.field=value``."""

    repository: str
    preset: str
    input: NotRequired[str]
    output: str
    settings: NotRequired[list[str]]
    force: NotRequired[bool]


CHECK = Stage("check_new_data", "register", accepted=(0, 1))
"""Registering needs all steps before it. Exit code 1: one is not done for the present input."""
STEPS = tuple(Stage(name, name) for name in ("subjects", "pairs", "shards", "train", "evaluate", "register"))
GATE = Stage("promote", "register", action="promote", accepted=(0, 3))
"""Exit code 3: the gate kept the champion."""

ENV_VARS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "120",
    "TQDM_MININTERVAL": "30",
}


def make_entrypoint(stage: Stage, params: Params) -> str:
    """The command line of a stage. All values are quoted: none is read by the shell.

    >>> make_entrypoint(GATE, {"repository": "/opt/refalign", "preset": "toy", "output": "/shared/runs/a b"})
    "python /opt/refalign/pipelines/register.py promote --preset toy --output '/shared/runs/a b'"
    """
    words = ["python", f"{params['repository'].rstrip('/')}/pipelines/{stage.script}.py"]
    words += [stage.action] if stage.action else []
    words += ["--preset", params["preset"]]
    words += ["--input", params["input"]] if params.get("input") else []
    words += ["--output", params["output"]]
    for setting in params.get("settings") or ():
        words += ["--set", setting]
    return shlex.join(words)


def is_nothing_new(exit_code: int | None, log: str) -> bool:
    """Whether the check found every step done. If it had to register a model, the gate has something to do."""
    return exit_code == 0 and NOTHING_NEW in log
