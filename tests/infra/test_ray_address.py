"""The job client of the DAGs where there is no Ray, or something else in its place."""

import http.server
import threading

import pytest
from ray_jobs import RayJobError, RayJobs


def test_an_address_that_is_none_or_silent_is_an_error():
    with pytest.raises(RayJobError, match="no address of a Ray dashboard"):
        RayJobs("head:8265", None)
    with pytest.raises(OSError):
        RayJobs("http://127.0.0.1:9", "x").attach("x", "true")


def test_the_token_does_not_follow_a_redirect():
    """A server that sends callers elsewhere does not get the token sent there."""
    seen = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(302)
            self.send_header("Location", "/stolen")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(RayJobError, match="302"):
                RayJobs(f"http://127.0.0.1:{server.server_port}", "secret").follow("x", print, poll_s=0.5)
        finally:
            server.shutdown()
            thread.join()
    assert seen == ["/api/jobs/x"]
