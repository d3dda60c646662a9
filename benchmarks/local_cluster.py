"""A Ray cluster of several raylets on this machine, on loopback and with a token, for tests and chaos runs.

Every process belongs to a group that was started here and is ended by its own id.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
_HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")
_NODE_PORTS = (
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
    "runtime-env-agent-port",
    "node-manager-port",
    "object-manager-port",
)
_START_TIMEOUT_S = 600
_HEAD_ATTEMPTS = 5
_STARTED = "Ray runtime started"


def find_ports(count: int) -> list[int]:
    """Free ports of the loopback interface."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class LocalCluster:
    """A head node, and more nodes on request; ``start_head`` comes first.

    Attributes:
        environment: of clients: address and token of the cluster.
        nodes: the nodes added after the head, without those that were killed.
    """

    def __init__(self, folder: Path) -> None:
        """Chooses ports and a token; logs go to ``folder``."""
        self.folder = folder
        ports = dict(zip(_HEAD_PORTS, find_ports(len(_HEAD_PORTS)), strict=True))
        self.address = f"127.0.0.1:{ports['port']}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = environment | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_raylet_start_wait_time_s": str(_START_TIMEOUT_S),
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
        }
        self.environment = self._environment | {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
        }
        self.head: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._head_attempts = self._head_cpus = 0
        self._numbers = itertools.count()
        self._offers: dict[subprocess.Popen[bytes], tuple[int, dict[str, float]]] = {}
        self._disks: list[str] = []
        self._logs: dict[subprocess.Popen[bytes], Path] = {}
        self._head_flags = [f"--{name}={port}" for name, port in ports.items()]

    def start_head(self, num_cpus: int) -> None:
        """The node that the others and the clients join."""
        self._head_cpus = num_cpus
        self._head_attempts += 1
        flags = ["--head", "--dashboard-host=127.0.0.1", f"--num-cpus={num_cpus}", *self._head_flags]
        self.head = self._start("head", *flags)

    def add_node(self, num_cpus: int = 1, resources: dict[str, float] | None = None) -> subprocess.Popen[bytes]:
        """One more raylet, which may offer custom resources."""
        # A node that starts clears the folder of unpacked jobs; on a shared disk that would be its neighbours' too.
        self._disks.append(tempfile.mkdtemp(prefix="ray-"))  # short: Ray puts sockets below it
        offers = [f"--num-cpus={num_cpus}", f"--resources={json.dumps(resources or {})}", f"--temp-dir={self._disks[-1]}"]
        node = self._start(f"node{next(self._numbers)}", f"--address={self.address}", *offers)
        self.nodes.append(node)
        self._offers[node] = num_cpus, resources or {}
        return node

    def mend(self) -> None:
        """Starts again what failed to start: a raylet dies if its agents take more than 15 s, as on a busy machine they may."""
        for node in self._all_nodes():
            if node.poll() is None and _has_lost_its_raylet(node):
                _kill_tree(node)  # `ray start` itself would go on waiting for it
        if self.head and self.head.poll() is not None and self._head_attempts < _HEAD_ATTEMPTS:
            self.start_head(self._head_cpus)
        for node in [node for node in self.nodes if node.poll() is not None]:
            self.nodes.remove(node)
            self.add_node(*self._offers.pop(node))

    def wait(self, num_nodes: int) -> None:
        """Returns when so many nodes, the head among them, have said that they run."""
        end = time.monotonic() + _START_TIMEOUT_S
        while sum(_STARTED in self._logs[node].read_text() for node in self._all_nodes() if node.poll() is None) < num_nodes:
            self.mend()
            assert self.head and self.head.poll() is None, f"the head ended; see {self.folder / 'head.log'}"
            if time.monotonic() > end:
                raise TimeoutError(f"{num_nodes} nodes did not come up; see {self.folder}")
            time.sleep(0.5)

    def _start(self, name: str, *flags: str) -> subprocess.Popen[bytes]:
        ports = [f"--{port_name}={port}" for port_name, port in zip(_NODE_PORTS, find_ports(len(_NODE_PORTS)), strict=True)]
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *flags, *ports]
        command.append(f"--object-store-memory={256 * 2**20}")
        path = self.folder / f"{name}.log"
        with path.open("w") as log:
            node = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, start_new_session=True)
        self._logs[node] = path
        return node

    def find_processes(self, name: str, *nodes: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Processes below the given nodes, or any, whose command line contains ``name``."""
        found = []
        for node in nodes or self._all_nodes():
            if node.poll() is None:
                found += [each for each in psutil.Process(node.pid).children(recursive=True) if name in _command_of(each)]
        return found

    def find_node(self, resource: str) -> subprocess.Popen[bytes]:
        """The node that offers a custom resource: perhaps not the one that was added, if that one failed to start."""
        return next(node for node in self.nodes if resource in self._offers[node][1])

    def _all_nodes(self) -> list[subprocess.Popen[bytes]]:
        return [*([self.head] if self.head else []), *self.nodes]

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL for all of a node's processes at once, as when a machine loses its power."""
        _kill_tree(node)
        self.nodes.remove(node)

    def close(self) -> None:
        """Ends all nodes."""
        for node in reversed(self._all_nodes()):
            if node.poll() is None:
                children = psutil.Process(node.pid).children(recursive=True)
                os.killpg(node.pid, signal.SIGTERM)
                _, alive = psutil.wait_procs([psutil.Process(node.pid), *children], timeout=20)
                for process in alive:
                    process.kill()
                node.wait()
        for disk in self._disks:
            shutil.rmtree(disk, ignore_errors=True)


def _has_lost_its_raylet(node: subprocess.Popen[bytes]) -> bool:
    try:
        children = psutil.Process(node.pid).children()
        return any(child.name() == "raylet" and child.status() == psutil.STATUS_ZOMBIE for child in children)
    except psutil.NoSuchProcess:
        return False


def _kill_tree(node: subprocess.Popen[bytes]) -> None:
    for victim in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    node.wait()


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def local_cluster(folder: Path, *, head_cpus: int = 2, nodes: int = 0, node_cpus: int = 1) -> Iterator[LocalCluster]:
    """A cluster for the length of a ``with`` block."""
    folder.mkdir(parents=True, exist_ok=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is ended too
    cluster = LocalCluster(folder)
    try:
        cluster.start_head(head_cpus)
        cluster.wait(1)
        for _ in range(nodes):
            cluster.add_node(node_cpus)
        cluster.wait(1 + nodes)
        yield cluster
    finally:
        cluster.close()
