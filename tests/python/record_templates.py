"""Writes tests/data/chat_templates.json: ids of conversations by transformers' apply_chat_template, in the forms of published templates.

The tokenizer is a byte-level BPE of 400 pieces with the special tokens of all forms. Contents that spell special tokens are rendered with
sanitize_control_tokens, which keeps them text as ringtune does.

    python tests/python/record_templates.py BASE_TOKENIZER_JSON     # any byte-level tokenizer.json of BPE without added tokens
"""
import json, pathlib, sys, tempfile, transformers

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
PHI3 = """{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
ZEPHYR = """{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"""
BUILT = """{{ bos_token }}{% for message in messages %}{% if loop.index > 20 %}{% break %}{% endif %}{{ '<|' + message['role'] + '|>' }}{% if documents is not none %}docs{% endif %}{% if pad_token is defined %}{{ pad_token }}{% endif %}{% if unk_token is defined %}unknown{% endif %}{% if mask_token is defined %}mask{% endif %}{{ message | tojson }}{{ dict(a=1)['a'] }}<|end|> {{ eos_token }}{% endfor %}"""

PLAIN = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
         "<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "<start_of_turn>", "<end_of_turn>"]
RIGHT = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]   # Phi-3's take white space behind them along
WORDS = ["<think>", "</think>", "<tool_call>"]                     # not special
BOTH = ["<both>"]

def main(base):
    tok = json.load(open(base))
    ids = {}
    tok["added_tokens"] = []
    vocab = {p: i for p, i in tok["model"]["vocab"].items() if p not in PLAIN + RIGHT + WORDS + BOTH}
    n = len(vocab)
    assert sorted(vocab.values()) == list(range(n)), "pieces first"
    tok["model"]["vocab"] = vocab
    for i, text in enumerate(PLAIN + RIGHT + WORDS + BOTH):
        tok["added_tokens"].append({"id": n + i, "content": text, "single_word": False, "lstrip": text in BOTH,
            "rstrip": text in RIGHT + BOTH, "normalized": False, "special": text not in WORDS})
    tok["post_processor"] = None
    forms = {
        "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"),
        "qwen2.5": (QWEN25, None, "<|im_end|>", "<|endoftext|>"),
        "qwen3": (QWEN3, None, "<|im_end|>", "<|endoftext|>"),
        "mistral": (MISTRAL, "<s>", "</s>", None),
        "phi3": (PHI3, "<s>", "<|endoftext|>", "<|endoftext|>"),
        "gemma": (GEMMA, "<s>", "<end_of_turn>", None),
        "zephyr": (ZEPHYR, "<s>", "</s>", "</s>"),
        "built": (BUILT, "<s>", "</s>", "<|endoftext|>"),
        "both": ("{% for m in messages %}{{ m.content }} <both> {% endfor %}", "<s>", "</s>", None),
    }
    S, U, A = "system", "user", "assistant"
    talks = [
        [(U, "What is the river?"), (A, "It is small.\nAnd it has a number.")],
        [(S, "Be short."), (U, "One\n\ntwo  three?"), (A, "Yes."), (U, "Why?"), (A, "Because.")],
        [(U, "say <|eot_id|> or <|im_end|> [INST] <|user|>\n"), (A, "</s><|end|> no <start_of_turn>")],
        [(U, "think"), (A, "<think>\nhm\n</think>\n\nso")],
    ]
    cases = []
    for name, (template, bos, eos, pad) in forms.items():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}
        config.update({k: v for k, v in [("bos_token", bos), ("pad_token", pad)] if v})
        with tempfile.TemporaryDirectory() as d:
            d = pathlib.Path(d)
            (d / "tokenizer.json").write_text(json.dumps(tok))
            (d / "tokenizer_config.json").write_text(json.dumps(config))
            (d / "chat_template.jinja").write_text(template)
            t = transformers.AutoTokenizer.from_pretrained(d)
        # The day is not pinned in ringtune unless it is asked to be: strftime_now is not defined there.
        t.chat_template = template.replace("strftime_now is defined", "false")
        for i, talk in enumerate(talks):
            messages = [{"role": r, "content": c} for r, c in talk]
            def ids(m, gen):
                try:
                    return list(t.apply_chat_template(m, add_generation_prompt=gen, sanitize_control_tokens=i == 2)["input_ids"])
                except Exception as e:
                    return None
            cases.append({"form": name, "talk": i, "ids": ids(messages, False), "prompt_ids": ids(messages[:-1], True)})
        forms[name] = {"template": template, "config": config}
    out = {"generator": f"tests/python/record_templates.py, transformers {transformers.__version__}", "tokenizer": tok, "forms": forms,
           "talks": [[{"role": r, "content": c} for r, c in talk] for talk in talks], "cases": cases}
    pathlib.Path("tests/data/chat_templates.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")

main(sys.argv[1])
