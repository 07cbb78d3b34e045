#!/bin/sh
# Type-checks Rust code for systems that this one is not: what stands behind cfg compiles there. Nothing is linked or run, so a stand-in
# that makes empty files takes the place of those systems' C compilers.
#   scripts/check-targets.sh [PACKAGE…]      launcher by default; ringtune takes as long as a first build
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- launcher
command -v rustup >/dev/null || { echo "check-targets: rustup is missing: it has the standard libraries of other targets" >&2; exit 1; }
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
cat >"$tools/cc" <<'CC'
#!/bin/sh
before=
for word in "$@"; do
    case $before in -o) : >"$word" ;; esac
    case $word in *.a) : >"$word" ;; esac
    before=$word
done
CC
printf '#!/bin/sh\n' >"$tools/cmake"
chmod +x "$tools/cc" "$tools/cmake"
for target in aarch64-unknown-linux-gnu x86_64-apple-darwin aarch64-apple-darwin; do
    rustup target list --installed | grep -qx "$target" || rustup target add "$target" >&2
    name=$(echo $target | tr - _)
    for package in "$@"; do
        env "CC_$name=$tools/cc" "CXX_$name=$tools/cc" "AR_$name=$tools/cc" CMAKE="$tools/cmake" \
            cargo check --locked --quiet -p "$package" --lib --bins --target $target --target-dir target/check
        echo "check-targets: $package compiles for $target"
    done
done
