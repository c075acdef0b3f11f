"""The rendezvous of the ranks before a process group exists: waits for all ranks and chooses the network interface.

It uses the store that the launcher names in `MASTER_ADDR` and `MASTER_PORT`, and takes a bounded time.
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
from cook.base.errors import EXIT_RANK_LOST, RankLost, RunFailed, UserError, write_to_stderr
from cook.base.processes import PROC, Process, this_process

PATIENCE = 600.0  # seconds within which all ranks must connect. Imports from a slow shared folder can take minutes

LATE = 15.0  # additional seconds that a pending call to the store may take to return

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell their programs."""

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

REMEDY = "  remedy: run the same command again; it resumes from the last checkpoint"


_before: list[dict[str, str | None]] = []  # the variables before the process group of a single rank, if one exists


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """The result of a rendezvous."""

    store: dist.Store  # the store for the process group
    processes: list[Process]  # the process of each rank
    ways: str  # the interface and address of this rank, for messages


def join(backend: str, meeting: Meeting | None, patience: timedelta) -> None:
    """Creates the process group of all ranks; of a single rank without a `meeting`, that is without a launcher."""
    if meeting is None:
        _before.append({name: os.environ.get(name) for name in VARIABLES + INTERFACES})
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())  # DeepSpeed asks that it is set; nothing listens there
        if loopback():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())  # the default is the address of the host name
        # The default store would listen on all interfaces, which a single rank does not need.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it; not every launcher sets it
    rank, world = launched_rank(), launched_world_size()
    try:
        dist.init_process_group(backend, store=meeting.store, rank=rank, world_size=world, timeout=patience)
    except RuntimeError as error:
        raise RunFailed(
            f"rank {rank} cannot connect to the other ranks from {meeting.ways}: {str(error).splitlines()[0]}\n"
            "  remedy: set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on GPUs) on every machine to the interface that "
            "reaches the others, and check that no firewall blocks the connection"
        ) from error


def leave() -> None:
    """Restores the variables that `join` has set for a single rank.

    A program that this process starts later would take them for those of a launcher.
    """
    for before in reversed(_before):
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    _before.clear()


def connect(seconds: float) -> dist.Store:
    """Opens a new connection to the store, under this package's own key prefix, with a timeout in seconds."""
    store = dist.TCPStore(*_endpoint(), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    return dist.PrefixStore("cook", store)


def meet(seconds: float = PATIENCE) -> Meeting | None:
    """Waits for all ranks that the launcher announced, at most some seconds; None without a launcher.

    Sets `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME` to the interface that reaches the other ranks, unless the user
    has set them. The default of both libraries is the address of the host name, which is often 127.0.1.1 in /etc/hosts.

    Raises:
        RankLost: some ranks have not connected in time. The message names them.
        UserError: no interface is known that reaches the other machines.
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
            received = shared.multi_get([f"came/{each}" for each in range(world)])
            reports = [json.loads(report) for report in received]
        except RuntimeError as error:  # the store's errors are of this kind
            host, port = _endpoint()
            raise RankLost(
                f"rank 0, or the process that hosts the store at {host}:{port}, has ended: {error}\n{REMEDY}"
            ) from None
    processes = [process for each in reports if (process := Process.from_json(each["process"]))]
    assert len(processes) == world
    return Meeting(store=store, processes=processes, ways=_choose_interface(reports, rank))


def _endpoint() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Ends the process if a call hangs: a call over a silently dropped connection never returns."""
    host, port = _endpoint()

    def end() -> None:
        write_to_stderr(f"failed: the store at {host}:{port} has not answered for {seconds:.0f} s\n{REMEDY}")
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
    # The constructor of the store would wait too, but would not handle signals meanwhile.
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankLost(
                    f"no store of rank 0 at {host}:{port} after {seconds:.0f} s: {error}\n"
                    "  remedy: check that rank 0 has started and that this machine can reach it, then start again"
                ) from None
        time.sleep(0.2)


def _wait_for_all(store: dist.Store, world: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (came := store.add("came", 0)) < world:
        if time.monotonic() > deadline:
            missing = [rank for rank in range(world) if not store.check([f"came/{rank}"])]
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            raise RankLost(
                f"only {came} of {world} ranks have connected within {seconds:.0f} s; missing: rank {names}\n{REMEDY}"
            )
        time.sleep(0.1 if world <= 64 else 1.0)


def _network() -> str:
    """The network namespace: processes that share it reach one another by the loopback interface."""
    try:
        return os.readlink(PROC / "self/ns/net")
    except OSError:
        return ""


def _source_towards(host: str, port: int) -> str:
    """The source address of packets from this machine to `host`; empty if there is no route."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    return ""


def _is_local(address: str) -> bool:
    return not address or ip_address(address.partition("%")[0]).is_loopback


def _choose_interface(reports: Sequence[dict[str, Any]], rank: int) -> str:
    """Sets the interface for gloo and NCCL. Returns its name and address, for messages."""
    places = {(each["process"]["host"], each["process"]["boot"], each["network"]) for each in reports}
    own = reports[rank]
    address = str(own["address"])
    if len(places) == 1 and loopback():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
        return f"{os.environ['GLOO_SOCKET_IFNAME']} (one machine)"
    if _is_local(address):  # MASTER_ADDR is this machine: use the route to any of the others
        others = [each["address"] for each in reports if not _is_local(each["address"])]
        address = _source_towards(others[0], 9) if others else ""
    by_address = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    name = by_address.get(address)
    if "GLOO_SOCKET_IFNAME" not in os.environ and name is None:
        raise UserError(
            f"rank {rank} on {own['process']['host']}: no interface is known that reaches the other machines",
            got=f"address {address or own['address'] or 'none'}; interfaces {', '.join(psutil.net_if_addrs())}",
            remedy="set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME on GPUs) on this machine to the right interface",
        )
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return f"{os.environ['GLOO_SOCKET_IFNAME']} ({address})"
