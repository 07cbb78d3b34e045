#!/bin/sh
# Runs a command on the emulated GPU of tests/vgpu: builds its libraries, lays them out as libcuda and libnccl in target/vgpu/lib, and
# puts that folder in front of the loader's path. `scripts/vgpu.sh target/release/ringtune doctor`
# Settings of the emulator are in tests/vgpu/README.md (VGPU_CC, VGPU_DEVICES, VGPU_SEED, VGPU_TRACE and others).
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -gt 0 ] || { echo "usage: scripts/vgpu.sh COMMAND [ARGUMENTS]" >&2; exit 2; }
built=${CARGO_TARGET_DIR:-$root/target}/release
lib=$root/target/vgpu/lib

if [ -z "${VGPU_BUILT-}" ]; then
    packages="--package vgpu-driver"
    [ -d "$root/tests/vgpu/nccl" ] && packages="$packages --package vgpu-nccl"
    # shellcheck disable=SC2086
    (cd "$root" && cargo build --release --quiet $packages) >&2
fi

mkdir -p "$lib"
# link LIBRARY NAME VERSION: under both names, because programs look for either and the system may have the other.
link() {
    [ -f "$built/lib$1.so" ] || return 0
    ln -sf "$built/lib$1.so" "$lib/lib$2.so"
    ln -sf "$built/lib$1.so" "$lib/lib$2.so.$3"
}
link vgpu_cuda cuda 1
link vgpu_nccl nccl 2
[ -e "$lib/libcuda.so.1" ] || { echo "scripts/vgpu.sh: $built has no libvgpu_cuda.so" >&2; exit 1; }

# A process started from here is already set up: it need not build again.
VGPU_BUILT=1
LD_LIBRARY_PATH=$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export VGPU_BUILT LD_LIBRARY_PATH
exec "$@"
