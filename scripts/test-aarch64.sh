#!/bin/sh
# Builds for aarch64 Linux and runs a choice of the tests there, on an emulated processor (qemu-user): what the instructions compute, how
# ranks meet, what the programs say. It takes an hour and more on two cores, most of it emulation, and says nothing of speed.
#   scripts/test-aarch64.sh [unit|pages|levels|it|ranks|train]…     all parts without a word; PROGRAMS: a folder with this machine's ringtune
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
touch "$release/ringrun.asked"

# Tests call `cc` for a library that the program then loads.
mkdir -p "$folder/tools"
ln -sf "$(command -v aarch64-linux-gnu-gcc)" "$folder/tools/cc"
export PATH="$folder/tools:$PATH"

status=0 parts=${*:-unit pages levels it ranks train}
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
    # shellcheck disable=SC2086
    QEMU_CPU=$cpu "$emulator" -p $pages "$program" --test-threads 2 $words || status=1
}

# Left out, because the emulator answers and not a processor: a peak in registers (it has none), what is read of its own /proc.
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
if want ranks; then
    run max "$it" ringrun::two_and_four ringrun::state_that_lies ringrun::a_killed_rank ringrun::a_signal_saves ringrun::no_rank_outlives ringrun::ranks_with_other ranks::
fi
# A training in f32, here and there: the same formulas in the same order, so the same bits of everything that is written.
if want train; then
    [ -n "${PROGRAMS-}" ] || cargo build --locked --release -p ringtune
    here=${PROGRAMS:-${CARGO_TARGET_DIR:-target}/release}/ringtune
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    head -n 60 data/demo/chat.jsonl >"$work/rows.jsonl"
    train() {
        name=$1 program=$2 level=$3
        RINGTUNE_CACHE=$work/cache-$name RINGTUNE_CPU=$level QEMU_CPU=max "$program" sft --device cpu --model-path tests/data/model/tiny-llama-tied \
            --dataset-paths "$work/rows.jsonl" --output-dir "$work/$name" --prompt-template chatml --packing --max-seq-len 64 --max-steps 8 \
            --learning-rate 5e-3 --eval-steps 4 --mixed-precision no --threads 1 $flags >"$work/$name.log" 2>&1 || { cat "$work/$name.log" >&2; status=1; }
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
