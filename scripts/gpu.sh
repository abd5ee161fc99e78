#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of a few minutes: correctness first, then time and memory beside
# the dense model, each step under its own limit and its rows written as they come.
#
#     scripts/gpu.sh FOLDER            # results go to FOLDER: gpu.jsonl (rows of bench.py) and a log per step
#     DEVICE=cpu scripts/gpu.sh FOLDER # a rehearsal with tiny models on a machine without a GPU
#
# It needs torch with CUDA, transformers, accelerate, peft and pytest, and no network; PYTHON names the interpreter.
set -u
out=${1:?usage: scripts/gpu.sh FOLDER}
device=${DEVICE:-cuda} python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export HF_RPS_TEST_DEVICE=$device

step() { # step NAME SECONDS COMMAND...: run it under its limit, keep its output, go on whatever happens
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
    step "$name" "$seconds" "$python" scripts/bench.py --device "$device" --dtype "$dtype" --output "$out/gpu.jsonl" "$@"
}

if [ "$device" = cuda ]; then
    dtype=bfloat16 small=gpt2 large=llama-1b timing="--rounds 5 --seconds 0.1" tests=120
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
else
    dtype=float32 small=tiny large=tiny timing="--rounds 1 --seconds 0.01" tests=300
fi
"$python" -c 'import torch, transformers, peft; print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)'

step correctness "$tests" "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider
# shellcheck disable=SC2086  # options, to be split
{
    bench stack 60 --only stack --models $([ "$device" = cuda ] && echo bert llama-1b || echo tiny) --forms views $timing
    bench step 70 --only step --models $small $large --forms views --step-tokens 16 512 $timing
    bench decode 70 --only decode prefill --models $small $large --forms views $timing
    bench load 40 --only load memory --models $small --forms views --rounds 3 --ratios 0.1
}
