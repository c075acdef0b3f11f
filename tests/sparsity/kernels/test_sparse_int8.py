"""Products in int8 and the encoder of them, for every kind of processor that the compiler here can make code for."""

from __future__ import annotations

import copy
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertModel

from cook.base.errors import UserError
from cook.sparsity.kernels import sparse_build
from cook.sparsity.kernels.sparse_bert import SparseBertModel
from cook.sparsity.kernels.sparse_int8 import Int8TileWiseLinear, encode, int8_levels, multiply, rounded
from cook.sparsity.sparse_export import export_sparse
from cook.sparsity.spec import PatternSpec
from tests.sparsity.test_sparse_export import SIZES, masked_model

OLDER = ["-mno-avx512vnni", "-mno-avx512f", "-mno-avx512f -mno-avxvnni"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache folder, where the products are built once per compiler."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture(params=["", *OLDER] if platform.machine() == "x86_64" else [""])
def levels(request, monkeypatch, built):
    """Levels of activations, with the products as an older processor would have them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built))
    monkeypatch.setenv("CC", f"cc {request.param}")
    sparse_build.library.cache_clear()
    yield available_levels()
    sparse_build.library.cache_clear()


def available_levels():
    """Levels of activations; a processor with AVX2 has some."""
    if not re.search(r"\bavx2\b", Path("/proc/cpuinfo").read_text()):
        pytest.skip("this processor has no AVX2")
    assert (found := int8_levels()) > 0
    return found


def random_layer(inputs, outputs, tiles, *, seed=0, alone=False):
    """Tiles that read a share of the inputs each; one output is in no tile. Also its weights, [K, N] int64.

    `alone`: an output has one weight that is not 0.
    """
    random = torch.Generator().manual_seed(seed)
    order, weight = torch.randperm(outputs, generator=random), np.zeros((inputs, outputs), dtype=np.int64)
    members = [
        (torch.randperm(inputs, generator=random)[: max(1, inputs * (n + 1) // tiles - n)].sort().values, own)
        for n, own in enumerate(order[1:].tensor_split(tiles))
    ]
    layer = Int8TileWiseLinear(inputs, outputs, [(len(i), len(o)) for i, o in members])
    layer.requires_grad_(False)
    layer.inputs.copy_(torch.cat([i for i, _ in members]))
    layer.outputs.copy_(torch.cat([o for _, o in members]))
    values = torch.randint(-127, 128, layer.weight.shape, generator=random)
    at = 0
    for rows, columns in layer.sizes if alone else ():
        values[at : at + rows * columns].view(columns, rows)[:, 1:] = 0
        at += rows * columns
    layer.weight.copy_(values)
    at = 0
    for i, o in members:
        weight[i[None, :].numpy(), o[:, None].numpy()] = values[at : at + len(i) * len(o)].view(len(o), len(i)).numpy()
        at += len(i) * len(o)
    return layer, weight


@pytest.mark.parametrize(
    ("inputs", "outputs", "tiles", "rows"), [(2, 2, 1, 1), (33, 14, 2, 17), (64, 97, 3, 150), (768, 20, 2, 64)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_of_products_are_exact(levels, inputs, outputs, tiles, rows, threads):
    layer, weight = random_layer(inputs, outputs, tiles)
    layer.scale.fill_(1.0)
    # With 0 and the highest level in a row the step is 1 and the lowest value 0: nothing is rounded.
    x = np.random.default_rng(1).integers(0, levels + 1, (rows, inputs))
    x[:, 0], x[:, -1] = 0, levels
    torch.set_num_threads(threads)
    try:
        found = multiply(layer, torch.from_numpy(x).float())
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(found.numpy(), (x @ weight).astype(np.float32))


@pytest.mark.parametrize("sign", [-127, 127])
def test_the_largest_sums_do_not_saturate(levels, sign):
    layer, _ = random_layer(3073, 9, 1)
    layer.scale.fill_(1.0)
    layer.weight.fill_(sign)
    x = torch.full((3, 3073), float(levels))
    x[:, 5] = 0
    wanted = (x.numpy().astype(np.int64)[:, layer.inputs.numpy()].sum(1) * sign).astype(np.float32)
    assert np.array_equal(multiply(layer, x)[:, layer.outputs.long()].numpy(), np.tile(wanted[:, None], (1, 8)))


@pytest.mark.parametrize("alone", [True, False])
def test_activations_are_rounded_by_half_a_step_at_most(levels, alone):
    layer, weight = random_layer(50, 30, 3, alone=alone)
    layer.scale.uniform_(0.5, 2.0)
    layer.bias.normal_()
    wide = weight.astype(np.float64)
    wide[:, layer.outputs.numpy()] *= layer.scale.double().numpy()
    x = torch.randn(70, 50) * torch.logspace(-3, 3, 70)[:, None] + torch.linspace(-10, 10, 70)[:, None]
    x[3], x[4] = 7.0, 0.0  # no range, so no step
    wanted = x.double().numpy() @ wide + layer.bias.double().numpy()
    step = (x.amax(1) - x.amin(1)).double().numpy() / levels
    away = np.abs(multiply(layer, x).double().numpy() - wanted)
    # The last term: fp32 of sums of 50 products.
    bound = 0.5 * step[:, None] * np.abs(wide).sum(0) + 1e-5 * (np.abs(x.numpy()) @ np.abs(wide) + 1)
    assert (away <= bound).all() and (away > bound / 50).any()  # it rounds
    assert np.allclose(away[[3, 4]], 0, atol=1e-5 * np.abs(wanted[3]).max())


def test_gelu_is_within_a_step_of_8_bits(levels):
    layer, _ = random_layer(1, 2, 1)
    layer.weight.fill_(127)
    layer.scale.fill_(1 / 127)
    x = torch.linspace(-30, 30, 2000)[:, None]  # rows of one number have no range: they are exact
    found = multiply(layer, x, is_gelu=True)[:, layer.outputs.long()]
    # The polynomial's error is 3.4e-5; outside of ±4.5 it leaves an 1e-5th of x.
    assert float((found - F.gelu(x)).abs().max()) < 1.5e-4


def test_weights_are_rounded_per_output():
    weight = torch.randn(6 * 4 + 5 * 3, generator=torch.Generator().manual_seed(0))
    weight[:6] = 0  # an output without weights
    values, scales = rounded(weight, [(6, 4), (5, 3)])
    tiles = [(weight[:24].view(4, 6), values[:24].view(4, 6), scales[:4])]
    tiles += [(weight[24:].view(3, 5), values[24:].view(3, 5), scales[4:])]
    for exact, found, scale in tiles:
        assert float(((found * scale[:, None] - exact).abs() - scale[:, None] / 2).max()) < 1e-6
    assert values.dtype == torch.int8 and values[24:].view(3, 5).abs().amax(1).tolist() == [127] * 3
    assert not values[:6].any() and rounded(torch.zeros(0), [])[0].shape == (0,)


class Rounded(nn.Module):
    """A stock linear layer that rounds its weights per output and its activations per row, in float64."""

    def __init__(self, stock, levels):
        super().__init__()
        self.levels, self.bias = levels, stock.bias.detach().double()
        scale = stock.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        self.weight = ((stock.weight.detach() / scale).round() * scale).double()

    def forward(self, x):
        if self.levels:
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            step = ((high - low) / self.levels).clamp(min=1e-30)
            x = low + ((x - low) / step).round() * step
        return F.linear(x, self.weight, self.bias)


def rounding(model, levels):
    """The stock model in float64, its encoder's linear layers rounded as the kernels do."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layer." in name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Rounded(module.float(), levels))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A masked model and the folder of its export in int8. Every unit still has an effect, so none is removed."""
    folder = tmp_path_factory.mktemp("int8")
    model, masks = masked_model(folder / "masked", PatternSpec(type=2, granularity=8), 25, BertModel)
    result = export_sparse(folder / "masked", folder / "int8", masks, int8=True)
    plain = export_sparse(folder / "masked", folder / "fp32", masks)
    assert result.kind == "sparse" and result.parameters == plain.parameters
    return model, folder


@pytest.mark.parametrize(("tokens", "threads"), [(7, 1), (40, 3), (65, 1), (33, 2)])
@pytest.mark.parametrize("kind", ["no mask", "padding", "causal"])
def test_a_layer_computes_what_the_stock_one_does_with_the_same_rounding(levels, exported, tokens, threads, kind):
    model, folder = exported
    stock, small = rounding(model, levels), SparseBertModel.from_pretrained(folder / "int8").eval()
    kept = torch.arange(tokens) < torch.tensor([tokens, tokens * 2 // 3, 3, tokens, 1])[:, None, None, None]
    mask = {"no mask": None, "padding": kept, "causal": torch.ones(5, 1, tokens, tokens).tril().bool()}[kind]
    added = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    x = torch.randn(5, tokens, 64, generator=torch.Generator().manual_seed(tokens))
    torch.set_num_threads(threads)
    try:
        for ours, layer in zip(small.encoder.layers, stock.encoder.layer, strict=True):
            with torch.no_grad():
                found = encode(ours, [ours], x, added).double()
                wanted = layer(x.double(), attention_mask=None if added is None else added.double())
            # Measured up to 3e-4: where GELU's error rounds an activation to the neighbour, an output is off by more.
            assert float((found - wanted).abs().mean()) < 6e-4 * float(wanted.abs().mean())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 3])  # two take sequences of their own, three share them
def test_the_encoder_computes_about_what_the_stock_model_does_with_the_same_rounding(levels, exported, threads):
    model, folder = exported
    small, ids = SparseBertModel.from_pretrained(folder / "int8").eval(), torch.arange(80).view(4, 20) % 50
    mask = (torch.arange(20) < torch.tensor([[20], [13], [7], [1]])).long()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            wanted, found = (m(ids, attention_mask=mask)[0] for m in (rounding(model, levels), small))
    finally:
        torch.set_num_threads(1)
    # A difference d in the first layer's output rounds d / step of the second one's inputs to a neighbour, a step away:
    # measured up to 0.5%. Without the rounding the difference is the same.
    assert float((found - wanted)[mask.bool()].abs().mean()) < 1e-2 * float(wanted.abs().mean())


def test_without_the_instructions_the_rounded_weights_are_multiplied_in_floating_point(exported, monkeypatch):
    model, folder = exported
    small = SparseBertModel.from_pretrained(folder / "int8").eval()
    ids = torch.randint(0, SIZES["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(0))
    wanted = rounding(model, 0)(ids)[0]
    found = small(ids)[0]  # with gradients
    # fp32 through two layers.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    bias = small.encoder.layers[0].output.bias
    assert float(bias.grad.abs().max()) > 0 and not small.encoder.layers[0].output.weight.is_floating_point()
    monkeypatch.setenv("COOK_NATIVE", "0")
    sparse_build.library.cache_clear()
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(small)(ids)[0].double(), wanted, rtol=1e-4, atol=1e-4)
    sparse_build.library.cache_clear()


def test_an_export_is_smaller_and_can_be_saved_again_and_changed(levels, exported):
    _, folder = exported
    sizes = {name: (folder / name / "model.safetensors").stat().st_size for name in ("fp32", "int8")}
    pruned = sum(
        m.weight.numel()
        for m in SparseBertModel.from_pretrained(folder / "int8").modules()
        if type(m).__name__ == "Int8TileWiseLinear"
    )
    assert sizes["fp32"] - sizes["int8"] > 2.5 * pruned  # three bytes each, and a scale per output
    small = SparseBertModel.from_pretrained(folder / "int8").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = small(ids)[0]
        small.save_pretrained(folder / "again")
        again = SparseBertModel.from_pretrained(folder / "again").eval()
        assert torch.equal(again(ids)[0], before) and torch.equal(copy.deepcopy(small)(ids)[0], before)
        half = copy.deepcopy(small).to(torch.bfloat16)(ids)[0]
        # bf16 keeps 8 bits of the embeddings, norms and biases.
        assert half.dtype == torch.bfloat16 and float((half - before).abs().mean()) < 0.05 * float(before.abs().mean())
        small.encoder.layers[0].output.bias += 1
        assert not torch.equal(small(ids)[0], before), "packed biases are made again"


def test_a_layer_without_heads_or_ffn(levels, tmp_path):
    stem = "encoder.layer.{}.{}.dense.weight"
    none = {
        stem.format(0, "attention.output"): torch.zeros(64, 64).bool(),
        stem.format(1, "output"): torch.zeros(64, 128).bool(),
    }
    model, masks = masked_model(tmp_path / "masked", PatternSpec(type=2, granularity=8), 25, BertModel, none)
    export_sparse(tmp_path / "masked", tmp_path / "int8", masks, int8=True)
    small = SparseBertModel.from_pretrained(tmp_path / "int8").eval()
    layers, ids = small.encoder.layers, torch.arange(40).view(2, 20)
    assert layers[0].heads == layers[0].qkv.out_features == layers[1].intermediate.out_features == 0
    with torch.no_grad():
        wanted, found = model(ids)[0], small(ids)[0]
    # Rounding to 8 bits, or 7, without an oracle that rounds: measured up to 0.4%.
    assert float((found - wanted).abs().mean()) < 1e-2 * float(wanted.abs().mean())


def test_mistakes_are_the_users(tmp_path):
    model, masks = masked_model(tmp_path / "masked", PatternSpec(type=2, granularity=32), 50)
    model.config.hidden_act = "relu"
    model.config.save_pretrained(tmp_path / "masked")
    with pytest.raises(UserError, match="relu"):
        export_sparse(tmp_path / "masked", tmp_path / "out", masks, int8=True)


def test_what_does_not_fit_is_refused_before_memory_is_touched(levels):
    layer, _ = random_layer(8, 6, 1)
    with pytest.raises(ValueError, match="8 features"):
        multiply(layer, torch.ones(2, 9))
    layer.inputs[0] = 8
    with pytest.raises(ValueError, match="damaged"):
        multiply(layer, torch.ones(2, 8))


def test_a_layer_alone_multiplies_in_int8_without_gradients():
    available_levels()
    layer, _ = random_layer(16, 12, 2)
    layer.scale.fill_(0.01)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x).flatten(0, 1), multiply(layer, x.flatten(0, 1))) and layer(x[:0]).shape == (0, 5, 12)
    wide = F.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer.requires_grad_()(x), wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.columns(x[0].T.contiguous()).detach(), wide[0].T, rtol=1e-5, atol=1e-5)
