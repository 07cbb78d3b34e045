"""Records the ids that Python's `tokenizers` gives with every kind of step that a tokenizer.json of today has: tests/data/tokenizer/kinds.json.

    python3 -m venv v && v/bin/pip install tokenizers && v/bin/python tests/python/record_tokenizer_kinds.py

Three small vocabularies are trained on the demo's rows; each kind is one of them under the steps of a published family (their regular
expressions, as their files have them) or under one step alone. Text is encoded as text: special tokens are not looked for in it.
"""
import copy
import hashlib
import json
import pathlib
import random

import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
GROUP = 100  # strings a hash


def texts():
    for name in ("chat", "define"):
        for line in (ROOT / f"data/demo/{name}.jsonl").read_text().splitlines()[:400]:
            row = json.loads(line)
            yield row["prompt"]
            yield row["response"]


TEXT = list(texts())


def byte_level():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL[1:], initial_alphabet=alphabet, show_progress=False))
    return json.loads(t.to_str())


def byte_fallback():
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spelled = [f"<0x{b:02X}>" for b in range(256)]
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + spelled, show_progress=False))
    v = json.loads(t.to_str())
    v["added_tokens"] = [a for a in v["added_tokens"] if a["content"] not in spelled]
    return v


def unigram():
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))
    v = json.loads(t.to_str())
    v["model"]["vocab"] = [[p, round(s, 4)] for p, s in v["model"]["vocab"]] + [[f"<0x{b:02X}>", -100.0] for b in range(256)]
    v["model"]["byte_fallback"] = True
    return v


def pres(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def norms(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def strip(left, right):
    return {"type": "Strip", "strip_left": left, "strip_right": right}


def metaspace(scheme, split=True):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def digits(one):
    return {"type": "Digits", "individual_digits": one}


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = dict(LEVEL, use_regex=False)
PREPEND, BLANK = {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")
BACK = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
JOINED = {"type": "Sequence", "decoders": BACK}
STRIPPED = {"type": "Sequence", "decoders": BACK + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER, END = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{END}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

KINDS = []


def kind(name, base, normalizer=None, pre=None, decoder=None, **model):
    steps = {"normalizer": normalizer, "pre_tokenizer": pre, "decoder": decoder or (LEVEL if base == "byte_level" else JOINED), "model": model}
    KINDS.append({"name": name, "base": base, **steps})


# As the files of published models say.
kind("GPT-2, OLMo", "byte_level", None, LEVEL)
kind("RoBERTa, a blank in front", "byte_level", None, dict(LEVEL, add_prefix_space=True))
kind("Llama-3", "byte_level", None, pres(split(WORDS), BYTES), ignore_merges=True)
kind("Qwen2, Qwen2.5, Qwen3", "byte_level", {"type": "NFC"}, pres(split(WORDS.replace("{1,3}", "")), BYTES))
kind("SmolLM, StarCoder2", "byte_level", None, pres(digits(True), LEVEL))
kind("Falcon", "byte_level", None, pres({"type": "Punctuation", "behavior": "Contiguous"}, LEVEL, digits(False), split("[0-9][0-9][0-9]")))
kind("DeepSeek LLM", "byte_level", norms(), pres(split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), digits(True), BYTES))
kind("DeepSeek-V3", "byte_level", norms(), pres(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(SIGNS), BYTES))
kind("gpt-oss, Phi-4, Mistral Nemo", "byte_level", None, pres(split(CASED), BYTES))
kind("Llama-2, TinyLlama, Phi-3, Yi, InternLM2", "byte_fallback", norms(PREPEND, BLANK), None, STRIPPED)
kind("Mistral v0.3", "byte_fallback", None, metaspace("first", False), STRIPPED)
kind("Yi-1.5", "byte_fallback", norms(BLANK), None, JOINED)
kind("Gemma", "byte_fallback", BLANK, split(" ", "MergedWithPrevious", kind="String"), JOINED)
kind("T5, a prefix everywhere", "unigram", norms({"type": "Nmt"}, {"type": "NFKC"}, replace(" {2,}", " ", "Regex")), metaspace("always"), metaspace("always"))
kind("XLNet", "unigram", norms(replace("``", '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}), pres({"type": "WhitespaceSplit"}, metaspace("always")), metaspace("always"))
for scheme in ("always", "first", "never"):
    kind(f"Metaspace {scheme}", "unigram", None, metaspace(scheme), JOINED if scheme == "never" else STRIPPED)
# Each step alone.
for name in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents"):
    kind(name, "byte_level", {"type": name}, LEVEL)
for left, right in ((True, True), (True, False), (False, True)):
    kind(f"Strip {left} {right}", "byte_level", strip(left, right), LEVEL)
kind("NFKC, Strip", "byte_level", norms({"type": "NFKC"}, strip(True, True)), LEVEL)
kind("Replace a newline", "byte_level", replace("\n", " "), LEVEL)
kind("Replace white space", "byte_level", replace(r"\s+", " ", "Regex"), LEVEL)
kind("Replace a tab", "byte_level", replace("\t", "    "), LEVEL)
kind("BertNormalizer", "byte_level", {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}, LEVEL)
kind("ByteLevel as a normalizer", "byte_level", {"type": "ByteLevel"}, split("Ġ", "MergedWithNext", kind="String"))
kind("Prepend a blank", "byte_level", {"type": "Prepend", "prepend": " "}, LEVEL)
for name in ("WhitespaceSplit", "Whitespace", "BertPreTokenizer", "UnicodeScripts"):
    kind(name, "byte_level", None, pres({"type": name}, BYTES))
for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
    kind(f"Punctuation {behavior}", "byte_level", None, pres({"type": "Punctuation", "behavior": behavior}, LEVEL))
    kind(f"Split {behavior}", "byte_level", None, pres(split(r"\s+", behavior), BYTES))
kind("Split inverted", "byte_level", None, pres(split(r"\w+", "Isolated", True), BYTES))
kind("CharDelimiterSplit", "byte_level", None, pres({"type": "CharDelimiterSplit", "delimiter": "a"}, BYTES))
kind("Digits", "byte_level", None, pres(digits(False), LEVEL))
kind("FixedLength", "byte_level", None, pres({"type": "FixedLength", "length": 5}, BYTES))


def strings(n=1000):
    rng = random.Random(13)
    pool = list("  \t\n\r\x0b\x0c\x00\x01\x7f\x85\xa0\u200b\u200d\u2028\u3000\ufeff") + list("abcXYZ'sS,.!?-_/\\\"`<>|{}[]()@#$%^&*+=~:;0123456789")
    pool += list("éÉüßñçœ①½ﬁﬂ\u0301\u0308ÅA\u030a日本語漢字かなカナ한국어Русский עברית العربية ไทย हिन्दी 😀👍🏽👩‍💻\U0001f1e9\U0001f1ea\ufffd\u202e\u00ad\uff5e▁Ġ")
    pool += ["'s", "'T", "'re", " the ", " of", "and ", "<s>", "</s>", "<pad>", "<unk>", "<0x0A>", "\r\n", "\n\n", "   ", "def f(x):\n    return"]
    words = " ".join(TEXT).split()
    out = ["", "\n", " ", "  a", "a  ", " a", "a ", "\n\n", "Hello\n world", "a\tb", "12345 67", "I'm DON'T we'LL"]
    while len(out) < n:
        length = rng.choice([1, 2, 3, 5, 8, 20, 40])
        out.append("".join(rng.choice(pool) if rng.random() < 0.7 else rng.choice(words) + " " for _ in range(length)))
    return out


def main():
    bases = {f.__name__: f() for f in (byte_level, byte_fallback, unigram)}
    text = strings()
    for k in KINDS:
        v = copy.deepcopy(bases[k["base"]])
        v.update({part: k[part] for part in ("normalizer", "pre_tokenizer", "decoder")}, post_processor=None)
        v["model"].update(k["model"])
        t = Tokenizer.from_str(json.dumps(v))
        t.encode_special_tokens = True
        k["sha256"] = []
        for at in range(0, len(text), GROUP):
            h = hashlib.sha256()
            for s in text[at : at + GROUP]:
                ids = t.encode(s, add_special_tokens=False).ids
                back = t.decode(ids, skip_special_tokens=False)
                h.update((" ".join(map(str, ids)) + "\n" + back + "\n").encode())
            k["sha256"].append(h.hexdigest()[:16])
    out = {"tokenizers": tokenizers.__version__, "group": GROUP, "strings": text, "bases": bases, "kinds": KINDS}
    path = ROOT / "tests/data/tokenizer/kinds.json"
    path.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{path}: {len(KINDS)} kinds, {len(text)} strings, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
