#!/bin/sh
# Builds for aarch64 Linux and runs a choice of the tests there, on an emulated processor (qemu-user): what the instructions compute, how
# ranks meet, what the programs say. It takes an hour and more on two cores, most of it emulation, and says nothing of speed.
#   scripts/test-aarch64.sh [unit|pages|levels|it|ranks|train]…     all parts without a word; PROGRAMS: a folder with this machine's ringtune;
#   LIMIT: seconds for each program of tests, which then counts as failed
# Debian: apt-get install gcc-aarch64-linux-gnu g++-aarch64-linux-gnu cmake qemu-user-static
set -eu
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
sysroot=${QEMU_LD_PREFIX:-/usr/aarch64-linux-gnu}
folder=${CARGO_TARGET_DIR:-$PWD/target}/aarch64
say() { echo "test-aarch64: $*" >&2; }
skip() { echo "skipped: test-aarch64: $*" >&2; exit 0; }

emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || skip "no qemu-aarch64 (apt-get install qemu-user-static)"
for tool in aarch64-linux-gnu-gcc aarch64-linux-gnu-g++ cmake; do
    command -v $tool >/dev/null || skip "no $tool (apt-get install g++-aarch64-linux-gnu cmake)"
done
[ -e "$sysroot/lib/ld-linux-aarch64.so.1" ] || skip "no C library for aarch64 in $sysroot (QEMU_LD_PREFIX names another folder)"
command -v rustup >/dev/null || skip "no rustup: it has the standard libraries of other targets"
rustup target list --installed | grep -qx $target || rustup target add $target >&2 || skip "no standard library of $target"

export QEMU_LD_PREFIX="$sysroot"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
export AR_aarch64_unknown_linux_gnu=aarch64-linux-gnu-ar
release=$folder/$target/release

# Programs and tests, without MPI: its library is this machine's.
say "build"
list=$(cargo test --no-run --locked --release -p ringtune -p launcher --lib --bins --test it --target $target --target-dir "$folder" 2>&1 |
    tee /dev/stderr | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
[ -n "$list" ] || { say "the build failed"; exit 1; }
cargo build --locked --release -p ringtune -p launcher --bins --target $target --target-dir "$folder"
one() { echo "$list" | grep "/deps/$1-" | head -n "${2:-1}" | tail -n 1; }
unit=$(one ringtune) launcher=$(one launcher) it=$(one it)

# A test starts programs, and ringrun ranks: this machine runs them through a script in the program's place.
for program in ringtune ringrun; do
    [ "$(head -c 2 "$release/$program")" = '#!' ] || mv "$release/$program" "$release/$program.elf"
    printf '#!/bin/sh\nexec "%s" -0 "$0" "$0.elf" "$@"\n' "$emulator" >"$release/$program"
    chmod +x "$release/$program"
done
# The tests build it anew where they find it old, for this machine.
touch -d '+1 day' "$release/ringrun.asked"

# Tests call `cc` for a library that the program then loads.
mkdir -p "$folder/tools"
printf '#!/bin/sh\nexec aarch64-linux-gnu-gcc "$@"\n' >"$folder/tools/cc"
chmod +x "$folder/tools/cc"

status=0 parts=${*:-unit pages levels it ranks train}
# Seconds that one program of tests may take.
LIMIT=${LIMIT:-1800}
want() { case " $parts " in *" $1 "*) return 0 ;; esac; return 1; }

# run CPU PROGRAM WORD…: the tests that have one of the words in their name, on that processor; `-NAME`: but for those. With pages of $pages bytes.
pages=4096
run() {
    cpu=$1 program=$2 words=
    shift 2
    for word in "$@"; do
        case $word in -*) words="$words --skip ${word#-}" ;; *) words="$words $word" ;; esac
    done
    say "$(basename "$program") on $cpu:$words"
    begun=$(date +%s) code=0
    # shellcheck disable=SC2086
    PATH="$folder/tools:$PATH" QEMU_CPU=$cpu timeout "$LIMIT" "$emulator" -p $pages "$program" --test-threads 2 $words || code=$?
    say "$(basename "$program") on $cpu:$words: $(($(date +%s) - begun)) s, $([ $code = 124 ] && echo "cut off after LIMIT=$LIMIT s" || echo "exit $code")"
    [ $code = 0 ] || status=1
}

# Left out, because the emulator answers and not a processor: a peak in registers. Tests that start themselves again are left out too: the
# kernel of this machine is asked for that, and it knows no such program.
peak=-peaks_grow_with_the_width_of_the_units

if want unit; then
    run max "$launcher"
    run max "$unit" -cpu::
fi
# Systems on aarch64 have pages of 4, 16 or 64 KiB.
if want pages; then
    for pages in 16384 65536; do
        run max "$unit" cpu::pages:: cpu::buffer:: mapped:: machine::
    done
    pages=4096
fi
# Every level of a processor with bf16, and of one without, where the level that needs it is refused.
if want levels; then
    run max "$unit" cpu:: $peak
    run cortex-a72 "$unit" cpu::level:: cpu::pack:: cpu::kept:: cpu::matmul:: cpu::testing::
    for level in neonbf16 avx2; do
        said=$(RINGTUNE_CPU=$level QEMU_CPU=cortex-a72 "$release/ringtune" bench kernels add 2>&1) && status=1
        say "RINGTUNE_CPU=$level on cortex-a72: $said"
        echo "$said" | grep -q "RINGTUNE_CPU=$level: \(this processor lacks it; its fastest level is neon\|expected one of portable, neon, neonbf16\)" || status=1
    done
fi
if want it; then
    run max "$it" gradients:: golden::the_smallest golden_steps:: schedule:: doctor:: train:: resume::full resume::lora_with eval::losses eval::adapter \
        generate_cmd:: merge_cmd::it_gives check::the_figures check::memory_is
fi
# What the trainings below share; the level costs the emulator least.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
head -n 60 data/demo/chat.jsonl >"$work/rows.jsonl"
# sft OUT FLAG…: the words of a training.
sft() {
    echo "sft --device cpu --model-path tests/data/model/tiny-llama-tied --dataset-paths $work/rows.jsonl --output-dir $work/$1 --prompt-template chatml --packing
        --max-seq-len 64 --learning-rate 5e-3 --mixed-precision no --threads 1 --per-device-train-batch-size 1"
    shift
    echo "$@"
}
# ring OUT FLAG…: the same on two ranks.
ring() {
    # shellcheck disable=SC2046
    RINGTUNE_CACHE=$work/cache RINGTUNE_CPU=neon QEMU_CPU=max "$release/ringrun" -n 2 --oversubscribe "$release/ringtune" $(sft "$@") >"$work/$1.out" 2>"$work/$1.log"
}
failed() {
    say "failed: $*"
    status=1
}
# Waits until a training has logged three steps.
three_steps() {
    until [ "$(wc -l <"$work/$1/metrics.jsonl" 2>/dev/null || echo 0)" -ge 3 ]; do
        kill -0 "$ring" 2>/dev/null || { failed "$1 ended early"; cat "$work/$1.log" >&2; return 1; }
        sleep 1
    done
}
if want ranks; then
    # Others wait a minute at most, which no step has to take here.
    run max "$it" ranks:: ringrun::a_killed_rank ringrun::ranks_with_other
    lora="--use-lora --lora-r 4"
    # shellcheck disable=SC2046,SC2086
    RINGTUNE_CACHE=$work/cache RINGTUNE_CPU=neon QEMU_CPU=max "$release/ringtune" $(sft one $lora --max-steps 4 --grad-accum 2) >"$work/one.out" 2>"$work/one.log" || failed "one rank"
    # shellcheck disable=SC2086
    ring two $lora --max-steps 4 --grad-accum 1 || failed "two ranks"
    cmp "$work/one/adapter_model.safetensors" "$work/two/adapter_model.safetensors" && say "two ranks have the bits of one" || failed "two ranks differ from one"
    # shellcheck disable=SC2086
    ring stopped $lora --max-steps 1000 --grad-accum 1 & ring=$!
    code=0
    three_steps stopped && pkill -TERM -P $ring; wait $ring || code=$?
    ls -d "$work"/stopped/checkpoint-* >/dev/null && [ $code = 75 ] && say "SIGTERM: $(tail -n 1 "$work/stopped.log")" || failed "SIGTERM: $code, $(tail -n 1 "$work/stopped.log")"
    # shellcheck disable=SC2086
    ring killed $lora --max-steps 1000 --grad-accum 1 & ring=$!
    three_steps killed && pkill -KILL -P $ring; wait $ring || true
    left() { pgrep -f "$work/killed" || true; }
    for _ in $(seq 100); do [ -z "$(left)" ] || sleep 0.1; done
    [ -z "$(left)" ] && say "a killed ringrun takes its ranks with it" || failed "ranks are left: $(left)"
fi
# A training in f32, here and there: the same formulas in the same order, so the same bits of everything that is written.
if want train; then
    [ -n "${PROGRAMS-}" ] || cargo build --locked --release -p ringtune
    here=${PROGRAMS:-${CARGO_TARGET_DIR:-target}/release}/ringtune
    # train OUT PROGRAM LEVEL
    train() {
        # shellcheck disable=SC2046,SC2086
        RINGTUNE_CACHE=$work/cache-$1 RINGTUNE_CPU=$3 QEMU_CPU=max "$2" $(sft "$1" $flags --max-steps 8 --eval-steps 4) >"$work/$1.log" 2>&1 ||
            { failed "sft $flags at $3"; cat "$work/$1.log" >&2; }
    }
    losses() { sed 's/.*"\(loss\|eval_loss\)":\([-0-9.e]*\).*/\1 \2/' "$work/$1/metrics.jsonl"; }
    for flags in "--use-lora --lora-r 4" --no-lora; do
        for pair in "portable portable" "avx2 neon"; do
            ours=${pair% *} theirs=${pair#* }
            case $ours-$(uname -m) in avx2-x86_64) grep -q '\<avx2\>' /proc/cpuinfo || { say "skipped: no avx2 here"; continue; } ;; avx2-*) ours=neon ;; esac
            rm -rf "$work/here" "$work/there"
            train here "$here" "$ours"
            train there "$release/ringtune" "$theirs"
            if [ "$(losses here)" = "$(losses there)" ] && cmp "$work"/here/*model.safetensors "$work"/there/*model.safetensors; then
                say "sft $flags: $ours here and $theirs on aarch64 have the same losses and files ($(losses there | head -n 1) … $(losses there | tail -n 1))"
            else
                say "sft $flags: $ours here and $theirs on aarch64 differ"
                losses here | head -n 3 >&2
                losses there | head -n 3 >&2
                status=1
            fi
        done
    done
fi
[ $status = 0 ] && say "all passed" || say "something failed, see above"
exit $status
