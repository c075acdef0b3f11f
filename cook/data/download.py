"""Downloads of public data, with resume and checksums."""

from __future__ import annotations

import os
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cook.base.errors import UserError
from cook.base.files import sha256, write_atomically

CHUNK = 1 << 20
TIMEOUT = 30


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file to fetch."""

    url: str
    sha256: str
    size: int  # bytes

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


_GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
_SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
_SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"


def _glue(name: str, size: int, digest: str, base: str = _GLUE) -> Download:
    return Download(url=base + name, size=size, sha256=digest)


# Sizes and checksums: those that the `datasets` library published for the same addresses.
GLUE_ARCHIVES = {
    "CoLA": _glue("CoLA.zip", 376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "SST-2": _glue("SST-2.zip", 7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "STS-B": _glue("STS-B.zip", 802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "QQP": _glue("QQP-clean.zip", 41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "MNLI": _glue("MNLI.zip", 312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "QNLI": _glue("QNLIv2.zip", 10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "RTE": _glue("RTE.zip", 697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "WNLI": _glue("WNLI.zip", 28999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
}
MRPC_FILES = {
    "train": _glue(
        "msr_paraphrase_train.txt",
        1047044,
        "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
        _SENTEVAL,
    ),
    "test": _glue(
        "msr_paraphrase_test.txt", 441275, "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784", _SENTEVAL
    ),
    "dev_ids": _glue("mrpc_dev_ids.tsv", 6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
}
SQUAD_FILES = {
    "1.1": (
        _glue("train-v1.1.json", 30288272, "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955", _SQUAD),
        _glue("dev-v1.1.json", 4854279, "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9", _SQUAD),
    ),
    "2.0": (
        _glue("train-v2.0.json", 42123633, "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002", _SQUAD),
        _glue("dev-v2.0.json", 4370528, "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8", _SQUAD),
    ),
}


def fetch(download: Download, folder: Path, say: Callable[[str], None] = print) -> Path:
    """Downloads a file to `folder`, unless it is already there. Resumes an incomplete download.

    A file that the user has put there is accepted if its checksum is right.

    Raises:
        UserError: there is no network, or the checksum is wrong. The message describes how to get the file by hand.
    """
    path, part = folder / download.name, folder / f"{download.name}.part"
    if path.is_file() and sha256(path) == download.sha256:
        say(f"{path}: already there")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if not (part.is_file() and part.stat().st_size == download.size):
        try:
            _transfer(download, part, say)
        except OSError as error:  # URLError is one
            raise UserError(
                f"{download.url}: the download failed",
                got=getattr(error, "reason", None) or error,
                remedy=f"start again to resume from {_bytes(part)} bytes; without a network, download that address on "
                f"another machine, copy the file to {path}, and start again",
            ) from None
    if (digest := sha256(part)) != download.sha256:
        part.unlink()
        raise UserError(
            f"{download.url}: the file differs from the published one",
            wanted=f"sha256 {download.sha256}, {download.size} bytes",
            got=f"sha256 {digest}",
            remedy="start again; if this happens again, the file at this address has changed",
        )
    os.replace(part, path)
    return path


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _transfer(download: Download, part: Path, say: Callable[[str], None]) -> None:
    have = _bytes(part)
    if have > download.size:
        have = 0
    headers = {"User-Agent": "cook"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(download.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumes = answer.status == 206  # a server without ranges sends the whole file
        say(f"{download.url}: {'resuming from byte ' + str(have) if resumes else f'{download.size} bytes'}")
        with open(part, "ab" if resumes else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
    if _bytes(part) < download.size:
        raise OSError("the connection ended early")


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpacks the text files of an archive into `folder`, whatever folders they lie in there."""
    made = []
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            name = Path(member.filename).name
            if member.is_dir() or not name.endswith(".tsv") or "__MACOSX" in member.filename:
                continue
            # MNLI's archive holds the originals in a folder of their own: the top one is what tasks read.
            if len(Path(member.filename).parts) <= 2:
                made.append(folder / name)
                write_atomically(folder / name, opened.read(member))
    if not made:
        raise UserError(f"{archive}: holds no .tsv file")
    return made


def write_mrpc(train: Path, test: Path, dev_ids: Path, folder: Path) -> None:
    """Makes MRPC's train, dev and test files: the distribution has one training file and the ids of the dev pairs."""
    # Only a line feed ends a line: the sentences may hold other separators of Unicode.
    ids = {tuple(line.split()) for line in dev_ids.read_text(encoding="utf-8-sig").split("\n") if line.strip()}
    lines = [line.rstrip("\r") for line in train.read_text(encoding="utf-8-sig").split("\n")]
    header, rows = lines[0], [line for line in lines[1:] if line]
    dev = [row for row in rows if tuple(row.split("\t")[1:3]) in ids]
    if not dev:
        raise UserError(f"{dev_ids}: none of its ids is in {train}")
    rest = [row for row in rows if tuple(row.split("\t")[1:3]) not in ids]
    for name, content in (("train", rest), ("dev", dev)):
        write_atomically(folder / f"{name}.tsv", "\n".join([header, *content]) + "\n")
    write_atomically(folder / "test.tsv", test.read_text(encoding="utf-8-sig"))
