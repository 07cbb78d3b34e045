"""Writes hopper_triton.ptx: two products that Triton 3.9 compiles for sm_90 (no GPU needed), without line tables.

    pip install triton==3.9.0 && python hopper_triton.py
"""
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def pointers(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (M, N) = a (M, K) b (K, N), bf16, through cp.async."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        a = tl.load(a_ptr + rm[:, None] * K + (k + rk)[None, :], mask=rm[:, None] < M, other=0.0)
        b = tl.load(b_ptr + (k + rk)[:, None] * N + rn[None, :], mask=rn[None, :] < N, other=0.0)
        acc = tl.dot(a, b, acc)
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(c_ptr + rm[:, None] * N + rn[None, :], acc.to(tl.bfloat16), mask=mask)


@triton.jit
def tensors(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (M, N) = a (M, K) b (N, K)^T, bf16, through tensor maps."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    c.store([m, n], acc.to(tl.bfloat16))


SIZES = {"BM": 128, "BN": 128, "BK": 64}
NAMES = {name: "constexpr" for name in SIZES}
POINTERS = {name: "*bf16" for name in ("a_ptr", "b_ptr", "c_ptr")} | {name: "i32" for name in "MNK"}
TENSORS = {"a": "tensordesc<bf16[128,64]>", "b": "tensordesc<bf16[128,64]>", "c": "tensordesc<bf16[128,128]>", "K": "i32"}
ALIGNED = [["tt.divisibility", 16]]


def text(function, types, aligned, warps):
    source = ASTSource(function, types | NAMES, SIZES, {(i,): ALIGNED for i in aligned})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})
    print(function.fn.__name__, "shared bytes:", kernel.metadata.shared)
    ptx = kernel.asm["ptx"]
    ptx = re.sub(r"\t\.file.*", "", ptx, flags=re.S)
    lines = [line.split("//")[0].rstrip() for line in ptx.splitlines()]
    return [line for line in lines if line and not line.startswith("\t.loc") and not line.startswith("$L__tmp")]


if __name__ == "__main__":
    first = text(pointers, POINTERS, range(6), 4)
    second = text(tensors, TENSORS, [3], 8)
    # One module: the second text without its head.
    second = second[next(i for i, line in enumerate(second) if ".entry" in line) :]
    second = [line.replace("$L__", "$L__T") for line in second]
    with open("hopper_triton.ptx", "w", encoding="utf-8") as f:
        f.write("// Made by hopper_triton.py with Triton 3.9.0.\n" + "\n".join(first + second) + "\n")
