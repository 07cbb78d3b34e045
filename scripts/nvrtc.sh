#!/bin/sh
# Fetches NVRTC, the run-time compiler for CUDA kernels, and the headers that tests compare with, from PyPI into the user's cache. No GPU
# and no CUDA toolkit are needed to compile with it. Nothing is installed; what is there is kept; without network it says so and goes on.
set -eu

say() { echo "nvrtc: $*" >&2; }

cache=${XDG_CACHE_HOME:-${HOME:?neither XDG_CACHE_HOME nor HOME is set}/.cache}/ringtune

if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
    say "the pinned packages are for Linux on x86-64; on this machine install the CUDA toolkit and set CUDA_HOME or RINGTUNE_NVRTC"
    exit 0
fi

# fetch FOLDER PACKAGE VERSION SHA256 FILE...: the files of a wheel under FOLDER, whole or not at all.
fetch() {
    folder=$cache/$1 package=$2 version=$3 hash=$4
    shift 4
    [ -e "$folder" ] && return 0
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    say "fetching $package $version"
    printf '%s==%s --hash=sha256:%s\n' "$package" "$version" "$hash" >"$work/requirements.txt"
    # pip compares the hash itself, and refuses a file that differs.
    if ! python3 -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --require-hashes \
        --requirement "$work/requirements.txt" --dest "$work/wheel" >"$work/log" 2>&1; then
        say "$package could not be fetched:"
        tail -n 3 "$work/log" >&2
        say "what needs it is skipped; RINGTUNE_NVRTC or CUDA_HOME may name a copy"
        rm -rf "$work"
        trap - EXIT
        return 0
    fi
    python3 - "$work/wheel" "$work/unpacked" "$@" <<'PYTHON'
import pathlib, shutil, sys, zipfile

wheel = next(pathlib.Path(sys.argv[1]).glob("*.whl"))
out = pathlib.Path(sys.argv[2])
with zipfile.ZipFile(wheel) as archive:
    for pattern in sys.argv[3:]:
        inside, to = pattern.split("=")
        names = [n for n in archive.namelist() if n.startswith(inside) and not n.endswith("/")]
        if not names:
            sys.exit(f"nvrtc: {wheel.name} has no {inside}")
        for name in names:
            target = out / to / name[len(inside):].lstrip("/") if name != inside else out / to
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
PYTHON
    # Two runs may race: the first to rename wins, and the other has the same files.
    mv -T "$work/unpacked" "$folder" 2>/dev/null || [ -e "$folder" ]
    rm -rf "$work"
    trap - EXIT
}

need_python() {
    python3 -m pip --version >/dev/null 2>&1 && return 0
    command -v apt-get >/dev/null 2>&1 || return 1
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    [ -z "$as_root" ] || command -v sudo >/dev/null 2>&1 || return 1
    say "installing with apt-get: python3 python3-pip"
    install="env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-pip"
    # shellcheck disable=SC2086
    $as_root $install >/dev/null 2>&1 || { $as_root apt-get update -q >&2 && $as_root $install >&2; }
}

[ -e "$cache/nvrtc-12.9.86" ] && [ -e "$cache/cuda-headers-12.9.79" ] && exit 0
if ! need_python; then
    say "python3 with pip is missing and could not be installed; what needs NVRTC is skipped"
    exit 0
fi
fetch nvrtc-12.9.86 nvidia-cuda-nvrtc-cu12 12.9.86 210cf05005a447e29214e9ce50851e83fc5f4358df8b453155d5e1918094dcb4 \
    nvidia/cuda_nvrtc/lib/libnvrtc.so.12=lib/libnvrtc.so.12 \
    nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.9=lib/libnvrtc-builtins.so.12.9
fetch cuda-headers-12.9.79 nvidia-cuda-runtime-cu12 12.9.79 25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3 \
    nvidia/cuda_runtime/include=include
