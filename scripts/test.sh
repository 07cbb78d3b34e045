#!/bin/sh
# Format, lints, every test and the documentation, in the order that finds mistakes soonest. `lint`: the first two alone.
# One profile throughout, so that a dependency is compiled once for lints and docs and once for tests and the program.
set -eu
cd "$(dirname "$0")/.."

step() { echo "== $*" >&2; }

step "cargo fmt"
cargo fmt --all --check
step "cargo clippy"
cargo clippy --release --workspace --all-targets -- -D warnings
[ "${1-}" = lint ] && exit 0

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps --quiet
step "tests"
# On the emulated GPU of tests/vgpu. A test that lacks something of the machine says so in this file and passes; with
# RINGTUNE_NO_SKIP=1 it fails.
skips=$(mktemp) log=$(mktemp)
trap 'rm -f "$skips" "$log"' EXIT
export RINGTUNE_SKIP_LOG="$skips"
status=0
if cargo nextest --version >/dev/null 2>&1; then
    # Examples in the documentation first: nextest does not run them, and its summary should stand last.
    cargo test --release --workspace --doc --quiet
    scripts/vgpu.sh cargo nextest run --release --workspace || status=$?
else
    # A pipe hides the status of cargo from sh, so it goes through the file.
    { scripts/vgpu.sh cargo test --release --workspace --no-fail-fast 2>&1 || echo "cargo test failed with status $?"; } | tee "$log"
    grep -q '^cargo test failed with status' "$log" && status=1
    awk '/^test result:/ { passed += $4; failed += $6; skipped += $8 }
        END { printf "Summary: %d tests run: %d passed, %d failed, %d skipped\n", passed + failed, passed, failed, skipped }' "$log"
fi
# The same tests on the real thing, where there is one.
if [ -e /dev/nvidiactl ]; then
    step "tests on this machine's GPU"
    cargo test --release --test cuda || status=$?
fi
count=$(wc -l <"$skips")
if [ "$count" -gt 0 ]; then
    step "$count tests skipped"
    sort "$skips" >&2
fi
exit $status
