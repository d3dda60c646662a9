"""Retrains when videos have arrived, and every week: check -> subjects -> ... -> register -> promote, each a Ray job.

Connection ``refalign_ray``: host (``http://head:8265``) and password (the cluster's token). Connection ``refalign_notify``,
optional: its password is a URL that takes a JSON message when a run fails. Environment of Airflow: ``REFALIGN_PRESET``,
``REFALIGN_INPUT``, ``REFALIGN_OUTPUT``, ``REFALIGN_TRACKING_URI``, ``REFALIGN_REPOSITORY``. Whoever delivers videos updates the
asset ``refalign_videos``; the asset ``refalign_champion`` is updated when a model is promoted.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import urllib.request
from typing import Any

from airflow.sdk import DAG, Asset, AssetOrTimeSchedule, BaseHook, BaseOperator, CronTriggerTimetable, Param
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException, AirflowSkipException
from ray_jobs import Outcome, RayJobs, make_submission_id
from stages import CHECK, ENV_VARS, GATE, STEPS, Stage, is_nothing_new, make_entrypoint

VIDEOS = Asset("refalign_videos")
CHAMPION = Asset("refalign_champion")
_WRONG_SETTINGS = 2
_log = logging.getLogger(__name__)


class RayJobOperator(BaseOperator):
    """Runs a stage as a Ray job, or follows the one that an earlier attempt of this task started.

    It polls instead of deferring, because one run with one task at a time takes one slot.
    """

    def __init__(self, *, stage: Stage, **arguments: Any) -> None:
        super().__init__(task_id=stage.name, **arguments)
        self.stage = stage
        self.submission_id: str | None = None

    def execute(self, context: Any) -> str:
        """Waits for the job's end and returns its id.

        Raises:
            AirflowSkipException: there is nothing new, or the champion stays.
            AirflowFailException: the settings are wrong; a retry would not help.
            RuntimeError: the job failed.
        """
        params = context["params"]
        if self.stage == CHECK and params["force"]:
            return "forced"
        base = make_submission_id(self.dag_id, context["run_id"], self.task_id)
        entrypoint = make_entrypoint(self.stage, params)
        jobs = self._connect()
        self.submission_id = jobs.attach(base, entrypoint, env_vars=ENV_VARS, accepted=self.stage.accepted)
        _log.info("%s: %s", self.submission_id, entrypoint)
        return self._judge(jobs.follow(self.submission_id, _log.info))

    def _judge(self, outcome: Outcome) -> str:
        if outcome.exit_code == _WRONG_SETTINGS:
            raise AirflowFailException(f"{outcome.submission_id}: wrong settings; see the last line of its log")
        if outcome.status == "STOPPED" or outcome.exit_code not in self.stage.accepted:
            raise RuntimeError(f"{outcome.submission_id}: {outcome.status}, exit code {outcome.exit_code}: {outcome.message}")
        if self.stage == CHECK and is_nothing_new(outcome.exit_code, outcome.log):
            raise AirflowSkipException("nothing new: every step is done for what the input holds")
        if self.stage == GATE and outcome.exit_code != 0:
            raise AirflowSkipException("the champion stays: the gate refused the challenger")
        return outcome.submission_id

    def on_kill(self) -> None:
        """The task was cleared, marked or timed out: its job is stopped."""
        if self.submission_id:
            self._connect().stop(self.submission_id)

    def _connect(self) -> RayJobs:
        connection = BaseHook.get_connection("refalign_ray")
        return RayJobs(connection.host or "", connection.password)


def notify(context: Any) -> None:
    """Sends a message that a run failed. If that fails too, the log says so."""
    text = f"{context['dag'].dag_id} {context['run_id']} failed"
    _log.error(text)
    try:
        connection = BaseHook.get_connection("refalign_notify")
    except AirflowNotFoundException:
        return
    body = json.dumps({"text": text}).encode()
    try:
        request = urllib.request.Request(connection.password or "", data=body, headers={"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()
    except (OSError, ValueError) as error:
        _log.error("notification failed: %s", type(error).__name__)  # the address is a secret


def _tracking() -> list[str]:
    uri = os.environ.get("REFALIGN_TRACKING_URI")
    return [f"tracking.uri={uri}"] if uri else []


with DAG(
    dag_id="retrain",
    description="new videos -> subjects -> pairs -> shards -> train -> evaluate -> register -> gate",
    schedule=AssetOrTimeSchedule(timetable=CronTriggerTimetable("0 2 * * 1", timezone="UTC"), assets=[VIDEOS]),
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    catchup=False,
    max_active_runs=1,
    default_args={
        "retries": 2,
        "retry_delay": datetime.timedelta(minutes=2),
        "retry_exponential_backoff": True,
        "max_retry_delay": datetime.timedelta(minutes=30),
    },
    on_failure_callback=notify,
    params={
        "force": Param(False, type="boolean", description="go on although nothing is new"),
        "preset": Param(os.environ.get("REFALIGN_PRESET", "wan2_1_1_3b"), type="string"),
        "input": Param(os.environ.get("REFALIGN_INPUT", "/shared/videos"), type="string"),
        "output": Param(os.environ.get("REFALIGN_OUTPUT", "/shared/runs/retrain"), type="string"),
        "settings": Param(_tracking(), type="array", description="section.field=value"),
        "repository": Param(os.environ.get("REFALIGN_REPOSITORY", "/opt/refalign"), type="string"),
    },
    tags=["refalign"],
) as dag:
    tasks = [RayJobOperator(stage=stage) for stage in (CHECK, *STEPS)]
    tasks.append(RayJobOperator(stage=GATE, outlets=[CHAMPION]))
    for before, after in zip(tasks, tasks[1:], strict=False):
        before >> after
