#!/usr/bin/env bash
# Build the launcher's own environment:  setup.sh UV PYTHON FOLDER
set -euo pipefail

uv=$1 python=$2 folder=$3
here=$(cd "$(dirname "$0")" && pwd)

[[ -x $folder/bin/python ]] || "$uv" venv --quiet --python "$python" "$folder"
"$uv" pip sync --quiet --require-hashes --no-build --python "$folder/bin/python" \
    "$here/requirements.lock"

# Proves that NeMo-Run imports, and leaves its bytecode behind.
unset PYTHONDONTWRITEBYTECODE
"$folder/bin/python" -W ignore -c '
from importlib.metadata import version
import nemo_run
print(f"NeMo-Run {version(nemo_run.__name__)} is ready")
' 2>"$folder/setup.log" || {
    cat "$folder/setup.log" >&2
    exit 1
}
