"""The contract of a stage: what it depends on, the parts that it is cut into, who makes one, and what is recorded at the end.

`refalign.stages.STAGES` lists the stages of a run in order, and `refalign.run` goes through them. A stage knows the manifests of
those before it (`Run.manifest_of`) and its own folder (`Step`); nothing else of a run travels between stages.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from pydantic import BaseModel, ConfigDict

from refalign.config import RunConfig
from refalign.pipeline.outcomes import Counted, Outcome, count_outcomes
from refalign.pipeline.ray_data import run_parts
from refalign.pipeline.steps import Step


class Manifest(BaseModel):
    """What a finished stage recorded: its ``manifest.json``."""

    model_config = ConfigDict(frozen=True)


class PartsManifest(Counted, Manifest):
    """Of a stage that is made of parts.

    Attributes:
        parts: names in the order of the plan.
        made_of: folders of the stages that these parts were made of.
        versions: folders of earlier versions that hold parts of this one.
    """

    parts: tuple[str, ...]
    made_of: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()


M = TypeVar("M", bound=Manifest)
W = TypeVar("W")
W_contra = TypeVar("W_contra", contravariant=True)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that a stage's output depends on; its folder is named by it.

    Attributes:
        settings: sections, plain values, and fingerprints of the data.
        recipe: those of them that are not the data: what versions of one stage have in common.
    """

    settings: tuple[Any, ...]
    recipe: tuple[Any, ...] = ()


class Run:
    """What stages see of a run.

    Attributes:
        steps: the folder of each stage so far, by its name.
        manifests: of the finished ones.
        locations: where each video of the present input lies, by its id; the path in a row is where it once lay.
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
        sections: of the settings, shown as params of its MLflow run, so that runs of one stage can be compared side by side.
        manifest: the class of what it records.
        parts_in_store: its parts go to ``storage.parts`` where that is set.
        needs_services: it works with Ray and MLflow, which are started before.
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
        """All that names the folder. The stages before are done, and what is found out here may be kept for `perform`."""

    @abstractmethod
    def perform(self, run: Run, step: Step) -> M:
        """Does the work and returns what is to be recorded; the caller writes it. What is finished already is not done again."""

    @abstractmethod
    def describe(self, manifest: M) -> str:
        """The stage's line on the terminal."""

    def accept(self, run: Run, manifest: M) -> None:
        """Looks at a finished manifest before the next stage.

        Raises:
            DataError: the stages after it have nothing to work on.
        """

    def is_still_there(self, run: Run, manifest: M) -> bool:
        """Whether what the manifest stands for exists, where it lies outside of the folder."""
        return True

    def list_files(self) -> Mapping[str, str] | None:
        """Where the files of the items lie, by item; faults in them are tried again where a file changed. None: it reads none."""
        return None

    def summarise(self, manifest: M) -> dict[str, Any]:
        """What it adds to ``summary.json``."""
        return {}

    def log(self, run: Run, step: Step, manifest: M) -> None:
        """Sends what else MLflow is to have: data sets, pictures, videos. Totals and the manifest are sent anyway."""


class Worker(Protocol[W_contra]):
    """Makes parts; loads its models once. Built and called in a Ray actor."""

    def __init__(self, config: RunConfig) -> None: ...

    def make_part(self, step: Step, name: str, work: W_contra) -> dict[str, Any]:
        """Makes one part, commits it (`Step.write_part`) and returns the commit."""
        ...


class PartStage(Stage[M], Generic[M, W]):
    """A stage that is cut into parts, which workers make.

    ``W``, the work behind a part, is a dataclass or plain values; it travels to the worker as JSON.

    Attributes:
        worker: who makes a part.
    """

    worker: ClassVar[type[Worker[Any]]]

    @abstractmethod
    def plan(self, run: Run, step: Step) -> dict[str, W]:
        """Part name to the work behind it."""

    @abstractmethod
    def finish(self, run: Run, step: Step, plan: Mapping[str, W], commits: Sequence[dict[str, Any]]) -> M:
        """What is recorded, from the commits in the order of the plan."""

    def digest(self, work: W) -> list[str] | None:
        """What a part's commit must say of its ``work``; another part is made again. None: a commit holds whatever it says."""
        return None

    def perform(self, run: Run, step: Step) -> M:
        plan = self.plan(run, step)
        works = {name: digests for name, work in plan.items() if (digests := self.digest(work)) is not None}
        return self.finish(run, step, plan, run_parts(step, plan, self.worker, run.config, label=self.name, works=works))


def count_all(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """``counts`` and ``outcomes`` of a manifest."""
    return {"counts": count_outcomes(outcomes), "outcomes": tuple(outcome for outcome in outcomes if outcome.reason)}
