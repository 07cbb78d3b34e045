#!/bin/sh
# The whole job on real text (data/demo), on the CPU: tokenise and pack, pretrain a tiny base model, fine-tune it with LoRA on three data
# sets, evaluate, generate, merge. Run again, it takes up what was interrupted and keeps what is done.
set -eu
cd "$(dirname "$0")/.."

out=${1:-demo_out}
data=data/demo
tokenizer=$data/spm4k.model
sets="$data/define.jsonl $data/chat.jsonl $data/jargon.jsonl"
ringtune() { target/release/ringtune "$@"; }
step() { printf '\n== %s\n' "$*"; }
mkdir -p "$out"
started=$(date +%s)

step "tokenise: $out/tokens"
# shellcheck disable=SC2086
ringtune pack --tokenizer-path $tokenizer --dataset-paths $data/pretrain_train.txt $data/pretrain_valid.txt --output "$out/tokens"
# shellcheck disable=SC2086
ringtune pack --tokenizer-path $tokenizer --dataset-paths $sets --prompt-template chatml --max-seq-len 256 --output "$out/tokens"

base=$out/base/demo_model/final
if [ -f "$base/model.safetensors" ]; then
    step "pretrain: $base is there; \`make clean-demo\` starts from nothing"
else
    step "pretrain a tiny base model: $base"
    ringtune pretrain --config-path configs/demo_pretrain.json --model-config configs/demo_model.json --tokenizer-path $tokenizer \
        --dataset-paths "$out/tokens/pretrain_train.tok" --val-paths "$out/tokens/pretrain_valid.tok" \
        --output-dir "$out/base" --resume-from-checkpoint auto
fi

tuned=$out/sft
if [ -f "$tuned/merged/model.safetensors" ]; then
    step "fine-tune: $tuned is there; \`make clean-demo\` starts from nothing"
else
    step "fine-tune it with LoRA on three data sets: $tuned"
    ringtune sft --config-path configs/demo_sft.json --model-path "$base" --tokenizer-path $tokenizer \
        --dataset-paths "$out/tokens/define.tok" "$out/tokens/chat.tok" "$out/tokens/jargon.tok" --dataset-weights 0.5 0.3 0.2 \
        --prompt-template chatml --use-lora --lora-r 16 --packing --do-gen-test --merge-adapters \
        --output-dir "$tuned" --resume-from-checkpoint auto
fi

# The figures of one evaluation in metrics.jsonl: value LINE KEY
value() { printf '%s' "$1" | tr ',{}' '\n\n\n' | sed -n "s|^\"$2\": *||p" | head -n 1; }
first=$(grep '"eval_loss"' "$tuned/metrics.jsonl" | head -n 1)
# The adapter that was written is that of the best evaluation.
best=$(grep '"eval_loss"' "$tuned/metrics.jsonl" | while read -r line; do
    printf '%s %s\n' "$(value "$line" eval_loss)" "$line"
done | sort -g | head -n 1 | cut -d ' ' -f 2-)

step "validation loss on the same held-out rows"
printf '  %-34s %10s %10s\n' "" "base" "fine-tuned"
for set in define chat jargon; do
    key="eval_${set}_loss"
    printf '  %-34s %10.4f %10.4f\n' "$set" "$(value "$first" "$key")" "$(value "$best" "$key")"
done
printf '  %-34s %10.4f %10.4f\n' "together" "$(value "$first" eval_loss)" "$(value "$best" eval_loss)"

step "written in $(( $(date +%s) - started )) s"
for path in "$base" "$tuned/adapter_model.safetensors" "$tuned/merged" "$tuned/metrics.jsonl" "$tuned/trainer_state.json" \
    "$out/base/demo_model/loss.svg" "$out/base/demo_model/loss.png" "$tuned/loss.svg" "$tuned/loss.png"; do
    [ -e "$path" ] && printf '  %s\n' "$path"
done
