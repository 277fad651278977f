"""The C++ extension as a file: what it links to, which instructions it holds; and every instruction set against the
reference."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

import kvb
from kvb import reference

if kvb.ops.backend("cpu") != "cpp":
    pytest.skip(f"the C++ extension does not run: {kvb.ops.absent['cpu']}", allow_module_level=True)

from kvb import _C

pytestmark = pytest.mark.memory

MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
OF_MACHINES = {"x86_64": ("avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"), "aarch64": ("neon", "neon_dot")}
CAPABILITIES = ("portable", *OF_MACHINES.get(MACHINE, ()))
LIBRARIES = (
    "libtorch_cpu",
    "libc10",
    "libstdc++",
    "libgcc_s",
    "libc",
    "libm",
    "libpthread",
    "ld-linux-x86-64",
    "ld-linux-aarch64",
)
# The first that a line of machine code matches, and the namespaces of kvb that may hold it.
WIDE = ("avx512", "avx512_vnni", "amx")
INSTRUCTIONS = {
    r"\t(tile|tdp|ldtilecfg|sttilecfg)": ("amx",),
    r"\tvpdpbusd": ("avx_vnni", "avx512_vnni", "amx"),
    r"%zmm|%k[0-7]\b": WIDE,
    r"%ymm|\tv[a-z]": ("avx2", "avx_vnni", *WIDE),
}
PRODUCTS_OF_BYTES = r"\t[su]dot\tv\d+\.4s"


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environ)


def tool(name: str, *options: str) -> str:
    """What a tool of binutils says of the extension."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    return subprocess.run([name, *options, _C.__file__], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def needed() -> list[str]:
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d"))
    if any(re.match("lib[at]san", library) for library in libraries):
        pytest.skip("the extension was built with a sanitizer")
    return libraries


# --- the file ---------------------------------------------------------------------------------------------------------


def test_one_file_for_every_python():
    assert os.path.basename(_C.__file__) == "_C.abi3.so"


def test_it_needs_torch_and_the_system_only(needed):
    assert "libtorch_cpu.so" in needed
    assert [library for library in needed if library.partition(".so")[0] not in LIBRARIES] == []


def test_it_calls_the_stable_abi_only(needed):
    """Of PyTorch, functions in C only; of Python, nothing that a limited API lacks."""
    called = re.findall(r" UND (\S+)", tool("readelf", "--wide", "--dyn-syms"))
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in called)
    assert [name for name in called if re.match(r"_ZNK?(2at|3c10|5torch|8pybind11)", name)] == []
    assert [name for name in called if name.startswith("_Py_")] == []


def disassembled() -> Iterator[tuple[str, str]]:
    """Every instruction of the extension, with the function that it stands in."""
    cross = f"{MACHINE}-linux-gnu-objdump"  # under an emulator the other one knows the host's instructions
    here = ""
    for line in tool(cross if shutil.which(cross) else "objdump", "-d", "--no-show-raw-insn").splitlines():
        if label := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            here = label[1]
        else:
            yield here, line


def is_of(function: str, names: Sequence[str]) -> bool:
    """Whether a function stands in the namespace of one of the instruction sets."""
    return any(f"3kvb{len(name)}{name}" in function for name in names)


@pytest.mark.skipif(MACHINE != "x86_64", reason="looks for instructions of x86-64")
def test_instructions_stay_in_their_namespace(needed):
    """No function that an old machine runs was compiled for a newer one: neither ours nor an inlined library's."""
    strays, seen = set(), set()
    for here, line in disassembled():
        for pattern, allowed in INSTRUCTIONS.items():
            if re.search(pattern, line):
                seen.add(pattern)
                if not is_of(here, allowed):
                    strays.add(f"{here}: {line.strip()}")
                break
    assert not strays, "\n".join(sorted(strays)[:20])
    assert seen == set(INSTRUCTIONS)


@pytest.mark.skipif(MACHINE != "aarch64", reason="looks for instructions of 64-bit Arm")
def test_arm_searches_with_vectors(needed):
    """Searches multiply vectors of float32, by a number in a lane, and of bytes where the processor has that alone."""
    floats: Counter[str] = Counter()
    bytes_: Counter[str] = Counter()
    strays = set()
    for here, line in disassembled():
        name = next((name for name in ("neon", "neon_dot") if is_of(here, [name])), "other")
        is_filter = re.search(r"FloatFilter|Int8Filter|search_small", here) is not None
        floats[name] += is_filter and re.search(r"\tfmla\tv\d+\.4s", line) is not None
        if re.search(PRODUCTS_OF_BYTES, line):
            bytes_[name] += is_filter
            strays.update([] if name == "neon_dot" else [f"{here}: {line.strip()}"])
    assert not strays, "\n".join(sorted(strays)[:20])
    assert min(floats["neon"], floats["neon_dot"]) >= 40  # 16 at once in the filter, 24 in small codebooks
    assert bytes_["neon_dot"] >= 32  # 16 at once in both forms of the filter


# --- what it says -----------------------------------------------------------------------------------------------------


def test_info_names_the_instruction_set():
    capability = torch.ops.kvb.cpu_capability()
    assert capability in CAPABILITIES
    if MACHINE == "aarch64" and sys.platform == "linux" and "KVB_CPU_CAPABILITY" not in os.environ:
        hwcap, products_of_bytes = 16, 1 << 20  # AT_HWCAP, HWCAP_ASIMDDP
        has_products = ctypes.CDLL(None).getauxval(hwcap) & products_of_bytes
        assert capability == ("neon_dot" if has_products else "neon")
    assert kvb.info()["backend on cpu"] == f"cpp ({capability})"


@pytest.mark.parametrize("wish", ["sse", "AVX2", " ", ""])
def test_an_unknown_instruction_set_is_an_error_that_names_the_known_ones(wish):
    done = run("import kvb", KVB_CPU_CAPABILITY=wish)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    assert "KVB_CPU_CAPABILITY" in last
    assert all(name in last for name in ("torch", "portable", *itertools.chain(*OF_MACHINES.values()), "unset it"))


@pytest.mark.parametrize("name", ["torch", "reference"], ids=["its name", "its former name"])
def test_plain_pytorch_can_be_asked_for(name):
    done = run("import kvb; print(kvb.info()['backend on cpu'])", KVB_CPU_CAPABILITY=name)
    assert done.stdout.startswith("torch ("), done.stderr
    assert "KVB_CPU_CAPABILITY" in done.stdout


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A file of searches, as the reference answers them."""
    torch.manual_seed(0)
    cases = []
    kinds = (
        "normal",
        "quarters",
        "outlying keys",
        "far queries",
        "tiny",
        "huge",
        "too large a query",
        "too large a key",
    )
    for K, D, kind in itertools.product((1, 7, 100, 200, 300, 1024), (1, 5, 8, 14, 32, 64, 130, 520), kinds):
        queries, keys, some = torch.randn(5, 7, 2, D), torch.randn(2, K, D), torch.rand(2, K) < 0.7
        some[:, 0] = True
        whole = kind == "quarters"  # every distance is exact, and many are equal
        if whole:
            queries, keys = ((4 * tensor).round() / 4 for tensor in (queries, keys))
        elif kind == "outlying keys":  # 8-bit numbers tell the others no longer apart
            keys[:, ::50] *= 1e5
            queries[0] *= 1e5
        elif kind == "far queries":
            queries += 1e4 * torch.randn(D)
        elif kind == "tiny":
            queries, keys = queries * 1e-18, keys * 1e-18
        elif kind != "normal":  # "huge"; and what is "too large" could overflow a float32 score
            queries, keys = queries * 1e17, keys * 1e17
            queries[0] *= 30 if kind == "too large a query" else 1
            keys[:, 0] *= 30 if kind == "too large a key" else 1
        packed = reference.pack_keys(keys)
        many = {min(20, K)} if kind not in ("tiny", "huge") else set()
        many |= {120} if K == 200 and kind in ("normal", "quarters") else set()
        for topk, mask in itertools.product(sorted({1, min(3, K), 7 if K == 7 else 1} | many), (None, some)):
            answer = reference.nearest(queries, keys, packed, mask, topk)
            cases.append((f"{K=} {D=} {kind=} {topk=}", whole, queries, keys, mask, topk, *answer))
    file = tmp_path_factory.mktemp("answers") / "cases.pt"
    torch.save(cases, file)
    return str(file)


def tables_of(op):
    """What gathers and their gradients make of rows of every length and dtype, as bytes, with one NaN for all."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for V, dtype, pool in itertools.product(
        (1, 3, 8, 19, 70, 144), (torch.float16, torch.bfloat16, torch.float32, torch.float64), ("none", "sum", "mean")
    ):
        C, K, S = 11, 40 if V < 70 else 4, 3
        scale = 10.0 ** torch.randint(-8, 6, (C, K, 1), generator=generator)
        values = scale * torch.randn(C, K, V, generator=generator)
        values[2, 1], values[3, 2], values[4, 3] = float("nan"), -0.0, float("inf")
        codes = torch.randint(K, (5, S, C), generator=generator)
        rows = op.gather(values.to(dtype), codes, pool, "bscv")
        found += [rows, op.gather_backward(rows, codes, K, pool), op.gather_backward_rows(rows, codes, K, pool)[1]]
    return [torch.where(tensor.isnan(), torch.nan, tensor).view(torch.uint8) for tensor in found]


COMPARE = """
import itertools, os, torch, kvb
op = torch.ops.kvb
print(op.cpu_capability())
for case, whole, queries, keys, mask, topk, indices, distances in torch.load(os.environ["CASES"]):
    wide, few = keys.double(), queries[:1]  # few: read as they lie
    packed, packed_wide = op.pack_keys(keys), op.pack_keys(wide)
    all_queries = op.nearest(queries, keys, packed, mask, topk)
    all_wide = op.nearest(queries.double(), wide, packed_wide, mask, topk)
    # One order of summation, whatever way the number of queries calls for.
    assert torch.equal(op.nearest(few, keys, packed, mask, topk)[1], all_queries[1][:1]), case
    assert torch.equal(op.nearest(few.double(), wide, packed_wide, mask, topk)[1], all_wide[1][:1]), case
    for got in (
        all_queries,
        all_wide,
        op.nearest(few, keys, kvb.ops.kept.unpacked(keys), mask, topk),
        op.nearest(few, wide, kvb.ops.kept.unpacked(wide), mask, topk),
    ):
        assert torch.equal(got[0], indices[: len(got[0])]), case
        found, want = got[1].float(), distances[: len(got[1])]
        torch.testing.assert_close(found, want, rtol=0 if whole else 1e-6, atol=0, msg=case)
for found, want in zip(tables_of(op), torch.load(os.environ["TABLES"]), strict=True):
    assert torch.equal(found, want)
"""


# Its filter is that of avx2, its vectors are those of avx512_vnni.
OFTEN = [pytest.param(each, marks=pytest.mark.slow) if each == "avx512" else each for each in CAPABILITIES]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A file of fetched and summed rows, by the instruction set of this process."""
    file = tmp_path_factory.mktemp("tables") / "tables.pt"
    torch.save(tables_of(torch.ops.kvb), file)
    return str(file)


@pytest.mark.parametrize("capability", OFTEN)
def test_every_instruction_set_agrees_with_the_reference(answers, tables, capability):
    done = run(inspect.getsource(tables_of) + COMPARE, KVB_CPU_CAPABILITY=capability, CASES=answers, TABLES=tables)
    if done.returncode and "this machine lacks the instructions" in done.stderr:
        assert capability not in ("portable", torch.backends.cpu.get_cpu_capability().lower())
        assert done.returncode == 1, "it crashed"
        assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError: ")
        pytest.skip(f"this machine has no {capability}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [capability]


def seconds(run) -> float:
    """Of the processor, the least of some."""
    taken = []
    for _ in range(5):
        begin = time.process_time()
        run()
        taken.append(time.process_time() - begin)
    return min(taken)


def test_one_query_does_not_pay_for_packed_keys():
    queries, keys = torch.randn(1, 1, 4, 14), torch.randn(4, 4096, 14)
    alone = seconds(lambda: kvb.functional.nearest(queries, keys))
    assert alone < seconds(lambda: torch.ops.kvb.pack_keys(keys))


def test_float64_costs_little_more_than_float32():
    """Its filters are the same, so that few distances are taken in float64."""
    queries, keys = torch.randn(64, 1, 1, 64), torch.randn(1, 2048, 64)

    def search(dtype: torch.dtype) -> float:
        given, table = queries.to(dtype), keys.to(dtype)
        packed = torch.ops.kvb.pack_keys(table)
        return seconds(lambda: torch.ops.kvb.nearest(given, table, packed, None, 1))

    assert search(torch.float64) < 3 * search(torch.float32)


@pytest.mark.skipif("san" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers slow down kvb, not PyTorch")
def test_all_keys_in_order_cost_less_than_a_sort_of_all_distances():
    queries, keys = torch.randn(16, 1, 1, 14), torch.randn(1, 4096, 14)
    packed = torch.ops.kvb.pack_keys(keys)
    ours = seconds(lambda: torch.ops.kvb.nearest(queries, keys, packed, None, 4096))
    assert ours < seconds(lambda: torch.cdist(queries[:, 0, 0], keys[0]).topk(4096, largest=False))


def test_queries_that_are_not_finite_cost_no_more_than_others():
    """Or about as much, where distances cost more than sorting them."""
    keys = torch.randn(1, 4096, 8)
    queries, packed = torch.randn(16, 1, 1, 8), torch.ops.kvb.pack_keys(keys)

    def search(given: torch.Tensor) -> float:
        return seconds(lambda: torch.ops.kvb.nearest(given, keys, packed, None, 4096))

    assert search(queries * torch.nan) < 2 * search(queries)


THREADS = """
import threading, torch, kvb
torch.set_num_threads(1)
module = kvb.KeyValueBottleneck(4, 300, 8, 6).freeze_keys().eval()
x = torch.randn(200, 4, 8)
want = module(x).detach()
failed = []
def work():
    for _ in range(5):
        out = module(x)
        (grad,) = torch.autograd.grad(out.sum(), module.values)
        torch.ops.kvb.pack_keys(module.keys)
        if not (torch.equal(out, want) and grad.sum() == out.numel()):
            failed.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed
print("done")
"""


THREADS_ON_ALL_OPERATORS = """
import concurrent.futures, random, torch, kvb
from kvb.testing import cases, checks
torch.set_num_threads(1)
problems = [cases.problem(case, torch.device("cpu")) for case in cases.CASES if case.K <= 300][::3]
work = [(name, problem) for problem in problems for name in kvb.ops.NAMES if name != "sample"]  # it draws numbers
assert len(problems) >= 8

def check_all(seed):
    for name, problem in random.Random(seed).sample(work, len(work)):
        checks.CHECKS[name](torch.ops.kvb, problem)

with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(check_all, range(4)))
print("done")
"""


@pytest.mark.threads
@pytest.mark.parametrize("script", [THREADS, THREADS_ON_ALL_OPERATORS], ids=["a module", "every operator"])
def test_threads_share_what_they_read(script):
    """Under the thread sanitizer this is the search for data races; it exits with 66 where it finds one."""
    done = run(script)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
