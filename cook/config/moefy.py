"""The `MoEfication` section of `bmcook.json`: FFN blocks as mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cook.config.declare import Count, Limits

ModuleSuffix = Annotated[
    str, Limits(title="the end of a module's name, such as mlp.gate_proj", pattern="^[A-Za-z0-9_.]+$")
]


@dataclass(frozen=True, kw_only=True)
class MoefyConfig:
    """FFN blocks become mixtures of experts, of which a router chooses some for each token."""

    is_moefy: bool
    """False: the section is unused."""
    first_FFN_module: Annotated[tuple[ModuleSuffix, ...], Limits(maxItems=10**4)] = ()
    """Ends of the names of the first products of the FFN blocks that become mixtures of experts. Empty: all blocks."""
    experts: Annotated[int, Limits(minimum=2, maximum=10**4)] = 8
    """Experts per block, shared and routed ones, of equal numbers of FFN dims. What does not divide evenly is added to
    the shared ones."""
    shared: Count = 1
    """Experts that every token uses, made of the dims that are most active. They form one larger expert."""
    active: Annotated[float, Limits(exclusiveMinimum=0, maximum=1)] = 0.5
    """Share of the experts that a token uses, shared ones included. 1: all of them, which equals the dense model."""
    calibration_steps: Annotated[int, Limits(minimum=1, maximum=10**5)] = 8
    """Steps whose batches are read, without training, to choose the experts and the first weights of the routers."""
    steps: Count | None = None
    """Training steps of the stage, in which routers and weights are trained. 0: no training. None: `training.steps`."""
