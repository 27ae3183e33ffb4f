#!/usr/bin/env bash
# Make the lock file again after a change of requirements.in:  lock.sh UV [--upgrade]
# Versions that are locked already are kept, unless --upgrade asks for newer ones.
set -euo pipefail

uv=$(realpath "$1")
shift
cd "$(dirname "$0")"

"$uv" pip compile --quiet --no-header --no-annotate --no-emit-index-url --generate-hashes \
    --no-build --python-version 3.12 --python-platform x86_64-manylinux_2_34 "$@" \
    requirements.in --output-file requirements.lock
