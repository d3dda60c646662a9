"""A client of Ray's job REST API, with the standard library alone.

A job's id is made of what asked for it, so that a restarted caller finds the job instead of starting another.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

_GOING = {"PENDING", "RUNNING"}
_TIMEOUT_S = 30.0
_SILENCE_S = 600.0
"""How long a head node may be away, for example for a restart, before a followed job counts as lost."""
_LOG_STEP_BYTES = 2**20
"""Ray always sends the whole log, so for every so many bytes of it one poll does not ask for it."""


class RayJobError(Exception):
    """Ray does not answer, refuses, or no longer knows a job. The message says which, and what to do."""


class Job(TypedDict, total=False):
    """What Ray knows of a job; ``driver_exit_code`` is missing if the command never started or was killed with its node."""

    status: str
    driver_exit_code: int | None
    message: str | None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
        exit_code: as in `Job`.
        message: what Ray says about it.
        log: all that the command printed.
    """

    submission_id: str
    status: str
    exit_code: int | None
    message: str
    log: str


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def make_submission_id(*parts: str) -> str:
    """The beginning of a job's id: the same for the same parts, readable, and fit for a URL.

    >>> make_submission_id("retrain", "scheduled__2026-11-22T00:00:00+00:00", "train")
    'retrain-scheduled__2026-11-22T00-00-00-00-00-train-58dcd458'
    """
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(parts)).strip("-")
    return f"{readable[:100]}-{digest}"


class RayJobs:
    """The jobs of the Ray cluster at ``address``, for example ``http://head:8265``, which need not be there yet.

    Raises:
        RayJobError: the address is no http address.
    """

    def __init__(self, address: str, token: str | None) -> None:
        if not address.startswith(("http://", "https://")):
            raise RayJobError(f"{address!r} is no address of a Ray dashboard; expected http://host:8265 or https://...")
        self.address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._opener = urllib.request.build_opener(_NoRedirect)

    def find(self, submission_id: str) -> Job | None:
        """The job, if there is one.

        Raises:
            RayJobError: Ray refuses.
            OSError: Ray does not answer.
        """
        try:
            return self._call("GET", f"/api/jobs/{submission_id}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def attach(
        self,
        base: str,
        entrypoint: str,
        *,
        env_vars: Mapping[str, str] | None = None,
        accepted: Collection[int] = (0,),
    ) -> str:
        """The id of the job that does ``entrypoint`` for ``base``: an existing one, or a new one.

        A job that is running or has succeeded is taken; after one that failed or was stopped, the next number is tried.

        Args:
            base: from `make_submission_id`.
            entrypoint: a command line.
            env_vars: of the command and of its workers; no secrets, Ray shows them.
            accepted: exit codes that are results, not failures.

        Raises:
            RayJobError, OSError: as `find`.
        """
        for number in itertools.count(1):
            submission_id = f"{base}-{number}"
            job = self.find(submission_id)
            if job is None:
                self._submit(submission_id, entrypoint, env_vars or {})
                return submission_id
            is_result = job["status"] == "FAILED" and job.get("driver_exit_code") in accepted
            if job["status"] in {*_GOING, "SUCCEEDED"} or is_result:
                return submission_id
        raise AssertionError("count has no end")

    def _submit(self, submission_id: str, entrypoint: str, env_vars: Mapping[str, str]) -> None:
        request = {"submission_id": submission_id, "entrypoint": entrypoint, "runtime_env": {"env_vars": dict(env_vars)}}
        try:
            self._call("POST", "/api/jobs/", request)  # without the last slash the dashboard answers 405
        except urllib.error.HTTPError as error:
            if self.find(submission_id) is None:  # else another attempt came first
                raise RayJobError(f"{self.address} refused {submission_id}: {error.code} {_first_line(error)}") from error

    def follow(self, submission_id: str, say: Callable[[str], object], *, poll_s: float = 30.0) -> Outcome:
        """Waits for a job's end; each line that it prints goes to ``say``.

        Raises:
            RayJobError: Ray does not know the job any more, refuses, or was silent for ten minutes.
        """
        shown, log, waits, heard = 0, "", 0, time.monotonic()
        while True:
            try:
                job = self.find(submission_id)
                if job is None:
                    raise RayJobError(f"{self.address} does not know {submission_id} any more: its head node was replaced")
                ended = job["status"] not in _GOING
                if ended or waits == 0:
                    log = self._call("GET", f"/api/jobs/{submission_id}/logs")["logs"] or ""
                    shown = _say_lines(log, shown, say, all_of_it=ended)
                    waits = len(log) // _LOG_STEP_BYTES + 1
                heard = time.monotonic()
            except (OSError, http.client.HTTPException) as error:
                ended = False
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    raise RayJobError(f"{self.address}: {error.code} {_first_line(error)}") from error
                if time.monotonic() - heard > _SILENCE_S:
                    raise RayJobError(f"{self.address} has not answered for {_SILENCE_S:.0f} s: {error}") from error
            if ended:
                return Outcome(submission_id, job["status"], job.get("driver_exit_code"), job.get("message") or "", log)
            waits = max(0, waits - 1)
            time.sleep(poll_s)

    def stop(self, submission_id: str) -> None:
        """Asks a job to end: SIGTERM, and SIGKILL after ``RAY_JOB_STOP_WAIT_TIME_S``. No error if there is none."""
        try:
            self._call("POST", f"/api/jobs/{submission_id}/stop")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise

    def _call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        headers = {**self._headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data=data, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise RayJobError(
                    f"{self.address} refused the token ({error.code}); the connection's password must be the cluster's token"
                ) from error
            raise


def _first_line(error: urllib.error.HTTPError) -> str:
    """The last line of what the server said: of a traceback, the exception."""
    lines = error.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else error.reason


def _say_lines(log: str, shown: int, say: Callable[[str], object], *, all_of_it: bool) -> int:
    """Says complete lines from position ``shown`` on; returns the new position."""
    end = len(log) if all_of_it else log.rfind("\n") + 1
    for line in log[shown:end].split("\n")[: None if all_of_it else -1]:
        if line.strip():
            say(line.rstrip())
    return max(shown, end)
