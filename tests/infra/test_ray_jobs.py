"""The job client of the DAGs against a real head node with token authentication, on loopback."""

import time

import pytest
from local_cluster import local_cluster
from ray_jobs import RayJobError, RayJobs, make_submission_id

_POLL_S = 0.5


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with local_cluster(tmp_path_factory.mktemp("ray"), head_cpus=1) as cluster:
        yield cluster.environment


@pytest.fixture
def jobs(environment):
    return RayJobs(environment["RAY_API_SERVER_ADDRESS"], environment["RAY_AUTH_TOKEN"])


def follow(jobs, submission_id):
    lines = []
    return jobs.follow(submission_id, lines.append, poll_s=_POLL_S), lines


def wait_until(what):
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(_POLL_S)


def test_a_job_is_attached_to_and_not_started_again(environment, jobs, tmp_path):
    """A second client, as after a scheduler's restart, finds the running job, and later its result."""
    base = make_submission_id("retrain", "run 1", "train")
    code = (
        f"open('{tmp_path}/started', 'a').write('x'); import os, time\nwhile not os.path.exists('{tmp_path}/go'): time.sleep(.1)"
    )
    entrypoint = f'python -c "{code}\nprint(1)\nprint(2)"'
    first = jobs.attach(base, entrypoint)
    wait_until((tmp_path / "started").exists)
    again = RayJobs(environment["RAY_API_SERVER_ADDRESS"] + "/", environment["RAY_AUTH_TOKEN"])
    assert again.attach(base, entrypoint) == first == f"{base}-1"
    (tmp_path / "go").touch()
    outcome, lines = follow(again, first)
    assert (outcome.status, outcome.exit_code) == ("SUCCEEDED", 0)
    assert lines[-2:] == ["1", "2"]
    assert jobs.attach(base, entrypoint) == first
    assert (tmp_path / "started").read_text() == "x"


def test_exit_codes_are_true_and_a_failed_job_is_tried_under_the_next_number(jobs):
    base = make_submission_id("retrain", "run 1", "promote")
    entrypoint = "python -c \"import sys; print('the champion stays'); sys.exit(3)\""
    first = jobs.attach(base, entrypoint)
    outcome, lines = follow(jobs, first)
    assert (outcome.status, outcome.exit_code) == ("FAILED", 3)
    assert "the champion stays" in lines and "the champion stays" in outcome.log
    assert jobs.attach(base, entrypoint, accepted=(0, 3)) == first
    second = jobs.attach(base, "true")
    assert second == f"{base}-2"
    assert follow(jobs, second)[0].exit_code == 0


def test_a_stopped_job_ends_and_is_started_again(jobs, tmp_path):
    base = make_submission_id("retrain", "run 1", "subjects")
    entrypoint = f"python -c \"open({str(tmp_path / 'up')!r}, 'w'); import time; time.sleep(600)\""
    first = jobs.attach(base, entrypoint)
    wait_until((tmp_path / "up").exists)
    jobs.stop(first)
    assert follow(jobs, first)[0].status == "STOPPED"
    assert jobs.attach(base, "true", accepted=(0, 1)) == f"{base}-2"
    jobs.stop("never-started")


def test_lines_are_said_once_while_the_job_runs(jobs, tmp_path):
    """The job waits until its first line was said."""
    code = (
        "import os, sys, time\nprint('one', flush=True)\n"
        f"while not os.path.exists('{tmp_path}/heard'): time.sleep(.1)\n"
        "sys.stdout.write('10%\\r20%\\n\\n')"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    lines = []

    def say(line):
        lines.append(line)
        if line == "one":
            (tmp_path / "heard").touch()

    submission_id = jobs.attach(make_submission_id("lines"), f"python {script}", env_vars={"GREETING": "hello"})
    assert jobs.follow(submission_id, say, poll_s=_POLL_S).status == "SUCCEEDED"
    assert lines[-3:] == ["one", "10%", "20%"]
    assert jobs.find(submission_id)["runtime_env"]["env_vars"]["GREETING"]


def test_what_is_wrong_is_said(environment, jobs):
    address = environment["RAY_API_SERVER_ADDRESS"]
    assert jobs.find("unknown") is None
    with pytest.raises(RayJobError, match="does not know unknown any more"):
        follow(jobs, "unknown")
    for wrong in ("wrong", None):
        with pytest.raises(RayJobError, match=r"refused the token \(40[13]\)"):
            RayJobs(address, wrong).attach("x", "true")
