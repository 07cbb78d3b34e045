#!/usr/bin/env python3
"""Records evaluation losses that transformers computes on the demo's rows: tests/data/golden/eval.json.

Ids come from sentencepiece and the templates' definitions alone, so nothing of ringtune is in the figures."""

import json
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/data"
BOS, EOS = 2, 3
INSTRUCT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{}\n\n### Response:\n")


def encode(sp, prefix, response):
    """BOS, prefix and response encoded as one text, EOS; what is supervised begins where the response does."""
    text = (" " + prefix + response).encode()  # the model puts a blank before a text and changes nothing else
    start, at = len((" " + prefix).encode()), 0
    ids, mask = [BOS], [False]
    for id in sp.encode(prefix + response):
        piece = sp.id_to_piece(id)
        size = 1 if sp.is_byte(id) else len(piece.replace("\u2581", " ").encode())
        assert not at < start < at + size, "a token across the border"
        ids.append(id)
        mask.append(at >= start)
        at += size
    assert at == len(text), "the pieces spell the text"
    return ids + [EOS], mask + [True]


def evaluate(model, rows):
    nll, count, right = 0.0, 0, 0
    with torch.no_grad():
        for ids, mask in rows:
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
            targets, keep = torch.tensor(ids[1:]), torch.tensor(mask[1:])
            nll -= torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets][keep].sum().item()
            count += int(keep.sum())
            right += int((logits.argmax(-1) == targets)[keep].sum())
    return {"loss": nll / count, "supervised_tokens": count, "token_accuracy": right / count}


def main():
    sp = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer/spm4k.model"))
    cases = []
    for name in ["tiny-llama-tied", "tiny-llama-untied"]:
        for adapter in [False, True]:
            model = AutoModelForCausalLM.from_pretrained(DATA / "model" / name, dtype=torch.float32)
            if adapter:
                model = PeftModel.from_pretrained(model, DATA / "golden" / name / "adapter_all")
            for file in ["eval", "chat"]:
                rows = [json.loads(line) for line in (ROOT / f"data/demo/{file}.jsonl").read_text().splitlines()[:60]]
                encoded = [encode(sp, INSTRUCT.format(r["prompt"]), r["response"]) for r in rows]
                encoded = [(ids[:512], mask[:512]) for ids, mask in encoded]
                cases.append({"model": name, "adapter": adapter, "template": "instruct", "file": file, "rows": len(rows),
                              **evaluate(model.eval(), encoded)})
    import transformers
    made = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "cases": cases}
    (DATA / "golden/eval.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main()
