"""The `MoEfication` section of `bmcook.json`: FFN blocks as mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cook.config.declare import Count, Limits, Scale, Size

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
    masked_dims: Literal["remove", "route"] = "remove"
    """What becomes of the FFN dims that masks of earlier stages remove. `remove`: the smaller model gets the experts.
    `route`: they stay, and the experts are chosen such that tokens use mostly the dims that the masks keep."""
    calibration_steps: Annotated[int, Limits(minimum=1, maximum=10**5)] = 8
    """Steps whose batches are read, without training, to choose the experts and the first weights of the routers."""
    steps: Count | None = None
    """Training steps of the stage, in which routers and weights are trained. 0: no training. None: `training.steps`."""


@dataclass(frozen=True, kw_only=True)
class MoefyJob:
    """A model whose FFN blocks become mixtures of experts, by one command."""

    model: str
    """A model folder, or a name on the Hugging Face Hub."""
    output: str
    """Folder for everything: `recipe/`, `run/`, `model/` (the model with experts)."""
    data: tuple[str, ...]
    """A file or folder of text, JSON lines or parquet; may be repeated. Some of it is held out for evaluation."""
    experts: Annotated[int, Limits(minimum=2, maximum=10**4)] = 8
    """Experts per FFN block, shared and routed ones."""
    shared: Count = 1
    """Experts that every token uses. If a token then uses one routed expert, as with `--shared 3`, the result may be a
    stock model, which needs no modeling file."""
    active: Annotated[float, Limits(exclusiveMinimum=0, maximum=1)] = 0.5
    """Share of the experts that a token uses, shared ones included."""
    steps: Count = 0
    """Steps in which routers and weights are trained, with the dense model as the teacher. 0: no training."""
    calibration_steps: Size = 8
    """Batches from whose activations the experts are chosen."""
    max_length: Annotated[int, Limits(minimum=2)] = 512
    """Tokens per row."""
    batch_size: Size = 2
    """Rows per batch."""
    learning_rate: Scale = 1e-4
    """Learning rate of routers and weights."""
    text_field: str = "text"
    """Key or column that holds the text of JSON lines and tables."""
    seed: Count = 0
    """Random seed."""
