#!/usr/bin/env bash
# All that wants a GPU, in at most 12 minutes on one H100; see README.md.
#
#   bash benchmarks/gpu.sh                           # OUT=folder for the output, PYTHON=interpreter
#   bash benchmarks/gpu.sh --quick --device cpu      # tiny sizes and a few of the tests, without a GPU
#
# What a part prints stands in $OUT/PART.txt as it comes. A part that fails or runs out of time does not stop the next;
# the exit status is the number of those that did.
set -u
cd "$(dirname "$0")/.." || exit 2

device=cuda quick=
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1 ;;
        --device) device=${2:-} && shift ;;
        *) echo "$1 is unknown; give --quick, --device cuda or --device cpu" >&2 && exit 2 ;;
    esac
    shift
done
case $device in
    cuda) marked="gpu" ;;
    cpu) marked="not gpu" ;;
    *) echo "--device is '$device'; give cuda or cpu" >&2 && exit 2 ;;
esac
python=${PYTHON:-python}
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA device for $python; --device cpu runs the same lines without one" >&2
    exit 2
fi
out=${OUT:-eval/gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
: >"$out/summary.txt"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/tools${PYTHONPATH:+:$PYTHONPATH}"
failed=0

part() { # NAME SECONDS COMMAND...: run a part within its time
    local name=$1 seconds=$2 start=$SECONDS code said
    shift 2
    echo "== $name, at most $seconds s"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    case $code in
        0) said="done" ;;
        124 | 137) said="FAILED: out of time" ;;
        *) said="FAILED: exit status $code" ;;
    esac
    [ "$code" = 0 ] || failed=$((failed + 1))
    echo "$name: $said, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

ways="TSP;TSP 16GiB;TSP 8GiB;MONAI, 2 splits;MONAI, 8 splits;windows"
tsp=(--sizes 256x256x256,512x512x512,512x512x768 --budget 290)
sampling=(--budget 170)
tests=(tests/diffusion/test_devices.py tests/tsp/test_devices.py tests/bundles/test_training.py)
named="device"
if [ -n "$quick" ]; then
    tsp=(--sizes 16x96x16,16x96x24 --channels small --repeats 1 --threads 1)
    sampling=(--quick --threads 1)
    tests=(tests/diffusion/test_devices.py)
    named="device and scheduler"
fi

part tests 180 "$python" -m pytest -v --durations=5 -p no:cacheprovider --continue-on-collection-errors \
    -k "$named" -m "$marked" "${tests[@]}"
part tsp 310 "$python" benchmarks/tsp_cuda.py --device "$device" --directions decode --variants "$ways" \
    --out "$out" "${tsp[@]}"
part sampling 200 "$python" benchmarks/sampling_cuda.py --device "$device" --out "$out" "${sampling[@]}"

echo "== output in $out"
cat "$out/summary.txt"
exit "$failed"
