"""The products in C against dense ones, for every kind of processor that the compiler here can make code for."""

from __future__ import annotations

import stat

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cook.models import sparse_native
from cook.models.sparse_ways import by, ways
from tests.models.test_sparse_layers import BLOCK, made, tile_mask


@pytest.fixture(autouse=True)
def forget():
    yield
    sparse_native.library.cache_clear()


@pytest.fixture(params=["", "-mno-avx512f", "-mno-avx", "-mno-avx512bf16"])
def processor(request, monkeypatch, tmp_path):
    """The products as an older processor would have them: registers of 16, 8 and 4 floats, with and without bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", f"cc {request.param}")
    sparse_native.library.cache_clear()
    assert sparse_native.has_native(torch.float32), "a C compiler is needed to test the products"
    return request.param


def native(layer, x_KM, name="native"):
    """The layer's product in C, into memory that held something else."""
    found = ways(layer.plan(), x_KM)
    if name not in found:
        return None
    out = torch.full((layer.out_features, x_KM.shape[1]), torch.nan, dtype=x_KM.dtype)
    return by(found[name], layer.plan(), x_KM, transposed=True, out=out)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=5), st.booleans(),
    st.integers(1, 200), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3),
)  # fmt: skip
def test_tiles(processor, seed, inputs, columns, uneven, rows, dtype, threads):
    layer, weight, bias = made(seed, tile_mask(seed, inputs, columns, uneven), dtype)
    x_KM = torch.randn(inputs, rows, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native(layer, x_KM)
    finally:
        torch.set_num_threads(before)
    if found is None:
        assert not layer.plan().tiles or (dtype == torch.bfloat16 and not sparse_native.has_native(dtype))
        return
    wanted = weight.double() @ x_KM.double() + bias.double()[:, None]
    # fp32: sums of 40 products in another order. bf16: sums in fp32, rounded once, half an ulp of 8 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(found.double(), wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(processor, dtype):
    random = torch.Generator().manual_seed(0)
    mask = (torch.rand(6, 5, generator=random) > 0.5).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    layer, weight, bias = made(0, mask, dtype, block=BLOCK)
    x_KM = torch.randn(24, 77, generator=random).to(dtype)
    found = native(layer, x_KM)
    assert (found is None) == (not sparse_native.has_native(dtype))
    if found is not None:
        wanted = weight.double() @ x_KM.double() + bias.double()[:, None]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_single_weights(processor, rows):
    random = torch.Generator().manual_seed(rows)
    layer, weight, bias = made(1, torch.rand(37, 29, generator=random) < 0.3)
    x = torch.randn(rows, 37, generator=random)
    found = native(layer, x.T.contiguous(), "entries")
    torch.testing.assert_close(found.T, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 64, 150])
def test_the_norm(processor, rows, dtype):
    random = torch.Generator().manual_seed(rows)
    norm = torch.nn.LayerNorm(48, eps=1e-5)
    torch.nn.init.normal_(norm.weight, generator=random)
    torch.nn.init.normal_(norm.bias, generator=random)
    x, y = (torch.randn(rows, 48, generator=random).to(dtype) for _ in range(2))
    exact = F.layer_norm(x.double() + y.double(), (48,), norm.weight.double(), norm.bias.double(), norm.eps)
    x_DM = x.T.contiguous()
    assert sparse_native.add_and_norm(x_DM, y.T.contiguous(), norm) is x_DM
    # fp32 sums of 48 numbers; bf16 is rounded once, half an ulp of 8 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(x_DM.T.double(), exact, **tolerance)


def test_activations_in_a_part_of_others():
    layer, weight, bias = made(2, tile_mask(2, 24, [8, 8], False))
    x_KM, out = torch.randn(24, 90), torch.full((16, 90), torch.nan)
    by(ways(layer.plan(), x_KM)["native"], layer.plan(), x_KM[:, 20:70], transposed=True, out=out[:, 30:80])
    torch.testing.assert_close(out[:, 30:80], weight @ x_KM[:, 20:70] + bias[:, None], rtol=1e-5, atol=1e-5)
    assert out[:, :30].isnan().all() and out[:, 80:].isnan().all()


def test_activations_of_another_type_are_no_ones_products():
    layer, *_ = made(2, tile_mask(2, 24, [8, 8], False))
    x_KM = torch.randn(24, 8, dtype=torch.bfloat16)
    assert "native" not in ways(layer.plan(), x_KM)
    with pytest.raises(AssertionError):
        sparse_native.multiply(layer.plan().panels, x_KM, torch.empty(16, 8, dtype=torch.bfloat16))
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layer(x_KM.T)


@pytest.mark.parametrize(
    "name, value", [("CC", "no-such-compiler"), ("CC", "cc -no-such-option"), ("COOK_NATIVE", "0")]
)
def test_without_a_compiler_the_others_serve(name, value, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    sparse_native.library.cache_clear()
    layer, weight, bias = made(0, tile_mask(0, 24, [8, 8, 8], False))
    x = torch.randn(5, 24)
    assert "native" not in ways(layer.plan(), x.T)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.rglob("*.so"))


def test_the_library_is_built_once_where_nobody_else_can_write(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = sparse_native._built()
    assert built.parent == tmp_path / "cook" and stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    made_at = built.stat().st_mtime_ns
    assert sparse_native._built() == built and built.stat().st_mtime_ns == made_at
    assert [path.name for path in built.parent.iterdir()] == [built.name]
    built.parent.chmod(0o777)
    assert sparse_native._built().parent != built.parent
