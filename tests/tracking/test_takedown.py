"""Which models were trained on shards that held a source, and the pictures that MLflow kept of it."""

import numpy as np

from refalign.config.presets import toy_tiny
from refalign.tracking.client import make_tracking_uri, open_client
from refalign.tracking.model_card import Provenance
from refalign.tracking.registry import find_trained_models, register_model
from refalign.tracking.run import TrackedRun, delete_pictures


def open_run(output, name, digest):
    tracked = TrackedRun.open(toy_tiny(), output=output, fingerprint=name * 12)
    tracked.log_dataset("train", name="shards", folder=output, digest=digest)
    return tracked


def test_versions_and_runs_of_a_digest_are_listed_and_pictures_deleted(tmp_path):
    config = toy_tiny()
    export = tmp_path / "export"
    (export / "transformer").mkdir(parents=True)
    (export / "transformer" / "config.json").write_text("{}")
    for name, digest in (("a", "d" * 16), ("b", "e" * 16)):
        tracked = open_run(tmp_path, name, digest)
        tags = Provenance({}, {}, digest, name * 12, "c", {}, "run it").tags()
        register_model(tracked, config, key=name, export_folder=export, card="card", tags=tags)
        tracked.set_tags("shards", {"refalign.folder": f"shards-{name}"})
        tracked.log_image("shards", np.zeros((4, 4, 3), np.uint8), "contact_sheets/x.png")
        (tmp_path / "report.html").write_text("with pictures")
        tracked.log_file(None, tmp_path / "report.html")
        tracked.finish()
    unregistered = open_run(tmp_path, "c", "d" * 16)
    unregistered.finish()

    client = open_client(make_tracking_uri(None, tmp_path))
    found = find_trained_models(client, ["d" * 16])
    assert [(model.name, model.version, model.digest) for model in found] == [("refalign", "1", "d" * 16), ("", "", "d" * 16)]
    assert found[1].run_id == unregistered.child("train")
    assert find_trained_models(client, ["f" * 16]) == []
    (second,) = find_trained_models(client, ["e" * 16])
    assert (second.version, second.aliases) == ("2", ("challenger",))

    assert delete_pictures(client, ["shards-a"]) == 2, "the step's run and its parent"
    for name, left in (("a", set()), ("b", {"contact_sheets", "report.html"})):
        tracked = TrackedRun.open(config, output=tmp_path, fingerprint=name * 12)
        files = [*tracked.client.list_artifacts(tracked.child("shards")), *tracked.client.list_artifacts(tracked.run_id)]
        assert {file.path for file in files} == left
    assert delete_pictures(client, ["shards-a"]) == 0
