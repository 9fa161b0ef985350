#!/usr/bin/env bash
# Every GPU run that is owed: bash benchmarks/owed.sh FOLDER STEP. Each step is meant to end within ten minutes on an H200.
#
# tests      every GPU test, eight at a time with pytest-xdist (8 minutes on 16 cores); first: nothing is timed on red tests
# alone      the GPU tests that look at the whole GPU's energy, memory and SMs, with nothing beside them
# models     decoding steps of a transformers model compiled into a graph
# training   BPE beside bytes
set -euo pipefail
[ $# -eq 2 ] || { sed -n 's/^# \{0,1\}//p' "$0" | sed 1d; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MOE_GPU_CACHE="$folder" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
alone="tests/gpu/test_slices.py tests/gpu/test_energy.py tests/gpu/test_live.py tests/gpu/test_expert_slices.py"
case $2 in
tests)
    beside=$($python -c 'import xdist; print("-n8")' 2>/dev/null || true)
    $python -m pytest -q $beside tests/gpu ${alone//tests/--ignore=tests} 2>&1 | tee "$folder/tests.log"
    ;;
alone) $python -m pytest -q $alone 2>&1 | tee "$folder/alone.log" ;;
models) $python benchmarks/run_huggingface.py "$folder/h200_models.jsonl" --section "decode, compiled" ;;
training) $python benchmarks/run_training.py "$folder/h200_training.jsonl" --section bpe ;;
*) echo "owed.sh: error: no step '$2'; see the head of this file" >&2; exit 2 ;;
esac
