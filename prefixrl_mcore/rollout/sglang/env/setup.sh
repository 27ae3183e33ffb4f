#!/usr/bin/env bash
# Build SGLang's own environment:  setup.sh UV PYTHON FOLDER [cpu|gpu|cpu-next]
# Without the last argument: gpu where nvidia-smi lists a GPU, cpu elsewhere. cpu-next is the newest
# version that is supported, for the tests.
set -euo pipefail

uv=$1 python=$2 folder=$3
here=$(cd "$(dirname "$0")" && pwd)

kind=${4:-}
if [[ -z $kind ]]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        kind=gpu
    else
        kind=cpu
    fi
fi

[[ -x $folder/bin/python ]] || "$uv" venv --quiet --python "$python" "$folder"
"$uv" pip sync --quiet --require-hashes --no-build --python "$folder/bin/python" \
    "$here/requirements-$kind.lock"

# Proves that the server's modules import, and leaves their bytecode behind, without which every
# start takes twice as long.
unset PYTHONDONTWRITEBYTECODE
if [[ $kind == cpu* ]]; then
    export SGLANG_USE_CPU_ENGINE=1 PYTHONPATH=$here/../cpu/stand_ins CUDA_VISIBLE_DEVICES=
fi
"$folder/bin/python" -W ignore -c '
import sglang.srt.entrypoints.http_server
import sglang.srt.models.qwen3
import sglang.version
print(f"SGLang {sglang.version.__version__} is ready")
' 2>"$folder/setup.log" || {
    cat "$folder/setup.log" >&2
    exit 1
}
