"""Every Triton kernel compiled for a GPU, which takes none: what the interpreter lets pass may not compile."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_form
from torch import Tensor

from myriad.kernels import (
    batch_norm,
    cross_entropy,
    expert_lookup,
    lazy_adam,
    new_moments,
    product_key,
    rounded_adamw,
    softmax_gradient,
    use,
    value_lookup,
)

pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no compiler for CUDA")
HOPPER = ("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
}
WIDE_LOAD = "ld.global.v4.b32"  # 16 bytes a thread


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Kernels by name, as the launches inside the test compile them instead of running."""
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}

    def run(self: Any, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        found[self.__name__] = compile_for_hopper(self, arguments, options)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton_form.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton_form.triton.knobs.cache, "dir", str(tmp_path))
    with triton_form.fresh_package(monkeypatch):
        monkeypatch.setattr(triton_form.module("launch"), "PROGRAMS", 1)  # the blocks of many tokens
        # The CPU's tensors stand for CUDA's: nothing runs.
        for forms in triton_form.registry._implementations.values():
            if "triton" in forms:
                forms["triton"] = forms["triton"]._replace(devices=None)
        with use("triton"):
            yield found


def compile_for_hopper(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list] = {}
    for number, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(argument, Tensor):
            signature[name] = TYPES[argument.dtype]
            attributes[number,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(argument, float) else "i32"
    launch_options = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature |= dict.fromkeys(options, "constexpr")
    source = ASTSource(kernel, signature, options, attributes)
    return triton_form.triton.compile(source, target=GPUTarget(*HOPPER), options=launch_options)


def assert_is_sound(kernel: Any, folder: Path) -> None:
    """No atomics, whose sums change from run to run, and no registers spilled to memory."""
    assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = triton_form.triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("width", "gated", "activation", "x_dtype", "dtype"),
    [
        (256, False, "gelu", torch.float32, torch.float32),
        (1024, True, "silu", torch.bfloat16, torch.float32),
        (300, True, "relu", torch.bfloat16, torch.bfloat16),
        (300, False, "none", torch.bfloat16, torch.float32),
    ],
)
def test_expert_lookup(width, gated, activation, x_dtype, dtype, compiled, tmp_path):
    tables = [normal(512, width, dtype=dtype) for _ in range(3)]
    ids, weights = torch.randint(512, (16, 128)), normal(16, 128)
    case = (normal(16, width, dtype=x_dtype), ids, weights, *tables[:2], tables[2] if gated else None)
    expert_lookup(*case, activation=activation, sparse=False).sum().backward()
    assert set(compiled) == {"_hidden", "_bag_sum", "_hidden_gradients", "_piece_sums", "_row_sums"}
    for name, kernel in compiled.items():
        assert_is_sound(kernel, tmp_path)
        if width % 256 == 0:
            assert WIDE_LOAD in kernel.asm["ptx"], name


def test_expert_lookup_of_one_token(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_form.module("launch"), "PROGRAMS", 1024)
    table, ids = torch.randn(512, 256), torch.randint(512, (1, 128))
    expert_lookup(torch.randn(1, 256), ids, torch.randn(1, 128), table, table)
    assert set(compiled) == {"_hidden", "_bag_sum"}
    for kernel in compiled.values():
        assert_is_sound(kernel, tmp_path)
        assert WIDE_LOAD in kernel.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_lookup(dtype, compiled, tmp_path):
    value_lookup(torch.randint(512, (16, 32)), normal(16, 32), normal(512, 256, dtype=dtype)).sum().backward()
    assert set(compiled) == {"_bag_sum", "_bag_dot", "_piece_sums", "_row_sums"}
    for kernel in compiled.values():
        assert_is_sound(kernel, tmp_path)


@pytest.mark.parametrize(
    ("tokens", "side", "k", "dtype"),
    [
        (64, 1024, 16, torch.float32),
        (1, 256, 64, torch.float32),
        (64, 256, 16, torch.bfloat16),
        (64, 5, 25, torch.bfloat16),
    ],
)
def test_product_key(tokens, side, k, dtype, compiled, tmp_path):
    product_key(normal(tokens, 1, 2, 128, dtype=dtype), normal(2, side, 128, dtype=dtype), k)[0].sum().backward()
    placed = dtype == torch.bfloat16
    gradients = {"_sub_key_sums"} if placed else {"_half_entries", "_piece_sums", "_row_sums"}
    assert set(compiled) == {"_scores", "_top_columns", "_top_sums", "_winners_sub_keys"} | gradients
    for kernel in compiled.values():
        assert_is_sound(kernel, tmp_path)
    if tokens > 32:
        assert "wgmma" in compiled["_scores"].asm["ptx"]  # tensor cores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])
def test_table_update(layout, dtype, compiled, tmp_path):
    table = torch.randn(64, 256).to(dtype)
    grad = torch.ones_like(table)
    grad = grad.to_sparse(1) if layout == torch.sparse_coo else grad
    lazy_adam(table, *new_moments(table), grad, lr=0.1, betas=(0.9, 0.99), eps=1e-8, step=1)
    (kernel,) = compiled.values()
    assert_is_sound(kernel, tmp_path)
    assert WIDE_LOAD in kernel.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [4096, 700])
def test_rounded_adamw(count, dtype, compiled, tmp_path):
    """Whole blocks, which all loads of are wide, and the block of the rest."""
    state = (torch.zeros(count, dtype=torch.bfloat16) for _ in range(3))
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 1, "seed": 0}
    rounded_adamw(*state, torch.ones(count, dtype=dtype), **options)
    (kernel,) = compiled.values()
    assert_is_sound(kernel, tmp_path)
    if count % 1024 == 0:
        loads = re.findall(r"ld\.global\.\S+", kernel.asm["ptx"])
        assert set(loads) == {WIDE_LOAD}
        stores = re.findall(r"st\.global\.\S+", kernel.asm["ptx"])
        assert set(stores) == {"st.global.v4.b32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [cross_entropy, softmax_gradient])
def test_cross_entropy(function, dtype, compiled, tmp_path):
    """The vocabulary is odd, and its padding makes accesses wide all the same."""
    function(torch.zeros(4, 50304, dtype=dtype), torch.zeros(4, dtype=torch.int64), 50257)
    (kernel,) = compiled.values()
    assert_is_sound(kernel, tmp_path)
    assert WIDE_LOAD in kernel.asm["ptx"]
    wide_store = "st.global.v4.b32" in kernel.asm["ptx"]
    assert wide_store == (function is softmax_gradient)


def test_cross_entropy_of_few_columns_that_are_not_aligned(compiled, tmp_path):
    softmax_gradient(torch.zeros(4, 11), torch.zeros(4, dtype=torch.int64), 11)
    (kernel,) = compiled.values()
    assert_is_sound(kernel, tmp_path)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm(dtype, weight_dtype, compiled, tmp_path):
    """What passes over the tokens reads and writes 16 bytes at once, and sums have the next tiles on their way."""
    weight, bias = (normal(2048, dtype=weight_dtype) for _ in range(2))
    batch_norm(normal(4096, 2048, dtype=dtype), weight, bias, torch.zeros(2048))[0].sum().backward()
    sums, writers = {"_moment_sums", "_gradient_sums"}, {"_normalise", "_differentiate"}
    assert set(compiled) == sums | writers | {"_statistics", "_factors"}
    for name, kernel in compiled.items():
        assert_is_sound(kernel, tmp_path)
        if name in sums:
            assert set(re.findall(r"cp\.async\.c[ag]\.\S+", kernel.asm["ptx"])) == {"cp.async.cg.shared.global"}, name
        if name in writers:
            assert WIDE_LOAD in kernel.asm["ptx"], name
            assert set(re.findall(r"st\.global\.\S+", kernel.asm["ptx"])) == {"st.global.v4.b32"}, name


@pytest.mark.parametrize("features", [1, 300])
def test_batch_norm_of_features_that_are_not_aligned(features, compiled, tmp_path):
    vectors = normal(features), normal(features), torch.zeros(features)
    batch_norm(normal(100, features, dtype=torch.bfloat16), *vectors)[0].sum().backward()
    for kernel in compiled.values():
        assert_is_sound(kernel, tmp_path)
