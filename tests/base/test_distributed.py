from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from cook.base import distributed
from tests.recipe.tiny_run import REPOSITORY, run

TWO_RANKS = """
    import sys, torch, torch.distributed as dist
    from cook.base import distributed as d
    from cook.base.errors import UserError, UserErrors
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    assert (d.rank(), d.world_size(), d.is_on()) == (rank, 2, True)
    assert d.all_reduce_sum(torch.tensor([rank + 1.0])).item() == 3
    assert d.broadcast({"from": rank}, source=1) == {"from": 1}
    errors = d.broadcast(UserErrors("t", [UserError("a", remedy="b")]) if rank == 0 else None)
    assert str(errors) == "t: 1 error\\n1. a\\n  remedy: b", errors
    assert d.gather(rank * 10) == [0, 10]
    d.barrier()
    dist.destroy_process_group()
"""


def test_one_process_needs_no_group(monkeypatch):
    assert (distributed.rank(), distributed.world_size(), distributed.is_on()) == (0, 1, False)
    value = torch.tensor([2.0])
    assert distributed.all_reduce_sum(value) is value and value.item() == 2
    assert distributed.broadcast("x") == "x" and distributed.gather("x") == ["x"]
    distributed.barrier()
    for name, number in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, number)
    launched = distributed.launched_rank(), distributed.local_rank(), distributed.launched_world_size()
    assert launched == (3, 1, 4)


def test_two_processes(tmp_path):
    code = textwrap.dedent(TWO_RANKS)
    commands = [[sys.executable, "-c", code, str(rank), str(tmp_path / "rendezvous")] for rank in range(2)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    results = [(process.communicate(timeout=60)[1], process.returncode) for process in ranks]
    assert [code for _, code in results] == [0, 0], results


@pytest.mark.parametrize("slow", [0, 1])
def test_a_side_group_is_not_freed_while_another_rank_still_connects_to_it(slow):
    script = str(REPOSITORY / "tests" / "base" / "side_groups.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run([sys.executable, *launcher, script, str(slow), "20"], REPOSITORY)
    assert result.code == 0 and result.out.count("left") == 2, result
