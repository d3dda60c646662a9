"""The preflight command, on one rank in this process."""

from __future__ import annotations

import http.server
import socket
import threading
from pathlib import Path

import pytest
import torch
from make_shards import make_config

from refalign.errors import ArtifactError, BackendUnavailable
from refalign.pipeline.steps import Step
from refalign.tracking.client import check_server
from refalign.training.check import check_folder, check_training
from refalign.training.launch import launch_in_process
from refalign.training.models import Ranks


def test_a_check_says_what_a_run_would_meet_and_leaves_no_trace(base: Path, shards: Path, tmp_path: Path, capsys) -> None:
    config = make_config(base)
    step = Step.make(tmp_path, "train", config)
    before = sorted(tmp_path.rglob("*"))
    found = check_training(config, step=step, shards=shards, launch=launch_in_process)
    assert sorted(tmp_path.rglob("*")) == before
    assert found.ranks == 1 and found.steps == 7 and found.step_s > 0
    assert 0 < found.estimate.peak < found.available_bytes
    assert found.hours == pytest.approx(7 * (found.step_s + found.data_wait_s) / 3600)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["shards", "folder", "tracking", "checkpoint", "memory", "step", "recipe"]
    assert "20 samples, digest d1" in lines[0] and "7 steps on 1 ranks" in lines[-1]


class TwoMachines(Ranks):
    """Rank 0 of two; the other one wrote to a folder of its own."""

    def gather(self, value):
        return [value, type(value)()]


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"rank 0 on .* does not see what rank 1 on .* wrote; .* one shared folder"):
        check_folder(tmp_path / "run", TwoMachines(0, 2, torch.device("cpu")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="rank 0 on .* cannot write"):
        check_folder(tmp_path / "file" / "run", Ranks(0, 1, torch.device("cpu")))


class Healthy(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_GET(self) -> None:  # noqa: N802 - the name http.server calls
        self.send_response(self.code if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *arguments) -> None:
        pass


def test_a_tracking_server_is_asked_from_the_worker() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert check_server(uri) == f"{uri} answers"
        for Healthy.code in (401, 404):  # the driver has the credentials; a proxy serves the API alone
            assert check_server(uri) == f"{uri} answers"
        Healthy.code = 500
        with pytest.raises(BackendUnavailable, match="HTTP 500; is it MLflow"):
            check_server(uri)
        server.shutdown()
    with pytest.raises(BackendUnavailable, match=f"does not answer {socket.gethostname()} .*as this machine sees it"):
        check_server(uri)
    assert "driver alone" in check_server("sqlite:///somewhere.db")
