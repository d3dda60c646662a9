"""MLflow on a real database: one tracked, whatever is restarted."""

import json
import socket
import time
from contextlib import ExitStack

import pytest

from refalign.config.presets import toy_tiny
from refalign.errors import ArtifactError, BackendUnavailable
from refalign.pipeline.stage import Run
from refalign.pipeline.steps import Step
from refalign.run import Loop
from refalign.stages import Register, Train
from refalign.stages.register import RegisterManifest
from refalign.tracking.client import make_tracking_uri
from refalign.tracking.model_card import Provenance, make_model_card
from refalign.tracking.registry import has_version, register_model, resolve_model
from refalign.tracking.run import TrackedRun, flatten
from refalign.training.follower import follow
from refalign.training.launch import TrainManifest
from refalign.training.records import UNSENT, append_record, read_records, truncate_records

PROVENANCE = Provenance(
    {"CC-BY-NC-4.0": 3}, {"signed": 3}, "d" * 64, "0123456789ab", "abc", {"train": "train-0123456789ab"}, "run it"
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One output folder, hence one database, for the module: creating one takes seconds."""
    return tmp_path_factory.mktemp("it's an output")


def test_rerun_continues_the_same_run_and_changes_nothing(output):
    config = toy_tiny()
    tracked = TrackedRun.open(config, output=output, fingerprint="a" * 12)
    train = tracked.child("train")
    tracked.log_records("train", [{"step": 1, "total": 2.0}])
    tracked.finish("KILLED")
    statuses = {run_id: tracked.client.get_run(run_id).info.status for run_id in (tracked.run_id, train)}
    assert set(statuses.values()) == {"KILLED"}

    other_cluster = config.model_copy(update={"cluster": config.cluster.model_copy(update={"threads": 7})})
    again = TrackedRun.open(other_cluster, output=output, fingerprint="a" * 12)
    assert (again.run_id, again.child("train")) == (tracked.run_id, train)
    assert again.client.get_run(again.run_id).info.status == "RUNNING"
    assert again.client.get_run(again.run_id).data.params["cluster.threads"] == str(config.cluster.threads)
    again.log_records("train", [{"step": 1, "total": 9.0, "pull": 1.0, "exposure": float("nan")}])
    assert [(m.step, m.value) for m in again.client.get_metric_history(train, "total")] == [(1, 2.0)]
    assert [(m.step, m.value) for m in again.client.get_metric_history(train, "pull")] == [(1, 1.0)]
    assert not again.client.get_metric_history(train, "exposure")
    again.finish()
    assert again.client.get_run(train).info.status == "FINISHED"
    assert len(again.client.search_runs([again.experiment_id])) == 2


def test_stories_differ_by_fingerprint_and_by_output_folder(output, tmp_path):
    config = toy_tiny()
    ids = {TrackedRun.open(config, output=output, fingerprint=name * 12).run_id for name in "abb"}
    assert len(ids) == 2
    shared = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": make_tracking_uri(None, output)})})
    assert TrackedRun.open(shared, output=tmp_path, fingerprint="a" * 12).run_id not in ids


def test_a_step_is_never_logged_twice(output, tmp_path):
    tracked = TrackedRun.open(toy_tiny(), output=output, fingerprint="c" * 12)
    path, run_id = tmp_path / "metrics.jsonl", tracked.child("train")
    told = {"tracking_uri": tracked.uri, "run_id": run_id, "progress": False}

    def sent(name):
        return [point.step for point in tracked.client.get_metric_history(run_id, name)]

    with follow(path, 9, **told):
        _append(path, range(1, 6))
        _wait_until(lambda: sent("total") == [1, 2, 3, 4, 5])
        truncate_records(path, 3)  # a restart goes back to the checkpoint's step, and its lines come again
        _append(path, range(4, 8))
        assert (tmp_path / UNSENT).exists()
    with follow(path, 9, **told):  # the next process follows the record from its beginning
        _append(path, [8])
    tracked.log_records("train", read_records(path))
    for name in ("total", "validation/pull"):
        assert sent(name) == list(range(1, 9))
    assert not (tmp_path / UNSENT).exists()


@pytest.mark.parametrize("answers", [False, True])
def test_a_server_that_is_away_delays_metrics_and_stops_nobody(answers, tmp_path, caplog, monkeypatch):
    """Nothing listens there; or something does, and never says a word."""
    monkeypatch.setattr("refalign.tracking.client._FIRST_CONTACT_S", 1.0)
    path = tmp_path / "metrics.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}" if answers else _dead_uri()
        with follow(path, 9, tracking_uri=uri, run_id="0" * 32, progress=False):
            _append(path, [1])
            _wait_until(lambda: "does not answer" in caplog.text)
            began = time.monotonic()
            _append(path, range(2, 6))
            assert time.monotonic() - began < 0.2
            began = time.monotonic()
        assert time.monotonic() - began < 5
    assert caplog.text.count("does not answer") == 1 and "the next command with this --output sends them" in caplog.text
    assert (tmp_path / UNSENT).exists()


def test_metrics_that_were_not_taken_in_time_are_sent_by_a_later_run_that_has_nothing_else_to_do(tmp_path, capsys):
    config = toy_tiny()
    step = Step.make(tmp_path, "train", "it")
    step.commit({"steps": 5})
    for number in range(6):
        append_record(step.folder / "metrics.jsonl", {"step": number, "stage": "stage1", "total": 1.0 / (1 + number)})
    (step.folder / UNSENT).touch()
    away = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": _dead_uri()})})
    for settings, out, err in ((away, "", "metrics wait: MLflow at"), (config, "train: sent the metrics that MLflow lacked", "")):
        loop = Loop(settings, tmp_path, ExitStack(), stages=[Train])
        loop.steps, loop.manifests = {"train": step}, {"train": TrainManifest.model_construct(steps=5)}
        loop.send_unsent()
        said = capsys.readouterr()
        assert out in said.out and err in said.err
    assert not (step.folder / UNSENT).exists()
    tracked = TrackedRun.open(config, output=tmp_path, fingerprint=loop.fingerprint)
    history = tracked.client.get_metric_history(tracked.child("train"), "total")
    assert [(point.step, point.value) for point in history] == [(number, 1.0 / (1 + number)) for number in range(6)]


def test_unreachable_server_is_one_line_without_the_password(tmp_path):
    uri = _dead_uri().replace("//", "//me:secret@")
    config = toy_tiny()
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    with pytest.raises(BackendUnavailable) as caught:
        TrackedRun.open(config, output=tmp_path / "new", fingerprint="a" * 12)
    text = str(caught.value)
    assert "does not answer" in text and "tracking.uri" in text
    assert "\n" not in text and "secret" not in text


def test_a_deleted_experiment_is_refused_with_the_way_out(tmp_path):
    config = toy_tiny()
    tracked = TrackedRun.open(config, output=tmp_path, fingerprint="a" * 12)
    tracked.client.delete_experiment(tracked.experiment_id)
    with pytest.raises(BackendUnavailable, match="was deleted; restore it with `mlflow experiments restore`, or set tracking"):
        TrackedRun.open(config, output=tmp_path, fingerprint="a" * 12)


def test_params_are_dotted_short_and_without_credentials():
    config = toy_tiny()
    tracking = config.tracking.model_copy(update={"uri": "https://me:secret@mlflow.example/x"})
    negative = config.evaluation.model_copy(update={"negative_prompt": "blurred " * 200})
    params = flatten(config.model_copy(update={"tracking": tracking, "evaluation": negative}))
    assert params["training.stages.1.name"] == config.training.stages[1].name
    assert params["tracking.uri"] == "https://...@mlflow.example/x"
    assert max(map(len, params.values())) == 500


def test_the_shard_digest_is_a_dataset_of_the_run_once(output):
    tracked = TrackedRun.open(toy_tiny(), output=output, fingerprint="d" * 12)
    for _ in range(2):
        tracked.log_dataset("train", name="shards", folder=output, digest="e" * 64)
    datasets = tracked.client.get_run(tracked.child("train")).inputs.dataset_inputs
    assert [(item.dataset.name, item.dataset.digest) for item in datasets] == [("shards", "e" * 36)]


def test_registering_twice_is_one_version(output, tmp_path):
    config = toy_tiny()
    export = _make_export(tmp_path / "export")
    card = make_model_card(config, PROVENANCE, {"after": {"fidelity": 0.5}}, note="Tiny.")
    versions = []
    for fingerprint in ("e" * 12, "e" * 12, "f" * 12):  # a retry, and another run that evaluated the same checkpoint
        tracked = TrackedRun.open(config, output=output, fingerprint=fingerprint)
        versions.append(register_model(tracked, config, key="same", export_folder=export, card=card, tags=PROVENANCE.tags()))
    assert len({model.version for model in versions}) == 1
    other = register_model(tracked, config, key="other", export_folder=export, card=card, tags=PROVENANCE.tags())
    assert int(other.version) == int(versions[0].version) + 1
    assert (other.alias, other.uri) == ("challenger", "models:/refalign@challenger")
    first = tracked.client.get_model_version("refalign", versions[0].version)
    assert first.tags["refalign.licenses"] == "CC-BY-NC-4.0" and first.tags["refalign.shard_digest"] == "d" * 64
    assert first.run_id and "non-commercial use only" in first.description


def test_a_kill_between_upload_and_version_uploads_nothing_again(output, tmp_path):
    config = toy_tiny()
    tracked = TrackedRun.open(config, output=output, fingerprint="f" * 12)
    export = _make_export(tmp_path / "export")
    before = register_model(tracked, config, key="killed", export_folder=export, card="card", tags={})
    source = tracked.client.get_model_version("refalign", before.version).source
    tracked.client.delete_model_version("refalign", before.version)  # what the kill left: the upload without its version
    after = register_model(tracked, config, key="killed", export_folder=export, card="card", tags={})
    assert tracked.client.get_model_version("refalign", after.version).source == source


def test_a_version_that_was_deleted_in_mlflow_is_not_done_whatever_the_manifest_says(tmp_path, capsys):
    """In a folder of its own: a deleted version's number is not given again."""
    config = toy_tiny()
    tracked = TrackedRun.open(config, output=tmp_path, fingerprint="f" * 12)
    model = register_model(tracked, config, key="k", export_folder=_make_export(tmp_path / "export"), card="card", tags={})
    run = Run(config, tmp_path)
    manifest = RegisterManifest.model_construct(**model._asdict())
    assert Register().is_still_there(run, manifest) and has_version(tracked.uri, "refalign", "1") and not capsys.readouterr().out
    tracked.client.delete_model_version("refalign", "1")
    assert not Register().is_still_there(run, manifest)
    assert "refalign version 1 is gone from the registry" in capsys.readouterr().out
    away = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    assert Register().is_still_there(Run(away, tmp_path), manifest)
    assert "not checked, the manifest is trusted" in capsys.readouterr().out


def test_model_uris_lead_to_the_exported_folder(output, tmp_path):
    config = toy_tiny()
    tracked = TrackedRun.open(config, output=output, fingerprint="f" * 12)
    export = _make_export(tmp_path / "made-elsewhere")
    model = register_model(tracked, config, key="resolved", export_folder=export, card="card", tags={})
    for source in (
        model.uri,
        f"models:/refalign/{model.version}",
        str(export),
        str(export.parent / ".." / tmp_path.name / export.name),
    ):
        assert json.loads((resolve_model(source, tracked.uri) / "transformer" / "config.json").read_text()) == {"num_layers": 9}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("models:/refalign@nobody", "it has versions"),
        ("models:/refalign/99", "it has versions"),
        ("models:/other@challenger", "it has no model other"),
        ("models:/refalign", "models:/<name>@<alias>"),
        ("/no/such/folder", "transformer/config.json"),
    ],
)
def test_models_that_are_not_there_are_one_line(output, tmp_path, source, expected):
    tracked = TrackedRun.open(toy_tiny(), output=output, fingerprint="f" * 12)
    register_model(tracked, toy_tiny(), key="present", export_folder=_make_export(tmp_path / "export"), card="card", tags={})
    with pytest.raises(ArtifactError, match=expected) as caught:
        resolve_model(source, tracked.uri)
    assert "\n" not in str(caught.value)


def test_registering_what_is_no_export_is_refused(output, tmp_path):
    tracked = TrackedRun.open(toy_tiny(), output=output, fingerprint="f" * 12)
    with pytest.raises(ArtifactError, match="run the train step again"):
        register_model(tracked, toy_tiny(), key="none", export_folder=tmp_path, card="card", tags={})


def test_the_card_names_licences_and_survives_hostile_text():
    hostile = Provenance({"<script>|x\ny": 1}, {}, "d", "f", "c", {}, "cmd")
    card = make_model_card(toy_tiny(), hostile, {}, note=None)
    assert "&lt;script>\\|x y" in card and "AGPL-3.0" in card and "Not evaluated" in card


def _make_export(folder):
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text('{"num_layers": 9}')
    return folder


def _append(path, steps):
    for step in steps:
        append_record(path, {"step": step, "stage": "only", "total": 1.0 / step, "validation/pull": 0.5})


def _wait_until(is_true):
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.1)


def _dead_uri():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
