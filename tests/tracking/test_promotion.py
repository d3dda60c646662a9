"""The champion's alias: forward on evidence, back on demand, and one winner of two."""

import threading

import mlflow
import pytest

from refalign.errors import ArtifactError, BackendUnavailable
from refalign.tracking.client import make_tracking_uri, open_client
from refalign.tracking.promotion import find_version, list_versions, promote, record_decision, rollback

NAME = "creatures"
COMPARISON = {"score": "fidelity", "prompts": 20, "gain": 0.1, "p_value": 0.01}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A registry with three versions; its tables are made once."""
    output = tmp_path_factory.mktemp("registry")
    uri = make_tracking_uri(None, output)
    client = open_client(uri)
    client.create_registered_model(NAME)
    experiment = client.create_experiment("runs", artifact_location=(output / "artifacts").as_uri())
    run = client.create_run(experiment, run_name="train")
    for _ in range(3):
        client.create_model_version(NAME, str(output), run_id=run.info.run_id, tags={"refalign.shard_digest": "d" * 64})
    return uri


@pytest.fixture
def uri(database):
    """The registry without any champion."""
    client = open_client(database)
    client.delete_registered_model_alias(NAME, "champion")
    client.set_registered_model_tag(NAME, "refalign.champions", "[]")
    return database


def test_forward_and_back(uri):
    assert find_version(uri, NAME, "champion") is None
    promote(uri, NAME, "1", expected=None)
    promote(uri, NAME, "3", expected="1")
    assert find_version(uri, NAME, "champion") == "3"
    assert rollback(uri, NAME) == ("3", "1")
    assert find_version(uri, NAME, "champion") == "1"
    with pytest.raises(ArtifactError, match="no champion before"):
        rollback(uri, NAME)


def test_evidence_about_another_champion_is_refused(uri):
    promote(uri, NAME, "2", expected=None)
    with pytest.raises(ArtifactError, match="version 3 was compared with the base model, but version 2 is champion now"):
        promote(uri, NAME, "3", expected=None)
    assert find_version(uri, NAME, "champion") == "2"


def test_of_two_at_once_one_wins_and_the_other_says_so(uri):
    said, start = [], threading.Barrier(2)

    def challenge(version):
        start.wait()
        try:
            promote(uri, NAME, version, expected=None)
            said.append((version, None))
        except (ArtifactError, BackendUnavailable) as error:
            said.append((version, str(error)))

    threads = [threading.Thread(target=challenge, args=(version,)) for version in ("1", "2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [version for version, error in said if error is None]
    (refusal,) = [error for _, error in said if error]
    assert find_version(uri, NAME, "champion") == winner
    assert "another promotion" in refusal


def test_a_lock_of_a_dead_process_is_taken_over_in_the_end(uri, monkeypatch):
    open_client(uri).create_registered_model(f"{NAME}.promotion", description="process 1 on gone")
    with pytest.raises(BackendUnavailable, match="process 1 on gone"):
        promote(uri, NAME, "1", expected=None)
    monkeypatch.setattr("refalign.tracking.promotion._STALE_LOCK_S", -1.0)
    promote(uri, NAME, "1", expected=None)
    assert find_version(uri, NAME, "champion") == "1"


def test_the_decision_stands_on_the_version(uri):
    decision = {
        "passed": False,
        "reason": "not better",
        "comparisons": [COMPARISON],
        "champion_scores": {},
        "challenger_scores": {},
    }
    record_decision(uri, NAME, "2", decision=decision, champion=None)
    shown = {each.version: each for each in list_versions(uri, NAME)}
    assert list(shown) == ["3", "2", "1"]
    assert shown["2"].gate == "refused" and shown["2"].reason == "against the base model: not better"
    assert shown["3"].gate == "not asked" and shown["3"].digest == "d" * 64
    run_id = open_client(uri).get_model_version(NAME, "2").run_id
    names = {file.path for file in mlflow.MlflowClient(uri).list_artifacts(run_id, "gate")}
    assert names == {"gate/version-2.json", "gate/version-2-comparisons.json"}
    with pytest.raises(ArtifactError, match="no version of it"):
        list_versions(uri, "nobody")
