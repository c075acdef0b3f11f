"""The products in C against dense ones, for every kind of processor that the compiler here can make code for."""

from __future__ import annotations

import gc
import os
import platform
import resource
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cook.sparsity.kernels import sparse_build, sparse_native
from cook.sparsity.kernels.sparse_ways import by, ways
from tests.sparsity.kernels.test_sparse_layers import BLOCK, made, tile_mask
from tests.warm import interpreter


@pytest.fixture(autouse=True)
def forget():
    yield
    sparse_build.library.cache_clear()


OLDER = ["-mno-avx512f", "-mno-avx", "-mno-avx512bf16"] if platform.machine() == "x86_64" else []
FLOATS = torch.ones(1)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache folder, where the products are built once per compiler; it holds those of the compiler `cc`."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("CC", raising=False)
        sparse_build.library.cache_clear()
        assert sparse_native.has_native(FLOATS), "a C compiler is needed to test the products"
    return folder


@pytest.fixture
def own_cache(built, tmp_path, monkeypatch):
    """A cache folder with what is built, which a test may change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "cook").mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(built))
        sparse_build.library.cache_clear()
        shutil.copy2(sparse_build.library()._name, tmp_path / "cook")
    sparse_build.library.cache_clear()
    return tmp_path / "cook"


@pytest.fixture(params=["", *OLDER])
def processor(request, monkeypatch, built):
    """The products as an older processor would have them: registers of 16, 8 and 4 floats, with and without bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built))
    monkeypatch.setenv("CC", f"cc {request.param}")
    sparse_build.library.cache_clear()
    assert sparse_native.has_native(FLOATS), "a C compiler is needed to test the products"
    return request.param


def native(layer, x_KM, name="native"):
    """The layer's product in C, into memory that held something else."""
    found = ways(layer.plan(), x_KM)
    if name == "native" and "native in fp32" in found:
        name = "native in fp32"
    if name not in found:
        return None
    out = torch.full((layer.out_features, x_KM.shape[1]), torch.nan, dtype=x_KM.dtype)
    return by(found[name], layer.plan(), x_KM, transposed=True, out=out)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.booleans(),
    st.integers(1, 200),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
)
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
        assert not layer.plan().tiles
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
    assert found is not None
    wanted = weight.double() @ x_KM.double() + bias.double()[:, None]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-5)


def test_bf16_is_multiplied_in_fp32_where_the_processor_has_no_instructions_for_it(processor):
    layer, *_ = made(0, tile_mask(0, 24, [8, 8], False), torch.bfloat16)
    found = ways(layer.plan(), torch.ones(24, 5, dtype=torch.bfloat16))
    has_half = sparse_native.has_native(FLOATS.to(torch.bfloat16))
    assert ("native" in found) == has_half and ("native in fp32" in found) == (not has_half)


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


def test_the_library_says_which_instructions_it_has(processor):
    if processor == "-mno-avx512f" and "avx2" in Path("/proc/cpuinfo").read_text():
        assert sparse_native.instructions() == "AVX2"
    if processor == "-mno-avx" and platform.machine() == "x86_64":
        assert sparse_native.instructions() == "128-bit vectors"


def test_many_threads_share_a_few_groups_of_rows(processor):
    layer, weight, bias = made(5, tile_mask(5, 300, [37, 64, 5, 90], False))
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        for rows in (1, 100, 1000):
            x_KM = torch.randn(300, rows, generator=torch.Generator().manual_seed(rows))
            wanted = weight.double() @ x_KM.double() + bias.double()[:, None]
            torch.testing.assert_close(native(layer, x_KM).double(), wanted, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_activations_in_a_part_of_others(own_cache):
    layer, weight, bias = made(2, tile_mask(2, 24, [8, 8], False))
    x_KM, out = torch.randn(24, 90), torch.full((16, 90), torch.nan)
    by(ways(layer.plan(), x_KM)["native"], layer.plan(), x_KM[:, 20:70], transposed=True, out=out[:, 30:80])
    torch.testing.assert_close(out[:, 30:80], weight @ x_KM[:, 20:70] + bias[:, None], rtol=1e-5, atol=1e-5)
    assert out[:, :30].isnan().all() and out[:, 80:].isnan().all()


def test_odd_blocks_in_bf16(processor):
    random = torch.Generator().manual_seed(0)
    mask = (torch.rand(7, 5, generator=random) > 0.5).repeat_interleave(3, 0).repeat_interleave(3, 1)
    layer, weight, bias = made(0, mask, torch.bfloat16, block=3)
    x_KM = torch.randn(21, 50, generator=random).bfloat16()
    found = native(layer, x_KM)
    if found is not None:
        wanted = weight.double() @ x_KM.double() + bias.double()[:, None]
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-5)


def test_what_does_not_fit_is_refused_before_memory_is_touched(own_cache):
    layer, *_ = made(2, tile_mask(2, 24, [8, 8], False))
    panels, x_KM = layer.plan().panels, torch.randn(24, 8)
    for wrong in (
        (x_KM[:20], torch.empty(16, 8)),
        (x_KM, torch.empty(12, 8)),
        (x_KM, torch.empty(16, 9)),
        (x_KM.bfloat16(), torch.empty(16, 8).bfloat16()),
        (x_KM, torch.empty(8, 16).T),
    ):
        with pytest.raises(ValueError):
            sparse_native.multiply(panels, *wrong)
    assert "native" not in ways(layer.plan(), x_KM.bfloat16())
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layer(x_KM.T.bfloat16())
    reads, writes, weight, bias = torch.arange(13, 25), torch.arange(8), torch.zeros(8, 12), torch.zeros(8, 1)
    with pytest.raises(ValueError, match="damaged"):
        sparse_native.tile_panels([(reads, writes, weight, bias)], inputs=24, outputs=16, block=1)


def test_tensors_without_memory_get_no_native_product(own_cache):
    layer, *_ = made(2, tile_mask(2, 24, [8, 8], False))
    plan = layer.plan()
    fake = FakeTensorMode().from_tensor(torch.randn(24, 8))
    assert "native" not in ways(plan, fake) and not sparse_native.has_native(fake)


def test_threads_that_end_leave_no_memory_behind(own_cache):
    layer, *_ = made(0, torch.ones(512, 8, dtype=torch.bool))
    x_KM, plan = torch.randn(512, 256), layer.plan()
    way = ways(plan, x_KM)["native"]
    peaks = []
    for _ in range(2):
        for _ in range(60):
            thread = threading.Thread(target=by, args=(way, plan, x_KM), kwargs={"transposed": True})
            thread.start()
            thread.join()
        gc.collect()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 8 * 1024, peaks  # KiB; 60 buffers would be 12 MiB


@pytest.mark.parametrize(
    "name, value", [("CC", "no-such-compiler"), ("CC", "cc -no-such-option"), ("CC", "cc '"), ("COOK_NATIVE", "0")]
)
def test_without_a_compiler_the_others_serve(name, value, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    sparse_build.library.cache_clear()
    layer, weight, bias = made(0, tile_mask(0, 24, [8, 8, 8], False))
    x = torch.randn(5, 24)
    assert "native" not in ways(layer.plan(), x.T)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.rglob("*.so"))
    assert ("cannot be built" in caplog.text) == (name == "CC")


def test_the_library_is_built_once_where_nobody_else_can_write(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sparse_build.library.cache_clear()
    assert sparse_build.library() is not None
    folder = tmp_path / "cook"
    (built,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    made_at = built.stat().st_mtime_ns
    sparse_build.library.cache_clear()
    assert sparse_build.library() is not None and built.stat().st_mtime_ns == made_at


@pytest.mark.parametrize("case", ["another user's", "open to others", "a link"])
def test_a_library_that_another_user_may_have_put_there_is_not_loaded(case, monkeypatch, tmp_path, own_cache):
    (built,) = own_cache.iterdir()
    before = built.stat().st_ino
    assert sparse_build.library() is not None and built.stat().st_ino == before, "as it is, it is loaded"
    if case == "another user's":
        if os.getuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(built, 12345, 12345)
    elif case == "open to others":
        built.chmod(0o777)
    else:
        built.rename(tmp_path / "elsewhere.so")
        built.symlink_to(tmp_path / "elsewhere.so")
    before = built.stat().st_ino
    opened = []
    monkeypatch.setattr(sparse_build.ctypes, "CDLL", lambda path: opened.append(os.stat(path).st_ino))
    sparse_build.library.cache_clear()
    sparse_build.library()
    found = built.lstat()
    assert opened == [found.st_ino] and found.st_ino != before, "it was built again, and that one is loaded"
    assert found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700 and stat.S_ISREG(found.st_mode)


def test_a_compiler_named_by_blanks_is_none_named(monkeypatch, own_cache):
    monkeypatch.setenv("CC", "   ")
    sparse_build.library.cache_clear()
    assert sparse_build.library() is not None


@pytest.mark.parametrize("case", ["open to others", "damaged", "no home"])
def test_where_nothing_can_be_kept_it_is_built_for_this_process(case, tmp_path, own_cache):
    folder, environment = tmp_path / "cook", {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    code = "from cook.sparsity.kernels import sparse_build as b; assert b.library().panel_outputs() in (4, 6, 8)"
    run = [interpreter(), "-c", code]
    # It may have loaded another OpenMP than this process has, and then has a library of its own.
    subprocess.run(run, env=environment, cwd=ROOT, check=True)
    if case == "no home":
        shutil.rmtree(folder)
        folder.write_text("a file where the folder should be")
    else:
        if case == "damaged":
            for built in folder.iterdir():
                built.unlink()
                built.write_bytes(b"no library")
        else:
            folder.chmod(0o777)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    subprocess.run(run, env=environment, cwd=ROOT, check=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before  # and nothing is left behind
