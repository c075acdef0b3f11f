"""Two ranks make a side group and leave it at once, one of them slowly: `side_groups.py SLOW_RANK COUNT`."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base import distributed  # noqa: E402


class Slow(dist.Store):
    """The store through which the ranks find each other, some time late with every answer."""

    def __init__(self, inner: dist.Store):
        super().__init__()
        self._inner = inner

    def get(self, key: str) -> bytes:
        time.sleep(0.05)
        return self._inner.get(key)

    def set(self, key: str, value: bytes) -> None:
        self._inner.set(key, value)

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._inner.wait(keys, *timeout)


def main() -> None:
    dist.init_process_group("gloo")
    if distributed.rank() == int(sys.argv[1]):
        world, group = dist.distributed_c10d._world, dist.distributed_c10d._get_default_group()
        backend, store = world.pg_map[group]
        world.pg_map[group] = (backend, Slow(store))
    for _ in range(int(sys.argv[2])):
        # No name holds the group: its connections end as soon as it is left.
        distributed.leave_group(distributed.side_group(timedelta(seconds=20)))
    dist.barrier()
    print("left")


main()
