#!/bin/sh
# Breaks the code once in each place of a list and asks the tests to notice: for whoever changed a test, started by hand.
#   scripts/mutants.sh [WORD…]   only the mutations whose name holds one of the words
# It works on a copy of the last commit with a target folder of its own (MUTANTS_DIR, kept between runs), and ends with 1 where a
# mutation survived or no longer applies. The last result is in tests/README.md.
set -u
cd "$(dirname "$0")/.."
dir=${MUTANTS_DIR:-${TMPDIR:-/tmp}/ringtune-mutants}
mkdir -p "$dir"
from=$PWD
# The tree is kept: only what differs from the last time is compiled again.
[ -d "$dir/tree" ] || git clone --quiet "$from" "$dir/tree" || exit 1
git -C "$dir/tree" fetch --quiet "$from" HEAD && git -C "$dir/tree" reset --quiet --hard FETCH_HEAD || exit 1
words="$*"
cd "$dir/tree" || exit 1
export CARGO_TARGET_DIR="$dir/target"
# Our own code alone is compiled in another way, so that a target folder put there beforehand serves.
set -- --config profile.release.package.ringtune.opt-level=1 --config profile.release.debug=false
quick="$*"

survived=0 tried=0
# mutant NAME FILE PERL TESTS…: a substitution in a file, and the tests (names or parts of names) of which one has to fail.
mutant() {
    name=$1 file=$2 change=$3
    shift 3
    [ -z "$words" ] || { for word in $words; do case $name in *"$word"*) break ;; *) false ;; esac; done || return 0; }
    tried=$((tried + 1))
    cp "$file" "$dir/original"
    perl -0pi -e "$change" "$file"
    if cmp -s "$file" "$dir/original"; then
        verdict="NOT APPLIED"
    elif ! cargo build --release --lib $quick >"$dir/log" 2>&1; then
        verdict="DOES NOT BUILD"
    elif cargo nextest run --release $quick --package ringtune --lib --test it --no-fail-fast "$@" >"$dir/log" 2>&1; then
        verdict=SURVIVED
    else
        by=$(sed -n 's/^ *FAIL \[[^]]*\] ([^)]*) //p; s/^ *FAIL \[[^]]*\] //p' "$dir/log" | sort -u | head -1)
        verdict="killed by ${by:-nothing, or no test has such a name: $dir/log}"
    fi
    case $verdict in "killed by ringtune"*) ;; *) survived=$((survived + 1)) ;; esac
    printf '%-44s %s\n' "$name" "$verdict"
    cp "$dir/original" "$file"
    touch "$file"
}

mutant "dropout: one mask for every step" src/train/step.rs 's/mix\(&\[self\.seed, step, k as u64\]\)/mix(&[self.seed, 0 * step, k as u64])/' dropout_mask
mutant "dropout: one mask for every micro-batch" src/train/step.rs 's/mix\(&\[self\.seed, step, k as u64\]\)/mix(&[self.seed, step, 0 * k as u64])/' dropout_mask
mutant "dropout: one mask for every layer" src/model/pass.rs 's/self\.layer as u64, product/0, product/' dropout_mask
mutant "dropout: one mask for every target" src/model/pass.rs 's/, product as u64\]\), p/, 0 * product as u64]), p/' dropout_mask
mutant "LoRA: one A for every layer" src/model/lora.rs 's/STREAM_LORA, i as u64/STREAM_LORA, 0 * i as u64/' first_values
mutant "LoRA: one A for every target" src/model/lora.rs 's/i as u64, product as u64\]/i as u64, 0 * product as u64]/' first_values
mutant "bad steps never end a row" src/train/trainer.rs 's/\n        s\.bad_in_row = 0;//' sound_step
mutant "no evaluation after the last step" src/train/trainer.rs 's/\n *\|\| \(last && settings\.eval_every != Every::Never\)//' last_step_is
mutant "train_loss of the last step alone" src/train/outputs.rs 's/state\.loss_sum \/ state\.updates\.max\(1\) as f64/state.loss_sum/' summary_has
mutant "sampling: one draw for every token" src/generate/sampling.rs 's/f64_at\(seen\.len\(\) as u64\)/f64_at(0)/' draw
mutant "sampling: one draw for every sequence" src/generate/sampling.rs 's/STREAM_SAMPLE, sequence\]/STREAM_SAMPLE, 0 * sequence]/' draw
for setting in packing seed max_seq_len lr_scheduler_type mixed_precision max_grad_norm warmup_steps weight_decay; do
    mutant "fingerprint: $setting is not compared" src/train/setup.rs "s/\\(\"$setting\", [^\\n]*\\),\\n//" decides what_changed
done
mutant "fsync: content of a file" src/files.rs 's/file\.sync_all\(\)\.at\(path\)/Ok(())/' durable
mutant "fsync: folder after a rename" src/files.rs 's/\n    sync_dir\(&parent\(path\)\)\n/\n    Ok(())\n/' durable
mutant "fsync: folder that was published" src/files.rs 's/\n    sync_dir\(&parent\(to\)\)\?;//' durable
mutant "fsync: new parents" src/files.rs 's/missing\.iter\(\)\.rev\(\)\.try_for_each\(\|new\| sync_dir\(&parent\(new\)\)\)/Ok(())/' durable
mutant "fsync: checkpoints set aside" src/checkpoint/manifest.rs 's/\n        sync_dir\(output_dir\)\?;//' durable
mutant "the best is kept although it is gone" src/train/run.rs 's/\n            state\.best\.best = None;//' best_model_that_is_gone
mutant "a lost best ends the run" src/train/run.rs 's/let best = load_best\(dev, &mut work, &state, &checkpoints, s\);/let best: Result<()> = Ok(load_best(dev, &mut work, &state, &checkpoints, s)?);/' best_checkpoint_that_is_gone
mutant "trained rows of a padded model made anew" src/commands/start.rs 's/if rows == all \{ BTreeMap::new\(\) \}/if rows > 0 { BTreeMap::new() }/' padding
mutant "another level on resume is not said" src/train/checkpoints.rs 's/filter\(\|then\| \*then != self\.arithmetic\)/filter(|_| false)/' instruction_level
mutant "a 206 of another version is appended" src/datasets/download.rs 's/206 if new_tag == tag && /206 if /' another_version
mutant "a cut file is not noticed" src/mapped.rs 's/found >= expected && !cut/true || cut/' is_cut
mutant "evaluation data that is cut" src/train/batches.rs 's/set\.tokens\.check_whole\(\)\n/Ok(())\n/' is_cut_while
mutant "AdamW: no bias correction of v" src/optim/adamw.rs 's/s\.beta2\.powf\(/0.0f64.powf(/' golden_steps adamw
mutant "merge: another scale" src/hf/merge.rs 's/self\.0\.adapter\.config\.lora\.scale\(\) as f32/1.5/' merg second_reading
mutant "merge: no second reading" src/hf/merged.rs 's/second_reading::check\(base, adapter\.dir\(\), &written\)/Ok::<usize, crate::error::Error>(0)/' second_reading merge
mutant "rows: the whole file in memory" src/data/source/items.rs 's/const BATCH: usize = 2 << 20;\n.*?\nconst MOST_ITEMS: usize = 1 << 14;/const BATCH: usize = 1 << 40;\nconst MOST_ITEMS: usize = 1 << 40;/s' bounded_memory
mutant "parity: tensors that nothing compares" tests/common/parity/run.rs 's/for name in self\.case\.unread\(\)/for name in Vec::<String>::new()/' recorded_tensor what_a_case
mutant "parity: shorter tensors" tests/common/parity/report.rs 's/_ => return f64::INFINITY/_ => break/' length relative_error what_a_case
mutant "a signal leaves its temporary files" src/train/signals.rs 's/remove_pending\(\);//g' signal
echo "$tried mutations, $survived not killed"
[ "$survived" = 0 ]
