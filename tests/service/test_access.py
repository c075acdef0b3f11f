"""Tokens, login links, sessions, and the names by which a server is reached."""

from __future__ import annotations

import os
import stat
import time

import pytest

from cook.base.errors import UserError
from cook.service import access
from cook.service.access import Access, Denied, address, is_loopback, read_tokens

TOKENS = {"admin": "a" * 40, "other": "b" * 40}


@pytest.fixture
def guarded():
    return Access(TOKENS, address("127.0.0.1", 8642))


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path):
    tokens = read_tokens(tmp_path / "home")
    path = tmp_path / "home" / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(tokens["admin"]) > 40
    assert read_tokens(tmp_path / "home") == tokens
    path.write_text(f"{'c' * 40}\n{'d' * 40} guest\n")
    assert read_tokens(tmp_path / "home") == {"admin": "c" * 40, "guest": "d" * 40}
    path.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        read_tokens(tmp_path / "home")


@pytest.mark.parametrize("text", ["", "short admin\n", f"{'c' * 40} a\n{'d' * 40} a\n", f"{'c' * 40}\n{'d' * 40}\n"])
def test_a_token_file_without_valid_tokens_is_refused(text, tmp_path):
    (tmp_path / "token").write_text(text)
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(UserError, match="token"):
        read_tokens(tmp_path)


def test_a_link_in_place_of_the_token_file_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("x" * 40)
    os.symlink(tmp_path / "elsewhere", tmp_path / "token")
    with pytest.raises(OSError):
        read_tokens(tmp_path)


def test_bearer_tokens(guarded):
    assert guarded.authenticate({"authorization": f"Bearer {'b' * 40}"}, {}) == ("other", False)
    for wrong in ("Bearer", "Bearer ", f"Bearer {'b' * 39}", f"Basic {'b' * 40}", "Bearer é", f"Bearer {'b' * 41}"):
        assert guarded.authenticate({"authorization": wrong}, {})[0] is None


def test_sessions_are_signed_and_end(guarded, monkeypatch):
    def owner(value):
        return guarded.authenticate({}, {guarded.cookie_name: value})[0]

    value = guarded.session("other")
    assert owner(value) == "other"
    assert Access(TOKENS, guarded.address).authenticate({}, {guarded.cookie_name: value})[0] == "other"  # a restart
    content, signature = value.split(".")
    for wrong in (
        "",
        ".",
        "a.b",
        "é.é",
        content,
        f"{guarded.session('admin').split('.')[0]}.{signature}",
        f"{value}x.",
    ):
        assert owner(wrong) is None
    changed = Access(TOKENS | {"other": "c" * 40}, guarded.address)
    assert changed.authenticate({}, {changed.cookie_name: value})[0] is None
    now = time.time()
    monkeypatch.setattr(access.time, "time", lambda: now + access.SESSION + 1)
    assert owner(value) is None


def test_a_login_link_works_once_and_not_forever(guarded, monkeypatch):
    code = guarded.make_link()
    assert guarded.redeem("x") is None and guarded.redeem("\ud800") is None
    assert guarded.redeem(code) == "admin" and guarded.redeem(code) is None
    late = guarded.make_link("other")
    now = time.monotonic()
    monkeypatch.setattr(access.time, "monotonic", lambda: now + access.LINK + 1)
    assert guarded.redeem(late) is None
    for _ in range(access.MAX_LINKS + 5):
        guarded.make_link()
    assert len(guarded._links) == access.MAX_LINKS


def test_the_cookie_is_kept_from_scripts_and_other_sites(guarded):
    cookie = guarded.cookie("admin")
    assert all(part in cookie for part in ("HttpOnly", "SameSite=Strict", "Path=/")) and "Secure" not in cookie
    assert "Secure" in Access(TOKENS, guarded.address, secure=True).cookie("admin")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "[::1]", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", ""])
def test_other_addresses_need_encryption(host):
    assert not is_loopback(host)
    with pytest.raises(UserError, match="without encryption"):
        address(host, 1)
    assert address(host, 1, tls=True).schemes == ("https",)
    assert "http" in address(host, 1, behind_proxy=True).schemes


HERE = {"host": "127.0.0.1:8642"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
def test_host_and_origin_are_checked_for_every_method(guarded, method):
    def check(headers, by_cookie=False):
        guarded.address.check(method, headers, by_cookie=by_cookie)

    check(HERE)
    check({"host": "LOCALHOST:8642", "origin": "http://localhost:8642"}, by_cookie=True)
    for host in ("", "evil.example", "evil.example:8642", "127.0.0.1", "127.0.0.1:80", "127.0.0.1:8642.evil.example"):
        with pytest.raises(Denied) as denial:
            check({"host": host})
        assert denial.value.status == 403
    for origin in ("null", "", "http://evil.example", "https://127.0.0.1:8642", "http://127.0.0.1:1", "http://[", "x"):
        with pytest.raises(Denied):
            check(HERE | {"origin": origin})


def test_a_change_by_cookie_must_come_from_a_page_of_the_server(guarded):
    check = guarded.address.check
    check("GET", HERE, by_cookie=True)
    check("POST", HERE | {"sec-fetch-site": "same-origin"}, by_cookie=True)
    for more in ({}, {"sec-fetch-site": "same-site"}, {"sec-fetch-site": "none"}):
        with pytest.raises(Denied):
            check("POST", HERE | more, by_cookie=True)


def test_further_names():
    found = address("127.0.0.1", 8642, behind_proxy=True, names=["cook.example.org", "[::2]:1"])
    assert {"cook.example.org", "cook.example.org:8642", "[::2]:1"} <= found.hosts
    for name in ("a b", "http://x", "*", "x/y", ""):
        with pytest.raises(UserError, match="--allow-host"):
            address("127.0.0.1", 1, names=[name])
