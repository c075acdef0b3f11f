"""The server process: `cook serve`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from cook.base.errors import UserError
from cook.base.files import regular_file, write_json
from cook.service.access import Access, address, read_tokens
from cook.service.api import Limits, Service, create_app
from cook.service.client import SERVER_FILE
from cook.service.controller import Controller
from cook.service.paths import Roots
from cook.service.planner import Planner
from cook.service.submission import Plan

EVERYWHERE = ("0.0.0.0", "::")
GRACE = 5
"""Seconds that requests in progress have to end when the server stops."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `cook serve`."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 8642
    roots: Sequence[Path] = ()
    allow_hub: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    behind_proxy: bool = False
    allow_hosts: Sequence[str] = ()
    database: str | None = None
    limits: Limits = field(default_factory=Limits)


class Server(uvicorn.Server):
    """A server that ends its event streams before it waits for open requests.

    Args:
        options: The options.
        controller: The jobs; None: the jobs of the home folder, which the server then starts and closes.
        plan: Plans submissions; None: in a process of its own.

    Raises:
        UserError: The options are not valid, the port is taken, or the home folder has another server.
    """

    def __init__(self, options: Options, *, controller: Controller | None = None, plan: Plan | None = None):
        self.options = options
        tls = _has_tls(options)
        # Refuses an unprotected address before anything listens.
        address(options.host, options.port, tls=tls, behind_proxy=options.behind_proxy, names=options.allow_hosts)
        roots = Roots(options.roots, allow_hub=options.allow_hub)
        options.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        tokens = read_tokens(options.home)
        self._socket = _listen(options.host, options.port)
        port = self._socket.getsockname()[1]
        names = address(options.host, port, tls=tls, behind_proxy=options.behind_proxy, names=options.allow_hosts)
        shown = f"[{options.host}]" if ":" in options.host else options.host
        if options.host in EVERYWHERE:  # no address that a browser could open
            shown = re.sub(r":\d+$", "", next(iter(options.allow_hosts), socket.gethostname()))
        self.url = f"{'https' if tls else 'http'}://{shown}:{port}"
        self.access = Access(tokens, names, secure=tls or options.behind_proxy)
        self._planner = Planner() if plan is None else None
        try:
            self._controller = controller or Controller(options.home, database=options.database)
        except BaseException:
            self._socket.close()
            raise
        self._owns_controller = controller is None
        self.service = Service(
            controller=self._controller,
            access=self.access,
            roots=roots,
            plan=plan or self._planner,  # type: ignore[arg-type]
            limits=options.limits,
        )
        self.app = create_app(self.service)
        super().__init__(
            uvicorn.Config(
                self.app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # it would show login codes
                server_header=False,
                proxy_headers=options.behind_proxy,
                timeout_graceful_shutdown=GRACE,
                ssl_certfile=options.tls_cert,
                ssl_keyfile=options.tls_key,
            )
        )

    @property
    def login_link(self) -> str:
        """A new link that logs a browser in, once."""
        return f"{self.url}/v1/login?code={self.access.make_link()}"

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Holds the home folder: follows its jobs, and tells clients the address."""
        try:
            if self._owns_controller:
                self._controller.start()
            note = self.options.home / SERVER_FILE
            write_json(note, {"url": self.url, "pid": os.getpid()})
            try:
                yield
            finally:
                note.unlink(missing_ok=True)
        finally:
            self._socket.close()
            if self._owns_controller:
                self._controller.close()
            if self._planner is not None:
                self._planner.close()

    def serve_here(self) -> None:
        """Serves until a signal, or `should_exit`. Jobs are not stopped. The server must be `attached`."""
        with _signals_end_quietly():
            if self._planner is not None:
                threading.Thread(target=self._planner.warm, daemon=True).start()
            self.run(sockets=[self._socket])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.streams.close()
        await super().shutdown(sockets)


def _has_tls(options: Options) -> bool:
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UserError("--tls-cert and --tls-key must be given together")
    if options.tls_cert is None or options.tls_key is None:
        return False
    for path in (options.tls_cert, options.tls_key):
        regular_file(path)
    try:
        # Without a password, a key that is encrypted would wait for somebody to type it.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            options.tls_cert, options.tls_key, password=""
        )
    except ssl.SSLError as error:
        raise UserError(
            "--tls-cert and --tls-key cannot be used",
            wanted="a chain of certificates that begins with the server's own, and its key without a password, in PEM",
            got=error.reason or str(error),
        ) from None
    return True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: not an address of this machine: {error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen()  # clients that come before the application is ready wait
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"{host}:{port}: cannot listen here: {error}", remedy="choose another --port") from None
    return listening


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it again: then it has no further effect, and the exit code is 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
