"""Register: the evaluated model becomes a version in the MLflow registry, alias ``challenger``."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from refalign.errors import BackendUnavailable
from refalign.io.untrusted import hide_secrets
from refalign.pipeline.stage import Inputs, Manifest, Run, Stage
from refalign.pipeline.steps import Step
from refalign.stages.evaluate import Evaluate
from refalign.stages.shards import Shards
from refalign.stages.subjects import Subjects
from refalign.stages.train import Train
from refalign.tracking.client import Tag, make_tracking_uri
from refalign.tracking.model_card import Provenance, load_note, make_model_card
from refalign.tracking.registry import digest_weights, has_version, register_model
from refalign.tracking.run import code_revision


class Example(Manifest):
    """A prompt and reference pictures to try the model on."""

    prompt: str
    references: list[str]


class RegisterManifest(Manifest):
    """The version.

    Attributes:
        weights: their digest.
        licenses, consents: clips it was trained on, by licence and consent.
        code: git revision.
        card: the model card, in Markdown.
    """

    name: str
    version: str
    alias: str
    uri: str
    tracking_uri: str
    weights: str
    licenses: dict[str, int]
    consents: dict[str, int]
    code: str
    card: str
    example: Example


class Register(Stage[RegisterManifest]):
    """One version per evaluated checkpoint: training again with another result is another version."""

    name = "register"
    manifest = RegisterManifest
    sections = ("tracking",)

    def find_inputs(self, run: Run) -> Inputs:
        return Inputs((run.config.tracking, run.step_of(Evaluate).fingerprint))

    def is_still_there(self, run: Run, manifest: RegisterManifest) -> bool:
        """A version that was deleted in MLflow is not done, whatever the manifest says."""
        uri = make_tracking_uri(run.config.tracking.uri, run.output)
        try:
            if has_version(uri, manifest.name, manifest.version):
                return True
        except BackendUnavailable as error:
            print(f"register: not checked, the manifest is trusted ({error})", flush=True)
            return True
        print(f"register: {manifest.name} version {manifest.version} is gone from the registry", flush=True)
        return False

    def perform(self, run: Run, step: Step) -> RegisterManifest:
        config, evaluated, subjects = run.config, run.manifest_of(Evaluate), run.manifest_of(Subjects)
        export = run.step_of(Train).folder / run.manifest_of(Train).export
        provenance = Provenance(
            licenses=subjects.licenses,
            consents=subjects.consents,
            shard_digest=run.manifest_of(Shards).digest,
            fingerprint=step.fingerprint,
            code=code_revision(),
            folders={name: each.folder.name for name, each in run.steps.items()},
            command=hide_secrets(shlex.join(["uv", "run", *sys.argv])),
        )
        weights, evaluation, first = digest_weights(export), run.step_of(Evaluate), evaluated.samples[0]
        card = make_model_card(config, provenance, evaluated.scores, note=load_note(config.models.base))
        tags = {**provenance.tags(), Tag.WEIGHTS: weights}
        key = f"{evaluation.fingerprint}-{weights}"
        model = register_model(run.tracker, config, key=key, export_folder=export, card=card, tags=tags)
        references = [str(evaluation.folder / reference.file) for reference in first.references]
        return RegisterManifest(
            **model._asdict(),
            tracking_uri=hide_secrets(run.tracker.uri),
            weights=weights,
            licenses=subjects.licenses,
            consents=subjects.consents,
            code=provenance.code,
            card=card,
            example=Example(prompt=first.prompt, references=references),
        )

    def describe(self, manifest: RegisterManifest) -> str:
        return f"{manifest.name} version {manifest.version}, alias {manifest.alias}"

    def summarise(self, manifest: RegisterManifest) -> dict[str, Any]:
        return {"model": manifest.model_dump(mode="json")}
