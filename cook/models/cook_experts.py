"""FFN blocks as mixtures of experts: a router per block, and products that compute only the chosen experts.

The file needs only torch and transformers (>= 5). The modeling files that exports contain import it, so an export
contains a copy of it under this name.

An expert is a range of consecutive FFN dims, and the weights of a block keep their names and shapes: first the dims of
the shared expert, which all tokens use, then those of the routed experts, equally many each. Each chosen expert has
weight 1, so a block that uses all of its experts computes what the dense block computes.

With gradients the products compute all dims, and a mask multiplies those of the others by 0: the router learns by
straight-through estimation, from what every expert would have added. Without gradients only the chosen experts are
computed. All modules are called for every batch, which ZeRO-3 requires.

Shape suffixes: N tokens, H hidden size, F FFN dims, E routed experts, K experts per token.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Part(NamedTuple):
    """An expert that has tokens, or several consecutive ones with the same tokens."""

    dims: slice
    tokens: Tensor | None
    """The numbers of its tokens; None: all."""

    def rows_of(self, x_NH: Tensor) -> Tensor:
        """The rows of its tokens."""
        return x_NH if self.tokens is None else x_NH[self.tokens]


class Router(nn.Module):
    """Chooses the routed experts of each token: those with the largest `sigmoid(W x) + bias`.

    Args:
        hidden: Features of the block's input.
        shared: FFN dims of the shared expert.
        size: FFN dims per routed expert.
        routed: Number of routed experts.
        active: Routed experts per token; with `routed`, the block is dense.
    """

    def __init__(self, *, hidden: int, shared: int, size: int, routed: int, active: int):
        super().__init__()
        self.shared, self.size, self.routed, self.active = shared, size, routed, active
        self.weight = nn.Parameter(torch.empty(routed, hidden))
        self.bias = nn.Parameter(torch.zeros(routed))
        nn.init.normal_(self.weight, std=hidden**-0.5)
        self.mask: Tensor | None = None
        """`[..., E]`: 1 for the experts that a token uses; set during a forward pass with gradients."""
        self.parts: list[Part] | None = None
        """The experts that have tokens; set during a forward pass without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """The score of each expert, fp32: `[..., H]` to `[..., E]`."""
        with torch.autocast(x.device.type, enabled=False):
            return torch.sigmoid(F.linear(x.float(), self.weight.float())) + self.bias.float()

    def choose(self, x: Tensor) -> None:
        """Chooses the experts for a block's input, until `done`."""
        self.done()
        if self.active == self.routed:
            return
        scores = self(x)
        chosen = scores.topk(self.active, -1).indices
        if torch.is_grad_enabled():
            hard = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
            self.mask = hard + (scores - scores.detach())
        else:
            self.parts = self._parts_of(chosen.view(-1, self.active))

    def _parts_of(self, chosen_NK: Tensor) -> list[Part]:
        parts = [Part(slice(0, self.shared), None)] if self.shared else []
        if len(chosen_NK) == 1:  # in decoding, every call counts: neighbours are one part
            for dims in map(self._dims_of, sorted(chosen_NK[0].tolist())):
                if parts and parts[-1].dims.stop == dims.start:
                    dims = slice(parts.pop().dims.start, dims.stop)
                parts.append(Part(dims, None))
            return parts
        flat = chosen_NK.flatten()
        tokens = (flat.argsort(stable=True) // self.active).split(flat.bincount(minlength=self.routed).tolist())
        return parts + [Part(self._dims_of(expert), own) for expert, own in enumerate(tokens) if len(own)]

    def _dims_of(self, expert: int) -> slice:
        start = self.shared + expert * self.size
        return slice(start, start + self.size)

    def done(self) -> None:
        """Forgets the choice."""
        self.mask = self.parts = None

    def masked(self, inner: Tensor) -> Tensor:
        """The inner features `[..., F]` with those of experts that a token does not use multiplied by 0."""
        assert self.mask is not None
        shared, routed = inner.split([self.shared, self.routed * self.size], -1)
        mask = self.mask.to(inner.dtype).view(*routed.shape[:-1], self.routed).repeat_interleave(self.size, -1)
        return torch.cat([shared, routed * mask], -1)


def add_experts(model: nn.Module, experts: dict[str, dict[str, Any]]) -> None:
    """Turns FFN blocks of a model into mixtures of experts, in place.

    Args:
        model: A model whose blocks have the shapes of the dense ones.
        experts: By the path of the router that a block gets: the arguments of `Router`; `ins`, the paths of the
            products into the block in the order of their calls, each with the offsets at which its parts begin (two for
            a fused gate and up); and `out`, the path of the product out of it.
    """
    for path, entry in experts.items():
        numbers = {name: entry[name] for name in ("hidden", "shared", "size", "routed", "active")}
        router = Router(**numbers)
        model.set_submodule(path, router)
        for name, offsets in entry["ins"].items():
            _route(model.get_submodule(name), router, _into, offsets)
        _route(model.get_submodule(entry["out"]), router, _out_of, [0])
        first: Any = next(iter(entry["ins"]))
        model.get_submodule(first).register_forward_pre_hook(_choose)
        model.get_submodule(entry["out"]).register_forward_pre_hook(_mask)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its blocks. Their `active` may be changed."""
    return [module for module in model.modules() if isinstance(module, Router)]


def _route(product: Any, router: Router, forward: Any, offsets: list[int]) -> None:
    product.routed_by = (router,)  # in a tuple: the router is not a part of the product
    product.offsets = offsets
    product.forward = functools.partial(forward, product)


def _choose(product: Any, inputs: tuple[Tensor, ...]) -> None:
    product.routed_by[0].choose(inputs[0])


def _mask(product: Any, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """In a hook, since a product that rounds its input must not see dims that the token does not use."""
    [router] = product.routed_by
    return None if router.mask is None else router.masked(inputs[0])


def _into(product: Any, x: Tensor) -> Tensor:
    """A product into the block; the dims of experts that a token does not use are 0."""
    [router] = product.routed_by
    if router.parts is None:
        dense: Tensor = type(product).forward(product, x)
        return dense
    weight_FH, bias_F = _weight(product), product._parameters.get("bias")
    x_NH = x.reshape(-1, x.shape[-1])
    inner_NF = x.new_zeros(len(x_NH), len(weight_FH))
    for expert in router.parts:
        dims, tokens, own = expert.dims, expert.tokens, expert.rows_of(x_NH)
        for offset in product.offsets:
            part = slice(offset + dims.start, offset + dims.stop)
            value = _scaled(product, F.linear(own, weight_FH[part], None if bias_F is None else bias_F[part]))
            if tokens is None:
                inner_NF[:, part] = value
            else:
                inner_NF[:, part].index_copy_(0, tokens, value)
    return inner_NF.view(*x.shape[:-1], -1)


def _out_of(product: Any, inner: Tensor) -> Tensor:
    """The product out of the block, which reads only the dims of the experts that a token uses.

    A quantized weight is used whole, since its rows have one scale each; the dims of other experts are 0.
    """
    [router] = product.routed_by
    if router.parts is None or type(product.weight) is not nn.Parameter:
        dense: Tensor = type(product).forward(product, inner)
        router.done()
        return dense
    inner_NF, weight_HF, bias_H = inner.reshape(-1, inner.shape[-1]), _weight(product), product._parameters.get("bias")
    out_NH = inner_NF.new_zeros(len(inner_NF), len(weight_HF)) if bias_H is None else bias_H.repeat(len(inner_NF), 1)
    for expert in router.parts:
        own = expert.rows_of(inner_NF[:, expert.dims])
        value = _scaled(product, F.linear(own, weight_HF[:, expert.dims]))
        if expert.tokens is None:
            out_NH += value
        else:
            out_NH.index_add_(0, expert.tokens, value)
    router.done()
    return out_NH.view(*inner.shape[:-1], -1)


def _weight(product: Any) -> Tensor:
    """The weight as `[outputs, inputs]`."""
    return product.weight.t() if isinstance(product, Conv1D) else product.weight


def _scaled(product: Any, value: Tensor) -> Tensor:
    """CPM-Ant's products divide by the root of their number of inputs."""
    return value / math.sqrt(product.fan_in) if hasattr(product, "fan_in") else value
