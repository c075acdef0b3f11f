"""Downloads from a server on the loopback address: whole, resumed, damaged, and none at all."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cook.base.errors import UserError
from cook.data.benchmarks.glue import GLUE_TASKS, read_glue
from cook.data.download import GLUE_ARCHIVES, MRPC_FILES, SQUAD_FILES, Download, fetch, unpack, write_mrpc

CONTENT = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    ranges = True
    """Whether it answers to `Range`."""
    sends: int | None = None
    """Bytes after which it breaks off."""
    asked: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        self.send_response(206 if begin else 200)
        self.end_headers()
        self.wfile.write(CONTENT[begin : self.server.sends])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.asked = []
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def download(server: Server, **changes: object) -> Download:
    right = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}
    return Download(url=f"http://127.0.0.1:{server.server_port}/x.bin", **(right | changes))  # type: ignore[arg-type]


def test_a_file_is_fetched_once(server, tmp_path):
    for _ in range(2):
        assert fetch(download(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None] and [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_is_resumed(server, tmp_path, ranges):
    server.sends, server.ranges = 1000, ranges
    with pytest.raises(UserError, match="resume from 1000 bytes") as caught:
        fetch(download(server), tmp_path)
    assert str(tmp_path / "x.bin") in str(caught.value)  # the way by hand
    server.sends = None
    assert fetch(download(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-"]


def test_another_content_is_refused_and_not_kept(server, tmp_path):
    with pytest.raises(UserError, match="the file differs from the published one"):
        fetch(download(server, sha256="0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_put_there_by_hand_counts(tmp_path):
    (tmp_path / "x.bin").write_bytes(CONTENT)
    nowhere = Download(url="http://127.0.0.1:9/x.bin", sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))
    assert fetch(nowhere, tmp_path).read_bytes() == CONTENT
    (tmp_path / "x.bin").write_bytes(b"other")
    with pytest.raises(UserError, match="the download failed"):
        fetch(nowhere, tmp_path)


def test_an_archive_is_unpacked_flat(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("MNLI/train.tsv", "a")
        archive.writestr("MNLI/original/train.tsv", "not this one")
        archive.writestr("__MACOSX/MNLI/._train.tsv", "nor this")
        archive.writestr("../../evil.tsv", "b")
    assert sorted(path.name for path in unpack(tmp_path / "a.zip", tmp_path / "out")) == ["train.tsv"]
    assert (tmp_path / "out" / "train.tsv").read_text() == "a"
    assert not (tmp_path.parent / "evil.tsv").exists()
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("readme.md", "x")
    with pytest.raises(UserError, match=r"no \.tsv"):
        unpack(tmp_path / "b.zip", tmp_path / "out")


def test_mrpc_is_split_by_the_published_ids(tmp_path):
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = [f"{number % 2}\t{number}\t{number + 100}\tone \u2028 {number}\ttwo\r\n" for number in range(5)]
    (tmp_path / "train.txt").write_bytes(("\ufeff" + header + "".join(rows)).encode())
    (tmp_path / "test.txt").write_bytes(("\ufeff" + header + rows[0]).encode())
    (tmp_path / "ids.tsv").write_text("1\t101\n3\t103\n")
    files = [tmp_path / name for name in ("train.txt", "test.txt", "ids.tsv")]
    write_mrpc(*files, tmp_path / "MRPC")
    read = {name: read_glue(GLUE_TASKS["MRPC"], tmp_path / "MRPC" / f"{name}.tsv").rows for name in ("train", "dev")}
    assert [row.first for row in read["dev"]] == ["one \u2028 1", "one \u2028 3"] and len(read["train"]) == 3
    (tmp_path / "ids.tsv").write_text("9\t9\n")
    with pytest.raises(UserError, match="none of its ids"):
        write_mrpc(*files, tmp_path / "MRPC")


def test_every_task_can_be_fetched():
    assert {*GLUE_ARCHIVES, "MRPC"} == set(GLUE_TASKS)
    listed = [*GLUE_ARCHIVES.values(), *MRPC_FILES.values(), *(file for pair in SQUAD_FILES.values() for file in pair)]
    assert len({file.sha256 for file in listed}) == len(listed)
    for file in listed:
        assert file.url.startswith("https://") and len(file.sha256) == 64 and file.size > 1000
