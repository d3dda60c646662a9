"""Promotion: the champion's videos are made as the challenger's were, and the gate's word becomes the registry's."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_run import make_evaluate, make_shards, make_subjects, make_train

from refalign.config.presets import toy_tiny
from refalign.errors import ArtifactError, ConfigError, NotPromoted
from refalign.evaluation.blind import place_challenger, read_votes
from refalign.evaluation.promotion import Contest, run_ask, run_list, run_promote, run_rollback, score_champion
from refalign.evaluation.results import Pictures, SampleRecord
from refalign.io.writing import write_json
from refalign.models.wan import load_transformer
from refalign.pipeline.stage import Run
from refalign.pipeline.steps import Step
from refalign.stages.evaluate import Evaluate
from refalign.tracking.registry import register_model
from refalign.tracking.run import TrackedRun


def make_config(**evaluation):
    config = toy_tiny()
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})


@pytest.mark.usefixtures("ray_cluster")
def test_a_champion_is_scored_on_the_same_videos_as_its_challenger(tmp_path):
    config = make_config(num_inference_steps=1, num_samples=2)
    shards = make_shards(tmp_path, {"train": ["c"], "validation": ["a", "b"]}, cross_pair={"a": "c"})
    steps = {"shards": shards, "subjects": make_subjects(tmp_path, ["a", "b", "c"]), "train": make_train(tmp_path)}
    export = steps["train"].folder / "export"
    shutil.copytree(config.models.base, export)
    trained = load_transformer(str(export))
    torch.nn.init.normal_(trained.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    trained.save_pretrained(export / "transformer")
    step = Step.make(tmp_path, "evaluate", 0)
    run = Run(config, tmp_path)
    run.steps, run.manifests = steps, {"train": SimpleNamespace(**steps["train"].load_manifest())}
    samples = Evaluate().perform(run, step).samples
    after = {sample.key: sample.scores["after"] for sample in samples}
    assert score_champion(config, step, samples, export) == after
    assert after["a"].copy_paste is not None and after["b"].copy_paste is None
    before = {sample.key: sample.scores["before"] for sample in samples}
    assert before != after


def test_a_first_challenger_is_asked_about_against_the_base_model(registry, tmp_path, capsys):
    _, config, (first, _) = registry
    evaluate = make_evaluate(tmp_path)
    register = Step.make(tmp_path, "register", 0)
    register.commit({"name": "nobody", "version": first})
    write_json(tmp_path / "summary.json", {"folders": {step.name: step.folder.name for step in (evaluate, register)}})
    run_ask(config, tmp_path)
    comparison = Contest(config, tmp_path).comparison
    path = tmp_path / "ask" / comparison / "questions.csv"
    assert str(path) in capsys.readouterr().out and len(list(path.parent.glob("*.mp4"))) == 2
    path.write_text(path.read_text().rstrip() + place_challenger(comparison, "clip"))
    assert read_votes(path, comparison, ["clip"]).share == 1


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """An output folder whose run registered the toy base twice."""
    output = tmp_path_factory.mktemp("runs")
    config = make_config()
    tracked = TrackedRun.open(config, output=output, fingerprint="a" * 12)
    register = [register_model(tracked, config, key=key, export_folder=config.models.base, card="", tags={}) for key in "xy"]
    return output, config, [model.version for model in register]


def tell(output, version, gain):
    """Leaves what a run that registered ``version`` leaves: 24 scored samples, ``gain`` better than before."""
    rng = np.random.default_rng(int(version))
    samples = []
    for number in range(24):
        before, after = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6) + gain
        scores = {"before": {"fidelity": before, "own_above_other": 0.5}, "after": {"fidelity": after, "own_above_other": 0.5}}
        pictures = Pictures(own=[], other=[], targets=[])
        told = {"prompt": "", "seed": 0, "references": [], "videos": {}, "verdicts": {}, "pictures": pictures}
        samples.append(SampleRecord(key=str(number), scores=scores, **told).model_dump())
    evaluate, register = Step.make(output, "evaluate", version, gain), Step.make(output, "register", version, gain)
    evaluate.commit({"samples": samples})
    register.commit({"name": "refalign", "version": version})
    write_json(output / "summary.json", {"folders": {step.name: step.folder.name for step in (evaluate, register)}})


def test_the_gates_word_becomes_the_registrys(registry, tmp_path, capsys):
    output, config, (first, second) = registry
    with pytest.raises(ArtifactError, match=r"no registered model; finish pipelines/full\.py"):
        run_promote(config, tmp_path)
    tell(output, first, gain=0.0)
    with pytest.raises(NotPromoted, match=f"version {first} stays challenger: not better"):
        run_promote(config, output)
    tell(output, second, gain=0.2)
    run_promote(config, output)
    assert f"version {second} is champion" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="champion already"):
        run_promote(config, output)
    run_list(config, output)
    newest, oldest = capsys.readouterr().out.splitlines()
    assert newest.split()[:2] == [second, "challenger,"] and "champion" in newest and "passed: against the base model" in newest
    assert oldest.split()[0] == first and "refused: against the base model: not better" in oldest
    with pytest.raises(ArtifactError, match="no champion before this one"):
        run_rollback(config, output)
