#!/usr/bin/env bash
# Every GPU run that is owed: bash benchmarks/owed.sh FOLDER STEP. Each step is meant to end within ten minutes on an H200.
#
# tests      every GPU test; first, since nothing is timed on red tests
# tune       tiles of Qwen3-30B-A3B, those of 192 rows too; FOLDER/tiles/h200.json goes to moe_gpu/triton_kernels/tiles/
# experts    beside SonicMoE (if installed) and bmm; peak memory; SM budgets; repeats bit for bit
# decode     decode and skew in graphs, beside vLLM and triton_kernels (if installed)
# layer      the whole layer beside its peers, eager launches among them
# slices     device tables, isolation, the profiler's cost, ADAPTIVE's costs
# graphs     eager against replay; a shared expert beside the routed ones
# energy1..4 counter; calibration and attribution; qwen; mixtral
# models     a transformers model beside grouped_mm and batched_mm
# cache      the expert cache beside on-demand copies, LRU and resident weights
# top        what publishing for `moe-gpu top` costs a job
# rows       load-aware tiles beside every single tile, the Gluon kernels and torch._grouped_mm
# ablation   what each part of the layer brings, and 4 to 256 experts
# training   tokens/s, MFU, memory, bitwise resume
set -euo pipefail
[ $# -eq 2 ] || { sed -n 's/^# \{0,1\}//p' "$0" | sed 1d; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MOE_GPU_CACHE="$folder" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
case $2 in
tests) $python -m pytest -q tests/gpu 2>&1 | tee "$folder/tests.log" ;;
tune) $python -m moe_gpu tune --preset qwen3-30b-a3b --seconds 540 --output "$folder/h200_tune.jsonl" ;;
experts) $python benchmarks/run_hopper.py "$folder/h200_experts.jsonl" --table training --table budget --table precision ;;
decode) $python benchmarks/run_hopper.py "$folder/h200_decode.jsonl" --table decode --table skew ;;
layer) $python benchmarks/run_h200.py "$folder/h200_layer.jsonl" ;;
slices) $python benchmarks/run_slices.py "$folder/h200_slices.jsonl" ;;
graphs) $python benchmarks/run_graphs.py "$folder/h200_graphs.jsonl" ;;
energy1) set -- counter power idle overhead trace ;;&
energy2) set -- calibrate attribute intervention slices ;;&
energy3) set -- qwen ;;&
energy4) set -- mixtral ;;&
energy?) $python benchmarks/run_energy.py "$folder/h200_energy.jsonl" "${@/#/--section=}" ;;
models) $python benchmarks/run_huggingface.py "$folder/h200_models.jsonl" ;;
cache) $python benchmarks/run_expert_cache.py "$folder/h200_expert_cache.jsonl" ;;
top) $python benchmarks/run_top_cost.py "$folder/h200_top_cost.jsonl" ;;
rows) $python benchmarks/run_tiles.py "$folder/h200_load_aware.jsonl" ;;
ablation) $python -m moe_gpu bench --ablation --output-dir "$folder/h200_ablation" ;;
training) $python benchmarks/run_training.py "$folder/h200_training.jsonl" ;;
*) echo "owed.sh: error: no step '$2'; see the head of this file" >&2; exit 2 ;;
esac
