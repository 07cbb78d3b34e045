#!/bin/sh
# Format, lints, every test and the documentation, in the order that finds mistakes soonest.
# `product`: of the packages ringtune and launcher alone; `vgpu`: of the emulator alone; `lint`: format and lints of everything.
# One profile throughout, so that a dependency is compiled once for lints and docs and once for tests and the program.
set -eu
cd "$(dirname "$0")/.."

part=${1-all}
emulator="--package vgpu --package vgpu-driver --package vgpu-nccl"
case $part in
    all | lint) packages=--workspace ;;
    product) packages="--package ringtune --package launcher" ;;
    vgpu) packages=$emulator ;;
    *) echo "usage: scripts/test.sh [all|product|vgpu|lint]" >&2; exit 2 ;;
esac

# With MPI where there is one: programs, lints and tests share one build, and `make build` has the same.
features=
[ "$part" = vgpu ] || features=$(scripts/features.sh)

step() { echo "== $*" >&2; }

step "cargo fmt"
cargo fmt --all --check
step "cargo clippy"
# shellcheck disable=SC2086
cargo clippy --release $packages $features --all-targets -- -D warnings
if [ "$part" != vgpu ] && [ -f deny.toml ] && cargo deny --version >/dev/null 2>&1; then
    step "cargo deny"
    cargo deny --offline check licenses bans sources 2>&1
fi
[ "$part" = lint ] && exit 0

step "documentation"
# shellcheck disable=SC2086
RUSTDOCFLAGS="-D warnings" cargo doc --release $packages $features --no-deps --quiet
step "tests"
# Tests start it; cargo builds a program for the tests of its own package alone.
# shellcheck disable=SC2086
cargo build --release --package ringtune --package launcher $features --bin ringrun --quiet
# On the emulated GPU of tests/vgpu. A test that lacks something of the machine says so in this file and passes; with
# RINGTUNE_NO_SKIP=1 it fails.
skips=$(mktemp) log=$(mktemp)
trap 'rm -f "$skips" "$log"' EXIT
export RINGTUNE_SKIP_LOG="$skips"
status=0
# shellcheck disable=SC2086
if cargo nextest --version >/dev/null 2>&1; then
    # Examples in the documentation first: nextest does not run them, and its summary should stand last.
    cargo test --release $packages $features --doc --quiet
    scripts/vgpu.sh cargo nextest run --release $packages $features || status=$?
else
    # A pipe hides the status of cargo from sh, so it goes through the file.
    { scripts/vgpu.sh cargo test --release $packages $features --no-fail-fast 2>&1 || echo "cargo test failed with status $?"; } | tee "$log"
    grep -q '^cargo test failed with status' "$log" && status=1
    awk '/^test result:/ { passed += $4; failed += $6; skipped += $8 }
        END { printf "Summary: %d tests run: %d passed, %d failed, %d skipped\n", passed + failed, passed, failed, skipped }' "$log"
fi
# The same tests on the real thing, where there is one.
if [ "$part" != vgpu ] && [ -e /dev/nvidiactl ]; then
    step "tests on this machine's GPU"
    # shellcheck disable=SC2086
    cargo test --release $features --test cuda || status=$?
fi
count=$(wc -l <"$skips")
if [ "$count" -gt 0 ]; then
    step "$count tests skipped"
    sort "$skips" >&2
fi
exit $status
