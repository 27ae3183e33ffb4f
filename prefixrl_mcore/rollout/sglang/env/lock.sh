#!/usr/bin/env bash
# Make the lock files again after a change of requirements-*.in:  lock.sh UV [--upgrade]
# Versions that are locked already are kept, unless --upgrade asks for newer ones.
set -euo pipefail

uv=$(realpath "$1")
shift
cd "$(dirname "$0")"

compile() {
    "$uv" pip compile --quiet --no-header --no-annotate --no-emit-index-url --generate-hashes \
        --no-build --python-version 3.12 --python-platform x86_64-manylinux_2_34 "$@"
}

for kind in cpu cpu-next; do
    compile "$@" --config-file no-dependencies.toml "requirements-$kind.in" \
        --output-file "requirements-$kind.lock"
done
for kind in gpu router; do
    compile "$@" "requirements-$kind.in" --output-file "requirements-$kind.lock"
done
