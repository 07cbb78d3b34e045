#!/bin/sh
# Installs what the build needs, only where it is missing, and says what it does. Quick when nothing is missing.
# What for: cmake and g++ build the SentencePiece library, pkg-config is asked by build scripts.
# `bootstrap.sh tests` adds what tests alone need, and goes on without it where it cannot be had: Open MPI and libclang
# (scripts/features.sh), Chromium and its driver.
set -eu

say() { echo "bootstrap: $*" >&2; }

if ! command -v cargo >/dev/null 2>&1 && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH="$HOME/.cargo/bin:$PATH"
fi
if ! command -v cargo >/dev/null 2>&1; then
    say "cargo is missing; install Rust from https://rustup.rs, then run this again:"
    say "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
    exit 1
fi

packages=
need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || packages="$packages $2"
}
as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
# The package lists of a fresh machine are empty or old: they are refreshed only when the first try fails.
# shellcheck disable=SC2086
install() {
    say "installing with apt-get:$packages"
    install="env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends"
    $as_root $install $packages >/dev/null 2>&1 || { $as_root apt-get update -q >&2 && $as_root $install $packages >&2; }
}

need cc gcc
need c++ g++
need cmake cmake
need make make
need pkg-config pkg-config
if [ -n "$packages" ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        say "missing:$packages; this system has no apt-get, install them with its own tool, then run this again"
        exit 1
    fi
    if [ -n "$as_root" ] && ! command -v sudo >/dev/null 2>&1; then
        say "missing:$packages; run as root: apt-get install$packages"
        exit 1
    fi
    install
fi

# Only where it costs nobody a question: as root or with a sudo that asks for no password.
if [ "${1-}" = tests ] && [ "${MPI-}" != no ] && command -v apt-get >/dev/null 2>&1; then
    packages=
    need mpirun openmpi-bin
    need mpicc libopenmpi-dev
    scripts/features.sh 2>&1 | grep -q 'libclang is not' && packages="$packages libclang-dev"
    case $packages in *libopenmpi-dev*) packages="$packages libclang-dev" ;; esac
    if [ -n "$packages" ] && { [ -z "$as_root" ] || sudo -n true 2>/dev/null; }; then
        install || say "without$packages: the tests of MPI are skipped"
    fi
fi

# Chromium, whose tests look at the report. A distribution that has no such package is not asked for it, and their tests are skipped.
if [ "${1-}" = tests ] && command -v apt-get >/dev/null 2>&1; then
    packages=
    need chromium chromium
    need chromedriver chromium-driver
    if [ -n "$packages" ] && { [ -z "$as_root" ] || sudo -n true 2>/dev/null; }; then
        install || say "without$packages: the tests of the report in a browser are skipped"
    fi
fi

# The minimal profile of rustup comes without these two.
for component in rustfmt clippy; do
    case $component in rustfmt) program=cargo-fmt ;; *) program=cargo-clippy ;; esac
    if ! command -v $program >/dev/null 2>&1; then
        if ! command -v rustup >/dev/null 2>&1; then
            say "$component is missing and there is no rustup to install it; \`make test\` needs it, \`make build\` does not"
            continue
        fi
        say "installing the Rust component $component"
        rustup component add $component >&2
    fi
done
