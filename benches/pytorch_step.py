#!/usr/bin/env python3
"""Training steps of transformers + PEFT on the CPU beside `ringtune bench step`, in turn on one quiet machine.

    pip install torch --index-url https://download.pytorch.org/whl/cpu; pip install transformers peft numpy
    python3 pytorch_step.py --ringtune target/release/ringtune [--threads 2] [--rounds 3] [--cases small-lora-bf16,...] [--compile]

Each measurement is a process of its own (peak RSS is a process's). Per case and program: median tokens/s over the rounds, their least and
largest, peak RSS in MiB (ru_maxrss), seconds from the start of the process to the end of its first step.

tiny  = hidden 256, 6 layers, 8/4 heads, ffn 688, vocabulary 32,000, tied, 4 x 512 tokens.
small = SmolLM2-135M: hidden 576, 30 layers, 9/3 heads, ffn 1536, vocabulary 49,152, tied, 1 x 512 tokens.
LoRA: rank 16, alpha 32, dropout 0.05 on the seven linears. AdamW, fused under bf16 autocast. sdpa.
packed: documents of 64 tokens, the last half of each supervised, packed into rows of 512: PyTorch gets position ids and a block-diagonal
causal mask (what TRL's packing without flash attention needs for the same result), ringtune `--documents N --supervised 0.5`.
"""
import argparse, json, os, resource, statistics, subprocess, sys, time

START = time.time()
SHAPES = {
    "tiny": dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=688,
                 vocab_size=32000, rows=4),
    "small": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                  vocab_size=49152, rows=1),
}
SEQ = 512
DOCUMENT = 64  # of packed cases


def cases():
    for shape in ("tiny", "small"):
        for how in ("full", "lora"):
            for dtype in ("bf16", "f32"):
                yield f"{shape}-{how}-{dtype}"
            yield f"{shape}-{how}-bf16-packed"


def child(name, threads, steps, compiled):
    """One PyTorch run; prints a line of JSON."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parts = name.split("-")
    shape, lora, bf16, packed = SHAPES[parts[0]], parts[1] == "lora", parts[2] == "bf16", "packed" in parts
    rows = shape["rows"]
    config = LlamaConfig(**{k: v for k, v in shape.items() if k != "rows"}, max_position_embeddings=2048, tie_word_embeddings=True,
                         attn_implementation="sdpa", use_cache=False, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        # The frozen base of a bf16 run is loaded in bf16, as a user would load it.
        if bf16:
            model = model.to(torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True) if bf16 else torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, config.vocab_size, (rows, SEQ)))
    labels = ids.clone()
    batch = dict(input_ids=ids, labels=labels)
    if packed:
        positions = torch.arange(SEQ) % DOCUMENT
        document = torch.arange(SEQ) // DOCUMENT
        labels[:, positions < DOCUMENT // 2] = -100
        seen = (document[:, None] == document[None, :]) & (torch.arange(SEQ)[:, None] >= torch.arange(SEQ)[None, :])
        kind = torch.bfloat16 if bf16 else torch.float32
        mask = torch.where(seen, 0.0, torch.finfo(kind).min).to(kind)[None, None].expand(rows, 1, SEQ, SEQ)
        batch.update(position_ids=positions[None].expand(rows, SEQ), attention_mask=mask)
    run = torch.compile(model) if compiled else model
    times, losses, first = [], [], None
    for i in range(steps + (3 if compiled else 1)):
        begin = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = run(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(loss.item())
        if first is None:
            first = time.time() - START
        if i >= (3 if compiled else 1):
            times.append(time.perf_counter() - begin)
    print(json.dumps({"tokens_per_second": rows * SEQ / statistics.median(times), "first_step_seconds": first,
                      "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "loss": [losses[0], losses[-1]]}))


def run_pytorch(name, a, compiled):
    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads))
    if a.mkl_bypass:
        env["LD_PRELOAD"] = a.mkl_bypass
    command = [sys.executable, os.path.abspath(__file__), "--child", name, "--threads", str(a.threads), "--steps", str(a.steps)]
    out = subprocess.run(command + (["--compile"] if compiled else []), capture_output=True, text=True, env=env)
    if out.returncode:
        raise SystemExit(f"{name}: {out.stderr[-2000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def run_ringtune(name, a):
    parts = name.split("-")
    rows = SHAPES[parts[0]]["rows"]
    flags = ["bench", "step", "--device", "cpu", "--shape", parts[0], "--micro_batch", str(rows), "--seq_len", str(SEQ), "--steps",
             str(a.steps), "--threads", str(a.threads), "--json", "--only", "full" if parts[1] == "full" else "lora",
             "--mixed_precision", "bf16" if parts[2] == "bf16" else "no"]
    if "packed" in parts:
        flags += ["--documents", str(rows * SEQ // DOCUMENT), "--supervised", "0.5"]
    begin = time.time()
    child = subprocess.Popen([a.ringtune] + flags, stdout=subprocess.PIPE, text=True)
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{name}: ringtune failed")
    c = json.loads(text[text.index("{"):])["cases"][0]
    return {"tokens_per_second": c["tokens_per_second"], "first_step_seconds": c["first_step_seconds"], "peak_mib": usage.ru_maxrss / 1024,
            "loss": [c["loss"]["first"], c["loss"]["last"]], "wall": time.time() - begin}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--ringtune", default="target/release/ringtune")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--cases", default=None)
    p.add_argument("--compile", action="store_true", help="torch.compile too (minutes a case)")
    p.add_argument("--mkl-bypass", default=None, help="a library that tells MKL it runs on Intel, for f32 on AMD")
    p.add_argument("--child", default=None)
    a = p.parse_args()
    if a.child:
        return child(a.child, a.threads, a.steps, a.compile)
    wanted = a.cases.split(",") if a.cases else list(cases())
    print("| case | program | tokens/s | least | most | peak RSS MiB | start to first step s | loss |\n|---|---|---|---|---|---|---|---|")
    for name in wanted:
        programs = {"ringtune": lambda: run_ringtune(name, a), "eager": lambda: run_pytorch(name, a, False)}
        if a.compile and "bf16" in name:
            programs["compile"] = lambda: run_pytorch(name, a, True)
        found = {k: [] for k in programs}
        for _ in range(a.rounds):
            for k, run in programs.items():
                found[k].append(run())
        for k, all_ in found.items():
            rate = [r["tokens_per_second"] for r in all_]
            print(f"| {name} | {k} | {statistics.median(rate):.0f} | {min(rate):.0f} | {max(rate):.0f} | {max(r['peak_mib'] for r in all_):.0f} | "
                  f"{statistics.median(r['first_step_seconds'] for r in all_):.2f} | {all_[0]['loss'][0]:.3f} to {all_[0]['loss'][1]:.3f} |", flush=True)
        ours = statistics.median(r["tokens_per_second"] for r in found["ringtune"])
        for k in list(programs)[1:]:
            theirs = statistics.median(r["tokens_per_second"] for r in found[k])
            print(f"| {name} | ringtune / {k} | {ours / theirs:.2f} | | | "
                  f"{max(r['peak_mib'] for r in found['ringtune']) / max(r['peak_mib'] for r in found[k]):.2f} | | |", flush=True)


main()
