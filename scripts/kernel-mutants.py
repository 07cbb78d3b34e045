#!/usr/bin/env python3
"""Breaks a kernel once in each place of a list and asks the CUDA tests to notice: for whoever changed a kernel or its test, by hand.

  cargo test --release --test cuda --no-run                       # names the test program
  scripts/vgpu.sh scripts/kernel-mutants.py PROGRAM [WORD...]     # only mutations whose name holds one of the words

The text of kernels lies inside the test program, which compiles it when it runs: a copy of the program with another text of the same
length is enough, nothing is built. Ends with 1 where a mutation survived or no longer applies. The last result is in tests/README.md.
"""
import os
import re
import subprocess
import sys
import tempfile

OFFSETS = ["offsets::"]
FOLD = ["fold::", "offsets::tables"]
HOPPER = ["hopper::a_block", "hopper::every", "hopper::a_row", "hopper::what", "offsets::hopper", "offsets::masks"]
GROUPS = ["hopper::a_block", "hopper::projections"]
GATE = ["gate::the_loop_of_a_warpgroup"]

# Name, file, text, what it becomes, tests of which one has to fail.
MUTANTS = [
    ("adamw: chunk in 32 bits", "adamw.cu", "u64(u32(which)) * CHUNK,", "u32(which) * u32(CHUNK),", OFFSETS),
    ("adamw: block in 16 bits", "adamw.cu", "table[8 * slots + blockIdx.x]", "table[8 * slots + u16(blockIdx.x)]", OFFSETS),
    ("stats: word of the table signed", "stats.cu", "table[2 * blockIdx.x], what", "table[int(2 * blockIdx.x)], what", OFFSETS),
    ("stats: sum of a block in 16 bits", "stats.cu", "parts[blockIdx.x] = sum", "parts[u16(blockIdx.x)] = sum", OFFSETS),
    ("stats: place in order signed", "stats.cu", "sum += parts[order[i]]", "sum += parts[int(order[i])]", OFFSETS),
    ("fold: own term in bytes of 32 bits", "fold.cu", "own[i]", "own[u32(i * 16) / 16]", OFFSETS),
    ("fold: slot in 32 bits", "fold.cu", "received[r * (stride / 4) + i]", "received[u32(r * u32(stride) / 4) + i]", FOLD),
    ("fold: own term last", "fold.cu", "r == rank ? own[i] : received[r * (stride / 4) + i]",
     "r == ranks - 1 ? own[i] : received[(r < rank ? r : r + 1) * (stride / 4) + i]", FOLD),
    ("fold: a step begins with the last one's sums", "fold.cu", "begins ? make_float4", "begins > 1 ? make_float4", FOLD),
    ("fold: last elements", "fold.cu", "if (i >= quads) return;", "if (i + 1 >= quads) return;", FOLD),
    ("column_sums: row in 32 bits", "column_sums.cu", "dy[u64(i) * cols + j]", "dy[i * cols + j]", OFFSETS),
    ("column_sums_add: row in 32 bits", "column_sums.cu", "partial[u64(s) * cols + j]", "partial[s * cols + j]", OFFSETS),
    ("cast: place in 32 bits", "cast.cu", "const u64 at = ", "const u32 at = ", OFFSETS),
    ("dropout: mask in 32 bits", "dropout.cu", "philox(words, block, Stream", "philox(words, u32(block * 8) / 8, Stream", OFFSETS),
    ("embedding: row in 32 bits", "embedding.cu", "dout[u64(i) * cols + j]", "dout[i * cols + j]", OFFSETS),
    ("rope: row in 32 bits", "rope.cu", "x + u64(row) * cols + pair", "x + row * cols + pair", OFFSETS),
    ("matmul: row of C in 32 bits", "matmul.cu", "static_cast<float *>(c) + u64(row) * n", "static_cast<float *>(c) + row * n", OFFSETS),
    ("matmul_sm90: row of C in 32 bits", "matmul_sm90.cu", "static_cast<float *>(c) + u64(row) * n",
     "static_cast<float *>(c) + row * n", OFFSETS),
    ("project_sm90: row in 32 bits", "project_sm90.cu", "store8(y + u64(row) * n + j, eight);\n                       });",
     "store8(y + row * n + j, eight);\n                       });", OFFSETS),
    ("project_sm90: residual in 32 bits", "project_sm90.cu", "onto + u64(row) * n + j", "onto + row * n + j", OFFSETS),
    ("project_sm90: pair in 32 bits", "project_sm90.cu", "if (row < m && j < n) store8(y + u64(row) * n + j, eight)",
     "if (row < m && j < n) store8(y + row * n + j, eight)", OFFSETS),
    ("project_sm90: positions in 16 bits", "project_sm90.cu", "row < m ? positions[row] : 0", "row < m ? positions[u16(row)] : 0", OFFSETS),
    ("project_dx_sm90: row in 32 bits", "project_dx_sm90.cu", "store8(dx + u64(row) * n + j", "store8(dx + row * n + j", OFFSETS),
    ("project_dx_sm90: mask in 32 bits", "project_dx_sm90.cu", "(u64(row) * n + column) / 8", "(row * n + column) / 8", OFFSETS),
    ("project_dx: mask in 32 bits", "project_dx.cu", "(u64(row) * n + column) / 8", "(row * n + column) / 8", OFFSETS),
    ("project_dw_sm90: row in 32 bits", "project_dw_sm90.cu", "dw + u64(row) * n + j", "dw + row * n + j", OFFSETS),
    ("lora_t: mask in 32 bits", "lora.cu", "(u64(first_row + row) * k + tile * 64 + (2 * step + half) * 8) / 8",
     "((first_row + row) * k + tile * 64 + (2 * step + half) * 8) / 8", OFFSETS),
    ("lora_da: mask in 32 bits", "lora.cu", "(u64(first_row + tile * 64 + step * 16 + row) * k", "((first_row + tile * 64 + step * 16 + row) * k", OFFSETS),
    ("decoding on tensor cores: cache in 32 bits", "attention_decode.cu", "(u64(sequence) * capacity + begin) * (kv_heads",
     "(sequence * capacity + begin) * (kv_heads", OFFSETS),
    ("decoding on tensor cores: part in 16 bits", "attention_decode.cu", "float *mine = parts + u64(blockIdx.x) * pitch",
     "float *mine = parts + u16(blockIdx.x) * pitch", OFFSETS),
    ("decoding, plain: cache in 32 bits", "attention_plain.cu", "u64(sequence) * capacity * stride + kv * dim",
     "sequence * capacity * stride + kv * dim", OFFSETS),
    ("Hopper: a buffer given back too early", "common/warpgroup.cuh", "            if (t > 0) give_back(before);\n",
     "            give_back(barrier + to_empty);\n", HOPPER),
    ("Hopper: a tile's last products not waited for", "common/warpgroup.cuh", "        wgmma_wait<0>();\n        give_back(before);\n    }",
     "        wgmma_wait<1>();\n        give_back(before);\n    }", HOPPER),
    ("Hopper: a tile's last buffer kept", "common/warpgroup.cuh", "        wgmma_wait<0>();\n        give_back(before);\n    }",
     "        wgmma_wait<0>();\n    }", HOPPER),
    ("Hopper: turns not told apart", "common/warpgroup.cuh", "buffer = 0, parity ^= 1", "buffer = 0, parity ^= 0", HOPPER),
    ("Hopper: fewer bytes announced", "common/warpgroup.cuh", "            fill(TILE);\n", "            fill(TILE - 1024);\n", HOPPER),
    ("Hopper: half of the warps give back", "common/warpgroup.cuh", "CLUSTER * 2 * WARPGROUP / 32", "CLUSTER * WARPGROUP / 32", HOPPER),
    ("Hopper: a block copies to itself alone", "common/warpgroup.cuh", "u16((1 << CLUSTER) - 1)", "u16(1 << rank_of_block())", HOPPER),
    ("Hopper: both blocks copy the same rows", "common/warpgroup.cuh", "copy_to_all(to + rank * SHARE * 128, b, k, row + rank * SHARE)",
     "copy_to_all(to + rank * SHARE * 128, b, k, row)", HOPPER),
    ("Hopper: a block leaves the other", "common/warpgroup.cuh", "    if (CLUSTER > 1) cluster_barrier();\n}\n\n// Whether",
     "    if (CLUSTER > 2) cluster_barrier();\n}\n\n// Whether", HOPPER),
    ("Hopper: two blocks begin with one tile", "common/warpgroup.cuh", "first_tile() { return blockIdx.x / CLUSTER; }",
     "first_tile() { return blockIdx.x / CLUSTER / 2; }", HOPPER),
    ("Hopper: tiles left out", "common/warpgroup.cuh", "tiles_further() { return gridDim.x / CLUSTER; }",
     "tiles_further() { return gridDim.x / CLUSTER + 1; }", HOPPER),
    ("Hopper: no fence before products", "common/warpgroup.cuh", "            barrier_wait(barrier, of.parity);\n            wgmma_fence();\n",
     "            barrier_wait(barrier, of.parity);\n", HOPPER),
    ("Hopper: sums of the tile before", "common/warpgroup.cuh", "i > 0 || (t | add) > 0", "true", HOPPER),
    ("Hopper: staged sums read at once", "common/warpgroup.cuh", "        __syncwarp();\n#pragma unroll 1\n        for (u32 pass",
     "#pragma unroll 1\n        for (u32 pass", GATE),
    ("Hopper: staged sums overwritten at once", "common/warpgroup.cuh", "            store(r, lane % 8 * 8, eight);\n        }\n        __syncwarp();\n",
     "            store(r, lane % 8 * 8, eight);\n        }\n", GATE),
    ("Hopper: another swizzle of staged sums", "common/warpgroup.cuh", "(lane % 8 ^ r % 8) * 8", "(lane % 8 ^ r % 4) * 8", HOPPER),
    ("Hopper: stride of an operand", "common/hopper.cuh", "STRIDE = 1024 / 16", "STRIDE = 2048 / 16", HOPPER),
    ("Hopper: panels of an operand", "common/hopper.cuh", "KMajor ? 1 : 8192 / 16", "KMajor ? 1 : 4096 / 16", HOPPER),
    ("Hopper: raster of seven", "common/tile.cuh", "rows = min(tiles_m - first, GROUP)", "rows = min(tiles_m - first, 7u)", HOPPER),
    ("Hopper: a draw at the threshold falls", "project_dx_sm90.cu", ">= threshold;", "> threshold;", GROUPS),
    ("Hopper: words of a mask with other lanes", "project_dx_sm90.cu", "                    turn_words(words);\n", "", GROUPS),
    ("Hopper: a weight's tile with the one above", "common/group.cuh", "tile_row < tiles0 ? 0 : tile_row < tiles0 + tiles1 ? 1 : 2",
     "tile_row <= tiles0 ? 0 : tile_row < tiles0 + tiles1 ? 1 : 2", GROUPS),
    ("Hopper: a row of tiles too many is added", "common/group.cuh", "m = place.m < below ? pick(group, m0, m1, m2) : 0;",
     "m = pick(group, m0, m1, m2);", GROUPS),
    ("Hopper: gate's update in up as well", "project_sm90.cu", "which == 0 ? part.column : BEYOND, k);", "part.column, k);", GROUPS),
    ("Hopper: v is rotated", "project_sm90.cu", "if (part.group < turned)", "if (part.group <= turned)", GROUPS),
]


def changed(text, old, new):
    """The text with the change, as long as it was: what is too much goes from a line of comment."""
    text = text.replace(old, new)
    more = len(new) - len(old)
    if more <= 0:
        return text + b"\n" * -more
    comment = re.search(rb"^//[^\n]{%d,}$" % more, text, re.M)
    return text[: comment.end() - more] + text[comment.end() :]


def verdict(program, tests, root):
    try:
        run = subprocess.run([program, "--test-threads", "2", *tests], cwd=root, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "TIMED OUT"
    failed = re.findall(r"^test (\S+) \.\.\. FAILED", run.stdout, re.M)
    if "NVRTC:" in run.stdout + run.stderr:
        return "DOES NOT COMPILE"
    return f"noticed by {sorted(set(failed))[0]}" if run.returncode and failed else "SURVIVED"


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(sys.argv[1], "rb") as f:
        program = f.read()
    survived = tried = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, file, old, new, tests in MUTANTS:
            if sys.argv[2:] and not any(word in name for word in sys.argv[2:]):
                continue
            tried += 1
            with open(os.path.join(root, "kernels", file), "rb") as f:
                text = f.read()
            if text.count(old.encode()) != 1 or text not in program:
                result = "NOT APPLIED"
            else:
                path = os.path.join(folder, f"cuda{tried}")
                with open(path, "wb") as f:
                    f.write(program.replace(text, changed(text, old.encode(), new.encode())))
                os.chmod(path, 0o755)
                result = verdict(path, tests, root)
                os.remove(path)
            survived += not result.startswith("noticed")
            print(f"{name:<48} {result}", flush=True)
    print(f"{tried} mutations, {survived} not noticed")
    sys.exit(survived > 0)


main()
