#!/bin/sh
# Packs what a machine without Rust needs: dist/ringtune-VERSION-TARGET.tar.gz and its .sha256. The same sources and tools give the same bytes.
#   scripts/dist.sh [OUT]               OUT: dist
#   PROGRAMS=DIR scripts/dist.sh        takes ringtune and ringrun from there instead of building them (without MPI, in target/dist)
#   ARCHS="sm_80 sm_90a" …              kernels are compiled for these; empty: for none; they need NVRTC and are left out without one
#   SOURCE_DATE_EPOCH=N …               the date of the files; else that of the last commit
set -eu
cd "$(dirname "$0")/.."
out=${1:-dist}
archs=${ARCHS-sm_80 sm_86 sm_89 sm_90a sm_100 sm_120}
say() { echo "dist: $*" >&2; }
end() { say "$*"; exit 1; }
for tool in readelf strip tar gzip sha256sum; do
    command -v $tool >/dev/null || end "$tool is missing (apt-get install binutils coreutils tar gzip)"
done
LC_ALL=C
export LC_ALL
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
root=$PWD

if [ -z "${PROGRAMS-}" ]; then
    # A program that is linked to an MPI does not start where there is none. Paths of this machine are none of its business.
    RUSTFLAGS="${RUSTFLAGS-} --remap-path-prefix=$root=. --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo" \
        cargo build --release --locked --target-dir target/dist >&2
    PROGRAMS=target/dist/release
fi
ringtune=$PROGRAMS/ringtune ringrun=$PROGRAMS/ringrun
for program in "$ringtune" "$ringrun"; do [ -x "$program" ] || end "$program: no program"; done

version=$("$ringtune" --version | cut -d' ' -f2)
target=$(rustc -vV | sed -n 's/^host: //p')
name=ringtune-$version-$target
needed() { readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }
if needed "$ringtune" | grep -q '^libmpi'; then
    name=$name-mpi
    say "linked to an MPI: it starts only where $(needed "$ringtune" | grep '^libmpi') is"
fi

# The least version of a library's symbols that both programs need: floor GLIBC.
versions() { readelf -V "$ringtune" "$ringrun" | grep -o "Name: $1_[0-9.]*" | sed "s/.*_//" | sort -uV; }
floor=$(versions GLIBC | tail -1)
[ -n "$floor" ] || end "no version of the C library is named in $ringtune"
decides=$(readelf -W --dyn-syms "$ringtune" "$ringrun" | grep -o "[A-Za-z0-9_]*@GLIBC_$floor\b" | sed 's/@.*//' | sort -u | head -4 | paste -sd' ')
built_on=$(ldd --version 2>/dev/null | sed -n '1s/.* //p')
cxx=$(versions GLIBCXX | tail -1)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dir=$work/$name
mkdir -p "$dir/bin" "$dir/share/man/man1" "$dir/completions" "$dir/licences"
for program in ringtune ringrun; do
    cp "$PROGRAMS/$program" "$dir/bin/$program"
    strip "$dir/bin/$program"
    "$ringtune" completions bash $program >"$dir/completions/$program"
    "$ringtune" completions zsh $program >"$dir/completions/_$program"
    "$ringtune" completions fish $program >"$dir/completions/$program.fish"
done
"$ringtune" man "$dir/share/man/man1" >/dev/null
cp README.md CHANGELOG.md "$dir/"
mkdir "$dir/configs"
cp -R configs/. "$dir/configs/"
cp LICENSE-MIT LICENSE-APACHE "$dir/licences/"

# What is linked in, by name, version and licence; then their texts, each once.
list=$dir/licences/THIRD-PARTY.txt
cargo tree --locked --edges normal,build --prefix none --format '{p}	{l}' | grep -v '(/' | sed 's/ (proc-macro)//; s/ (\*)$//' | sort -u >"$work/crates"
[ -s "$work/crates" ] || end "cargo tree names no dependency"
{
    echo "The programs contain these libraries. Their licence texts follow, each once."
    echo
    cat "$work/crates"
} >"$list"
mkdir "$work/texts"
while read -r crate number _; do
    for source in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"$crate-${number#v}"; do
        for text in "$source"/LICEN[CS]E* "$source"/COPYING* "$source"/NOTICE*; do
            [ -f "$text" ] || continue
            hash=$(sha256sum "$text" | cut -d' ' -f1)
            [ -f "$work/texts/$hash" ] || cp "$text" "$work/texts/$hash"
            echo "$crate $number: $(basename "$text")" >>"$work/texts/$hash.of"
        done
    done
done <"$work/crates"
for of in "$work"/texts/*.of; do
    [ -f "$of" ] || continue
    printf '\n%s\n\n' "----------------------------------------------------------------------"
    cat "$of"
    echo
    cat "${of%.of}"
done >>"$list"

kernels=
for arch in $archs; do
    if said=$("$ringtune" kernels --arch "$arch" --output "$dir/kernels/$arch" 2>&1); then
        kernels="$kernels $arch"
    else
        rm -rf "$dir/kernels/$arch"
        say "without kernels for $arch: $(echo "$said" | tail -1)"
    fi
done
rmdir "$dir/kernels" 2>/dev/null || true

{
    echo "ringtune $version for $target"
    echo
    echo "Needs: the C library glibc $floor or newer, and $(needed "$ringtune" | grep -v '^lib[cm]\.\|^ld-' | paste -sd' ' | sed 's/ /, /g') (libstdc++ with GLIBCXX_$cxx)."
    echo "bin/ringtune, bin/ringrun: anywhere on PATH, side by side."
    echo "completions/: ringtune and ringrun for bash (~/.local/share/bash-completion/completions), _ringtune, _ringrun for zsh (a folder of"
    echo "  \$fpath), *.fish for fish (~/.config/fish/completions). share/man: man -M share/man ringtune-sft."
    if [ -n "$kernels" ]; then
        echo "kernels/: RINGTUNE_KERNELS=kernels/sm_90a for a GPU of this architecture where there is no NVRTC:$kernels."
    fi
    echo "configs/: settings and model shapes, which the program also has built in. licences/: its own, and those of what it contains."
} >"$dir/INSTALL.txt"

mkdir -p "$out"
archive=$out/$name.tar.gz
tar --sort=name --format=gnu --mtime="@$epoch" --owner=0 --group=0 --numeric-owner --mode=u+rwX,go+rX,go-w -C "$work" -cf - "$name" | gzip -9n >"$archive"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$archive: $(($(wc -c <"$archive") / 1048576)) MiB; glibc $floor or newer ($decides; linked on glibc $built_on: an older one lowers it);${kernels:- no} kernels"
