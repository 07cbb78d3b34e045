#!/bin/sh
# Installs what the build needs, only where it is missing, and says what it does. Quick when nothing is missing.
# What for: cmake and g++ build the SentencePiece library, pkg-config is asked by build scripts.
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
    as_root=
    if [ "$(id -u)" != 0 ]; then
        as_root=sudo
        if ! command -v sudo >/dev/null 2>&1; then
            say "missing:$packages; run as root: apt-get install$packages"
            exit 1
        fi
    fi
    say "installing with apt-get:$packages"
    install="env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends"
    # The package lists of a fresh machine are empty or old: refresh them only when the first try fails.
    # shellcheck disable=SC2086
    if ! $as_root $install $packages >/dev/null 2>&1; then
        $as_root apt-get update -q >&2
        $as_root $install $packages >&2
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
