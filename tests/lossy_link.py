"""A link between two network namespaces that loses packets, and is late and slow: netem's work on any kernel.

Two TUN devices, and a thread that carries packets from each to the other.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Sequence

TUN = "/dev/net/tun"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


class LossyLink(threading.Thread):
    """The link, from its start to `close`.

    Args:
        devices: A name for each end.
        namespaces: Where each end goes.
        loss: The share of packets that are lost.
        delay: Seconds on the way; each packet takes up to a quarter more or less, so that some overtake others.
        rate: Bytes per second in each direction.
    """

    def __init__(
        self,
        devices: Sequence[str],
        namespaces: Sequence[str],
        *,
        loss: float = 0.02,
        delay: float = 0.02,
        rate: float = 5e5,
    ):
        super().__init__(daemon=True)
        self.loss, self.delay, self.rate = loss, delay, rate
        self.carried = self.lost = 0
        self._random, self._ends, self._is_open = random.Random(0), list[int](), True
        for device, namespace in zip(devices, namespaces, strict=True):
            end = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
            subprocess.run(["ip", "link", "set", device, "netns", namespace], check=True)
            self._ends.append(end)

    def run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # when it arrives, a number, to which end, the packet
        free, number = [0.0, 0.0], 0
        while self._is_open:
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            for end in select.select(self._ends, [], [], min(pause, 0.1))[0]:
                packet, way = os.read(end, 1 << 16), self._ends.index(end)
                if self._random.random() < self.loss:
                    self.lost += 1
                    continue
                free[way] = max(free[way], time.monotonic()) + len(packet) / self.rate
                late = self.delay * self._random.uniform(0.75, 1.25)
                heapq.heappush(waiting, (free[way] + late, number, self._ends[1 - way], packet))
                number += 1
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(waiting)
                try:
                    os.write(end, packet)
                    self.carried += 1
                except OSError:  # that end is down
                    self.lost += 1

    def close(self) -> None:
        """Ends the link; its devices vanish."""
        self._is_open = False
        self.join()
        for end in self._ends:
            os.close(end)
