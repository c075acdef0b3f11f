"""A real server on a free port of this machine, for tests of the interface: in a thread, or as a process."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from cook.config.load import load_config
from cook.service.access import read_tokens
from cook.service.client import Client
from cook.service.controller import Controller
from cook.service.jobs import Job
from cook.service.server import Options, Server
from tests.recipe.tiny_run import REPOSITORY, own_environment, write_run
from tests.service.parts import local, wait_for

STAGES = ("pretrain", "layer_mask")


def quick_plan(folder: Path, processes: int, refused: Sequence[Any] = ()) -> dict[str, Any]:
    """The checks of the configuration, without those that open the model."""
    config = load_config(folder / "bmcook.json", world_size=processes, refused=refused)
    numbers = ("steps", "tokens_at_most", "parameters_before", "parameters_after", "state_bytes_per_rank")
    row = {"weights_from": "fresh weights", "learns": [], "uneven": False, **dict.fromkeys(numbers, 6)}
    stages = [{"stage": entry.name, **row} for entry in config.stages]
    return {"config": "bmcook.json", "output": "out", "data": "text", "ranks": processes, "stages": stages}


class Full(type(local())):  # type: ignore[misc]
    """An executor that starts nothing: jobs stay queued, and an attempt that a test writes stays as it is."""

    def has_room(self, *_: object) -> bool:
        return False

    def tend(self, *_: object) -> str:
        return ""


class Live:
    """A running server and a client for it."""

    def __init__(self, server: Server):
        self.server, self.url = server, server.url
        self.controller: Controller = server.service.controller
        self.token = next(iter(read_tokens(server.options.home).values()))
        self.bearer = {"Authorization": f"Bearer {self.token}"}
        self.http = httpx.Client(base_url=self.url, headers=self.bearer, trust_env=False, timeout=30)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def raw(self, request: bytes, seconds: float = 10.0) -> bytes:
        """The answer to bytes that are sent as they are, up to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
                while block := connection.recv(65536):
                    answer += block
            return answer

    def submit(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.http.post("/v1/jobs", json=body, headers=headers)

    def job(self, body: dict[str, Any]) -> Job:
        answer = self.submit(body)
        assert answer.status_code == 201, answer.text
        return self.controller.get(answer.json()["id"])


@contextlib.contextmanager
def serving(
    home: Path, *, plan: Any = quick_plan, executor: Any = None, port: int = 0, **options: Any
) -> Iterator[Live]:
    """Serves `home` until the end of the block."""
    executors = {"local": executor or Full(gpus=(), slots=4)}
    controller = Controller(home, executors=executors, poll=0.05, retry_delay=0.0)
    controller.start()
    try:
        server = Server(Options(home=home, port=port, **options), controller=controller, plan=plan)
        with server.attached():
            thread = threading.Thread(target=server.serve_here, daemon=True)
            thread.start()
            wait_for(lambda: server.started, "the server")
            live = Live(server)
            try:
                yield live
            finally:
                live.http.close()
                server.should_exit = True
                began = time.monotonic()
                thread.join(20)
                assert not thread.is_alive(), "the server does not end"
                assert time.monotonic() - began < 10
    finally:
        controller.close()


@contextlib.contextmanager
def served(home: Path, *options: str) -> Iterator[tuple[subprocess.Popen, Client]]:
    """`cook serve` as a process, and a client of it. Its errors are appended to the file `errors` beside `home`."""
    script = str(Path(__file__).with_name("serve.py"))
    command = [sys.executable, script, "--home", str(home), "--port", "0", "--json", *options]
    environment = own_environment(PYTHONPATH=str(REPOSITORY))
    with (
        open(home.parent / "errors", "a") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors) as server,
    ):
        assert server.stdout is not None
        try:
            facts = json.loads(server.stdout.readline())
            with Client(facts["url"], (home / "token").read_text().split()[0]) as client:
                yield server, client
        finally:
            server.kill()


def recipe(folder: Path, stages: Sequence[str] = STAGES, **changes: Any) -> dict[str, Any]:
    """A submission of the tiny recipe; its corpus lies in `folder`."""
    write_run(folder, stages, **changes)
    config, scheme = (json.loads((folder / name).read_text()) for name in ("bmcook.json", "l0_pruning.json"))
    return {"config": config, "scheme": scheme, "name": "tiny"}
