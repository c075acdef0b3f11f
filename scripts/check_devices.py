"""Finds tensors of different devices in the passes of every family, on a card that need not be there.

    python scripts/check_devices.py [FAMILY ...] [--kind cuda]

Tensors are fake ones of PyTorch's `FakeTensorMode`: they have the device of a card, but no values, so the operations of
that device are chosen. This needs a build of PyTorch for such cards; the tests do the same on any build with the meta
device. Each family runs forward and backward with gates, packed rows and a teacher. The exit code is 1 if a family
failed, and 2 with another build.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cook.base.environment import quiet_torchao  # noqa: E402
from cook.base.errors import UserError, run_entry  # noqa: E402
from tests.absent_device import AbsentDevice, backward_without_engine  # noqa: E402
from tests.families.device_passes import NAMES, passes  # noqa: E402

quiet_torchao()  # transformers is imported later
CAPABILITY = (9, 0)
"""Of the card that is not there: grouped products of experts ask for it."""


def check(name: str, kind: str) -> str | None:
    """What is wrong with the passes of a family; None if nothing is."""
    try:
        passes(name, kind, FakeTensorMode(), AbsentDevice(kind), backward=backward_without_engine)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def build_has(kind: str) -> bool:
    """Whether this build of PyTorch has operations of such a device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", {"cuda": "CUDA", "xpu": "XPU"}[kind])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--kind", choices=("cuda", "xpu"), default="cuda", help="the type of the device")
    options = parser.parse_args()
    if unknown := sorted({*options.families} - {*NAMES}):
        raise UserError(f"{', '.join(unknown)}: no such family", wanted=f"one of {', '.join(NAMES)}")
    if not build_has(options.kind):
        raise UserError(
            f"PyTorch {torch.__version__} has no operations for {options.kind}",
            wanted=f"a build of PyTorch for {options.kind}; no card is needed",
            remedy="run it where such a build is installed; any build has `pytest tests/families/test_meta_device.py`",
        )
    module = torch.get_device_module(options.kind)
    if not module.is_available():
        module.get_device_capability = lambda device=None: CAPABILITY
    names = options.families or NAMES
    failed = 0
    for name in names:
        problem = check(name, options.kind)
        failed += problem is not None
        print(f"{name}: {problem or 'ok'}", flush=True)
    print(f"{len(names) - failed} of {len(names)} families pass")
    return int(failed > 0)


if __name__ == "__main__":
    run_entry(main)
