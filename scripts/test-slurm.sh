#!/bin/bash
# Slurm for real (root, two minutes; not a part of `make test`): two machines that are network namespaces of this one, each with its slurmd.
# Trainings are started by srun, salloc, sbatch and ringrun, and have to end with the weights of one rank, bit for bit; ranks are killed,
# jobs are cancelled, and configs/cluster/slurm.sh is signalled before its time is up, goes back to the queue and goes on.
#   scripts/test-slurm.sh [CASE…]             all cases by default
#   PROGRAMS=DIR scripts/test-slurm.sh        takes ringtune and ringrun from there instead of building them
# It needs slurmctld, slurmd, munged (Debian: slurm-wlm, munge), ip and nsenter, and says `skipped:` where one is missing. Nothing of an
# installed Slurm is touched: configuration, state, sockets and ports are its own.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
root=$PWD
all="srun one_machine pmix pmi2 engine batch batch_one salloc alone killed killed_ringrun restarted requeue time_limit cancelled stray_ringruns"
skip() { echo "skipped: $*" >&2; exit 0; }
[ "$(id -u)" = 0 ] || skip "slurmd and network namespaces need root"
for program in slurmctld slurmd munged sbatch ip nsenter unshare; do
    command -v $program >/dev/null || skip "there is no $program"
done

if [ -z "${PROGRAMS-}" ]; then
    # shellcheck disable=SC2046
    cargo build --release --package ringtune --package launcher --bins $(scripts/features.sh) || exit 1
    PROGRAMS=${CARGO_TARGET_DIR:-target}/release
fi
PROGRAMS=$(cd "$PROGRAMS" && pwd)
work=$(mktemp -d /tmp/ringtune-slurm.XXXXXX)
chmod 755 "$work"
id=$$ failed=0
# Names and ports of their own, so that two of these scripts may run at once.
a=rs${id}a b=rs${id}b port=$((30000 + id % 10000))
export SLURM_CONF=$work/slurm.conf
for name in $(compgen -v SLURM_) $(compgen -v PMI) $(compgen -v RINGTUNE_); do
    [ "$name" = SLURM_CONF ] || unset "$name"
done

# on MACHINE COMMAND…: there, under its name, with its own hosts and scratch folder.
on() {
    local name=$1 ns=$a
    [ "$name" = a ] || ns=$b
    shift
    # shellcheck disable=SC2016
    nsenter --net="/run/netns/$ns" unshare --uts --mount sh -c \
        'hostname "$1" && mount --bind "$0/hosts.$1" /etc/hosts && mount --bind "$0/tmp.$1" "$0/tmp" && shift && exec "$@"' "$work" "$name" "$@"
}
# Processes of ours, whichever machine they are on.
left() { pgrep -f "(ringtune|ringrun|srun) .*$work" || true; }
cleanup() {
    on a scancel --state=RUNNING --full -s KILL --user=root 2>/dev/null
    on a scancel --user=root 2>/dev/null
    for pid in $(left); do kill -KILL "$pid" 2>/dev/null; done
    for file in "$work"/*.pid; do [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null; done
    for _ in $(seq 50); do pgrep -f "slurmstepd.*\[|slurmd.*$work|munged.*$work" >/dev/null || break; sleep 0.1; done
    for ns in "$a" "$b"; do ip netns del "$ns" 2>/dev/null; done
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

case=
fail() { echo "test-slurm: FAILED: $case: $*" >&2; failed=$((failed + 1)); }
none_left() {
    for _ in $(seq 100); do [ -z "$(left)" ] && return; sleep 0.1; done
    fail "left running: $(ps -o pid=,args= -p "$(left | paste -sd,)" | cut -c1-150)"
    for pid in $(left); do kill -KILL "$pid" 2>/dev/null; done
}

# Two machines, a and b, and a cable. The name of a machine is a loopback address on itself, as Debian writes it.
mkdir "$work"/{state,spool.a,spool.b,tmp,tmp.a,tmp.b} || exit 2
printf '127.0.0.1 localhost\n127.0.1.1 a\n10.79.0.2 b\n' >"$work/hosts.a"
printf '127.0.0.1 localhost\n10.79.0.1 a\n127.0.1.1 b\n' >"$work/hosts.b"
for ns in "$a" "$b"; do ip netns add "$ns" && ip -n "$ns" link set lo up || exit 2; done
ip link add v0 netns "$a" type veth peer name v0 netns "$b" || exit 2
ip -n "$a" addr add 10.79.0.1/24 dev v0 && ip -n "$a" link set v0 up
ip -n "$b" addr add 10.79.0.2/24 dev v0 && ip -n "$b" link set v0 up

# Eight cores each, whatever there is. A job that goes back to the queue waits there as long as a credential lives.
(umask 077 && head -c 128 /dev/urandom >"$work/munge.key")
munged --force --key-file="$work/munge.key" --socket="$work/munge.sock" --pid-file="$work/munged.pid" --log-file="$work/munged.log" \
    --seed-file="$work/munge.seed" || skip "munged does not start: $(tail -1 "$work/munged.log")"
printf 'CgroupPlugin=cgroup/v%s\nCgroupAutomount=no\n' "$([ -f /sys/fs/cgroup/cgroup.controllers ] && [ ! -d /sys/fs/cgroup/memory ] && echo 2 || echo 1)" \
    >"$work/cgroup.conf"
cat >"$SLURM_CONF" <<CONF
ClusterName=ringtune
SlurmctldHost=a(10.79.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$work/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool.%n
TmpFS=$work/tmp
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
ReturnToService=2
KillWait=5
NodeName=a NodeHostname=a NodeAddr=10.79.0.1 CPUs=8 State=UNKNOWN
NodeName=b NodeHostname=b NodeAddr=10.79.0.2 CPUs=8 State=UNKNOWN
PartitionName=main Nodes=a,b Default=YES MaxTime=INFINITE State=UP
CONF
on a slurmctld -c && on a slurmd && on b slurmd
for _ in $(seq 100); do [ "$(on a sinfo -h -N -o %t 2>/dev/null | sort -u)" = idle ] && break; sleep 0.1; done
[ "$(on a sinfo -h -N -o %t | sort -u)" = idle ] ||
    skip "slurmd does not start here: $(grep -h error "$work"/slurmd.?.log "$work/slurmctld.log" | tail -2)"

head -60 data/demo/chat.jsonl >"$work/rows.jsonl"
steps=16
# words OUT RANKS: twelve micro-batches a step, whatever the number of ranks.
words() {
    echo "sft --model_path $root/tests/data/model/tiny-llama-tied --max_steps $steps --save_steps 4 --save_total_limit 3 --eval_steps 10 \
        --max_seq_len 64 --per_device_train_batch_size 2 --gradient_accumulation_steps $((12 / $2)) --learning_rate 5e-3 --threads 1 \
        --dataset_paths $work/rows.jsonl --cache_dir $work/cache --output_dir $work/$1 --lora_dropout 0.1 \
        --resume_from_checkpoint auto --quiet --no-tensorboard"
}
export PATH="$PROGRAMS:$PATH"
same() { cmp -s "$work/one/adapter_model.safetensors" "$work/$1/adapter_model.safetensors" || fail "other weights than one rank's"; }
logged() { [ -f "$work/$1/metrics.jsonl" ] && wc -l <"$work/$1/metrics.jsonl" || echo 0; }
# Waits until a run has logged more lines than N.
await() {
    for _ in $(seq 600); do [ "$(logged "$1")" -gt "$2" ] && return; sleep 0.1; done
    fail "nothing was logged: $(tail -3 "$work/$1.log")"
    return 1
}
# run COMMAND…: on machine a; its exit code in $code, what it said in $log.
run() {
    log=$work/$case.log code=0
    on a timeout -k 5 120 "$@" >"$log" 2>&1 || code=$?
}
succeeded() {
    [ "$code" = 0 ] || fail "exit code $code: $(tail -3 "$log")"
    same "$case"
}
said() { grep -q -- "$1" "$log" || fail "nothing says \"$1\": $(tail -4 "$log")"; }
# batch NODES TASKS COMMAND: a batch script with that command, run to its end.
batch() {
    printf '#!/bin/sh\n#SBATCH --nodes=%s\n#SBATCH --ntasks-per-node=%s\n%s\n' "$1" "$2" "$3" >"$work/$case.sh"
    log=$work/$case.log code=0
    on a timeout -k 5 120 sbatch -W -o "$log" "$work/$case.sh" >/dev/null 2>&1 || code=$?
}

case_srun() { run srun -N 2 -n 3 ringtune $(words srun 3); succeeded; }
case_one_machine() { run srun -N 1 -n 3 ringtune $(words one_machine 3); succeeded; }
# With gradients over MPI, where it was built in and srun has the plug-in.
case_pmix() {
    if ! ringtune doctor 2>/dev/null | grep -q 'built with Open MPI' || ! on a srun --mpi=list 2>&1 | grep -q pmix; then
        echo "  skipped: $case: there is no Open MPI in ringtune, or no pmix in srun" >&2
        return
    fi
    OMPI_MCA_btl_vader_single_copy_mechanism=none run srun --mpi=pmix -N 2 -n 3 ringtune $(words pmix 3) --transport mpi
    succeeded
    # Without the plug-in each would find itself alone: nothing is trained.
    run srun -N 2 -n 3 ringtune $(words refused 3) --transport mpi
    [ "$code" = 0 ] && fail "ranks without MPI were not refused"
    said "nothing that speaks to MPI started this rank: start the program with mpirun, or with srun --mpi=pmix"
}
# An interface that Open MPI does not speak: sockets carry the gradients.
case_pmi2() {
    on a srun --mpi=list 2>&1 | grep -q pmi2 || { echo "  skipped: $case: srun has no pmi2" >&2; return; }
    run srun --mpi=pmi2 -N 2 -n 3 ringtune $(words pmi2 3)
    succeeded
}
case_engine() { run ringrun --engine srun -n 3 ringtune $(words engine 3); succeeded; }
# In a batch script on two machines ringrun takes srun, in one on one machine it starts the ranks itself; as many as the script asked for.
case_batch() {
    batch 2 2 "ringrun --dry-run ringtune; exec ringrun ringtune $(words batch 4)"
    succeeded
    said "srun --ntasks 4 .*--wrap -- ringtune"
}
case_batch_one() {
    batch 1 4 "ringrun --dry-run ringtune; exec ringrun ringtune $(words batch_one 4)"
    succeeded
    said "RANK=3 WORLD_SIZE=4 .*ringtune$"
}
case_salloc() { run salloc -N 2 -n 4 ringrun ringtune $(words salloc 4); succeeded; }
# A program of a batch script that nothing started as a rank is alone, whatever the job has asked for.
case_alone() { batch 2 4 "exec ringtune $(words alone 1)"; succeeded; }
# A rank is killed: bare srun ends with the others' words, and does not wait for them though it was not told --kill-on-bad-exit.
case_killed() {
    RINGTUNE_FAULT="rank=2 step=6 at=backward:1 do=kill" run srun -N 2 -n 3 ringtune $(words killed 3)
    [ "$code" != 0 ] && [ "$code" != 124 ] || fail "exit code $code"
    # Where it was at its last heartbeat.
    said "rank 2 on host b: step [1-6], .*: connection closed: killed or crashed"
    none_left
    run srun -N 2 -n 3 ringtune $(words killed 3)
    succeeded
}
case_killed_ringrun() {
    RINGTUNE_FAULT="rank=2 step=6 at=backward:1 do=kill" run ringrun --engine srun -n 3 ringtune $(words killed_ringrun 3)
    [ "$code" = 137 ] || fail "exit code $code"
    said "^ringrun: rank 2 on host .*: step 6, backward, layer 1: killed by SIGKILL$"
    none_left
}
# The same in a job: what is started again is a new step of it.
case_restarted() {
    RINGTUNE_FAULT="rank=1 step=6 at=reduce do=exit:3" batch 2 2 "exec ringrun --max-restarts 1 ringtune $(words restarted 4)"
    succeeded
    said "starting again in 1s"
}
# job STEPS CHANGES: configs/cluster/slurm.sh with a training of this folder on two ranks a machine; the job's number.
job() {
    sed -e "s|^    ringtune sft .*|    ringtune $(steps=$1 words "$case" 4)|" -e '/--output_dir out/d' -e 's/\(--ntasks-per-node=\).*/\12/' \
        -e 's/\(--cpus-per-task=\).*/\12/' -e "$2" configs/cluster/slurm.sh >"$work/$case.sh"
    on a sbatch --parsable -o "$log" "$work/$case.sh"
}
state() { on a squeue -h -j "$1" -o %T 2>/dev/null; }
ended() {
    for _ in $(seq 900); do [ -z "$(state "$1")" ] && return; sleep 0.1; done
    fail "job $1 does not end: $(on a squeue -j "$1")"
}
# SIGUSR1 as Slurm sends it, to every process of the job's steps: saved, back in the queue, gone on with to the end.
case_requeue() {
    local number log=$work/$case.log
    number=$(job $steps "")
    await requeue 3 || return
    on a scancel -s USR1 "$number"
    for _ in $(seq 300); do grep -q "all ranks stopped with their state saved" "$log" && break; sleep 0.1; done
    said "SIGUSR1: finishing step"
    said "all ranks stopped with their state saved"
    ended "$number"
    said "resuming from .*/checkpoint-"
    code=0
    succeeded
}
# The clock of Slurm does it: it looks at times every half a minute.
case_time_limit() {
    local number log=$work/$case.log
    number=$(job 100000 's/^\(#SBATCH --time=\).*/\100:01:00/; s/USR1@120/USR1@45/')
    for _ in $(seq 1200); do grep -q "resuming from" "$log" 2>/dev/null && break; sleep 0.1; done
    said "SIGUSR1: finishing step"
    said "all ranks stopped with their state saved"
    said "resuming from .*/checkpoint-"
    on a scancel "$number"
    ended "$number"
}
case_cancelled() {
    local number log=$work/$case.log
    number=$(job 100000 "")
    await cancelled 3 || return
    on a scancel "$number"
    ended "$number"
    none_left
    # The folder is not locked by who is gone, and its newest checkpoint is whole.
    number=$(job 100000 "")
    for _ in $(seq 300); do grep -q "resuming from" "$log" && break; sleep 0.1; done
    said "resuming from .*/checkpoint-"
    on a scancel "$number"
    ended "$number"
}
# srun in front of ringrun makes runs of their own, and says so.
case_stray_ringruns() {
    run srun -n 2 ringrun -n 1 true
    [ "$code" = 0 ] || fail "exit code $code"
    said "srun started 2 ringruns, and each starts a run of its own"
}

# shellcheck disable=SC2046
"$PROGRAMS/ringtune" $(words one 1) >"$work/one.log" 2>&1 || { cat "$work/one.log"; exit 1; }
for case in ${*:-$all}; do
    begun=$(date +%s)
    "case_$case"
    none_left
    echo "  $case: $(($(date +%s) - begun)) s" >&2
done
[ "$failed" = 0 ] || { echo "test-slurm: $failed failures" >&2; exit 1; }
echo "test-slurm: passed" >&2
