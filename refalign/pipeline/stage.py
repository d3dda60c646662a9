"""The contract of a stage: what it depends on, the parts that it is cut into, who makes a part, and what is recorded at the end.

`refalign.stages.STAGES` lists the stages of a run in order, and `refalign.run` goes through them. A stage knows its own folder
(`Step`) and the manifests of those before it (`Run.manifest_of`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, cast

from pydantic import TypeAdapter
from typing_extensions import TypeVar  # typing's has no default before Python 3.13

from refalign.config import RunConfig
from refalign.pipeline.outcomes import Commit, Manifest, Outcome, count_outcomes
from refalign.pipeline.outcomes import PartsManifest as PartsManifest  # stages take all of the contract from here
from refalign.pipeline.ray_data import W, Worker, run_parts
from refalign.pipeline.steps import Step

M = TypeVar("M", bound=Manifest)
C = TypeVar("C", default=Commit)


@dataclass(frozen=True)
class Inputs:
    """All that a stage's output depends on. The folder is named by it.

    Attributes:
        settings: sections, plain values, and fingerprints of the data.
        recipe: those that are not the data. Versions of one stage have it in common.
    """

    settings: tuple[object, ...]
    recipe: tuple[object, ...] = ()


class Run:
    """What stages see of a run.

    Attributes:
        steps: the folder of each stage so far, by its name.
        manifests: of the finished ones.
        locations: where each video of the present input lies now, by its id.
        tracker: the MLflow run, open while a stage works.
    """

    def __init__(self, config: RunConfig, output: Path) -> None:
        self.config, self.output = config, output
        self.steps: dict[str, Step] = {}
        self.manifests: dict[str, Manifest] = {}
        self.locations: dict[str, str] = {}
        self.tracker: Any = None

    def step_of(self, stage: type[Stage[Any]]) -> Step:
        """The folder of an earlier stage."""
        return self.steps[stage.name]

    def manifest_of(self, stage: type[Stage[M]]) -> M:
        """What an earlier stage recorded."""
        return cast(M, self.manifests[stage.name])


class Stage(ABC, Generic[M]):
    """One stage of a run; an object of it serves one run.

    Attributes:
        name: of its folders, of its MLflow run, and of its pool ``cluster.<name>``.
        manifest: the class of what it records.
        sections: of the settings, shown as params of its MLflow run.
        parts_in_store: its parts go to ``storage.parts`` if that is set.
        needs_services: Ray and MLflow are started before it works.
    """

    name: ClassVar[str]
    manifest: ClassVar[type[Manifest]]
    sections: ClassVar[tuple[str, ...]] = ()
    parts_in_store: ClassVar[bool] = False
    needs_services: ClassVar[bool] = True

    def is_wanted(self, config: RunConfig) -> bool:
        """Whether a run with this config has the stage."""
        return True

    @abstractmethod
    def find_inputs(self, run: Run) -> Inputs:
        """All that names the folder. Called when the stages before are done."""

    @abstractmethod
    def perform(self, run: Run, step: Step) -> M:
        """Does the work that is not done yet and returns what is to be recorded; the caller writes it."""

    @abstractmethod
    def describe(self, manifest: M) -> str:
        """The stage's line on the terminal."""

    def accept(self, run: Run, manifest: M) -> None:
        """Looks at a finished manifest before the next stage.

        Raises:
            DataError: the stages after it have nothing to work on.
        """

    def is_still_there(self, run: Run, manifest: M) -> bool:
        """Whether what the manifest describes still exists outside of the folder."""
        return True

    def list_files(self) -> Mapping[str, str] | None:
        """Where the files of the items lie, by item; faults are tried again if a file changed. None: it reads none."""
        return None

    def summarise(self, manifest: M) -> Mapping[str, object]:
        """What it adds to ``summary.json``."""
        return {}

    def log(self, run: Run, step: Step, manifest: M) -> None:
        """Sends data sets, pictures and videos to MLflow, which has the manifest already."""


class PartStage(Stage[M], Generic[M, W, C]):
    """A stage that is cut into parts, which workers make.

    ``W``, the work behind a part, is a dataclass or plain values; it travels to the worker as JSON. ``C`` is what `finish` reads
    of a part's commit.

    Attributes:
        worker: who makes a part.
        commit: ``C``: a pydantic model or a dataclass, by default the whole record.
    """

    worker: ClassVar[type[Worker[Any]]]
    commit: ClassVar[type] = Commit

    @abstractmethod
    def plan(self, run: Run, step: Step) -> dict[str, W]:
        """Part name to the work behind it."""

    @abstractmethod
    def finish(self, run: Run, step: Step, plan: Mapping[str, W], commits: Sequence[C]) -> M:
        """What is recorded, from the commits in the order of the plan."""

    def digest(self, work: W) -> list[str] | None:
        """What a part's commit must say of its ``work``, otherwise the part is made again. None: anything."""
        return None

    def perform(self, run: Run, step: Step) -> M:
        plan = self.plan(run, step)
        works = {name: digests for name, work in plan.items() if (digests := self.digest(work)) is not None}
        commits = run_parts(step, plan, self.worker, run.config, label=self.name, works=works)
        read = Commit if self.commit is Commit else TypeAdapter(self.commit).validate_python
        return self.finish(run, step, plan, cast(list[C], [read(commit) for commit in commits]))


def count_all(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """``counts`` and ``outcomes`` of a manifest."""
    outcomes = tuple(outcomes)
    return {"counts": count_outcomes(outcomes), "outcomes": tuple(outcome for outcome in outcomes if outcome.reason)}
