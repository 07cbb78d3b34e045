"""Products and attention of PyTorch on the shapes of `ringtune bench kernels --json`: gpu_peer.py KERNELS.json TABLE.md

bf16, random values, operands rotated through more memory than the last cache holds, medians of times between CUDA events; a few microseconds
are launches, not kernels. PyTorch's gradients of weights are set in bf16, ours are added to f32. Each line is written as soon as it is measured;
the last line of stdout is a summary. Exits with 3, after saying why, where there is nothing to compare with.
"""

import json
import re
import statistics
import sys


def nothing(why):
    print(why)
    sys.exit(3)


def documents(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        return nothing(f"no measured kernels: {error}")


def sizes(case):
    """What PyTorch shall compute: ("product", op, m, n, k) or ("attention", direction, tokens, heads, kv_heads, width, document)."""
    name, shape = case["name"], case["shape"]
    product = re.fullmatch(r"(\d+) x (\d+) x (\d+)", shape)
    if name.startswith("matmul ") and product and case.get("dtype") == "bf16":
        return ("product", name.split()[1], *map(int, product.groups()))
    attention = re.fullmatch(r"(\d+) x (\d+)/(\d+) x (\d+), documents of (\d+)", shape)
    if name in ("attention forward", "attention backward") and attention:
        return ("attention", name.split()[1], *map(int, attention.groups()))
    return None


def work(torch, of):
    """A function that queues the work on the operands of a turn, and the bytes of these."""
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    if of[0] == "product":
        op, m, n, k = of[1:]
        turns = max(2, min(16, (256 << 20) // (2 * (m * k + k * n + m * n)) + 1))
        left = [torch.randn((k, m) if op == "tn" else (m, k), **bf16) for _ in range(turns)]
        right = [torch.randn((n, k) if op == "nt" else (k, n), **bf16) for _ in range(turns)]
        a = [x.t() if op == "tn" else x for x in left]
        b = [x.t() if op == "nt" else x for x in right]
        return lambda turn: torch.matmul(a[turn % turns], b[turn % turns])
    direction, tokens, heads, kv_heads, width, document = of[1:]
    rows = max(1, tokens // document)
    made = lambda h: torch.randn((rows, h, min(document, tokens), width), **bf16, requires_grad=direction == "backward")
    q, k, v = made(heads), made(kv_heads), made(kv_heads)
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    if direction == "forward":
        return lambda turn: attend()
    out = attend()
    gradient = torch.randn_like(out)
    return lambda turn: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)


def seconds(torch, run):
    """Median of the times of single runs, after a few that are not counted."""
    for turn in range(3):
        run(turn)
    torch.cuda.synchronize()
    times = []
    for turn in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(turn)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def main(kernels, table):
    found = documents(kernels)
    cases = [case for document in found for case in document["cases"] if case.get("seconds") and sizes(case)]
    if not cases:
        nothing("no measured kernels: none has a time")
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        nothing(f"no PyTorch in python3: {error}")
    if not torch.cuda.is_available():
        nothing(f"PyTorch {torch.__version__} sees no GPU")
    ratios, failed = {}, []
    with open(table, "w", encoding="utf-8") as file:
        file.write(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}\n\n")
        file.write("| case | shape | ours, us | PyTorch, us | ours / theirs, speed |\n| --- | --- | --- | --- | --- |\n")
        for case in cases:
            of = sizes(case)
            try:
                theirs = seconds(torch, work(torch, of))
            except Exception as error:
                failed.append(f"{case['name']}: {error}")
                continue
            ours = case["seconds"]["median"] if isinstance(case["seconds"], dict) else case["seconds"]
            ratios.setdefault(of[0], []).append(theirs / ours)
            file.write(f"| {case['name']} | {case['shape']} | {ours * 1e6:.1f} | {theirs * 1e6:.1f} | {theirs / ours:.2f} |\n")
            file.flush()
    for line in failed:
        print(line.splitlines()[0][:200])
    if not ratios:
        sys.exit("PyTorch computed none of the cases")
    means = (f"{kind} {statistics.geometric_mean(r):.2f} of {len(r)}, {min(r):.2f} at least" for kind, r in ratios.items())
    print("our speed / PyTorch's: " + "; ".join(means) + (f"; {len(failed)} failed" if failed else ""))


if __name__ == "__main__":
    main(*sys.argv[1:3])
