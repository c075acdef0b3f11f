"""CPM-Ant in PyTorch: a Hugging Face causal language model whose blocks may be missing, or keep fewer heads and dims.

The parameters carry CPM-Live's names. The file needs torch, transformers (>= 5) and cook_experts.py alone: an exported
model carries a copy of both, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works
anywhere.

Shape suffixes: B batch, P prompt length, T text length, L = P + T, Q queries, K keys, H heads, D dim_head, M dim_model,
F dim_ff, V vocabulary, S segment types, R rows of a table that the batch shares: 1 (shared by all) or B.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cook_experts import add_experts

LM_TASK = 2  # CPM-Live's task number of plain language modelling: its prompt leads every text
TEXT_SEGMENT = 2  # the segment type of the text in that task; prompts have segment 0
IGNORED = -100  # a target that takes no part in the loss
HIDDEN = -3e4  # added to the score of a key that a query may not see: vanishes in softmax, and fits every float type
BLOCK_SCORES = 1 << 19  # scores that one step of `BiasedAttention` holds: 2 MiB, so that they stay in a core's cache


class CpmAntConfig(PreTrainedConfig):
    """The shape of a CPM-Ant model, in the names of CPM-Live's JSON, and which parts of it pruning has left.

    Attributes:
        num_heads: Columns of the position-bias table, and the heads of every layer unless `layer_heads` says otherwise.
        half: Whether CPM-Live keeps the weights in fp16. Kept for export, not used here.
        mask_modules: For each layer `[attention removed, ffn removed]`; None removes nothing.
        gated_ffn: False for the older FFN, `gelu(w x)` in place of `gelu(w_0 x) * w_1 x`.
        layer_heads: For each layer the original numbers of the heads that it keeps, ascending: head j of the layer uses
            column `layer_heads[i][j]` of the position-bias table. None keeps all. Entries of removed blocks are unused.
        layer_dim_ff: For each layer its FFN's inner size; None means `dim_ff`. Entries of removed blocks are unused.
        unpruned: The sizes before pruning, by whose square roots the model divides: `dim_model`, `dim_head`, and for
            each layer `heads` (their number) and `dim_ff`. So the weights that pruning leaves keep their values. None:
            the model's own sizes.
        experts: FFN blocks that are mixtures of experts, as `add_experts` takes them.

    Raises:
        ValueError: The fields contradict each other.
    """

    model_type = "cook_cpm_ant"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"hidden_size": "dim_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}

    vocab_size: int = 30720
    dim_model: int = 4096
    dim_ff: int = 10240
    num_layers: int = 48
    num_heads: int = 32
    dim_head: int = 128
    dropout_p: float = 0.0
    position_bias_num_buckets: int = 512
    position_bias_max_distance: int = 2048
    eps: float = 1e-6
    half: bool = True
    prompt_types: int = 32
    prompt_length: int = 32
    segment_types: int = 32
    mask_modules: list[list[bool]] | None = None
    gated_ffn: bool = True
    layer_heads: list[list[int]] | None = None
    layer_dim_ff: list[int] | None = None
    unpruned: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False  # the input table itself is the output projection: there is no second parameter

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_sizes()
        self._check_layers()

    def has_attention(self, layer: int) -> bool:
        """Whether the layer still has its attention block."""
        return not (self.mask_modules and self.mask_modules[layer][0])

    def has_ffn(self, layer: int) -> bool:
        """Whether the layer still has its FFN block."""
        return not (self.mask_modules and self.mask_modules[layer][1])

    def heads_of(self, layer: int) -> list[int]:
        """Original numbers of the heads that the layer keeps."""
        return list(range(self.num_heads)) if self.layer_heads is None else list(self.layer_heads[layer])

    def dim_ff_of(self, layer: int) -> int:
        """Inner size of the layer's FFN."""
        return self.dim_ff if self.layer_dim_ff is None else self.layer_dim_ff[layer]

    def sizes_before(self) -> dict[str, Any]:
        """The sizes by whose square roots the model divides, as in `unpruned`."""
        layers = range(self.num_layers)
        return self.unpruned or {
            "dim_model": self.dim_model,
            "dim_head": self.dim_head,
            "heads": [len(self.heads_of(layer)) for layer in layers],
            "dim_ff": [self.dim_ff_of(layer) for layer in layers],
        }

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "dim_model", "dim_ff", "num_layers", "num_heads", "dim_head", "prompt_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prompt_types", "segment_types"):
            if getattr(self, name) <= LM_TASK:
                raise ValueError(f"{name} must be at least {LM_TASK + 1}, got {getattr(self, name)}")
        if self.position_bias_num_buckets < 4 or self.position_bias_num_buckets % 4:
            raise ValueError(f"position_bias_num_buckets must be a multiple of 4, got {self.position_bias_num_buckets}")
        if self.position_bias_max_distance <= self.position_bias_num_buckets // 4:
            raise ValueError(
                "position_bias_max_distance must be more than a quarter of position_bias_num_buckets, got "
                f"{self.position_bias_max_distance} and {self.position_bias_num_buckets}"
            )
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}")

    def _check_layers(self) -> None:
        for name in ("mask_modules", "layer_heads", "layer_dim_ff"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.num_layers:
                raise ValueError(f"{name} must have {self.num_layers} entries (num_layers), got {len(entries)}")
        before = self.sizes_before()
        if missing := {"dim_model", "dim_head", "heads", "dim_ff"} - set(before):
            raise ValueError(f"unpruned lacks {', '.join(sorted(missing))}")
        for name in ("heads", "dim_ff"):
            if len(before[name]) != self.num_layers:
                got = len(before[name])
                raise ValueError(f"unpruned.{name} must have {self.num_layers} entries (num_layers), got {got}")
        for layer, pair in enumerate(self.mask_modules or []):
            if len(pair) != 2 or any(removed not in (True, False) for removed in pair):
                raise ValueError(f"mask_modules[{layer}] must be [attention removed, ffn removed], got {pair}")
        if self.mask_modules is not None:
            self.mask_modules = [[bool(att), bool(ffn)] for att, ffn in self.mask_modules]
        for layer in range(self.num_layers):
            heads = self.heads_of(layer)
            ascending = heads == sorted(set(heads)) and all(0 <= head < self.num_heads for head in heads)
            if self.has_attention(layer) and not (heads and ascending):
                raise ValueError(
                    f"layer_heads[{layer}] must name heads of 0..{self.num_heads - 1} in ascending order, got {heads}"
                )
            if self.has_ffn(layer) and self.dim_ff_of(layer) < 1:
                raise ValueError(f"layer_dim_ff[{layer}] must be at least 1, got {self.dim_ff_of(layer)}")


def scaled_product(x: Tensor, weight: Tensor, fan_in: int) -> Tensor:
    """`x @ weight.T / sqrt(fan_in)`, divided in the product's own accumulator: no extra pass, no extra rounding."""
    if hasattr(weight, "qdata"):  # a quantized weight of torchao, which has its own F.linear
        return F.linear(x, weight) / math.sqrt(fan_in)
    flat = x.reshape(-1, x.shape[-1])
    out = torch.addmm(weight.new_empty(1), flat, weight.t(), beta=0, alpha=1 / math.sqrt(fan_in))
    return out.view(*x.shape[:-1], weight.shape[0])


class Linear(nn.Module):
    """A product without bias that divides by sqrt(fan_in) when it runs, so that its weights are of order 1.

    `fan_in` is `dim_in`, or what it was before pruning.
    """

    def __init__(self, dim_in: int, dim_out: int, fan_in: int, init_std: float = 1.0):
        super().__init__()
        self.fan_in = fan_in
        self.weight, self.init_std = nn.Parameter(torch.empty(dim_out, dim_in)), init_std * math.sqrt(fan_in / dim_in)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_product(x, self.weight, self.fan_in)


def residual_std(config: CpmAntConfig) -> float:
    """First weights of the products that add to the stream: the sum of all starts with unit variance (as in GPT-2).

    Measured against 1.0 on 120 steps of a byte-level model with 8 layers: a loss of 2.39 in place of 2.53.
    """
    return 1 / math.sqrt(2 * config.num_layers)


class Embedding(nn.Embedding):
    """A table that divides what it looks up by sqrt(dim), and that is an output projection as well.

    `fan_in` is the dim, or what it was before pruning.
    """

    def __init__(self, rows: int, config: CpmAntConfig):
        super().__init__(rows, config.dim_model)
        self.fan_in = config.sizes_before()["dim_model"]

    def forward(self, x: Tensor, project: bool = False) -> Tensor:
        """Looks up ids, or with `project` gives the scores of every row for hidden states.

        Both go through the module's call, where ZeRO-3 gathers the weight.
        """
        if project:
            return scaled_product(x, self.weight, self.fan_in)
        return F.embedding(x, self.weight) * (1 / math.sqrt(self.fan_in))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What every position of a row is. Keys are the last axis; the queries are the last `queries` of them.

    Attributes:
        segment_RK, context_RK: Segment types (int), and whether a position is context, seen by all (bool).
        span_RK: The sample of a packed row that a position belongs to, or None if all belong to one.
        real_RK: False where a position is padding, or None if none is.
        kinds: The segment types that occur, ascending; None: unknown.
        queries: How many of the last positions are computed now; the others are in the cache.
    """

    segment_RK: Tensor
    context_RK: Tensor
    span_RK: Tensor | None = None
    real_RK: Tensor | None = None
    kinds: tuple[int, ...] | None = None
    queries: int

    def hidden_RQK(self) -> Tensor:
        """True where a query may not see a key."""
        keys, start = self.context_RK.shape[1], self.context_RK.shape[1] - self.queries
        index_K = torch.arange(keys, device=self.context_RK.device)
        causal_QK = index_K[None, :] <= index_K[start:, None]
        context_RQ1 = self.context_RK[:, start:, None]
        seen_RQK = self.context_RK[:, None, :] | (~context_RQ1 & causal_QK)
        if self.span_RK is not None:
            seen_RQK = seen_RQK & (self.span_RK[:, start:, None] == self.span_RK[:, None, :])
        if self.real_RK is not None:
            seen_RQK = seen_RQK & self.real_RK[:, None, :]
        return ~seen_RQK


@dataclass(frozen=True, kw_only=True)
class Bias:
    """What is added to the attention scores, built once and used by every layer.

    Attributes:
        added_RHQK: The position bias, with `HIDDEN` where a key may not be seen unless `hidden_BQK` says it.
        bias_RHQK: The position bias that `BiasedAttention` sends its gradient to, or None to use PyTorch's attention.
        hidden_BQK: True where a query may not see a key, for `BiasedAttention` where rows differ.
        blocks: `BiasedAttention`'s steps (see `score_blocks`).
        keep_BQ1: 0 for the padded queries, which see nothing and so get nothing; None if there are none.
    """

    added_RHQK: Tensor
    bias_RHQK: Tensor | None = None
    hidden_BQK: Tensor | None = None
    blocks: tuple[tuple[slice, slice, slice], ...] = ()
    keep_BQ1: Tensor | None = None

    def of_heads(self, heads: Tensor) -> Bias:
        """The same for a layer that keeps the heads of these numbers."""
        bias = None if self.bias_RHQK is None else self.bias_RHQK.index_select(1, heads)
        return replace(self, added_RHQK=self.added_RHQK.index_select(1, heads), bias_RHQK=bias)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the numbers of a batch say of its layout: known before the batch is moved, they cost no wait for the device.

    Attributes:
        same_segment, same_context, same_span, same_real: Whether all rows are equal in this.
        alone: Whether every row is one sample.
        full: Whether no position is padding.
        kinds: The segment types that occur, ascending.
    """

    same_segment: bool
    same_context: bool
    same_span: bool
    same_real: bool
    alone: bool
    full: bool
    kinds: tuple[int, ...]

    @classmethod
    def of(cls, segment: Tensor, context: Tensor, span: Tensor | None, length: Tensor) -> Facts:
        """Reads them from a batch (B, L): one question to its device, and one for the segment types."""
        spans = torch.zeros_like(segment) if span is None else span
        real = torch.arange(segment.shape[1], device=segment.device) < length[:, None]
        same = [(x == x[:1]).all() for x in (segment, context, spans, real)]
        flags = torch.stack([*same, (spans == spans[:, :1]).all(), real.all()]).tolist()
        names = ("same_segment", "same_context", "same_span", "same_real", "alone", "full")
        return cls(**dict(zip(names, flags, strict=True)), kinds=tuple(segment.unique().tolist()))


def score_blocks(hidden_RQK: Tensor, num_heads: int) -> tuple[tuple[slice, slice, slice], ...]:
    """Cuts a row's scores into blocks of about `BLOCK_SCORES`: heads, queries, and the keys that any of these see."""
    queries, keys = hidden_RQK.shape[1:]
    rows = max(1, min(256, -(-queries // 4), BLOCK_SCORES // keys))  # more would leave out fewer keys
    heads = max(1, BLOCK_SCORES // (rows * keys))
    last_Q = (~hidden_RQK.all(0) * torch.arange(1, keys + 1, device=hidden_RQK.device)).amax(1)
    seen = {start: max(1, int(last_Q[start : start + rows].max())) for start in range(0, queries, rows)}
    return tuple(
        (slice(head, head + heads), slice(start, start + rows), slice(seen[start]))
        for head in range(0, num_heads, heads)
        for start in seen
    )


class PositionBias(nn.Module):
    """The table of attention biases: buckets of the distance within a segment, then one entry a pair of segments."""

    def __init__(self, config: CpmAntConfig):
        super().__init__()
        self.num_buckets, self.max_distance = config.position_bias_num_buckets, config.position_bias_max_distance
        self.num_segments, self.dropout_p = config.segment_types, config.dropout_p
        rows = config.segment_types**2 + config.position_bias_num_buckets
        self.relative_attention_bias = nn.Parameter(torch.empty(rows, config.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.relative_attention_bias, std=0.02)  # all distances start about equal

    def bucket(self, distance: Tensor) -> Tensor:
        """The table's row for distances k - q: exact when near, logarithmic when far (T5, arXiv 1910.10683)."""
        half = self.num_buckets // 2
        exact = half // 2
        near = distance.abs()
        # The order of these operations is that of the published model: another rounding moves bucket borders.
        far = torch.log(near.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact) * (half - exact)
        far = (exact + far.int()).clamp(max=half - 1)
        return torch.where(near < exact, near, far) + half * (distance > 0)

    def added(self, layout: Layout, dtype: torch.dtype) -> Bias:
        """Builds what every layer adds to its scores.

        Args:
            layout: The positions.
            dtype: The type of the queries, which PyTorch's attention wants the bias in.
        """
        bias_RHQK = self(layout)
        hidden_RQK = layout.hidden_RQK()
        start = layout.context_RK.shape[1] - layout.queries
        keep_BQ1 = None if layout.real_RK is None else layout.real_RK[:, start:, None]
        drops = self.training and self.dropout_p > 0
        if bias_RHQK.device.type != "cpu" or not bias_RHQK.requires_grad or drops:
            added = bias_RHQK.masked_fill(hidden_RQK[:, None], HIDDEN).to(dtype)
            return Bias(added_RHQK=added, keep_BQ1=keep_BQ1)
        blocks = score_blocks(hidden_RQK, bias_RHQK.shape[1])
        added = bias_RHQK.detach()
        if hidden_RQK.shape[0] > bias_RHQK.shape[0]:  # a bias for every row would cost more than hiding in each step
            return Bias(added_RHQK=added, bias_RHQK=bias_RHQK, hidden_BQK=hidden_RQK, blocks=blocks, keep_BQ1=keep_BQ1)
        added = added.masked_fill(hidden_RQK[:, None], HIDDEN)
        return Bias(added_RHQK=added, bias_RHQK=bias_RHQK, blocks=blocks, keep_BQ1=keep_BQ1)

    def forward(self, layout: Layout) -> Tensor:
        """The bias alone, (R, H, Q, K): a plain tensor, at which ZeRO-3 sees when the backward pass needs the table."""
        table = self.relative_attention_bias
        table_EH = table.to(torch.promote_types(table.dtype, torch.float32))  # the gradients of all layers meet here
        keys, queries = layout.segment_RK.shape[1], layout.queries
        # A function of k - q alone: a window that slides over one row a head, where a look-up for every pair would
        # need a scattered sum over L * L entries in the backward pass.
        distance_N = torch.arange(1 - keys, queries, device=table.device)
        line_HN = F.embedding(self.bucket(distance_N), table_EH).t()
        same_HQK = line_HN.unfold(1, keys, 1).flip(1)
        found = layout.segment_RK.unique().tolist() if layout.kinds is None else layout.kinds
        kinds = len(found)
        if kinds == 1:
            return same_HQK[None]
        kinds_S = torch.tensor(found).to(table.device, non_blocking=True)
        kind_RK = torch.bucketize(layout.segment_RK, kinds_S.to(layout.segment_RK.dtype))
        pairs = self.num_buckets + kinds_S[:, None] * self.num_segments + kinds_S[None, :]
        pair_SSH = F.embedding(pairs, table_EH) * (1 - torch.eye(kinds, device=table.device))[..., None]
        # Products with one-hot rows select exactly, and their backward is a product as well.
        with torch.autocast(table.device.type, enabled=False):
            key_RKS = F.one_hot(kind_RK, kinds).to(table_EH.dtype)
            left_RHQS = torch.einsum("rqs,sth->rhqt", key_RKS[:, keys - queries :], pair_SSH)
            right_RHSK = key_RKS.mT[:, None].expand(-1, left_RHQS.shape[1], -1, -1)
            is_same_RQK = kind_RK[:, keys - queries :, None] == kind_RK[:, None, :]
            same_RHQK = same_HQK.masked_fill(~is_same_RQK[:, None], 0)
            bias = torch.baddbmm(same_RHQK.flatten(0, 1), left_RHQS.flatten(0, 1), right_RHSK.flatten(0, 1))
        return bias.view_as(same_RHQK)


class BiasedAttention(torch.autograd.Function):
    """softmax(q k · scale + bias) v on the CPU, with the gradient of a bias that the batch shares.

    PyTorch's fused kernels for the CPU have no gradient for the bias; its plain path keeps all scores of all rows. This
    one goes through blocks of scores that fit in a core's cache, leaves out the keys that no query of a block sees,
    recomputes the probabilities in the backward pass, and sums the bias's gradient over the batch in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias_RHQK: Tensor, bias: Bias, scale: float) -> Tensor:
        """q, k, v: (B, H, L, D). `bias_RHQK` is `bias.bias_RHQK`, named again because it gets the gradient."""
        ctx.bias, ctx.scale = replace(bias, bias_RHQK=None), scale  # no graph is held
        if bias.hidden_BQK is None and q.shape[2] <= 1024:  # longer rows gain more from leaving keys out
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.added_RHQK.to(q.dtype), scale=scale)
            ctx.save_for_backward(q, k, v, out)
            return out
        out = torch.empty_like(v)
        q_, k_, v_ = (x.to(bias.added_RHQK.dtype) for x in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            for row, block in BiasedAttention.steps(q, bias):
                heads, queries, keys = block
                probs_HQK = BiasedAttention.probabilities(q_[row], k_[row], bias, row, block, scale)
                out[row, heads, queries] = (probs_HQK @ v_[row, heads, keys]).to(out.dtype)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bias: Bias = ctx.bias
        scale: float = ctx.scale
        saved = ctx.saved_tensors  # read once: activation checkpointing hands them out a single time
        q, k, v, out, grad = (x.to(bias.added_RHQK.dtype) for x in (*saved, *grads))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dbias = torch.zeros_like(bias.added_RHQK)
        inner_BHQ1 = (out * grad).sum(-1, keepdim=True)
        with torch.autocast("cpu", enabled=False):
            for row, block in BiasedAttention.steps(q, bias):
                heads, queries, keys = block
                probs_HQK = BiasedAttention.probabilities(q[row], k[row], bias, row, block, scale)
                grad_HQD = grad[row, heads, queries]
                dv[row, heads, keys].baddbmm_(probs_HQK.mT, grad_HQD)
                inner_HQ1 = inner_BHQ1[row, heads, queries]
                dscores = torch.baddbmm(inner_HQ1, grad_HQD, v[row, heads, keys].mT, beta=-1).mul_(probs_HQK)
                dbias[row if len(dbias) > 1 else 0, heads, queries, keys] += dscores
                dq[row, heads, queries] = (dscores @ k[row, heads, keys]).mul_(scale)
                dk[row, heads, keys].baddbmm_(dscores.mT, q[row, heads, queries], alpha=scale)
        return dq.to(saved[0].dtype), dk.to(saved[1].dtype), dv.to(saved[2].dtype), dbias, None, None

    @staticmethod
    def steps(q: Tensor, bias: Bias) -> Iterator[tuple[int, tuple[slice, slice, slice]]]:
        """The rows of the batch, each with all of its blocks."""
        return itertools.product(range(q.shape[0]), bias.blocks)

    @staticmethod
    def probabilities(
        q_HQD: Tensor, k_HKD: Tensor, bias: Bias, row: int, block: tuple[slice, slice, slice], scale: float
    ) -> Tensor:
        """One block of one row's attention, in the bias's type."""
        heads, queries, keys = block
        added_HQK = bias.added_RHQK[row if len(bias.added_RHQK) > 1 else 0, heads, queries, keys]
        scores_HQK = torch.baddbmm(added_HQK, q_HQD[heads, queries], k_HKD[heads, keys].mT, alpha=scale)
        if bias.hidden_BQK is not None:
            scores_HQK.masked_fill_(bias.hidden_BQK[row, queries, keys], HIDDEN)
        return torch.softmax(scores_HQK, -1)


class Attention(nn.Module):
    """Multi-head attention over the heads that the layer keeps."""

    def __init__(self, config: CpmAntConfig, layer: int, cache_slot: int):
        super().__init__()
        heads = config.heads_of(layer)
        self.num_heads, self.dim_head, self.dropout_p = len(heads), config.dim_head, config.dropout_p
        self.heads = None if len(heads) == config.num_heads else heads
        self.cache_slot = cache_slot
        dim_heads, before = self.num_heads * self.dim_head, config.sizes_before()
        self.scale, fan_out = 1 / math.sqrt(before["dim_head"]), before["heads"][layer] * before["dim_head"]
        self.project_q = Linear(config.dim_model, dim_heads, before["dim_model"])
        self.project_k = Linear(config.dim_model, dim_heads, before["dim_model"])
        self.project_v = Linear(config.dim_model, dim_heads, before["dim_model"])
        self.attention_out = Linear(dim_heads, config.dim_model, fan_out, residual_std(config))

    def forward(self, x_BQM: Tensor, bias: Bias, cache: Any = None) -> Tensor:
        q, k, v = (self._split(project(x_BQM)) for project in (self.project_q, self.project_k, self.project_v))
        if cache is not None:
            k, v = cache.update(k, v, self.cache_slot)
        if self.heads is not None:
            bias = bias.of_heads(torch.tensor(self.heads).to(x_BQM.device, non_blocking=True))
        if bias.bias_RHQK is not None:
            mixed_BHQD = BiasedAttention.apply(q, k, v, bias.bias_RHQK, bias, self.scale)
        else:
            drop = self.dropout_p if self.training else 0.0
            mixed_BHQD = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias.added_RHQK, dropout_p=drop, scale=self.scale
            )
        mixed = mixed_BHQD.transpose(1, 2).reshape(*x_BQM.shape[:2], -1)
        if bias.keep_BQ1 is not None:
            mixed = mixed * bias.keep_BQ1
        return self.attention_out(mixed)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.dim_head).transpose(1, 2)


class SelfAttentionBlock(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: CpmAntConfig, layer: int, cache_slot: int):
        super().__init__()
        self.layernorm_before_attention = nn.RMSNorm(config.dim_model, config.eps)
        self.self_attention = Attention(config, layer, cache_slot)
        self.dropout = nn.Dropout(config.dropout_p)

    def forward(self, x: Tensor, bias: Bias, cache: Any = None) -> Tensor:
        return x + self.dropout(self.self_attention(self.layernorm_before_attention(x), bias, cache))


class FFNInput(nn.Module):
    """gelu(w_0 x) * w_1 x, or gelu(w x) in older checkpoints."""

    def __init__(self, config: CpmAntConfig, layer: int):
        super().__init__()
        sizes = config.dim_model, config.dim_ff_of(layer), config.sizes_before()["dim_model"]
        self.gated = config.gated_ffn
        if self.gated:
            self.w_0, self.w_1 = Linear(*sizes), Linear(*sizes)
        else:
            self.w = Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.w_0(x)) * self.w_1(x) if self.gated else F.gelu(self.w(x))


class FeedForward(nn.Module):
    """The two products of an FFN."""

    def __init__(self, config: CpmAntConfig, layer: int):
        super().__init__()
        self.w_in = FFNInput(config, layer)
        self.dropout = nn.Dropout(config.dropout_p)
        fan_in = config.sizes_before()["dim_ff"][layer]
        self.w_out = Linear(config.dim_ff_of(layer), config.dim_model, fan_in, residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(self.dropout(self.w_in(x)))


class FFNBlock(nn.Module):
    """x + ffn(norm(x))."""

    def __init__(self, config: CpmAntConfig, layer: int):
        super().__init__()
        self.layernorm_before_ffn = nn.RMSNorm(config.dim_model, config.eps)
        self.ffn = FeedForward(config, layer)
        self.dropout = nn.Dropout(config.dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn(self.layernorm_before_ffn(x)))


class TransformerBlock(nn.Module):
    """A layer; either of its blocks may be missing, with its parameters."""

    def __init__(self, config: CpmAntConfig, layer: int, cache_slot: int):
        super().__init__()
        self.self_att = SelfAttentionBlock(config, layer, cache_slot) if config.has_attention(layer) else None
        self.ffn = FFNBlock(config, layer) if config.has_ffn(layer) else None

    def forward(self, x: Tensor, bias: Bias, cache: Any = None) -> Tensor:
        x = x if self.self_att is None else self.self_att(x, bias, cache)
        return x if self.ffn is None else self.ffn(x)


class Encoder(nn.Module):
    """All layers, then the last norm."""

    def __init__(self, config: CpmAntConfig):
        super().__init__()
        # Slots of the cache count the layers with attention only, so that the first slot always knows the past length.
        slots = [sum(map(config.has_attention, range(layer))) for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(TransformerBlock(config, layer, slot) for layer, slot in enumerate(slots))
        self.output_layernorm = nn.RMSNorm(config.dim_model, config.eps)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, bias: Bias, cache: Any = None, keep_states: bool = False) -> list[Tensor]:
        """The hidden states after the last norm; before them, with `keep_states`, those before every layer."""
        states = []
        for layer in self.layers:
            states += [x] if keep_states else []
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, bias, use_reentrant=False)
            else:
                x = layer(x, bias, cache)
        return [*states, self.output_layernorm(x)]


class CpmAntForCausalLM(PreTrainedModel, GenerationMixin):
    """CPM-Ant with its language-model head, which is the input embedding itself.

    It takes CPM-Live's batch by name (`input, length, context, position, segment, span`), for any of its tasks, or
    Hugging Face's (`input_ids, attention_mask, labels`), which is plain language modelling.
    """

    config_class = CpmAntConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock"]

    def __init__(self, config: CpmAntConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.prompt_embedding = Embedding(config.prompt_types * config.prompt_length, config)
        self.segment_embedding = Embedding(config.segment_types, config)
        self.input_embedding = Embedding(config.vocab_size, config)
        self.position_bias = PositionBias(config)
        add_experts(self, config.experts or {})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (Linear, Embedding, PositionBias, nn.RMSNorm)):
            module.reset_parameters()

    def init_weights(self) -> None:
        """Nothing: modules draw their weights when built, as they must where ZeRO-3 scatters them at once."""

    def get_input_embeddings(self) -> nn.Module:
        return self.input_embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.input_embedding = value

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recomputes every layer in the backward pass instead of keeping its activations.

        Raises:
            ValueError: For reentrant checkpointing, which loses gradients that hooks bring in, and for other variants.
        """
        variant = kwargs.get("every_n_layers", 1) != 1 or kwargs.get("offload", False)
        if variant or (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("CPM-Ant checkpoints every layer, with use_reentrant=False and no offloading")
        self.encoder.gradient_checkpointing = True

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token for hidden states after the last norm: (..., dim_model) -> (..., vocab_size)."""
        return self.input_embedding(hidden, project=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        *,
        input: Tensor | None = None,
        length: Tensor | None = None,
        context: Tensor | None = None,
        position: Tensor | None = None,
        segment: Tensor | None = None,
        span: Tensor | None = None,
        targets: Tensor | None = None,
        facts: Facts | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Runs the model on one of two kinds of batch.

        Plain language modelling: the prompt of task 2 is put in front of the text and is its only context.
            input_ids: (B, T). attention_mask: (B, T or past + T), 0 for padding on either side, which changes nothing
            for the others. labels: (B, T), the ids themselves: they are shifted here. With `past_key_values` (a dynamic
            cache) `input_ids` are the new tokens. The logits are those of the text: (B, T, V).

        CPM-Live's batch: every tensor is (B, L) with the prompt included, but `length`, (B,), the number of positions
            that are not padding. The first `prompt_length` ids of a row are prompt ids. In a packed row `span` numbers
            the samples, each comes with a prompt of its own, in segment 0, and is computed as if it were alone. (CPM-
            Live looks the later prompts up among the tokens, so that its packed rows differ from its single ones.)
            `labels` or `targets`: (B, L), aligned: entry i is the token after i. `facts`: what is known of the batch,
            or None. The logits are (B, L, V).

        `targets` are aligned in both; the loss is their mean cross-entropy without the entries -100. `position`,
        `position_ids` and `token_type_ids` are accepted and unused: positions are indices.

        Raises:
            ValueError: The batch is incomplete, or mixes the two kinds.
        """
        if output_attentions:
            raise ValueError("fused attention keeps no attention weights: output_attentions is not supported")
        if input is not None:
            if length is None or context is None or segment is None:
                raise ValueError("CPM-Live's batch needs `length`, `context` and `segment` beside `input`")
            if input_ids is not None or past_key_values is not None:
                raise ValueError("CPM-Live's batch cannot be combined with input_ids or past_key_values")
            hidden, layout = self._embed_batch(input, length, context, segment, span, facts)
            targets, prompt = labels if targets is None else targets, 0
        else:
            past_key_values = self._cache(past_key_values, use_cache)
            hidden, layout, prompt = self._embed_text(input_ids, inputs_embeds, attention_mask, past_key_values)
            if targets is None and labels is not None:
                targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        bias = self.position_bias.added(layout, self._query_dtype(hidden))
        states = self.encoder(hidden, bias, past_key_values, keep_states=bool(output_hidden_states))
        states = [state[:, prompt:] for state in states]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.logits(states[-1] if isinstance(kept, int) else states[-1][:, kept])
        output = CausalLMOutputWithPast(
            loss=None if targets is None else mean_loss(logits, targets),
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _embed_batch(
        self, ids: Tensor, length: Tensor, context: Tensor, segment: Tensor, span: Tensor | None, facts: Facts | None
    ) -> tuple[Tensor, Layout]:
        index_L = torch.arange(ids.shape[1], device=ids.device)
        real_BL = index_L < length[:, None]
        is_prompt_BL = index_L < self.config.prompt_length
        if span is not None:
            begins_BL = F.pad(span[:, 1:] != span[:, :-1], (1, 0))
            offset_BL = index_L - torch.where(begins_BL, index_L, 0).cummax(1).values
            is_prompt_BL = is_prompt_BL | ((offset_BL < self.config.prompt_length) & (segment == 0) & real_BL)
        else:
            is_prompt_BL = is_prompt_BL.expand_as(ids)
        prompt_BLM = self.prompt_embedding(ids.masked_fill(~is_prompt_BL, 0))
        text_BLM = self.input_embedding(ids.masked_fill(is_prompt_BL, 0))
        hidden_BLM = torch.where(is_prompt_BL[..., None], prompt_BLM, text_BLM)
        facts = Facts.of(segment, context, span, length) if facts is None else facts
        layout = Layout(  # without what says nothing, and without the batch axis where all rows are the same
            segment_RK=segment[:1] if facts.same_segment else segment,
            context_RK=context[:1].bool() if facts.same_context else context.bool(),
            span_RK=None if facts.alone or span is None else span[:1] if facts.same_span else span,
            real_RK=None if facts.full else real_BL[:1] if facts.same_real else real_BL,
            kinds=facts.kinds,
            queries=segment.shape[1],
        )
        return hidden_BLM + self.segment_embedding(segment), layout

    def _embed_text(
        self, input_ids: Tensor | None, embeds: Tensor | None, attention_mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, Layout, int]:
        """Hidden states, layout, and how many of the positions are prompt."""
        if (input_ids is None) == (embeds is None):
            raise ValueError("pass CPM-Live's batch with `input`, or exactly one of input_ids and inputs_embeds")
        text_BTM = self.input_embedding(input_ids) if embeds is None else embeds
        batch, tokens, device = text_BTM.shape[0], text_BTM.shape[1], text_BTM.device
        past = 0 if cache is None else cache.get_seq_length()
        prompt = 0 if past else self.config.prompt_length
        segment_2M = self.segment_embedding(torch.tensor([0, TEXT_SEGMENT], device=device))
        hidden_BQM = text_BTM + segment_2M[1]
        if prompt:
            ids_P = torch.arange(prompt, device=device) + LM_TASK * prompt
            prompt_PM = self.prompt_embedding(ids_P) + segment_2M[0]
            hidden_BQM = torch.cat([prompt_PM.expand(batch, -1, -1), hidden_BQM], 1)
        keys = past + prompt + tokens
        is_text_1K = torch.arange(keys, device=device)[None, :] >= self.config.prompt_length
        real = None
        if attention_mask is not None and not attention_mask.all():
            real = F.pad(attention_mask.bool(), (keys - attention_mask.shape[1], 0), value=True)
        layout = Layout(
            segment_RK=is_text_1K * TEXT_SEGMENT,
            context_RK=~is_text_1K,
            real_RK=real,
            kinds=(0, TEXT_SEGMENT) if self.config.prompt_length else (TEXT_SEGMENT,),
            queries=prompt + tokens,
        )
        return hidden_BQM, layout, prompt

    def _cache(self, cache: Any, use_cache: bool | None) -> Any:
        if cache is None:
            return DynamicCache() if use_cache and not (self.training and self.encoder.gradient_checkpointing) else None
        if getattr(cache, "is_compileable", False) or not hasattr(cache, "update"):
            raise ValueError(f"past_key_values must be a DynamicCache, got {type(cache).__name__}")
        return cache

    def _query_dtype(self, hidden: Tensor) -> torch.dtype:
        kind = hidden.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in the base class; the cache holds the prompt as well, which the ids do not."""
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if past and kwargs.get("next_sequence_length") is not None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - (past - self.config.prompt_length)
        return GenerationMixin.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 over the targets that are not -100; 0 if there are none."""
    flat = targets.reshape(-1).long()
    total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=IGNORED, reduction="sum")
    return total / (flat != IGNORED).sum().clamp(min=1)
