from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cook.base.errors import UserError
from cook.base.lock import NAME, run_lock
from cook.base.processes import this_process
from tests.recipe.tiny_run import REPOSITORY

NO_SLURM = {"CLUSTER_NAME": "", "JOB_ID": "", "RESTART_COUNT": ""}
DEAD = dataclasses.replace(this_process(), started="1")
ELSEWHERE = dataclasses.replace(this_process(), host="elsewhere")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in NO_SLURM:
        monkeypatch.delenv(f"SLURM_{name}", raising=False)


def leave(folder: Path, *processes, slurm: dict[str, str] = NO_SLURM) -> bytes:
    """A lock as a killed run leaves it."""
    folder.mkdir(exist_ok=True)
    content = {"processes": [process.as_json() for process in processes], "slurm": slurm}
    (folder / NAME).write_text(json.dumps(content))
    return (folder / NAME).read_bytes()


def test_it_is_there_while_held_and_gone_afterwards(tmp_path):
    with run_lock(tmp_path / "a" / "b"):
        held = json.loads((tmp_path / "a" / "b" / NAME).read_text())
        assert held == {"processes": [this_process().as_json()], "slurm": NO_SLURM}
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [NAME]
    assert list(tmp_path.iterdir()) == [], "folders made for the lock alone go with it"


def test_a_folder_that_was_used_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "a"):
        (tmp_path / "a" / "x").write_text("")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


def test_a_second_run_is_refused_and_the_first_keeps_its_lock(tmp_path):
    with run_lock(tmp_path):
        before = (tmp_path / NAME).read_bytes()
        with pytest.raises(UserError, match="another run is using") as caught, run_lock(tmp_path):
            pass
        assert str(os.getpid()) in str(caught.value) and "choose another output_dir" in str(caught.value)
        assert (tmp_path / NAME).read_bytes() == before
    assert not (tmp_path / NAME).exists()


def test_the_lock_of_dead_processes_is_taken_over(tmp_path):
    leave(tmp_path, DEAD, DEAD)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["processes"] == [this_process().as_json()]


@pytest.mark.parametrize("processes", [(DEAD, this_process()), (DEAD, ELSEWHERE), (ELSEWHERE,), ()])
def test_without_proof_that_all_are_dead_it_is_refused(tmp_path, processes):
    before = leave(tmp_path, *processes)
    with pytest.raises(UserError, match="may be using|is using") as caught, run_lock(tmp_path):
        pass
    assert (tmp_path / NAME).read_bytes() == before
    if this_process() not in processes:
        assert f"rm '{tmp_path / NAME}'" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"processes": 3, "slurm": []}', '{"processes": [{"pid": 1}]}'])
def test_a_lock_that_cannot_be_read_proves_nothing(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(UserError, match="may be using"), run_lock(tmp_path):
        pass
    assert (tmp_path / NAME).read_text() == content


FIRST = {"CLUSTER_NAME": "c", "JOB_ID": "12", "RESTART_COUNT": ""}


@pytest.mark.parametrize(
    ("mine", "taken"),
    [
        (FIRST | {"RESTART_COUNT": "1"}, True),
        (FIRST, False),
        (FIRST | {"RESTART_COUNT": "1", "JOB_ID": "13"}, False),
        (FIRST | {"RESTART_COUNT": "1", "CLUSTER_NAME": "d"}, False),
        (NO_SLURM, False),
    ],
)
def test_a_requeued_slurm_job_takes_over_its_own_lock_from_another_machine(tmp_path, monkeypatch, mine, taken):
    before = leave(tmp_path, ELSEWHERE, slurm=FIRST)
    for name, value in mine.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    if taken:
        with run_lock(tmp_path):
            assert (tmp_path / NAME).read_bytes() != before
    else:
        with pytest.raises(UserError, match="may be using"), run_lock(tmp_path):
            pass


def test_a_lock_that_another_run_has_taken_since_is_left_to_it(tmp_path):
    with run_lock(tmp_path):
        theirs = leave(tmp_path, ELSEWHERE)
    assert (tmp_path / NAME).read_bytes() == theirs


def test_a_folder_that_cannot_be_made_is_a_plain_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), run_lock(tmp_path / "file" / "x"):
        pass


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["processes"]
        with pytest.raises(UserError, match="is using"), run_lock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


RACE = r"""
    import os, sys, time
    from cook.base.errors import UserError
    from cook.base.lock import run_lock
    start, end = time.monotonic() + 0.2, time.monotonic() + 1.2
    for _ in range(5):
        if not os.fork():
            time.sleep(max(0.0, start - time.monotonic()))
            try:
                with run_lock(sys.argv[1]):
                    os.write(1, b"won\n")
                    time.sleep(max(0.0, end - time.monotonic()))
            except UserError:
                os.write(1, b"refused\n")
            os._exit(0)
    for _ in range(5):
        os.wait()
"""


def test_of_many_that_find_a_stale_lock_one_wins(tmp_path):
    leave(tmp_path, DEAD)
    command = [sys.executable, "-c", textwrap.dedent(RACE), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(done.stdout.split()) == ["refused"] * 4 + ["won"], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_ends_with_another_lost_takes_itself_out_and_the_last_removes_the_lock(tmp_path):
    other = subprocess.Popen(["sleep", "60"])
    try:
        started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        sibling = dataclasses.replace(this_process(), pid=other.pid, started=started)
        with run_lock(tmp_path) as withdraw:
            leave(tmp_path, this_process(), sibling, ELSEWHERE)
            withdraw()
            assert json.loads((tmp_path / NAME).read_text())["processes"] == [sibling.as_json()]
            leave(tmp_path, this_process(), DEAD, ELSEWHERE)
            withdraw()
            assert not (tmp_path / NAME).exists()
            theirs = leave(tmp_path, ELSEWHERE)
            withdraw()
            assert (tmp_path / NAME).read_bytes() == theirs, "another run's"
    finally:
        other.kill()
        other.wait()


def test_ranks_on_the_machines_of_a_lock_prove_its_processes_dead(tmp_path, monkeypatch):
    """What this machine cannot know the rank over there knows."""
    leave(tmp_path, DEAD, ELSEWHERE)
    monkeypatch.setattr(
        "cook.base.distributed.gather",
        lambda value: [value, ["unknown", "dead"][: len(value)]] if value and isinstance(value, list) else [value],
    )
    with run_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["processes"] == [this_process().as_json()]
    leave(tmp_path, DEAD, ELSEWHERE)
    monkeypatch.setattr(
        "cook.base.distributed.gather",
        lambda value: [value, ["unknown", "alive"][: len(value)]] if value and isinstance(value, list) else [value],
    )
    with pytest.raises(UserError, match="is using"), run_lock(tmp_path):
        pass
