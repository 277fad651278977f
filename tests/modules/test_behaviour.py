"""Every bad input, and what it gets: type, and what the message says. The order is that of the behaviour table."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import kvb
from kvb import KeyValueBottleneck, functional

op = torch.ops.kvb


def make(**options):
    return KeyValueBottleneck(4, 9, 14, 3, **options)


# --- construction -----------------------------------------------------------------------------------------------------

SIZE_NAMES = ("num_codebooks", "key_value_pairs_per_codebook", "dim_keys", "dim_values")


@pytest.mark.parametrize("name", SIZE_NAMES)
def test_sizes(name):
    good = dict.fromkeys(SIZE_NAMES, 3)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"^{name} must be a positive integer, got {bad}$"):
            KeyValueBottleneck(**{**good, name: bad})
    for bad in (2.0, True, "3", None):
        with pytest.raises(
            TypeError, match=f"^{name} must be a positive integer, got .* of type {type(bad).__name__}$"
        ):
            KeyValueBottleneck(**{**good, name: bad})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.0}, ValueError, r"decay must be in \[0.0, 1.0\), got 1.0"),
        ({"decay": -0.1}, ValueError, r"decay must be in \[0.0, 1.0\), got -0.1"),
        ({"decay": float("nan")}, ValueError, "decay must be in"),
        ({"decay": "0.9"}, TypeError, "decay must be a number, got '0.9' of type str"),
        ({"eps": 0}, ValueError, r"eps must be in \(0.0, inf\), got 0"),
        ({"threshold_ema_dead_code": -1}, ValueError, "threshold_ema_dead_code must be in"),
        ({"sample_codebook_temperature": -1}, ValueError, "sample_codebook_temperature must be in"),
        ({"kmeans_iters": 0}, ValueError, "kmeans_iters must be a positive integer, got 0"),
        ({"topk": 10}, ValueError, "topk must be at most the 9 pairs of a codebook, got 10"),
        ({"topk": 0}, ValueError, "topk must be a positive integer, got 0"),
        (
            {"init_mode": "kmean"},
            ValueError,
            r"init_mode must be one of 'random', 'sample', 'kmeans', 'kmeans\+\+'; got 'kmean'",
        ),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_not_a_tensor():
    import numpy as np

    for bad in ([[1.0]], np.zeros((2, 4, 14)), None):
        message = rf"^KeyValueBottleneck\(\): argument 'x' must be Tensor, not {type(bad).__name__}\b"
        with pytest.raises(TypeError, match=message):
            make()(bad)


@pytest.mark.parametrize("shape", [(8, 4, 16), (8, 5, 14), (4, 14), (14,), (), (8, 14, 4)])
def test_wrong_shape(shape):
    with pytest.raises(
        ValueError, match=r"expected x of shape \(B, C, \*shape, D\) = \(B, 4, \*shape, 14\), got \("
    ) as e:
        make()(torch.randn(shape))
    assert str(tuple(shape)) in str(e.value)
    assert "kvb.splitters" in str(e.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_wrong_dtype(dtype):
    with pytest.raises(TypeError, match=f"expected a floating-point x, got {dtype}; call x.float"):
        make()(torch.ones(2, 4, 14).to(dtype))


def test_another_device():
    message = "Expected all tensors to be on the same device, but x is on meta and keys are on cpu"
    with pytest.raises(RuntimeError, match=message):
        make()(torch.empty(2, 4, 14, device="meta"))
    with pytest.raises(RuntimeError, match="queries is on meta and keys are on cpu"):
        functional.nearest(torch.empty(2, 1, 4, 14, device="meta"), make().keys)
    with pytest.raises(RuntimeError, match="indices is on meta and values are on cpu"):
        make().decode(torch.zeros(2, 4, dtype=torch.int64, device="meta"))


def test_other_layouts():
    with pytest.raises(TypeError, match="expected a dense x, got layout torch.sparse_coo"):
        make()(torch.zeros(2, 4, 14).to_sparse())
    with pytest.raises(TypeError, match="expected a dense x, got a nested tensor"):
        make()(torch.nested.nested_tensor([torch.zeros(4, 14)] * 2, layout=torch.jagged))
    quantized = torch.quantize_per_tensor(torch.zeros(2, 4, 14), 1.0, 0, torch.qint8)
    with pytest.raises(TypeError, match="got quantized torch.qint8"):
        make()(quantized)


def test_check_finite_counts_the_rows():
    x = torch.randn(8, 4, 8, 14)
    x[0, 0, 0, 0] = float("nan")
    x[1, 2, 3] = float("inf")
    x[5, 3, 1, 13] = -float("inf")
    with pytest.raises(ValueError, match="^x contains NaN or Inf in 3 of 256 rows$"):
        make(check_finite=True)(x)
    make(check_finite=True)(torch.randn(8, 4, 14))
    make()(x)


def test_decode_checks_its_codes():
    module = make()
    with pytest.raises(IndexError, match="^index 9 is out of bounds for codebook with 9 pairs$"):
        module.decode(torch.full((2, 4), 9))
    with pytest.raises(IndexError, match="^index -1 is out of bounds for codebook with 9 pairs$"):
        module.decode(torch.full((2, 4), -1))
    with pytest.raises(TypeError, match=r"decode\(\): expected integer indices, got torch.float32"):
        module.decode(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="argument 'indices' must be Tensor, not list"):
        module.decode([[0] * 4])
    with pytest.raises(
        ValueError, match=r"expected indices of shape \(B, C, \*shape\) = \(B, 4, \*shape\), got \(2, 5\)"
    ):
        module.decode(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="pool must be one of 'none', 'mean', 'sum'; got 'max'"):
        module.decode(torch.zeros(2, 4, dtype=torch.int64), "max")


def test_encode_storage_must_hold_the_codes():
    small, large = make(), KeyValueBottleneck(1, (1 << 15) + 1, 1, 1)
    assert small.encode(torch.randn(2, 4, 14), dtype="auto").dtype == torch.int16
    x = torch.randn(2, 1, 1)
    assert large.encode(x, dtype="auto").dtype == torch.int32
    assert KeyValueBottleneck(1, 1 << 15, 1, 1).encode(x, dtype=torch.int16).dtype == torch.int16
    with pytest.raises(
        ValueError, match="dtype torch.int16 cannot hold the index 32768 of a codebook with 32769 pairs"
    ):
        large.encode(x, dtype=torch.int16)
    for bad in (torch.uint8, torch.float32, "int16"):
        with pytest.raises(ValueError, match="dtype must be torch.int16, torch.int32, torch.int64 or 'auto'"):
            small.encode(torch.randn(2, 4, 14), dtype=bad)


def test_functional_doors_check_their_arguments():
    queries, keys, values = torch.randn(2, 3, 4, 5), torch.randn(4, 9, 5), torch.randn(4, 9, 2)
    codes = torch.zeros(2, 3, 4, dtype=torch.int64)
    for call, error, message in (
        (lambda: functional.nearest(queries[0], keys), ValueError, r"\(B, S, C, D\) = \(B, S, 4, 5\), got \(3, 4, 5\)"),
        (lambda: functional.nearest(queries, keys[0]), ValueError, r"expected keys of shape \(C, K, D\)"),
        (lambda: functional.nearest(queries, keys[:, :0]), ValueError, "got no pairs"),
        (lambda: functional.nearest(queries.long(), keys), TypeError, "expected a floating-point queries"),
        (lambda: functional.nearest(queries, keys, topk=10), ValueError, "topk must be at most the 9 pairs"),
        (lambda: functional.nearest(queries, keys, mask=keys[..., 0]), TypeError, "mask must be torch.bool"),
        (lambda: functional.nearest(queries, keys, mask=keys[:, :3, 0] > 0), ValueError, "expected mask of shape"),
        (
            lambda: functional.nearest(queries, keys, packed=functional.pack_keys(keys[:, :5])),
            RuntimeError,
            "packed keys do not match",
        ),
        (
            lambda: functional.nearest(queries, keys, packed=functional.pack_keys(keys.double())),
            RuntimeError,
            "packed keys do not match",
        ),
        (lambda: functional.pack_keys(keys[0]), ValueError, "expected keys of shape"),
        (lambda: functional.sample(queries, keys, temperature=0), ValueError, r"temperature must be in \(0.0, inf\)"),
        (
            lambda: functional.gather(values, codes[0]),
            ValueError,
            r"expected indices of shape \(B, S, C\) = \(B, S, 4\)",
        ),
        (lambda: functional.gather(values, codes.float()), TypeError, "expected integer indices"),
        (lambda: functional.gather(values, codes, pool="max"), ValueError, "pool must be one of"),
        (lambda: functional.gather(values, codes, layout="bsvc"), ValueError, "layout must be one of"),
        (lambda: functional.gather(values, codes + 9), IndexError, "index 9 is out of bounds"),
        (lambda: functional.lookup(queries, keys, values[:, :3]), ValueError, r"expected values of shape \(C, K, V\)"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_functional_doors_answer():
    queries, keys, values = torch.randn(2, 3, 4, 5), torch.randn(4, 9, 5), torch.randn(4, 9, 2)
    indices, distances = functional.nearest(queries, keys)
    assert indices.shape == distances.shape == (2, 3, 4)
    assert functional.nearest(queries, keys, topk=2)[0].shape == (2, 3, 4, 2)
    out, found = functional.lookup(queries, keys, values, packed=functional.pack_keys(keys))
    assert torch.equal(found, indices)
    assert torch.equal(out, functional.gather(values, indices))
    first = functional.sample(queries, keys, temperature=1.0, generator=torch.Generator().manual_seed(1))
    again = functional.sample(queries, keys, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first[0], again[0])


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sample", "kmeans", "kmeans++"])
def test_use_before_initialisation(mode):
    module = make(init_mode=mode)
    message = r"^keys are not initialised: call init_keys\(...\) or run one batch in training mode$"
    x = torch.randn(20, 4, 14)
    for call in (lambda: module.eval()(x), module.freeze_keys, module.disable_update_keys, lambda: module.encode(x)):
        with pytest.raises(RuntimeError, match=message):
            call()
    module.train()(x)
    module.freeze_keys().eval()(x)


def test_init_keys_says_what_is_wrong():
    x = torch.randn(20, 4, 14)
    with pytest.raises(RuntimeError, match=r"keys are frozen: call unfreeze_keys\(\) before init_keys"):
        make().freeze_keys().init_keys(x)
    with pytest.raises(ValueError, match="method must be one of 'random', 'sample'"):
        make().init_keys(x, "median")
    with pytest.raises(ValueError, match="epochs must be an integer >= 0, got -1"):
        make().init_keys(x, epochs=-1)
    with pytest.raises(TypeError, match="data must be a Tensor or an iterable of batches, not int"):
        make().init_keys(3)
    with pytest.raises(ValueError, match="data yielded no rows"):
        make().init_keys([], progress=False)
    with pytest.raises(ValueError, match="data can be iterated only once, but 2 passes are needed: give a DataLoader"):
        make().init_keys(iter([x]), "kmeans", progress=False)
    make().init_keys(iter([x]), "random", progress=False)
    with pytest.raises(ValueError, match="a codebook without a single finite row"):
        make().init_keys(x * float("nan"), "sample", progress=False)
    with pytest.raises(ValueError, match="expected x of shape"):
        make().init_keys([x[..., :3]], progress=False)
    with pytest.raises(
        TypeError, match=r"argument 'x' must be Tensor, not dict with 'x'; .* by inputs_extractor=lambda"
    ):
        make().init_keys([{"x": x}], progress=False)


def test_what_is_no_batch_of_tensors_says_how_to_make_one():
    x = torch.randn(10, 4, 14)
    dataset = torch.utils.data.TensorDataset(x, torch.zeros(10))
    read = (
        (lambda data: make().init_keys(data, progress=False)),
        (lambda data: make().encode_dataset(data, progress=False)),
    )
    for call in read:
        with pytest.raises(TypeError, match=r"not TensorDataset: pass torch.utils.data.DataLoader\(data, batch_size="):
            call(dataset)
        with pytest.raises(TypeError, match=r"not ndarray: call torch.from_numpy\(data\) first"):
            call(x.numpy())
        with pytest.raises(TypeError, match="data must be a Tensor or an iterable of batches, not str$"):
            call("features.pt")
        with pytest.raises(TypeError, match=r"'x' must be Tensor, not ndarray; call torch.from_numpy\(x\) first"):
            call([x.numpy()])
    with pytest.raises(
        TypeError, match=r"'queries' must be Tensor, not ndarray; call torch.from_numpy\(queries\) first"
    ):
        kvb.functional.nearest(x.numpy(), x)


def test_an_encoder_that_does_not_take_the_entries_of_a_mapping():
    encoder = kvb.BottleneckedEncoder(torch.nn.Identity(), 6, 2, 4, 3, 2)
    for call in (encoder.init_keys, encoder.encode_dataset):
        with pytest.raises(TypeError, match=r"by their names, here 'pixels': pass inputs_extractor=lambda item: item"):
            call([{"pixels": torch.randn(3, 6), "labels": torch.zeros(3)}], progress=False)
    with pytest.raises(TypeError, match=r"^[^;]*unexpected keyword argument 'pixels'$"):
        encoder({"pixels": torch.randn(3, 6)})


@pytest.mark.parametrize("method", ["random", "sample", "kmeans", "kmeans++"])
def test_a_mask_that_lets_nothing_count(method):
    x, none = torch.randn(10, 4, 14), torch.zeros(10, dtype=torch.bool)
    for options in ({"data": x, "mask": none}, {"data": [x], "mask_extractor": lambda item: none}):
        module = make()
        before = module.keys.clone()
        with pytest.raises(ValueError, match="^data yielded no rows: its mask is False everywhere, and True counts$"):
            module.init_keys(method=method, progress=False, **options)
        assert torch.equal(module.keys, before)


def test_deactivate_counts_needs_counts():
    with pytest.raises(
        RuntimeError, match="no pair was counted yet, so deactivate_counts.. would leave nothing to fetch"
    ):
        make().freeze_keys().deactivate_counts()


def test_mask_pairs_checks_its_mask():
    with pytest.raises(TypeError, match="mask must be torch.bool, True where a pair may be fetched; got torch.float32"):
        make().mask_pairs(torch.ones(4, 9))
    with pytest.raises(ValueError, match=r"expected mask of shape \(C, K\) = \(4, 9\), got \(9, 4\)"):
        make().mask_pairs(torch.ones(9, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="argument 'mask' must be Tensor, not list"):
        make().mask_pairs([True])


def test_methods_chain():
    module = make()
    for name in (
        *("freeze_keys", "unfreeze_keys", "disable_update_keys", "enable_update_keys"),
        *("activate_counts", "reset_cluster_size_counter", "refresh_keys"),
    ):
        assert getattr(module, name)() is module
    module.cluster_size_counter += 1
    assert module.deactivate_counts().mask_pairs(None) is module


# --- the process ------------------------------------------------------------------------------------------------------


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True
    )
    return done.stdout.strip()


def test_import_leaves_subnormals_alone():
    use = "kvb.KeyValueBottleneck(1, 2, 3, 4)(torch.zeros(1, 1, 3))"
    code = f"import sys, kvb, torch; {use}; print(sys.float_info.min / 2)"
    assert float(run(code)) == sys.float_info.min / 2


def test_the_reference_needs_neither_triton_nor_a_compiler():
    code = (
        "import sys; sys.modules['triton'] = None; import kvb, torch; "
        "print(kvb.KeyValueBottleneck(1, 2, 3, 4)(torch.zeros(1, 1, 3)).shape, kvb.info()['backend on cpu'])"
    )
    assert run(code, PATH="", KVB_CPU_CAPABILITY="torch").startswith("torch.Size([1, 1, 4]) torch (")


def test_interpreted_kernels_are_asked_for_twice():
    """Triton looks at TRITON_INTERPRET at its import: too late to set it for the user."""
    settings = {"KVB_CPU_CAPABILITY": "triton", "TRITON_INTERPRET": "0"}
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run("import kvb", **settings)
    assert "ValueError: KVB_CPU_CAPABILITY=triton" in failed.value.stderr
    assert "set TRITON_INTERPRET=1 too" in failed.value.stderr
    report = "import kvb; print(kvb.info()['backend on cpu'])"
    assert run(report, **settings | {"TRITON_INTERPRET": "1"}) == "triton"


# For PyTorch, CUDA is there; no call reaches it.
WITH_CUDA = """
import importlib.util, sys, torch
torch.version.cuda = "13.0"
{before}
import kvb
names = [name for name in kvb.ops.NAMES if torch._C._dispatch_has_kernel_for_dispatch_key("kvb::" + name, "CUDA")]
print(",".join(names), "triton" in sys.modules, kvb.info()["backend on cuda"])
"""


def test_kernels_run_on_cuda_and_triton_waits_for_the_first_call():
    pytest.importorskip("triton", reason="no Triton for this platform")
    fast = ",".join(kvb.ops.NAMES)
    settings = {"KVB_CPU_CAPABILITY": "torch", "TRITON_INTERPRET": "0"}
    assert run(WITH_CUDA.format(before=""), **settings) == f"{fast} False triton"


def test_cuda_without_triton_runs_plain_pytorch():
    before = "find = importlib.util.find_spec; importlib.util.find_spec = lambda n: None if n == 'triton' else find(n)"
    found = run(WITH_CUDA.format(before=before), KVB_CPU_CAPABILITY="torch")
    assert found == "False torch (Triton is not installed: pip install triton)"


def test_a_forked_child_works_with_one_thread():
    code = (
        "import os, torch, kvb\n"
        "m = kvb.KeyValueBottleneck(4, 300, 8, 4).freeze_keys().eval(); x = torch.randn(500, 4, 8); want = m(x)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(m(x), want) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert run(code) == "0"


def test_info_names_versions_and_backends():
    facts = kvb.info()
    assert facts["kvb"] == kvb.__version__
    assert facts["torch"] == torch.__version__
    assert facts["backend on cpu"].split(" (")[0] == kvb.ops.backend("cpu")
    if torch.version.cuda is None and torch.version.hip is None:
        assert facts["backend on cuda"] == "torch (this PyTorch was built without CUDA or ROCm)"
    assert torch.backends.cpu.get_cpu_capability() in facts["cpu"]


def test_deterministic_mode_is_silent(recwarn):
    torch.use_deterministic_algorithms(True)
    try:
        module = make(threshold_ema_dead_code=0.5)
        module(torch.randn(20, 4, 14)).sum().backward()
        module.freeze_keys()(torch.randn(20, 4, 14)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [w for w in recwarn if "determinis" in str(w.message)]


def test_a_parameter_that_shares_memory_fails_as_in_pytorch():
    module = make().freeze_keys()
    module.values = torch.nn.Parameter(torch.randn(4, 1, 3).expand(4, 9, 3))
    module(torch.randn(2, 4, 14)).sum().backward()
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        torch.optim.SGD(module.parameters(), lr=1.0).step()
