"""A whole NDIF server on this machine: redis, object store, Ray, controller and API; no GPU, no accounts.

Prints one JSON line, {"host": "http://127.0.0.1:…"}, when it is up, runs until its standard input ends, and then stops what it started and
nothing else. Exits with 3 and the reason if its environment is missing. Ports are chosen free. What it serves listens on loopback, but
Ray's inner ports on every interface: for trusted networks only.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
from environment import folder, missing

INSIDE = Path(__file__).parent / "inside"
MARK = "NNATO_NDIF_SERVER"
DEADLINE = 240


class Server:
    """The services, and the ends of all of them."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="ndif.", dir="/tmp"))  # short: Ray's sockets lie below, and 107 bytes is their limit
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self.until = time.monotonic() + DEADLINE
        api, redis, store, ray, client, *_ = self.ports = free_ports(9)
        self.host = f"http://127.0.0.1:{api}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "USER")},
            MARK: str(self.home),
            "PATH": f"{folder() / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(INSIDE),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "NDIF_HOME": str(self.home / "home"),
            "NDIF_API_PORT": str(api),
            "NDIF_API_URL": self.host,
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{redis}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{store}",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{client}",
            "NDIF_RAY_HEAD_PORT": str(ray),
            "NDIF_RAY_TEMP_DIR": str(self.home / "ray"),
            "NDIF_MODEL_IMPORT_PATH": "actors.CPUModelActor",
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_SANDBOX_POOL_SIZE": "1",
            # The controller places models on nodes with a GPU only; pretend one, which the actor never touches.
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 8, "GPU": 1, "cuda_memory_bytes": 8_000_000_000}),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # a token left in the home folder by another Ray would be asked for, and not by all of its parts
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        (self.home / "home").mkdir()

    def start(self) -> None:
        api, redis, store, ray, client, dashboard, agent, agent_grpc, metrics = self.ports
        python = str(folder() / "bin" / "python")
        resources = subprocess.check_output([python, "-m", "ndif.services.ray.resources", "--head"], env=self.environment, text=True)
        # Without a dump: a stale flag in one would make /connected say yes too early.
        self.spawn("redis", "redis-server", "--bind", "127.0.0.1", "--port", redis, "--save", "", "--appendonly", "no")
        self.spawn("store", "moto_server", "-H", "127.0.0.1", "-p", store)
        self.spawn(
            *("ray", "ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--port={ray}"),
            *(f"--ray-client-server-port={client}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
            *(f"--metrics-export-port={metrics}", f"--resources={resources.strip()}", f"--temp-dir={self.home / 'ray'}"),
            *("--object-store-memory=200000000",),
        )
        self.wait_for_port("redis", redis)
        self.wait_for_port("ray", client)
        environment = {**self.environment, "RAY_ADDRESS": f"127.0.0.1:{ray}"}
        command = [python, "-m", "ndif.services.ray.deployments.controller.controller"]
        with open(self.home / "controller.log", "wb") as log:
            if subprocess.run(command, env=environment, cwd=self.home, stdout=log, stderr=log, timeout=DEADLINE).returncode:
                raise RuntimeError(f"the controller did not start:\n{self.tail('controller')}")
        self.spawn(
            *("api", "gunicorn", "--config", "python:ndif.services.api.gunicorn_conf", "--bind", f"127.0.0.1:{api}"),
            "ndif.services.api.app:app",
        )
        self.wait_for_port("store", store)
        self.wait_for_port("api", api)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                if direct.open(f"{self.host}/connected", timeout=5).status == 200:
                    return
            except (urllib.error.URLError, TimeoutError):
                pass
            self.check("api", "has not connected to Ray")
            time.sleep(0.5)

    def spawn(self, name: str, *command: object) -> None:
        with open(self.home / f"{name}.log", "wb") as log:
            self.services[name] = subprocess.Popen(
                [str(part) for part in command],
                env=self.environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for_port(self, name: str, port: int) -> None:
        while not taken(port):
            self.check(name, f"does not listen on {port}")
            time.sleep(0.2)

    def check(self, name: str, trouble: str) -> None:
        if self.services[name].poll() is not None:
            raise RuntimeError(f"{name} ended:\n{self.tail(name)}")
        if time.monotonic() > self.until:
            raise RuntimeError(f"{name} {trouble} after {DEADLINE} s:\n{self.tail(name)}")

    def tail(self, name: str) -> str:
        return "\n".join((self.home / f"{name}.log").read_text(errors="replace").splitlines()[-15:])

    def stop(self) -> None:
        """Ask all of ours to end, and after three seconds make them: nothing they hold outlives the run."""
        for end, seconds in ((psutil.Process.terminate, 3), (psutil.Process.kill, 10)):
            until = time.monotonic() + seconds
            while (left := self.ours()) and time.monotonic() < until:
                for process in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        end(process)
                time.sleep(0.3)
        for service in self.services.values():
            service.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def ours(self) -> list[psutil.Process]:
        """Living processes of our sessions, or with our mark: some of Ray's overwrite their environment, others leave the session."""
        sessions, found = {service.pid for service in self.services.values()}, []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                    continue
                if os.getsid(process.pid) in sessions or process.environ().get(MARK) == str(self.home):
                    found.append(process)
            except (psutil.Error, ProcessLookupError, PermissionError):
                continue
        return found


def free_ports(count: int) -> list[int]:
    """Below the ephemeral range, where nobody else lands meanwhile."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randint(20_000, 29_000)
        if not taken(port):
            found.add(port)
    return list(found)


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> int:
    if reason := missing():
        print(reason, file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    server = Server()
    try:
        server.start()
        print(json.dumps({"host": server.host, "logs": str(server.home)}), flush=True)
        sys.stdin.read()
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
