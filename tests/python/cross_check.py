#!/usr/bin/env python3
"""Compares what ringtune writes and computes with transformers and PEFT. See README.md beside this file."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/data"
PROMPTS = ["What is AI?", "Tell me a joke\n\nabout  naïve 🙂 cats", "Who are you"]
STEPS = 64
failures = 0


def check(name, value, limit):
    """Prints a comparison; `value` has to be at most `limit`."""
    global failures
    good = value <= limit
    failures += not good
    print(f"{'ok  ' if good else 'FAIL'}  {name}: {value:.3g} (at most {limit:g})", flush=True)


def run(ringtune, *words, cwd):
    """Standard output of a ringtune command."""
    words = [str(w) for w in words]
    done = subprocess.run([str(ringtune), *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ringtune {' '.join(words)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def load(folder, base=None):
    """The model of a folder; an adapter on `base`."""
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()


def compare_answers(name, model, answers, eos):
    """Greedy tokens and log probabilities of ringtune's answers against those of `model`."""
    worst, differing = 0.0, 0
    for a in answers:
        prompt = torch.tensor([a["prompt_ids"]])
        with torch.no_grad():
            ours = torch.full((len(a["ids"]), max(t for t, _ in a["logprobs"][0]) + 1), float("nan"))
            for i, row in enumerate(a["logprobs"]):
                for token, logprob in row:
                    ours[i, token] = logprob
            whole = torch.cat([prompt, torch.tensor([a["ids"]])], 1)
            logits = model(whole).logits[0, len(a["prompt_ids"]) - 1 : -1].double()
            theirs = torch.log_softmax(logits[:, : ours.shape[1]], -1)
            worst = max(worst, (theirs - ours).abs().max().item())
            made = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(a["ids"]), do_sample=False,
                eos_token_id=eos, pad_token_id=0,
            )[0, prompt.shape[1] :].tolist()
        differing += made != a["ids"]
    check(f"{name}: log probabilities", worst, 1e-4)
    check(f"{name}: answers with other greedy tokens of {len(answers)}", differing, 0)
    print(f"      steps compared: {', '.join(str(len(a['ids'])) for a in answers)}")


def answers(ringtune, cwd, folder, vocab, *more):
    """ringtune's greedy answers with the log probabilities of the whole vocabulary."""
    out = run(ringtune, "generate", "--model-path", folder, "--greedy", "--json", "--logprobs", vocab,
              "--max-new-tokens", STEPS, *more, *PROMPTS, cwd=cwd)
    return [json.loads(line) for line in out.splitlines()]


def vocab_of(folder):
    config = json.loads((folder / "config.json").read_text())
    return config.get("unpadded_vocab_size") or config["vocab_size"]


def compare_folder(name, ringtune, cwd, folder, base=None, template=True):
    """One written folder: it loads, answers alike, and its tokenizer gives ringtune's ids."""
    model = load(cwd / folder, base and cwd / base)
    made = answers(ringtune, cwd, folder, vocab_of(cwd / (base or folder)), *([] if template else ["--raw"]))
    eos = json.loads((cwd / folder / "generation_config.json").read_text())["eos_token_id"]
    compare_answers(name, model, made, eos)
    tokenizer = AutoTokenizer.from_pretrained(cwd / folder)
    if template:
        differing = sum(
            tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, return_dict=True)
            ["input_ids"] != a["prompt_ids"] for p, a in zip(PROMPTS, made))
        check(f"{name}: prompts with other ids of {len(made)}", differing, 0)
        texts = sum(tokenizer.decode([i for i in a["ids"] if i not in (eos if isinstance(eos, list) else [eos])]).strip()
                    != a["text"].strip() for a in made)
        check(f"{name}: answers with other text of {len(made)}", texts, 0)
    del model


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def compare_rows(name, ringtune, cwd, folder, rows_file, template, base=None):
    """Ids and loss masks of rows, and the evaluation loss over them."""
    tokenizer = AutoTokenizer.from_pretrained(cwd / folder)
    packs = run(ringtune, "inspect", "packs", "--model_path", base or folder, "--tokenizer_path", cwd / folder, "--dataset_paths",
                rows_file, "--prompt_template", template, "--no_packing", "--val_fraction", 0, "--json", cwd=cwd)
    ours = []
    for line in packs.splitlines():
        row = json.loads(line)
        n = row["cu_seqlens"][1]
        ours.append((tuple(row["input_ids"][:n]), tuple(l != -100 for l in row["labels"][:n])))
    theirs = []
    limit = max(len(ids) for ids, _ in ours)
    for row in read_rows(rows_file):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        made = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        theirs.append((tuple(made["input_ids"][:limit]), tuple(bool(m) for m in made["assistant_masks"][:limit])))
    # Rows come in the order of an epoch, and those cut to the row length are compared as far as they go.
    differing = len(set(theirs) ^ set(ours))
    check(f"{name}: rows of {len(theirs)} with other ids or loss mask", differing, 0)
    model = load(cwd / folder, base and cwd / base)
    nll, count, right = 0.0, 0, 0
    with torch.no_grad():
        for ids, mask in theirs:
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
            targets = torch.tensor(ids[1:])
            keep = torch.tensor(mask[1:])
            lse = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
            nll -= lse[keep].sum().item()
            count += int(keep.sum())
            right += int((logits.argmax(-1) == targets)[keep].sum())
    run(ringtune, "eval", "--model_path", folder, "--dataset_paths", rows_file, "--prompt_template", template,
        "--output", "eval.json", "--quiet", cwd=cwd)
    found = json.loads((cwd / "eval.json").read_text())["all"]
    check(f"{name}: supervised tokens, difference from {count}", abs(found["supervised_tokens"] - count), 0)
    check(f"{name}: evaluation loss {found['loss']:.6f}, difference from transformers", abs(found["loss"] - nll / count), 1e-5)
    check(f"{name}: token accuracy, difference", abs(found["token_accuracy"] - right / count), 1e-9)


def architectures(ringtune, cwd):
    """PEFT's adapters on all architectures, merged by ringtune, whole and in shards; prompts are ids, as there is no tokenizer."""
    for case in sorted(p.name for p in (DATA / "golden").iterdir() if p.is_dir()):
        base, adapter = DATA / "model" / case, DATA / "golden" / case / "adapter_all"
        for kind, words in [("merged", []), ("sharded", ["--max-shard-size", "100KB"])]:
            out = f"{case}-{kind}"
            run(ringtune, "merge", "--model-path", adapter, "--base-model", base, "--output-dir", out, "--dtype", "f32", *words, cwd=cwd)
        assert len(list((cwd / f"{case}-sharded").glob("*.safetensors"))) > 1
        ids = torch.tensor([[2] + [7 + 11 * i % 300 for i in range(40)]])
        with torch.no_grad():
            want = load(adapter, base)(ids).logits
            for kind in ["merged", "sharded"]:
                got = load(cwd / f"{case}-{kind}")(ids).logits
                check(f"{case}, {kind}: logits against PEFT on the base, relative", ((got - want).norm() / want.norm()).item(), 1e-5)


def byte_level(folder, chatml):
    """A byte-level BPE as Llama-3's or Qwen's, trained on a few rows, with the files beside it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    # Qwen's class in transformers 5 does not read this pattern from the file: it has its own, with single digits.
    digits = r"\p{N}" if chatml else r"\p{N}{1,3}"
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    t = Tokenizer(models.BPE(ignore_merges=not chatml))
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    if chatml:
        t.normalizer = normalizers.NFC()
    texts = [r["prompt"] + "\n" + r["response"] for r in read_rows(ROOT / "data/demo/chat.jsonl")]
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    t.train_from_iterator(texts, trainer)
    names = (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"] if chatml
             else ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"])
    t.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    if chatml:
        config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": None,
                  "add_bos_token": False}
    else:
        bos = t.token_to_id("<|begin_of_text|>")
        t.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B",
            special_tokens=[("<|begin_of_text|>", bos)])
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    folder.mkdir()
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def job(name, ringtune, cwd, model, rows, template, *more):
    """Fine-tunes with LoRA and whole, and compares every folder that comes out of it."""
    train = ["sft", "--model_path", model, "--dataset_paths", rows, "--prompt_template", template, "--max_steps", 12, "--max_seq_len",
             256, "--per_device_train_batch_size", 4, "--quiet", "--no_tensorboard", *more]
    lora, full = f"{name}-lora", f"{name}-full"
    run(ringtune, *train, "--lora_r", 4, "--learning_rate", "3e-3", "--merge_adapters", "--output_dir", lora, cwd=cwd)
    run(ringtune, *train, "--no_lora", "--learning_rate", "5e-4", "--output_dir", full, cwd=cwd)
    grown = (cwd / lora / "resized_base").is_dir()
    base = f"{lora}/resized_base" if grown else model
    compare_folder(f"{name}, adapter", ringtune, cwd, lora, base)
    compare_rows(f"{name}, adapter", ringtune, cwd, lora, rows, template, base)
    compare_folder(f"{name}, merged by sft", ringtune, cwd, f"{lora}/merged")
    run(ringtune, "merge", "--model-path", lora, "--output-dir", f"{name}-sharded", "--max-shard-size", "200KB", "--dtype", "f32", cwd=cwd)
    compare_folder(f"{name}, merged in shards", ringtune, cwd, f"{name}-sharded")
    if grown:
        compare_folder(f"{name}, grown base", ringtune, cwd, base)
    compare_folder(f"{name}, all weights", ringtune, cwd, full)
    compare_rows(f"{name}, all weights", ringtune, cwd, full, rows, template)
    newest = max((cwd / full).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    compare_folder(f"{name}, checkpoint", ringtune, cwd, f"{full}/{newest.name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ringtune", type=Path, default=ROOT / "target/release/ringtune")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is written; emptied first")
    parser.add_argument("--only", nargs="+", default=["architectures", "tied", "untied", "qwen", "llama3"], help="parts to run")
    args = parser.parse_args()
    torch.set_num_threads(1)  # spinning threads are slow on a busy machine
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    os.environ["RINGTUNE_CACHE"] = str(args.work / "cache")
    cwd, ringtune = args.work.resolve(), args.ringtune.resolve()
    if "architectures" in args.only:
        architectures(ringtune, cwd)
    rows = cwd / "rows.jsonl"
    texts = [(ROOT / f"data/demo/{n}.jsonl").read_text().splitlines()[:400] for n in ["chat", "define", "jargon"]]
    rows.write_text("\n".join(sum(texts, [])) + "\n")
    small = cwd / "small.jsonl"
    small.write_text("\n".join(texts[0][:60]) + "\n")
    spm = ["--tokenizer_path", DATA / "tokenizer/spm4k.model"]
    if "tied" in args.only:
        job("tied-chatml", ringtune, cwd, DATA / "model/tiny-llama-tied", rows, "chatml", *spm)
    if "untied" in args.only:
        job("untied-instruct", ringtune, cwd, DATA / "model/tiny-llama-untied", small, "instruct", *spm)
    shape = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
             "tie_word_embeddings": True}
    for name, chatml in [("qwen", True), ("llama3", False)]:
        if name not in args.only:
            continue
        byte_level(cwd / f"{name}-tok", chatml)
        (cwd / f"{name}.json").write_text(json.dumps(shape if chatml else shape | {"model_type": "llama"}))
        run(ringtune, "pretrain", "--model_config", f"{name}.json", "--tokenizer_path", f"{name}-tok", "--dataset_paths",
            ROOT / "data/demo/pretrain_valid.txt", "--output_dir", ".", "--max_steps", 20, "--max_seq_len", 128, "--quiet",
            "--no_tensorboard", cwd=cwd)
        compare_folder(f"{name}, pretrained", ringtune, cwd, f"{name}/final", template=False)
        job(f"{name}-chatml", ringtune, cwd, f"{name}/final", rows if chatml else small, "chatml")
        job(f"{name}-zephyr", ringtune, cwd, f"{name}/final", small, "zephyr")
    print(f"{failures} comparisons failed" if failures else "every comparison held")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
