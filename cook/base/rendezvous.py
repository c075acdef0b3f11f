"""Where the ranks of a run meet: who has come, in bounded time, and by which interface they reach one another.

All goes through the store that the launcher names (`MASTER_ADDR`, `MASTER_PORT`), before any process group exists.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import psutil
import torch.distributed as dist

from cook.base.distributed import free_port, launched_rank, launched_world_size, loopback
from cook.base.errors import EXIT_RANK_LOST, RankLost, RunFailed, UserError
from cook.base.processes import PROC, Process, this_process

PATIENCE = 600.0
"""Seconds in which all ranks must have come: a slow shared folder makes imports take minutes."""

LATE = 15.0
"""Seconds after that in which a call to the store that is under way may come back."""

REMEDY = "  remedy: start again, the same command goes on from the last checkpoint"


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Ranks that have met."""

    store: dist.Store
    """For the process group."""
    processes: list[Process]
    """Of each rank."""
    ways: str
    """By which interface and address this rank is reached, for messages."""


def join(backend: str, meeting: Meeting | None, patience: timedelta) -> None:
    """Makes the process group of the ranks that have met, or one of this rank alone.

    Args:
        backend: `gloo` or `nccl`.
        meeting: None without a launcher.
        patience: The timeout of its collectives.

    Raises:
        RunFailed: the ranks do not reach one another.
    """
    if meeting is None:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        if loopback():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())  # else the address of the machine's name
        # The usual store listens on all interfaces, and a single rank has nobody to meet there.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
        return
    rank, world = launched_rank(), launched_world_size()
    try:
        dist.init_process_group(backend, store=meeting.store, rank=rank, world_size=world, timeout=patience)
    except RuntimeError as error:
        raise RunFailed(
            f"rank {rank} cannot connect to the other ranks from {meeting.ways}: {str(error).splitlines()[0]}\n"
            "  remedy: set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on GPUs) on every machine to the interface that "
            "reaches the others, and see that no firewall stands between them"
        ) from error


def connect(seconds: float) -> dist.Store:
    """A new connection to the store, for this package's own keys."""
    store = dist.TCPStore(*_endpoint(), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    return dist.PrefixStore("cook", store)


def meet(seconds: float = PATIENCE) -> Meeting | None:
    """Waits for all ranks that the launcher announced; None without a launcher.

    Sets `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME` to the interface that reaches the other ranks, unless the user
    has: both would else take the address of the machine's name, which /etc/hosts often gives as 127.0.1.1.

    Raises:
        RankLost: some ranks have not come in time; it names them.
    """
    if "RANK" not in os.environ:
        return None
    rank, world = launched_rank(), launched_world_size()
    with _bounded(seconds):
        try:
            store = _store(rank, seconds)
            shared = dist.PrefixStore("cook", store)
            source = _source_towards(*_endpoint())
            mine = {"process": this_process().as_json(), "address": source, "network": _network()}
            shared.set(f"came/{rank}", json.dumps(mine))
            shared.add("came", 1)
            _wait_for_all(shared, world, seconds)
            came = [json.loads(told) for told in shared.multi_get([f"came/{each}" for each in range(world)])]
        except RuntimeError as error:  # the store's errors are of this kind
            host, port = _endpoint()
            raise RankLost(f"rank 0, or what keeps the store at {host}:{port}, has gone: {error}\n{REMEDY}") from None
    processes = [Process.from_json(each["process"]) for each in came]
    assert all(processes)
    ways = _choose_interface(came, rank)
    return Meeting(store=store, processes=[process for process in processes if process], ways=ways)


def _endpoint() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Ends the process where a call hangs: a connection that is cut without a word never comes back."""
    host, port = _endpoint()

    def end() -> None:
        text = f"failed: the store at {host}:{port} has not answered for {seconds:.0f} s\n{REMEDY}\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(EXIT_RANK_LOST)

    timer = threading.Timer(seconds + LATE, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _store(rank: int, seconds: float) -> dist.Store:
    (host, port), patience = _endpoint(), timedelta(seconds=seconds)
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        options: dict[str, Any] = {"is_master": True, "multi_tenant": True}
    else:
        _wait_for_store(host, port, seconds)
        options = {"is_master": False}
    return dist.TCPStore(host, port, wait_for_workers=False, timeout=patience, **options)


def _wait_for_store(host: str, port: int, seconds: float) -> None:
    # Not by the store's own constructor: no signal is heard inside it.
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankLost(
                    f"rank 0 keeps no store at {host}:{port}: {error}, for {seconds:.0f} s\n"
                    "  remedy: see why rank 0 has not started, and whether this machine reaches it; start again"
                ) from None
        time.sleep(0.2)


def _wait_for_all(store: dist.Store, world: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (came := store.add("came", 0)) < world:
        if time.monotonic() > deadline:
            missing = [rank for rank in range(world) if not store.check([f"came/{rank}"])]
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            raise RankLost(
                f"only {came} of {world} ranks have come within {seconds:.0f} s; missing: rank {names}\n{REMEDY}"
            )
        time.sleep(0.1 if world <= 64 else 1.0)


def _network() -> str:
    """What two processes on one machine share if they reach each other by its loopback interface."""
    try:
        return os.readlink(PROC / "self/ns/net")
    except OSError:
        return ""


def _source_towards(host: str, port: int) -> str:
    """The address of this machine from which packets to `host` leave; empty if there is no way."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    return ""


def _is_local(address: str) -> bool:
    return not address or ip_address(address.partition("%")[0]).is_loopback


def _choose_interface(came: Sequence[dict[str, Any]], rank: int) -> str:
    """Sets the interface for gloo and NCCL; returns it with its address."""
    places = {(each["process"]["host"], each["process"]["boot"], each["network"]) for each in came}
    address = str(came[rank]["address"])
    if len(places) == 1 and loopback():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
        return f"{os.environ['GLOO_SOCKET_IFNAME']} (one machine)"
    if _is_local(address):  # the machine that MASTER_ADDR is a name of: the way to any of the others
        others = [each["address"] for each in came if not _is_local(each["address"])]
        address = _source_towards(others[0], 9) if others else ""
    by_address = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    name = by_address.get(address)
    if "GLOO_SOCKET_IFNAME" not in os.environ and name is None:
        raise UserError(
            f"rank {rank} on {came[rank]['process']['host']}: no interface is known that reaches the other machines",
            got=f"address {address or came[rank]['address'] or 'none'}; interfaces {', '.join(psutil.net_if_addrs())}",
            remedy="set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME on GPUs) on this machine to the right interface",
        )
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return f"{os.environ['GLOO_SOCKET_IFNAME']} ({address})"
