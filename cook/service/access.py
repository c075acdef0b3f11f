"""Who may use the service: the token file, login links, session cookies, and the names that requests may use."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cook.base.errors import UserError

TOKEN_FILE = "token"
FIRST_OWNER = "admin"
SESSION = 7 * 86400
"""Seconds for which a browser stays logged in."""
LINK = 3600
"""Seconds for which a login link can be used."""
MAX_LINKS = 100
UNSAFE = ("POST", "PUT", "PATCH", "DELETE")


class Denied(Exception):
    """A request that is refused: its HTTP status and the reason."""

    def __init__(self, status: int, reason: str):
        self.status, self.reason = status, reason
        super().__init__(reason)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server can be reached.

    `hosts` are the accepted values of the Host header, and `schemes` those of the scheme of an Origin.
    """

    hosts: frozenset[str]
    schemes: tuple[str, ...]

    def check(self, method: str, headers: Mapping[str, str], *, by_cookie: bool) -> None:
        """Checks Host and Origin, which a browser sets and a page of another site cannot choose.

        Args:
            method: The method of the request.
            headers: Its headers, with names in lower case.
            by_cookie: Whether the request is authenticated by its cookie alone.

        Raises:
            Denied: The request came by another name, or from a page of another site.
        """
        if headers.get("host", "").lower() not in self.hosts:
            raise Denied(403, "this server is not known by the name in the Host header; see cook serve --allow-host")
        origin = headers.get("origin")
        if origin is not None:
            scheme, _, host = origin.lower().partition("://")
            if scheme not in self.schemes or host not in self.hosts:
                raise Denied(403, "the request comes from a page of another site")
        elif by_cookie and method in UNSAFE and headers.get("sec-fetch-site") != "same-origin":
            raise Denied(403, "a request with a cookie needs an Origin header")


def is_loopback(host: str) -> bool:
    """Whether an address or name to listen on is reachable only from this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def address(
    host: str, port: int, *, tls: bool = False, behind_proxy: bool = False, names: Sequence[str] = ()
) -> Address:
    """The names by which a server that listens on `host` accepts requests.

    Args:
        host: The address to listen on.
        port: Its port.
        tls: Whether the server itself has a certificate.
        behind_proxy: Whether a proxy on another machine or port forwards requests, and has the certificate.
        names: Further names, with or without a port, as they appear in the address bar.

    Raises:
        UserError: The server would be reachable from other machines without encryption.
    """
    if not is_loopback(host) and not tls and not behind_proxy:
        raise UserError(
            f"--host {host}: other machines would send their tokens without encryption",
            wanted="a loopback address such as 127.0.0.1",
            remedy="give --tls-cert and --tls-key, or --behind-proxy if a proxy adds TLS",
        )
    own = ["127.0.0.1", "localhost", "[::1]"] if is_loopback(host) else [host, socket.gethostname(), socket.getfqdn()]
    hosts = {f"{name}:{port}" for name in own} | ({name for name in own} if port in (80, 443) else set())
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?|\[[0-9A-Fa-f:]+\](:\d+)?", name):
            raise UserError(f"--allow-host {name}: not a name", wanted="NAME or NAME:PORT, as in the address bar")
        hosts |= {name} | ({f"{name}:{port}"} if ":" not in name else set())
    schemes = ("https",) if tls else ("https", "http") if behind_proxy else ("http",)
    return Address(hosts=frozenset(each.lower() for each in hosts), schemes=schemes)


def read_tokens(home: Path) -> dict[str, str]:
    """The tokens of a home folder by owner. The file is created with one token if it is missing.

    Each line is a token and, after a space, the name of its owner; the name of the first line may be left out.

    Raises:
        UserError: The file can be read by others, or it has no valid token.
        OSError: The file cannot be read or written.
    """
    path = home / TOKEN_FILE
    home.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(handle, "w", encoding="ascii") as file:
            file.write(f"{secrets.token_urlsafe(32)} {FIRST_OWNER}\n")
            file.flush()
            os.fsync(handle)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise UserError(f"{path}: other users can read it", remedy=f"chmod 600 {path}, and replace the tokens")
        lines = [line.split() for line in file.read().splitlines() if line.strip()]
    tokens: dict[str, str] = {}
    for number, (token, *rest) in enumerate(lines):
        owner = rest[0] if rest else FIRST_OWNER if number == 0 else ""
        if len(token) < 32 or not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", owner) or owner in tokens:
            what = f"{path}: line {number + 1} is not a token with an owner"
            raise UserError(what, wanted="at least 32 characters, a space, and a name that no other line has")
        tokens[owner] = token
    if not tokens:
        raise UserError(f"{path}: has no token", remedy="remove the file; the next start makes a new one")
    return tokens


class Access:
    """Authentication of requests.

    Args:
        tokens: Tokens by owner.
        address: The names by which the server is reached.
        secure: Whether browsers reach it by HTTPS, so that the cookie is sent by HTTPS only.
    """

    def __init__(self, tokens: Mapping[str, str], address: Address, *, secure: bool = False):
        self._tokens = dict(tokens)
        self.address, self.secure = address, secure
        self._key = hashlib.sha256("\n".join(self._tokens.values()).encode()).digest()
        # Browsers send the cookies of all ports of a host.
        self.cookie_name = f"cook_{hashlib.sha256(self._key).hexdigest()[:8]}"
        self._links: dict[str, tuple[str, float]] = {}

    def authenticate(self, headers: Mapping[str, str], cookies: Mapping[str, str]) -> tuple[str | None, bool]:
        """The owner that a request is from, or None; and whether only its cookie says so."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.owner_of(token.strip()), False
        return self._session_owner(cookies.get(self.cookie_name, "")), True

    def owner_of(self, token: str) -> str | None:
        """The owner of a token. The comparison takes as long for a wrong token as for a right one."""
        found = None
        for owner, known in self._tokens.items():
            if hmac.compare_digest(known.encode(), token.encode("utf-8", "replace")):
                found = owner
        return found

    def make_link(self, owner: str | None = None) -> str:
        """A new code for one login as `owner`; None: as the first owner."""
        if len(self._links) >= MAX_LINKS:
            self._links.pop(next(iter(self._links)))
        code = secrets.token_urlsafe(32)
        self._links[_digest(code)] = (owner or next(iter(self._tokens)), time.monotonic() + LINK)
        return code

    def redeem(self, code: str) -> str | None:
        """The owner whom a login code lets in. The code is not valid a second time."""
        owner, until = self._links.pop(_digest(code), (None, 0.0))
        return owner if time.monotonic() < until else None

    def session(self, owner: str) -> str:
        """The value of a session cookie. Its signature makes it valid also after a restart of the server."""
        content = f"{owner} {int(time.time()) + SESSION}".encode()
        return f"{_encoded(content)}.{_encoded(self._signature(content))}"

    def cookie(self, owner: str) -> str:
        """The Set-Cookie header that logs a browser in."""
        parts = [f"{self.cookie_name}={self.session(owner)}", "HttpOnly", "SameSite=Strict", "Path=/"]
        return "; ".join([*parts, f"Max-Age={SESSION}", *(["Secure"] if self.secure else [])])

    def no_cookie(self) -> str:
        """The Set-Cookie header that logs a browser out."""
        return f"{self.cookie_name}=; HttpOnly; SameSite=Strict; Path=/; Max-Age=0"

    def _signature(self, content: bytes) -> bytes:
        return hmac.digest(self._key, b"session " + content, "sha256")

    def _session_owner(self, value: str) -> str | None:
        try:
            content, signature = (base64.urlsafe_b64decode(f"{part}==") for part in value.split("."))
        except ValueError:
            return None
        if not hmac.compare_digest(self._signature(content), signature):
            return None
        owner, until = content.decode().split(" ")
        return owner if owner in self._tokens and int(until) > time.time() else None


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode("utf-8", "replace")).hexdigest()  # a look-up by hash reveals no code by its time


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")
