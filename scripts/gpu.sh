#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of a few minutes: correctness first, then time and memory beside
# the dense model, each step under its own limit and its rows written as they come.
#
#     scripts/gpu.sh FOLDER [STEP ...]   # results go to FOLDER: gpu.jsonl (rows of bench.py), products.jsonl, a log per step
#     DEVICE=cpu scripts/gpu.sh FOLDER   # a rehearsal with tiny models on a machine without a GPU
#
# Steps: correctness codebooks kernels products decode step stack compiled load folded learned; without names all of
# them, in this order. Codebooks are the tests of learned maps, learned is their time and memory.
# It needs torch with CUDA, transformers, accelerate, peft and pytest, and no network; PYTHON names the interpreter.
set -u
out=${1:?usage: scripts/gpu.sh FOLDER [STEP ...]}
shift
steps=${*:-correctness codebooks kernels products decode step stack compiled load folded learned}
device=${DEVICE:-cuda} python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export HF_RPS_TEST_DEVICE=$device

run() { # run NAME SECONDS COMMAND...: under its limit, its output kept; go on whatever happens
    local name=$1 seconds=$2 start=$SECONDS status
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "== $name: exit status $status after $((SECONDS - start)) s"
    tail -n "${LINES_SHOWN:-6}" "$out/$name.log"
}

bench() { # bench NAME SECONDS ARGUMENTS...: one run of bench.py, its rows appended
    local name=$1 seconds=$2
    shift 2
    # shellcheck disable=SC2086  # options, to be split
    run "$name" "$seconds" "$python" scripts/bench.py --device "$device" --dtype "$dtype" --forms views $timing \
        --output "$out/gpu.jsonl" "$@"
}

if [ "$device" = cuda ]; then
    dtype=bfloat16 small=gpt2 large=llama-1b stacks="bert llama-1b" timing="--rounds 5 --seconds 0.1"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
else
    dtype=float32 small=tiny large=tiny stacks=tiny timing="--rounds 1 --seconds 0.01"
fi
"$python" -c 'import torch, transformers, peft; print(torch.__version__, transformers.__version__, peft.__version__)'

for step in $steps; do
    case $step in
        correctness) run correctness "${TEST_SECONDS:-200}" "$python" -m pytest -q --maxfail 6 -m gpu tests/gpu/test_cuda.py tests/core/test_internals.py ;;
        codebooks) run codebooks "${TEST_SECONDS:-200}" "$python" -m pytest -q --maxfail 6 -m gpu tests/gpu/test_cuda_codebooks.py ;;
        kernels) run kernels 120 "$python" -m pytest -q -x tests/core/test_triton.py tests/core/test_triton_codebook.py -k "random or precision" ;;
        products) run products 60 "$python" scripts/benchmark/products.py --device "$device" --seconds 45 --output "$out/products.jsonl" ;;
        decode) bench decode 70 --only decode prefill --models $small $large --batches 1 8 ;;
        step) bench step 70 --only step --models $small $large --step-tokens 16 512 ;;
        # shellcheck disable=SC2086
        stack) bench stack 70 --only stack --models $stacks --tokens 1 512 2048 ;;
        compiled) bench compiled 120 --only compiled --models $small --ratios 0.1 ;;
        folded) bench folded "${BENCH_SECONDS:-120}" --only decode prefill step --models $small $large --batches 1 8 --step-tokens 16 512 --forms folded --ratios 0.1 ;;
        learned) bench learned "${BENCH_SECONDS:-120}" --only decode prefill step --models $small $large --batches 1 8 --step-tokens 16 512 --forms codebook ;;
        load) bench load 40 --only load memory --models $small --ratios 0.1 ;;
        *) echo "unknown step $step" >&2 ;;
    esac
done
