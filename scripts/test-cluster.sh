#!/usr/bin/env bash
# Two machines that are network namespaces of this one (root, minutes; not a part of `make test`), each with a name and an sshd of its own:
# ranks are killed, stopped, continued and given NaN, and launchers are killed, at random instants until the training is done, and its
# weights have to be those of a run that nobody disturbed, bit for bit. Then a link goes down, machines share no folder, strangers call,
# secrets differ, and a second job wants the same port.
#   scripts/test-cluster.sh [ROUNDS]          20 by default
#   SEED=N scripts/test-cluster.sh            repeats a run
#   PROGRAMS=DIR scripts/test-cluster.sh      takes ringtune and ringrun from there instead of building them
# Ranks are started by a ringrun on each machine, and by Open MPI's mpirun over ssh where there are both (Debian: openssh-server). Nothing of
# an installed sshd is touched: configuration, keys and port are its own.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
rounds=${1:-20}
seed=${SEED:-$(od -An -N2 -tu2 /dev/urandom | tr -d ' ')}
RANDOM=$seed
echo "test-cluster: SEED=$seed, $rounds rounds" >&2
[ "$(id -u)" = 0 ] || { echo "test-cluster: network namespaces need root" >&2; exit 2; }
command -v ip >/dev/null || { echo "test-cluster: no ip: apt-get install iproute2" >&2; exit 2; }

if [ -z "${PROGRAMS-}" ]; then
    # shellcheck disable=SC2046
    cargo build --release $(scripts/features.sh) || exit 1
    PROGRAMS=${CARGO_TARGET_DIR:-target}/release
fi
PROGRAMS=$(cd "$PROGRAMS" && pwd)
work=$(mktemp -d /tmp/ringtune-cluster.XXXXXX)
# Names of their own, so that two of these scripts may run at once.
a=rt${seed}a b=rt${seed}b failed=0
cleanup() {
    for pid in $(left); do kill -KILL "$pid" 2>/dev/null; done
    for file in "$work"/sshd.*.pid; do [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null; done
    for ns in "$a" "$b"; do ip netns del "$ns" 2>/dev/null; rm -rf "/etc/netns/$ns"; done
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

fail() { echo "test-cluster: FAILED (SEED=$seed): $*" >&2; failed=$((failed + 1)); }
# Processes of ours, whichever machine they are on.
left() { pgrep -f "(ringtune|ringrun|mpirun|orted) .*$work|ringrun .*$work" || true; }
# none_left WHAT
none_left() {
    local from
    from=$(now)
    while below "$(since "$from")" 5; do [ -z "$(left)" ] && return; sleep 0.05; done
    fail "$1: left running after 5 s: $(ps -o pid=,args= -p "$(left | paste -sd,)" | cut -c1-150)"
    for pid in $(left); do kill -KILL "$pid" 2>/dev/null; done
}

# Two machines, a and b, and a cable.
for ns in "$a" "$b"; do
    ip netns add "$ns" || exit 2
    mkdir -p "/etc/netns/$ns"
    printf '127.0.0.1 localhost\n10.77.0.1 a\n10.77.0.2 b\n' >"/etc/netns/$ns/hosts"
    ip -n "$ns" link set lo up
done
ip link add v0 netns "$a" type veth peer name v0 netns "$b" || exit 2
ip -n "$a" addr add 10.77.0.1/24 dev v0
ip -n "$b" addr add 10.77.0.2/24 dev v0
up() { ip -n "$a" link set v0 up; ip -n "$b" link set v0 up; }
up
# on MACHINE COMMAND…: there, under its name.
on() {
    local name=$1 ns=$a
    [ "$name" = a ] || ns=$b
    shift
    ip netns exec "$ns" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$name" "$@"
}
# An sshd on each machine, for whoever has the key of this run.
ssh_works() {
    command -v sshd >/dev/null && command -v ssh >/dev/null || return 1
    mkdir -p /run/sshd
    for key in host user; do ssh-keygen -q -t ed25519 -N '' -f "$work/$key" || return 1; done
    for name in a b; do
        printf '%s\n' "Port 2222" "HostKey $work/host" "AuthorizedKeysFile $work/user.pub" "PidFile $work/sshd.$name.pid" "StrictModes no" \
            "UsePAM no" "PermitRootLogin yes" "PasswordAuthentication no" >"$work/sshd.$name"
        on $name "$(command -v sshd)" -f "$work/sshd.$name" || return 1
    done
    printf '%s\n' "Host *" "Port 2222" "IdentityFile $work/user" "StrictHostKeyChecking no" "UserKnownHostsFile /dev/null" "LogLevel ERROR" \
        "BatchMode yes" >"$work/ssh"
    for _ in $(seq 50); do [ "$(on a ssh -F "$work/ssh" b hostname 2>/dev/null)" = b ] && return; sleep 0.1; done
    return 1
}

head -60 data/demo/chat.jsonl >"$work/rows.jsonl"
steps=120
# words OUT ACCUMULATION
words() {
    echo "sft --model_path tests/data/model/tiny-llama-tied --max_steps $steps --save_steps 4 --save_total_limit 3 --eval_steps 10 \
        --max_seq_len 64 --zero ${zero:-0} --per_device_train_batch_size 2 --gradient_accumulation_steps $2 --learning_rate 5e-3 --threads 1 \
        --dataset_paths $work/rows.jsonl --cache_dir $work/cache --output_dir $work/$1 --lora_dropout 0.1 --max_bad_steps 1 \
        --resume_from_checkpoint auto --quiet --no-tensorboard"
}
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }
below() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a < b) }'; }

# shellcheck disable=SC2046
"$PROGRAMS/ringtune" $(words one 4) >"$work/one.log" 2>&1 || { cat "$work/one.log"; exit 1; }
same() { cmp -s "$work/one/adapter_model.safetensors" "$work/$1/adapter_model.safetensors" || fail "$2: other weights than an undisturbed run"; }

# start ENGINE OUT PORT: four ranks on two machines, in the background; their ringruns are in $jobs, what they say in OUT.a.log, OUT.b.log.
start() {
    local engine=$1 out=$2 port=$3
    # shellcheck disable=SC2046
    case $engine in
    node)
        for rank in 0 1; do
            local name=a
            [ $rank = 0 ] || name=b
            # shellcheck disable=SC2086
            RINGTUNE_SECRET=${secret:-$seed} on $name ${within[$rank]-} "$PROGRAMS/ringrun" --nnodes 2 --node-rank $rank --master-addr 10.77.0.1 --master-port "$port" \
                --nproc-per-node 2 --oversubscribe --grace 4 ringtune $(words "$out" 1) >"$work/$out.$name.log" 2>&1 &
            jobs+=($!)
        done
        ;;
    mpirun)
        OMPI_MCA_plm_rsh_agent="ssh -F $work/ssh" OMPI_MCA_oob_tcp_if_include=v0 OMPI_MCA_btl_tcp_if_include=v0 \
            OMPI_MCA_btl_vader_single_copy_mechanism=none on a "$PROGRAMS/ringrun" -H a:2,b:2 --allow-run-as-root --grace 10 \
            ${RINGTUNE_FAULT:+-x RINGTUNE_FAULT} ringtune $(words "$out" 1) >"$work/$out.a.log" 2>&1 &
        jobs=($!)
        ;;
    esac
}
# Ranks and ringruns of an output folder; mpirun's own ssh and orted, which notice later, are not among them.
ours() { pgrep -f "^[^ ]*(ringtune sft|ringrun) .*--output_dir $work/$1 " || true; }
# Ranks of an output folder, none that a launcher is.
ranks_of() { pgrep -f "^[^ ]*ringtune sft .*--output_dir $work/$1 " || true; }
logged() { [ -f "$work/$1/metrics.jsonl" ] && wc -l <"$work/$1/metrics.jsonl" || echo 0; }
# Waits until a run has logged more lines than N, or has ended.
await() {
    local out=$1 n=$2
    while [ "$(logged "$out")" -le "$n" ]; do
        kill -0 "${jobs[0]}" 2>/dev/null || return 1
        sleep 0.02
    done
}
# The end of the run that was started last: its exit code in $code, that of the second machine's ringrun in $second, the last line in $last.
ended() {
    code=0
    wait "${jobs[0]}" || code=$?
    second=$code
    for job in "${jobs[@]:1}"; do
        second=0
        wait "$job" || second=$?
    done
    last=$(grep '^ringrun: ' "$work/$1.a.log" | tail -1)
}

engines=(node)
if ! command -v mpirun >/dev/null || ! mpirun --version | grep -q 'Open MPI'; then
    echo "test-cluster: skipped: mpirun: there is no Open MPI" >&2
elif ! ssh_works; then
    echo "test-cluster: skipped: mpirun: there is no sshd, or none answers (apt-get install openssh-server)" >&2
else
    engines+=(mpirun)
fi
port=20000
for round in $(seq "$rounds"); do
    engine=${engines[RANDOM % ${#engines[@]}]}
    deeds=(kill kill stop pause nan launcher)
    deed=${deeds[RANDOM % ${#deeds[@]}]}
    out=r$round at=$((RANDOM % (steps - 4))) victim=$((RANDOM % 4)) pause=$((RANDOM % 25)) later=$((RANDOM % 300))
    what="round $round, $engine, $deed of process $victim after line $at"
    jobs=() port=$((port + 1)) zero=$((RANDOM % 2))
    what="$what, zero $zero"
    unset RINGTUNE_FAULT
    # Every fifth step is an epoch's last one and has rows for rank 0 alone: the others compute nothing that could be wrong.
    nan_at=$((at + 2))
    [ $((nan_at % 5)) = 0 ] && nan_at=$((nan_at + 1))
    [ "$deed" = nan ] && export RINGTUNE_FAULT="rank=$victim step=$nan_at do=nan"
    begun=$(now)
    start "$engine" "$out" $port
    if [ "$deed" = nan ]; then
        expected=1 begun=$(now)
    elif ! await "$out" "$at"; then
        ended "$out"
        fail "$what: the run ended before: $code, $last; $(tail -3 "$work/$out.a.log")"
        continue
    else
        sleep "0.$(printf %03d "$later")"
        mapfile -t pids < <(ranks_of "$out")
        # A run that is over by now has nobody to disturb.
        [ ${#pids[@]} -gt 0 ] && pid=${pids[victim % ${#pids[@]}]} || deed=nothing
        begun=$(now)
        case $deed in
        nothing) expected=0 ;;
        kill) kill -KILL "$pid" 2>/dev/null; expected=137 ;;
        stop) kill -STOP "$pid" 2>/dev/null; expected=124 ;;
        # No rank and no ringrun is left after two seconds, on either machine. The first machine's holds the hub.
        launcher)
            which="(--nnodes 2 --node-rank $((victim % 2))|-H a:2,b:2)" expected=137
            [ "$engine" = node ] && [ $((victim % 2)) = 1 ] && expected=1
            kill -KILL "$(pgrep -f "^$PROGRAMS/ringrun $which .*--output_dir $work/$out " | head -1)" 2>/dev/null
            while below "$(since "$begun")" 2 && [ -n "$(ours "$out")" ]; do sleep 0.02; done
            [ -z "$(ours "$out")" ] || fail "$what: left running after 2 s: $(ps -o pid=,args= -p "$(ours "$out" | paste -sd,)" | cut -c1-150)"
            ;;
        pause)
            kill -STOP "${pids[@]}" 2>/dev/null
            sleep "$((pause / 10)).$((pause % 10))"
            kill -CONT "${pids[@]}" 2>/dev/null
            expected=0
            ;;
        esac
    fi
    ended "$out"
    took=$(since "$begun") first_last=$last
    if [ "$code" = 0 ] && [ "$deed" != nan ]; then
        : # It was done before, or the pause harmed nothing.
    elif [ "$deed" = launcher ] && [ "$expected" = 137 ]; then
        # Who is killed says nothing; ranks say that it is gone, unless the mpirun that carries their words died with it, or all of the other
        # machine had ended well while the first one wrote the last files.
        [ "$code" = 137 ] || fail "$what: exit code $code: $last"
        none_left "$what"
        first_last=$(cat "$work/$out".?.log | grep -m 1 'launcher is gone') || [ "$engine" = mpirun ] || [ "$second" = 0 ] || fail "$what: nobody says it: $(tail -2 "$work/$out.b.log")"
    elif [ "$deed" = pause ]; then
        fail "$what: a pause of $pause tenths of a second ended the run: $code, $last"
    else
        [ "$code" = $expected ] || fail "$what: exit code $code, expected $expected: $last"
        [[ $last =~ ^ringrun:\ rank\ [0-9]+\ on\ host\ [ab]:\  ]] || fail "$what: no cause is named: $last; $(tail -3 "$work/$out.a.log")"
        [[ ! $last =~ :\ start: ]] || fail "$what: it was long past its start: $last"
        # In the last phase, where the main rank is alone with its files, the second machine is done and right to say so.
        [ "$second" = "$code" ] || [ "$deed" = launcher ] || [[ $second = 0 && $last =~ :\ finish: ]] || fail "$what: the second machine ends with $second, the first with $code: $(tail -2 "$work/$out.b.log")"
        [ "$deed" = nan ] || below "$took" 10 || fail "$what: over after $took s"
        none_left "$what"
    fi
    unset RINGTUNE_FAULT
    if [ "$code" != 0 ]; then
        # As whoever started it would: again, until it is done.
        for try in 1 2 3; do
            jobs=() port=$((port + 1))
            start "$engine" "$out" $port
            ended "$out"
            [ "$code" = 0 ] && break
            fail "$what: try $try after it ended with $code: $last"
        done
    fi
    none_left "$what"
    same "$out" "$what"
    echo "  $what: ${first_last:-nothing said}, $took s" >&2
done
unset RINGTUNE_FAULT

# The cable is pulled: each side says that it lost the other, and nothing hangs.
jobs=() port=$((port + 1))
start node cut $port
await cut 5 && ip -n "$b" link set v0 down
begun=$(now)
ended cut
took=$(since "$begun")
[[ $last =~ rank\ [23]\ on\ host\ b:.*no\ sign\ of\ life ]] || fail "link down: the first machine says: $last"
grep -q 'launcher is gone\|no hub\|cannot reach\|lost' "$work/cut.b.log" || fail "link down: the second machine says: $(tail -2 "$work/cut.b.log")"
below "$took" 30 || fail "link down: over after $took s"
none_left "link down"
up
jobs=() port=$((port + 1))
start node cut $port
ended cut
[ "$code" = 0 ] || fail "after the link came back: $code, $last"
same cut "link down"
echo "  link down: over after $took s, then done" >&2

# The second machine has a file system of its own where the output goes: that is said, and no checkpoint is lost.
mkdir "$work/apart"
printf '#!/bin/sh\nmount -t tmpfs none %s && exec "$@"\n' "$work/apart" >"$work/apart.sh"
jobs=() port=$((port + 1)) zero=1 within=("" "unshare --mount sh $work/apart.sh")
start node apart $port
ended apart
within=()
{ [ "$code" = 0 ] && grep -q "rank 2 on host b does not see $work/apart, where rank 0 writes" "$work/apart.a.log"; } ||
    fail "no shared folder: $code, $last; $(tail -3 "$work/apart.a.log")"
[ -f "$work/apart/checkpoint-$steps/optimizer.safetensors" ] || fail "no shared folder: $(ls "$work/apart" "$work/apart/checkpoint-$steps" 2>&1)"
same apart "no shared folder"
echo "  no shared folder: said, and done" >&2

# A second job wants the same port, strangers call there and at the ranks' own ports, and a third job has a port of its own.
jobs=() port=$((port + 1)) zero=0
start node first $port
first=("${jobs[@]}")
await first 2
jobs=() secret=another
start node second $port
second_job=("${jobs[@]}")
secret=
for i in $(seq 10); do
    target=$port
    [ $((i % 2)) = 0 ] && target=$(ip netns exec "$a" ss -Hltn | awk '{ n = split($4, x, ":"); print x[n] }' | shuf -n1 --random-source=<(yes "$seed$i"))
    ip netns exec "$b" timeout 0.3 bash -c "exec 3<>/dev/tcp/10.77.0.1/$target && { printf 'GET / HTTP/1.1\r\n\r\n'; head -c 4096 /dev/urandom; } >&3" 2>/dev/null
done
jobs=("${second_job[@]}")
ended second
{ [ "$code" != 0 ] && grep -q "cannot listen at" "$work/second.a.log"; } || fail "a second job at the same port: $code, $(tail -2 "$work/second.a.log")"
grep -q "does not know the secret of this run" "$work/second.b.log" || fail "a second job at the same port: $(tail -2 "$work/second.b.log")"
jobs=()
start node third $((port + 500))
ended third
[ "$code" = 0 ] || fail "a job beside another one: $code, $last"
same third "beside another job"
jobs=("${first[@]}")
ended first
[ "$code" = 0 ] || fail "a job that strangers called: $code, $last"
same first "strangers"
none_left strangers
echo "  strangers and other jobs: first, third done" >&2

# One machine with another secret: both say so and end.
jobs=() port=$((port + 1))
begun=$(now)
RINGTUNE_SECRET=$seed on a "$PROGRAMS/ringrun" --nnodes 2 --node-rank 0 --master-addr 10.77.0.1 --master-port $port --nproc-per-node 1 --grace 2 \
    sleep 300 >"$work/secret.a.log" 2>&1 &
other=$!
# shellcheck disable=SC2046
RINGTUNE_SECRET=wrong on b "$PROGRAMS/ringrun" --nnodes 2 --node-rank 1 --master-addr 10.77.0.1 --master-port $port --nproc-per-node 1 --grace 2 \
    ringtune $(words secret 1) >"$work/secret.b.log" 2>&1
code=$?
grep -q "does not know the secret of this run" "$work/secret.b.log" && [ $code != 0 ] || fail "a wrong secret: $code, $(tail -2 "$work/secret.b.log")"
wait $other
code=$?
took=$(since "$begun")
grep -q "^ringrun: rank [01] on host unknown: did not come; a rank at 10.77.0.2 does not know the secret of this run" "$work/secret.a.log" && [ $code = 1 ] ||
    fail "a wrong secret: $code, $(tail -2 "$work/secret.a.log")"
below "$took" 15 || fail "a wrong secret: over after $took s"
none_left "a wrong secret"
echo "  a wrong secret: both over after $took s" >&2

if [ "$failed" -gt 0 ]; then
    echo "test-cluster: $failed failures; SEED=$seed repeats them" >&2
    exit 1
fi
echo "test-cluster: passed, $rounds rounds, SEED=$seed" >&2
