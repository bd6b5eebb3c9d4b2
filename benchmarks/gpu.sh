#!/usr/bin/env bash
# Run the tests for GPUs and a selection of the benchmarks, in at most 8 minutes, on a machine without a network:
#
#   benchmarks/gpu.sh WHEELS OUT
#
# The machine needs a GPU and the packages of the extra "test"; PYTHON names the Python that has them. WHEELS is a folder
# with the wheels of the peers, and of any other package that the machine lacks. To fill it on a machine with a network:
#
#   python -m pip wheel --no-deps --wheel-dir WHEELS curvlinops-for-pytorch==3.0.1 hessian-eigenthings==1.0.0a5 \
#       pyhessian==0.1 backpack-for-pytorch einconv einops unfoldNd linear_operator opt_einsum
#
# The wheels are installed into a temporary folder. Each step has a time limit of its own, and writes its results and its
# output to OUT. A step that fails does not stop the others. The last lines, also in OUT/summary.txt, say which steps
# failed; the exit status is then 1.
#
# DEVICE=cpu tries the script on a machine without a GPU, with one small model.
set -uo pipefail
if [ $# -ne 2 ]; then
    echo "usage: benchmarks/gpu.sh WHEELS OUT" >&2
    exit 2
fi
wheels=$(cd "$1" && pwd) && mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
total=480  # seconds
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD/src:$work/peers${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=$work/inductor
summary=$out/summary.txt
: > "$summary"
failed=0

# step NAME SECONDS COMMAND ...: run a command for at most as many seconds, or for the rest of the total.
step() {
    local name=$1 limit=$2 begun=$SECONDS status
    shift 2
    [ "$limit" -lt $((total - SECONDS)) ] || limit=$((total - SECONDS))
    if [ "$limit" -gt 0 ]; then
        timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
        status=$?
    else
        status="not started, because the time is up"
    fi
    case $status in
        0) status=ok ;;
        124 | 137) status="FAILED: stopped after $limit s"; failed=1 ;;
        *) status="FAILED: $status; see $name.log"; failed=1 ;;
    esac
    printf '%-12s %4d s  %s\n' "$name" $((SECONDS - begun)) "$status" | tee -a "$summary"
}

mlp="MLP 784-512-512-10" cnn="CNN 32x32" resnet="ResNet-18 64x64, eval" gpt="GPT 4 layers, d = 128"
all=(--model "$mlp" --model "$cnn" --model "$resnet" --model "$gpt")
with_convolutions=(--model "$cnn" --model "$resnet")
probes=4 steps=32 columns=10
if [ "$device" = cpu ]; then
    cnn=$mlp resnet=$mlp probes=1 steps=4 columns=1
    all=(--model "$mlp") with_convolutions=(--model "$mlp")
fi
on=(--device "$device")
eager=(--only curvop --only "curvop, tensors" --only "curvlinops to_scipy" --only "curvlinops eager" --only eigenthings
    --only "by hand" --only gradient)
compiled=(--only curvop --only "curvop compiled" --only "curvlinops compiled" --only gradient)
quick=(--runs 5 --room 0.3)

step install 15 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/peers" "$wheels"/*.whl
step device 15 "$python" -c "
import torch
print('torch', torch.__version__, 'CUDA', torch.version.cuda)
print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'CPU')"
step tests 90 "$python" -m pytest -q -p no:cacheprovider --numprocesses 4 tests/kernels/test_gpu.py \
    tests/kernels/test_precision.py
step peers 95 "$python" benchmarks/peers.py "${on[@]}" "${all[@]}" --work product --work Gauss-Newton "${eager[@]}" \
    "${quick[@]}" --limit 40 --out "$out/peers"
step compiled 105 "$python" benchmarks/peers.py "${on[@]}" "${all[@]}" --work product --work Gauss-Newton \
    "${compiled[@]}" "${quick[@]}" --limit 60 --out "$out/peers-compiled"
step tf32 40 "$python" benchmarks/peers.py "${on[@]}" --tf32 "${with_convolutions[@]}" --work product "${eager[@]}" \
    "${quick[@]}" --limit 30 --out "$out/peers-tf32"
step density 40 "$python" benchmarks/density.py "${on[@]}" --model "$cnn" --engine autograd --probes "$probes" \
    --steps "$steps" --repeats 1 --out "$out/density.json"
step solves 40 "$python" benchmarks/solves.py "${on[@]}" --model "digits, trained" --columns "$columns" --limit 4 \
    --out "$out/solves.json"
step memory 40 "$python" benchmarks/budget.py "${on[@]}" --model "$resnet" --repeats 1 --out "$out/budget.json"

if [ "$failed" -eq 0 ]; then
    echo "all steps succeeded in $SECONDS s" | tee -a "$summary"
else
    echo "at least one step failed; $SECONDS s" | tee -a "$summary"
fi
exit "$failed"
