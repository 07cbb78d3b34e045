#!/bin/sh
# Prints what cargo is told to build beside the defaults: `--features ringtune/mpi` where mpicc and libclang are found (the crate mpi
# reads mpi.h with it), else nothing. MPI=no leaves it out. What was decided is said on stderr.
# Programs and tests are built with what this prints, so that there is one build of each, with MPI or without.
set -eu

say() { echo "build: $*" >&2; }

# Where bindgen looks, or nearly: LIBCLANG_PATH, the loader's cache, LLVM's own folders.
libclang() {
    [ -n "${LIBCLANG_PATH-}" ] && return 0
    ldconfig -p 2>/dev/null | grep -q 'libclang[-0-9.]*\.so' && return 0
    for file in /usr/lib/llvm*/lib/libclang*.so* /usr/lib*/libclang*.so* /usr/local/lib/libclang*.so*; do
        [ -e "$file" ] && return 0
    done
    return 1
}

if [ "${MPI-}" = no ]; then
    say "without MPI, as MPI=no says"
elif ! mpicc=$(mpicc -show 2>/dev/null) || [ -z "$mpicc" ]; then
    say "without MPI: no mpicc (ranks use sockets, under mpirun and srun too)"
elif ! libclang; then
    say "without MPI: mpicc is there, libclang is not (apt-get install libclang-dev)"
else
    say "with MPI: $(command -v mpicc)"
    echo "--features ringtune/mpi"
fi
