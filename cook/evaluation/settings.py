"""How a model is evaluated: the options of `cook eval` and `cook compare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from cook.base.errors import UserError, UserErrors
from cook.config.declare import Limits

Size = Annotated[int, Limits(minimum=1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure."""

    window: Annotated[int, Limits(minimum=2)] = 512
    """Tokens that the model sees at once."""
    stride: Size | None = None
    """Tokens from one window to the next; what overlaps is context only. Default: disjoint windows, whose first token
    and whose incomplete rest are not counted."""
    bos: bool | None = None
    """Begin each window with the tokenizer's beginning-of-sequence token. Default: if the tokenizer begins texts with
    it, as those of Gemma and Llama do."""
    max_windows: Size | None = None
    """Score only this many windows."""
    batch_size: Size = 8
    """Windows per forward pass."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: as stored, or float32 on a CPU without bf16 instructions; bfloat16 on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto`: a GPU if there is one."""
    weights: Literal["auto", "memory", "disk"] = "auto"
    """`disk`: each layer is read from the files when it computes, for models larger than memory; every batch reads the
    whole model. `auto`: this for a model that does not fit into memory."""
    speed: bool = True
    """Time prefill and decoding; not done for weights on the disk."""
    prompts: Size = 1
    """Prompts per batch when these are timed."""
    prompt_tokens: Size = 128
    """Tokens per prompt."""
    new_tokens: Size = 32
    """Tokens to decode per prompt."""
    repeats: Size = 5
    """Rounds of timing."""
    trust_remote_code: bool = False
    """Let a modeling file in the model's folder run."""


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """What `cook profile` measures."""

    batch_size: Size = 1
    """Rows per forward pass."""
    length: Size = 512
    """Tokens per row."""
    phase: Literal["prefill", "decode"] = "prefill"
    """`prefill`: a forward pass over all tokens. `decode`: one more token per row after `length` cached ones."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of the weights."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto`: a GPU if there is one."""
    points: Annotated[int, Limits(minimum=2, maximum=64)] = 4
    """Sizes of attention and FFN blocks to measure, evenly spaced up to the whole block."""
    repeats: Size = 7
    """Passes per size, of which the median counts."""


def checked(settings: Settings) -> Settings:
    """The settings with their device chosen.

    Raises:
        UserErrors: a stride longer than the window, or a device that cannot be used; both at once.
    """
    errors = []
    if long := too_long_stride(settings, bos=bool(settings.bos)):
        errors.append(long)
    device = device_of(settings)
    try:
        import torch

        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        errors.append(UserError(f"--device {device} cannot be used", got=str(error).splitlines()[0]))
    if errors:
        raise UserErrors("the command line cannot be used", errors)
    return dataclasses.replace(settings, device=device)


def too_long_stride(settings: Settings, *, bos: bool) -> UserError | None:
    """The error if windows of which `bos` takes one place, or none, would not reach the next window."""
    longest = settings.window - bos
    if settings.stride is None or settings.stride <= longest:
        return None
    what = "--stride would leave tokens out between the windows"
    taken = ", since each window begins with the beginning-of-sequence token" if bos else ""
    return UserError(what, wanted=f"at most {longest}{taken}", got=settings.stride)


def device_of(settings: Settings | ProfileSettings) -> str:
    from cook.base.device import default_device

    return settings.device if settings.device != "auto" else default_device().type
