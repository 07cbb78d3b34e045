#!/bin/sh
# A quarter of an hour on a GPU: what this build does there, on a machine without Rust and without network.
#   scripts/gpu_check.sh pack DIR                          on the build machine: programs, data, kernels, the CPU's curves
#   DIR/gpu_check.sh run OUT [--only STEP…] [--device N]   there: each step with a limit of its own, OUT/summary.md as it goes
# Steps: doctor, kernels, peer (PyTorch beside them), tests, train, step, prebuilt, speed, sanitizer; BUDGET seconds in all (540: two commands
# of ten minutes hold it and what was left out), those that no time is left for are named. A part that fails, hangs or fills the disk costs the
# others nothing. On the emulated GPU (scripts/vgpu.sh) kernels and step count and time nothing, and the last two say nothing real; there STEPS=12,
# for both, makes the trainings short, and BUDGET, TRAIN_LIMIT, TEST_LIMIT and TEST_THREADS make room for slow ones. PROGRAMS: a folder with
# ringtune and cuda-tests, and perhaps kernels, that pack takes instead of building them. ARCHS: what pack compiles kernels for, sm_90a; with compute_80 the emulated GPU
# takes them too, where no NVRTC is found (HOME and PATH elsewhere) or in the step prebuilt.
set -u

usage() { sed -n '2,11p' "$0" | cut -c 3- >&2; exit 2; }

pack() {
    [ $# -eq 1 ] || usage
    mkdir -p "$1" || exit 1
    to=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 1
    if [ -n "${PROGRAMS-}" ]; then
        program=$PROGRAMS/ringtune tests=$PROGRAMS/cuda-tests
    else
        cargo build --release --quiet || exit 1
        program=${CARGO_TARGET_DIR:-target}/release/ringtune
        tests=$(cargo test --release --no-run --test cuda --message-format=json 2>/dev/null |
            sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | grep '/cuda-' | tail -n 1)
    fi
    [ -n "$tests" ] || { echo "gpu_check: the CUDA tests do not build" >&2; exit 1; }
    rm -rf "$to/bin" "$to/lib" "$to/tests" "$to/data" "$to/configs" "$to/kernels" "$to/curves"
    mkdir -p "$to/bin" "$to/lib" "$to/tests/data" "$to/data" "$to/curves"
    cp "$program" "$to/bin/ringtune" && cp "$tests" "$to/bin/cuda-tests" && strip "$to/bin/ringtune" "$to/bin/cuda-tests" || exit 1
    # The loader and what it loads here, for a machine whose own are older.
    ldd "$to/bin/ringtune" "$to/bin/cuda-tests" | sed -n 's/^[^/]*=> \(\/[^ ]*\).*/\1/p; s/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\).*/\1/p' |
        sort -u | while read -r file; do cp -L "$file" "$to/lib/"; done
    cp -r tests/data/golden tests/data/model tests/data/tokenizer "$to/tests/data/"
    cp -r data/demo "$to/data/" && cp -r configs "$to/" && cp scripts/gpu_check.sh scripts/gpu_peer.py "$to/"
    if [ -d "${PROGRAMS-}/kernels" ]; then
        cp -r "$PROGRAMS/kernels" "$to/"
    else
        "$to/bin/ringtune" kernels --arch "${ARCHS:-sm_90a}" --output "$to/kernels"
    fi || exit 1
    # What the same trainings give on the CPU.
    (cd "$to" && bin=$to/bin && for run in pretrain full lora; do
        training $run curves/$run cpu >"curves/$run.log" 2>&1 || { tail -n 3 "curves/$run.log" >&2; exit 1; }
        mv "$(found curves/$run)" "curves/$run.jsonl" && rm -rf "curves/$run" "curves/$run.log"
    done) || exit 1
    glibc=$(objdump -T "$to/bin/ringtune" "$to/bin/cuda-tests" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)
    commit=$(git rev-parse HEAD)$(git diff --quiet HEAD || echo " with changes")
    printf 'commit %s\nneeds %s\npacked %s\n' "$commit" "$glibc" "$(date -u +%FT%TZ)" >"$to/manifest"
    tar -C "$to" -cJf "$to.tar.xz" . && du -h "$to.tar.xz" && cat "$to/manifest"
}

begin=

# training NAME OUT DEVICE FLAGS…: one of the trainings whose losses are compared.
training() {
    name=$1 out=$2 device=$3
    shift 3
    common="--device $device --seed 7 --max-seq-len 128 --per-device-train-batch-size 4 --no-tensorboard --quiet --learning-rate 2e-3"
    case $name in
        pretrain)
            # shellcheck disable=SC2086
            $begin "$bin/ringtune" pretrain --model-config configs/demo_model.json --tokenizer-path data/demo/spm4k.model $common \
                --dataset-paths data/demo/pretrain_valid.txt --max-steps "${STEPS:-200}" --output-dir "$out" "$@" ;;
        full)
            # shellcheck disable=SC2086
            $begin "$bin/ringtune" sft --model-path tests/data/model/tiny-llama-tied --no-lora $common --dataset-paths data/demo/chat.jsonl \
                --prompt-template chatml --max-steps "${STEPS:-60}" --val-fraction 0 --output-dir "$out" "$@" ;;
        lora)
            # shellcheck disable=SC2086
            $begin "$bin/ringtune" sft --model-path tests/data/model/tiny-llama-tied --lora-r 8 --lora-dropout 0.05 $common \
                --dataset-paths data/demo/chat.jsonl --prompt-template chatml --max-steps "${STEPS:-60}" --val-fraction 0 \
                --mixed-precision bf16 --output-dir "$out" "$@" ;;
    esac
}

found() { find "$1" -name metrics.jsonl | head -n 1; }

# losses FILE: the losses of a log, one a line.
losses() { sed -n 's/.*"loss": *\([0-9.eE+-]*\).*/\1/p' "$1"; }

# distance A B: the largest relative difference of the running means of eight losses, in per cent.
distance() {
    losses "$1" >"$work/a" && losses "$2" >"$work/b"
    paste "$work/a" "$work/b" | awk 'NF == 2 { a[NR % 8] = $1; b[NR % 8] = $2; x = y = 0; for (i in a) { x += a[i]; y += b[i] }
        d = 100 * (x - y) / y; if (d < 0) d = -d; if (d > worst) worst = d } END { if (NR == 0) exit 1; printf "%.3f", worst }'
}

# What a training ends with: no checkpoint, and not the base with more rows that lies beside an adapter from the start.
weights() { find "$1" -name 'model.safetensors' -o -name 'adapter_model.safetensors' | grep -v 'checkpoint\|resized_base' | head -n 1; }

# limit N: N seconds, or what is left of the budget.
limit() {
    rest=$((ends - $(date +%s)))
    [ $rest -lt 1 ] && rest=1
    [ $rest -lt "$1" ] && echo $rest || echo "$1"
}

# Whether a child has ended; a zombie has.
ended() { case $(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) in '' | Z) ;; *) return 1 ;; esac; }

# within SECONDS COMMAND…: its exit status, or 124 where it was cut off. TERM, then KILL: trainings catch the first. What waits in the driver
# ends by neither, and is left behind.
within() {
    seconds=$(limit "$1")
    shift
    last=$(($(date +%s) + seconds + 8))
    timeout -k 5 "$seconds" "$@" &
    child=$!
    until ended $child; do
        [ "$(date +%s)" -gt $last ] && return 124
        sleep 0.1
    done
    wait $child
    status=$?
    # KILL by `timeout`, not by the system.
    [ $status = 137 ] && [ "$(date +%s)" -ge $((last - 8)) ] && status=124
    return $status
}

# On a full disk the table is still printed.
say() { printf '| %s | %s | %s |\n' "$1" "$2" "$3" | tee -a "$out/summary.md"; }

# The last line of a file that says something, fit for a table.
last_line() { grep -v '^[[:space:]]*$' "$1" 2>/dev/null | tail -n 1 | tr '|' ',' | cut -c -200; }

# A program that starts: that of the pack, or by the loader of the pack where this machine's libraries are older.
start_programs() {
    bin=$here/bin
    if ! "$bin/ringtune" --version >/dev/null 2>"$work/error"; then
        why=$(last_line "$work/error")
        mkdir -p "$work/bin"
        for program in ringtune cuda-tests; do
            printf '#!/bin/sh\nexec "%s" --library-path "%s" "%s" "$@"\n' "$here"/lib/ld-linux*.so.* \
                "$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$here/bin/$program" >"$work/bin/$program"
            chmod +x "$work/bin/$program"
        done
        bin=$work/bin
        "$bin/ringtune" --version >/dev/null 2>"$work/error" && verdict=passed || verdict=FAILED
        say programs $verdict "$why: started by the loader of the pack $(last_line "$work/error")"
    fi
    BIN=$bin && export BIN
}

doctor() { within 40 "$bin/ringtune" doctor --json --require cuda >"$out/doctor.json" 2>"$work/error"; }

step_doctor() {
    { cat manifest; ldd --version 2>&1 | head -n 1; uname -a; df -h "$out" "$work" /tmp; } >"$out/machine.txt" 2>&1
    within 20 nvidia-smi >>"$out/machine.txt" 2>&1
    within 5 nvcc --version >>"$out/machine.txt" 2>&1
    if doctor; then
        say doctor passed "$(gpu)"
        return
    fi
    why=$(last_line "$work/error")
    # Without NVRTC, or with one that does not work: the kernels of the pack are for one architecture, and need none.
    RINGTUNE_KERNELS=$here/kernels && export RINGTUNE_KERNELS
    if doctor; then
        say doctor passed "$(gpu), with the kernels of the pack: $why"
    else
        unset RINGTUNE_KERNELS
        say doctor FAILED "$why"
    fi
}

gpu() { sed -n 's/^ *"\(description\|name\)": "\(.*\)",*$/\2/p' "$out/doctor.json" | grep -m 1 -i 'nvidia\|vgpu\|cuda' | tr '|' ','; }

# one LOG TEST: a test in a process of its own, so that a kernel that faults spoils no other test, and one that hangs ends alone.
one() {
    text=${RINGTUNE_TEST_DIR:-/tmp}/$2.txt
    timeout -k 2 "${TEST_LIMIT:-60}" "$bin/cuda-tests" --exact "$2" >"$text" 2>&1 &
    child=$!
    # `timeout` has a group of its own, which nobody else ends.
    trap 'kill $child 2>/dev/null' TERM
    wait $child
    status=$?
    case $status in
        0) printf 'ok %s\n' "$2" ;;
        124 | 137 | 143) printf 'CUT OFF %s, which has %s s\n' "$2" "${TEST_LIMIT:-60}" ;;
        *) printf 'FAILED %s (%s)\n%s\n' "$2" $status "$(tail -n 30 "$text" | cut -c -500)" ;;
    esac >>"$1"
}

# each LOG THREADS TEST…: all of these, so many at once.
each() {
    log=$1 threads=$2
    shift 2
    printf '%s\n' "$@" | xargs -P "$threads" -n 1 sh "$here/gpu_check.sh" one "$log"
}

# cuda_tests NAME LIMIT WORDS…: runs tests whose names begin with one of the words, in the order of the words.
cuda_tests() {
    name=$1 most=$2
    shift 2
    all=$("$bin/cuda-tests" --list --format terse 2>"$work/error" | sed -n 's/: test$//p')
    chosen=$(for word in "$@"; do printf '%s\n' "$all" | grep "^$word"; done)
    wanted=$(printf '%s\n' "$chosen" | grep -c .)
    [ "$wanted" -gt 0 ] || { say "$name" FAILED "no test begins with $*: $(last_line "$work/error")"; return; }
    : >"$out/$name.log"
    # shellcheck disable=SC2086
    RINGTUNE_TEST_PROGRAM=$bin/ringtune RINGTUNE_TEST_DIR=$work RINGTUNE_NO_SKIP=1 \
        within "$most" sh "$here/gpu_check.sh" each "$out/$name.log" "${TEST_THREADS:-8}" $chosen >/dev/null 2>"$work/error"
    status=$?
    passed=$(grep -c '^ok ' "$out/$name.log") failed=$(grep -c '^FAILED ' "$out/$name.log") cut=$(grep -c '^CUT OFF ' "$out/$name.log")
    which=$(sed -n 's/^\(FAILED\|CUT OFF\) \([a-z0-9_:]*\).*/\2/p' "$out/$name.log" | head -n 4 | tr '\n' ' ')
    if [ "$failed" -gt 0 ]; then
        say "$name" FAILED "$passed of $wanted passed, $failed did not, $cut were cut off: $which"
    elif [ "$passed" = "$wanted" ]; then
        say "$name" passed "$passed tests"
    elif [ "$cut" -gt 0 ] || [ $status = 124 ]; then
        say "$name" "CUT OFF" "$passed of $wanted had passed, none failed: $which"
    else
        say "$name" FAILED "$passed of $wanted passed: $(last_line "$work/error")"
    fi
}

# Numerics first; what compiles for other architectures says nothing about this GPU.
step_tests() {
    cuda_tests tests-numerics 120 device:: matmul:: norm:: operations:: project:: hopper:: random::drawn_trainings
    # Where the kernels of the pack run, nothing can be compiled.
    [ -n "${RINGTUNE_KERNELS-}" ] && compiling="" || compiling="prebuilt:: doctor:: offsets"
    # shellcheck disable=SC2086
    cuda_tests tests-rest 90 uploads:: prepared:: fold:: arenas:: launches:: train:: bench:: skip:: beyond:: $compiling
    [ -n "$compiling" ] || say "tests that compile" "left out" "prebuilt, doctor and offsets: there is no NVRTC here"
}

emulated() {
    [ -s "$out/doctor.json" ] || doctor
    grep -q '"emulated": true' "$out/doctor.json" 2>/dev/null
}

# measured KIND MODEL FLAGS…: `ringtune bench` of a model's shapes; its document joins OUT/KIND.json, its mistakes OUT/KIND.log.
measured() {
    kind=$1 model=$2
    shift 2
    label="commit $(sed -n 's/^commit //p' manifest)"
    within "${TRAIN_LIMIT:-90}" "$bin/ringtune" bench "$kind" --device "$device" --model "$model" --label "$label" --json "$@" \
        >"$work/bench.json" 2>>"$out/$kind.log"
    code=$?
    what="$kind $model${*:+ $*}"
    case $code in
        0) ;;
        124) say "$what" "CUT OFF" "after $seconds s"; return ;;
        *) say "$what" FAILED "$(last_line "$out/$kind.log")"; return ;;
    esac
    # A list of documents: what was there without its end, the new one, the end.
    { [ -s "$out/$kind.json" ] && sed '$d' "$out/$kind.json" && echo ',' || echo '['; cat "$work/bench.json"; echo ']'; } >"$work/all.json" &&
        mv "$work/all.json" "$out/$kind.json"
    # The first of a field, in units of 10^power.
    field() { sed -n "s/^ *\"$1\": \([0-9.e+-]*\),*$/\1/p" "$work/bench.json" | awk -v by="$2" 'NR == 1 { printf "%.4g", $1 / 10 ^ by }'; }
    cases=$(grep -c '^      "name"' "$work/bench.json")
    if emulated; then
        say "$what" passed "$cases cases: results right, or losses that fall; counters alone, no time"
    elif [ "$kind" = kernels ]; then
        say "$what" measured "$cases cases right; best product $(field flops_per_second 12) TFLOP/s, copy $(field bytes_per_second 9) GB/s"
        case $* in *--compare*) beside ;; esac
    else
        say "$what" measured "$(sed -n 's/^ *"tokens_per_second": \([0-9]*\).*/\1/p; s/^ *"mfu": \([0-9]*\.[0-9]\{0,3\}\).*/(MFU \1)/p' "$work/bench.json" | tr '\n' ' ')tokens/s, full then LoRA"
    fi
}

# Each product of the last document by our kernels and by cuBLASLt, in TFLOP/s, where it has both; joins OUT/products.md.
beside() {
    sed -n 's/^ *"\(flops_per_second\|name\|shape\)": "*\([^"]*[^",]\)"*,*$/\1\t\2/p' "$work/bench.json" | awk -F '\t' '
        # A case begins with its name and shape; those without times have no rate.
        $1 == "name" { name = $2; kind = name; sub(/ .*/, "", kind); sub(/^[^ ]* /, "", name) }
        $1 == "shape" { of = $2 }
        $1 == "flops_per_second" && name != "" {
            if (kind == "matmul") { ours[name] = $2; order[++n] = name; shape[name] = of }
            if (kind == "cublaslt") theirs[name] = $2
            name = ""
        }
        END {
            for (i = 1; i <= n; i++) {
                p = order[i]
                if (theirs[p] > 0) printf "| %s | %s | %.1f | %.1f | %.2f |\n", p, shape[p], ours[p] / 1e12, theirs[p] / 1e12, ours[p] / theirs[p]
            }
        }' >"$work/products"
    [ -s "$work/products" ] || { say "products beside cuBLASLt" "left out" "$(grep -h -m 1 'compare:' "$out/kernels.log" | tr '|' ',')"; return; }
    [ -s "$out/products.md" ] || printf '| product | m x n x k | ours, TFLOP/s | cuBLASLt | ours / theirs |\n| --- | --- | --- | --- | --- |\n' >"$out/products.md"
    cat "$work/products" >>"$out/products.md"
    say "products beside cuBLASLt" measured "$(awk -F '|' '{ n++; sum += $6; if (n == 1 || $6 < least) least = $6 } END { printf "%d of %s, ours / theirs %.2f on average, %.2f at least", n, "'"$model"'", sum / n, least }' "$work/products")"
}

step_kernels() {
    rm -f "$out/kernels.json" "$out/kernels.log" "$out/products.md"
    if emulated; then
        measured kernels tiny --compare cublaslt
    else
        # In parts, so that one that takes too long costs the others nothing.
        measured kernels 8b --compare cublaslt --only matmul
        measured kernels 8b --only attention
        measured kernels 8b --only project
        measured kernels 8b --only norm,rope,swiglu,embedding,bias,scatter,cast,head,adamw
        measured kernels 135m --compare cublaslt
    fi
}

# PyTorch on the shapes of the kernels that were measured.
step_peer() {
    command -v python3 >/dev/null || { say "beside PyTorch" "left out" "no python3 here"; return; }
    within 90 python3 "$here/gpu_peer.py" "$out/kernels.json" "$out/peer.md" >"$out/peer.log" 2>&1
    case $? in
        0) say "beside PyTorch" measured "$(last_line "$out/peer.log")" ;;
        3) say "beside PyTorch" "left out" "$(last_line "$out/peer.log")" ;;
        124) say "beside PyTorch" "CUT OFF" "peer.md has what was measured before" ;;
        *) say "beside PyTorch" FAILED "$(last_line "$out/peer.log")" ;;
    esac
}

step_step() {
    rm -f "$out/step.json" "$out/step.log"
    if emulated; then
        measured step tiny --layers 2
        return
    fi
    # Clocks and power beside the figures.
    nvidia-smi dmon -s puc -d 1 >"$out/clocks.txt" 2>&1 &
    clocks=$!
    for tokens in 2048 8192; do
        measured step 8b --layers 8 --tokens $tokens
    done
    measured step 135m
    kill -9 $clocks 2>/dev/null
}

step_prebuilt() {
    if emulated && ! grep -q '"target": "compute_' kernels/kernels.json; then
        say prebuilt "left out" "machine code for sm_90a, and the emulator takes PTX"
    else
        RINGTUNE_KERNELS=$here/kernels cuda_tests prebuilt 60 operations:: matmul:: norm::
    fi
}

step_train() {
    for run in pretrain full lora; do
        for again in 1 2; do
            within "${TRAIN_LIMIT:-60}" sh "$here/gpu_check.sh" training $run "$work/$run-$again" "$device" >"$out/train-$run.log" 2>&1
            code=$?
            [ $code = 0 ] && continue
            [ $code = 124 ] && verdict="CUT OFF" || verdict=FAILED
            say "train $run" "$verdict" "$(last_line "$out/train-$run.log")"
            continue 2
        done
        log=$(found "$work/$run-1") && cp "$log" "$out/train-$run.jsonl"
        apart=$(distance "$log" "curves/$run.jsonl")
        cmp -s "$(weights "$work/$run-1")" "$(weights "$work/$run-2")" && same="the same bits twice" || same="OTHER BITS the second time"
        awk "BEGIN { exit !(${apart:-100} <= 0.5) }" && [ "$same" = "the same bits twice" ] && verdict=passed || verdict=FAILED
        say "train $run" $verdict "loss within ${apart:-an unknown share of} % of the CPU's; $same"
    done
    resumed
}

# Killed in the middle and taken up again.
resumed() {
    [ -n "$(weights "$work/lora-1" 2>/dev/null)" ] || { say resume "left out" "there is no undisturbed run"; return; }
    sh "$here/gpu_check.sh" training lora "$work/killed" "$device" --save-steps 2 >"$out/resume.log" 2>&1 &
    child=$!
    last=$(($(date +%s) + $(limit 60)))
    until ls -d "$work/killed"/checkpoint-[1-9]* >/dev/null 2>&1 || ended $child || [ "$(date +%s)" -gt $last ]; do sleep 0.05; done
    kill -9 $child 2>/dev/null
    ended $child || sleep 1
    if [ -n "$(weights "$work/killed" 2>/dev/null)" ]; then
        say resume "left out" "the training was done before it could be killed"
        return
    fi
    at=$(ls -d "$work/killed"/checkpoint-* 2>/dev/null | sed 's/.*-//' | sort -n | tail -n 1)
    if within 90 sh "$here/gpu_check.sh" training lora "$work/killed" "$device" --save-steps 2 --resume-from-checkpoint auto >>"$out/resume.log" 2>&1 &&
        cmp -s "$(weights "$work/killed")" "$(weights "$work/lora-1")"; then
        say resume passed "killed after step ${at:-none}, then the bits of the undisturbed run"
    else
        say resume FAILED "killed after step ${at:-none}: $(last_line "$out/resume.log")"
    fi
}

step_speed() {
    for run in pretrain lora; do
        if ! within 60 sh "$here/gpu_check.sh" training $run "$work/speed-$run" "$device" >"$out/speed-$run.log" 2>&1; then
            say "speed $run" FAILED "$(last_line "$out/speed-$run.log")"
            continue
        fi
        rate=$(sed -n 's/.*"tokens_per_second": *\([0-9.]*\).*/\1/p' "$(found "$work/speed-$run")" | tail -n 30 | sort -n | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }')
        say "speed $run" measured "median of the last 30 steps: ${rate:-none} tokens/s (a toy model: launches, not arithmetic)"
    done
}

step_sanitizer() {
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [ -z "$tool" ]; then
        say sanitizer "left out" "no compute-sanitizer here"
        return
    fi
    RINGTUNE_TEST_PROGRAM=$bin/ringtune RINGTUNE_TEST_DIR=$work within 90 "$tool" --error-exitcode 9 \
        "$bin/cuda-tests" --test-threads 1 operations >"$out/sanitizer.log" 2>&1
    case $? in
        0) say sanitizer passed "memcheck: $(grep 'ERROR SUMMARY' "$out/sanitizer.log" | tail -n 1)" ;;
        124) say sanitizer "CUT OFF" "no error until then" ;;
        *) say sanitizer FAILED "$(grep -m 1 'Invalid\|ERROR SUMMARY\|FAILED' "$out/sanitizer.log")" ;;
    esac
}

run() {
    [ $# -ge 1 ] || usage
    mkdir -p "$1" && out=$(cd "$1" && pwd) && shift || exit 1
    here=$(cd "$(dirname "$0")" && pwd) && cd "$here" || exit 1
    device=cuda steps="" only=""
    while [ $# -gt 0 ]; do
        case $1 in
            --only) only=yes ;;
            --device) device=cuda:$2; shift ;;
            *) [ "$only" = yes ] && steps="$steps $1" || usage ;;
        esac
        shift
    done
    # A full or foreign /tmp is no reason to stop.
    work=$(mktemp -d 2>/dev/null) || { work=$out/work && mkdir -p "$work"; } || exit 1
    trap 'rm -rf "$work"' EXIT
    trap 'kill ${child-} 2>/dev/null; exit 143' TERM INT HUP
    RINGTUNE_CACHE=$work/cache && export RINGTUNE_CACHE
    printf '%s\n\n| step | result | what |\n| --- | --- | --- |\n' "$(date -u +%FT%TZ), $(sed -n 's/^commit //p' manifest)" >"$out/summary.md"
    ends=$(($(date +%s) + ${BUDGET:-540}))
    start_programs
    for step in ${steps:-doctor kernels peer tests train step prebuilt speed sanitizer}; do
        begun=$(date +%s)
        if [ $((ends - begun)) -lt 10 ]; then
            say "$step" "left out" "the ${BUDGET:-540} s are over"
            continue
        fi
        "step_$step"
        echo "$step: $(($(date +%s) - begun)) s" >>"$out/times.txt"
    done
    ! grep -q 'FAILED\|CUT OFF\|OTHER' "$out/summary.md"
}

case ${1-} in
    pack) shift && pack "$@" ;;
    run) shift && run "$@" ;;
    # A step of its own, so that a limit of time holds for it.
    training) shift && cd "$(dirname "$0")" && bin=${BIN:-bin} begin=exec && training "$@" ;;
    one | each) here=$(cd "$(dirname "$0")" && pwd) && cd "$here" && bin=${BIN:-bin} && "$@" ;;
    *) usage ;;
esac
