"""The client of the service: finds the server, and makes requests that may be repeated safely."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from cook.base.errors import RunFailed, UserError, UserErrors
from cook.base.files import read_json, sha256
from cook.service.access import TOKEN_FILE, is_loopback

SERVER_FILE = "server.json"
"""A file of the home folder: the address of the server that runs on it."""
TRIES = 6
PLANNING = 600.0
"""Seconds to wait for an answer to a submission, which is planned first."""
ENDED = ("succeeded", "stopped", "failed", "lost")


def default_home() -> Path:
    """The home folder of the service, unless another one is named."""
    return Path(os.environ.get("COOK_HOME") or Path.home() / ".local" / "share" / "cook")


def find_server(server: str | None = None, token_file: Path | None = None) -> tuple[str, str]:
    """The address of the server, and the token for it.

    Args:
        server: `--server`; None: `COOK_SERVER`, or the server that runs on the default home folder.
        token_file: `--token-file`; None: `COOK_TOKEN`, or, for a server on this machine, the file in the home folder.

    Raises:
        UserError: There is no server, no token, or the token would be sent to another machine without encryption.
    """
    home = default_home()
    url = server or os.environ.get("COOK_SERVER") or _running_server(home)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--server {url}: not an address", wanted="https://HOST:PORT")
    local = is_loopback(parts.hostname)
    if parts.scheme == "http" and not local:
        raise UserError(f"--server {url}: the token would be sent without encryption", wanted="https://…")
    token = os.environ.get("COOK_TOKEN") if token_file is None else None
    if not token:
        if token_file is None and not local:
            raise UserError(f"no token for {url}", remedy="set COOK_TOKEN, or give --token-file")
        token = _read_token(token_file or home / TOKEN_FILE)
    return url.rstrip("/"), token


def _running_server(home: Path) -> str:
    path = home / SERVER_FILE
    if not path.is_file():
        raise UserError(
            "no server is running here",
            wanted=f"its address in {path}, which cook serve writes",
            remedy="start one with `cook serve`, or name it with --server or COOK_SERVER",
        )
    return str(read_json(path)["url"])


def _read_token(path: Path) -> str:
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: no token can be read: {error}", remedy="set COOK_TOKEN, or --token-file") from None
    if not words:
        raise UserError(f"{path}: has no token")
    return words[0]


class Client:
    """A connection to the service.

    Args:
        url: The address of the server.
        token: A token of it.
        pause: Seconds to wait before the second try of a request; each further wait is twice as long.
    """

    def __init__(self, url: str, token: str, *, pause: float = 0.5):
        self.url, self._pause = url, pause
        self.is_here = is_loopback(urlsplit(url).hostname or "")
        """Whether the server is on this machine."""
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(30.0, connect=10.0),
            # A proxy cannot reach this machine. A transport of its own heeds SSL_CERT_FILE all the same.
            transport=httpx.HTTPTransport() if self.is_here else None,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, body: dict[str, Any], key: str) -> dict[str, Any]:
        """Submits a job. The key makes it safe to repeat the request when the answer does not arrive."""
        headers = {"Idempotency-Key": key}
        return self._json("POST", "/v1/jobs", json=body, headers=headers, timeout=PLANNING)

    def plan(self, body: dict[str, Any]) -> dict[str, Any]:
        """The plan of a submission, without a job."""
        return self._json("POST", "/v1/plan", json=body, timeout=PLANNING)

    def jobs(self, *, state: Sequence[str] = (), owner: str | None = None, limit: int | None = None) -> Iterator[Any]:
        """Jobs, newest first."""
        after: str | None = None
        left = limit
        while left is None or left > 0:
            query: dict[str, Any] = {"state": list(state), "limit": min(left or 1000, 1000)}
            query |= {key: value for key, value in (("owner", owner), ("after", after)) if value}
            page = self._json("GET", "/v1/jobs", params=query)
            yield from page["jobs"]
            left = None if left is None else left - len(page["jobs"])
            after = page["next"]
            if after is None:
                return

    def job(self, id: str) -> dict[str, Any]:
        """One job."""
        return self._json("GET", _path(id))

    def stop(self, id: str, *, now: bool = False) -> dict[str, Any]:
        """Stops a job. Repeated, it has no further effect."""
        return self._json("POST", f"{_path(id)}/stop", json={"now": now})

    def resume(self, id: str) -> dict[str, Any]:
        """Queues a job again."""
        return self._json("POST", f"{_path(id)}/resume", tries=1)

    def remove(self, id: str) -> None:
        """Removes a job that has ended."""
        self._request("DELETE", _path(id), tries=1)

    def artifacts(self, id: str) -> list[dict[str, Any]]:
        """The manifest of a job."""
        return self._json("GET", f"{_path(id)}/artifacts")

    def log(self, id: str, offset: int, attempt: int | None = None) -> tuple[str, int, int]:
        """What a job has printed from a byte offset; where to continue; and which attempt it is."""
        query = {"offset": offset} | ({"attempt": attempt} if attempt else {})
        response = self._request("GET", f"{_path(id)}/log", params=query)
        return response.text, int(response.headers["X-Next-Offset"]), int(response.headers["X-Attempt"])

    def events(self, id: str, *, logs: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a job, without end. A lost connection is made again, and nothing is missed or repeated."""
        last: str | None = None
        lost_since: float | None = None
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            query = {"jobs": id, "logs": str(logs).lower()}
            try:
                timeout = httpx.Timeout(10.0, read=60.0)  # the server sends a sign of life every 15 seconds
                with self._http.stream("GET", "/v1/events", params=query, headers=headers, timeout=timeout) as response:
                    if not response.is_success:
                        response.read()
                        raise _failure(response)
                    for mark, name, data in _parsed(response.iter_lines()):
                        last, lost_since = mark or last, None
                        yield name, json.loads(data)
            except httpx.TransportError as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > 60 * self._pause * 2:
                    raise RunFailed(f"{self.url}: cannot be reached: {error}; the job is not affected") from None
            time.sleep(self._pause)

    def download(self, id: str, artifact: dict[str, Any], folder: Path, say: Callable[[str], None]) -> bool:
        """Downloads an artifact, and checks it. A part of an earlier download is continued.

        Args:
            id: The job.
            artifact: An entry of the manifest.
            folder: Where to; the name may add folders.
            say: Gets a sentence when a part is thrown away.

        Returns:
            False if the file was there already.

        Raises:
            UserError: The name leads out of the folder.
            RunFailed: What arrived has another checksum.
        """
        target = _inside(folder, artifact["name"])
        if target.is_file() and sha256(target) == artifact["sha256"]:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        for _ in range(TRIES):
            try:
                self._fetch(f"{_path(id)}/artifacts/{quote(artifact['name'])}", artifact, part)
            except httpx.TransportError:
                time.sleep(self._pause)
                continue
            if sha256(part) == artifact["sha256"]:
                os.replace(part, target)
                return True
            part.unlink()
            say(f"{artifact['name']}: the checksum is wrong; downloading it again")
        raise RunFailed(f"{artifact['name']}: could not be downloaded whole from {self.url}")

    def _fetch(self, path: str, artifact: dict[str, Any], part: Path) -> None:
        have = part.stat().st_size if part.is_file() else 0
        if have > artifact["bytes"]:
            part.unlink()
            have = 0
        if have == artifact["bytes"]:
            part.touch()
            return
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{artifact["sha256"]}"'} if have else {}
        with self._http.stream("GET", path, headers=headers) as response:
            if not response.is_success:
                response.read()
                raise _failure(response)
            with open(part, "ab" if response.status_code == 206 else "wb") as file:
                for block in response.iter_bytes(1 << 20):
                    file.write(block)

    def _json(self, method: str, path: str, **request: Any) -> Any:
        return self._request(method, path, **request).json()

    def _request(self, method: str, path: str, *, tries: int = TRIES, **request: Any) -> httpx.Response:
        for number in range(1, tries + 1):
            try:
                response = self._http.request(method, path, **request)
                if response.status_code not in (502, 503, 504):
                    break
                reason = f"status {response.status_code}"
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            if number == tries:
                raise RunFailed(f"{self.url}: the server cannot be reached: {reason}")
            time.sleep(self._pause * 2 ** (number - 1) * random.uniform(0.5, 1))
        if not response.is_success:
            raise _failure(response)
        return response


def _path(id: str) -> str:
    return f"/v1/jobs/{quote(id, safe='')}"


def _failure(response: httpx.Response) -> UserError | RunFailed:
    """The error of a response: a mistake of the user, or a failure of the server."""
    error, listed = f"status {response.status_code}", []
    with contextlib.suppress(ValueError, TypeError, KeyError):
        content = response.json()
        error, listed = str(content["error"]), [str(problem) for problem in content["problems"]]
    if response.status_code >= 500:
        return RunFailed(f"the server failed: {error}")
    if response.status_code == 422 and listed and listed != [error]:
        return UserErrors(error, [UserError(problem) for problem in listed])
    remedies = {401: "check COOK_TOKEN or the token file", 404: "`cook jobs` lists the jobs"}
    return UserError(error, remedy=remedies.get(response.status_code))


def _parsed(lines: Iterator[str]) -> Iterator[tuple[str | None, str, str]]:
    """Id, name and data of the events of a stream."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            key, _, value = line.partition(":")
            fields[key] = value.removeprefix(" ")
            continue
        if "data" in fields and "event" in fields:
            yield fields.get("id"), fields["event"], fields["data"]
        fields = {}


def _inside(folder: Path, name: str) -> Path:
    """The file of a name below a folder. The names come from a server, which may not be honest."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise UserError(f"the server names a file {name!r}, which is not inside of the folder")
    target = folder.joinpath(*parts)
    root = Path(os.path.realpath(folder))
    if not Path(os.path.realpath(target)).is_relative_to(root):
        raise UserError(f"{target}: a link leads out of {folder}", remedy="remove the link, or choose another folder")
    return target


def new_key(body: dict[str, Any]) -> str:
    """A new idempotency key for a submission."""
    return f"{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]}-{os.urandom(12).hex()}"
