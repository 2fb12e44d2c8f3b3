#!/usr/bin/env bash
# Try everything that needs an NVIDIA GPU, in about 8 minutes: the GPU tests, then the whole published geometry beside
# diffusers (random weights, float16, 512x512, 50 steps at strength 0.8, guidance): eager, captured, compiled.
# Writes out/gpu.md. Exit status: 0, 1 where a part failed or ran out of time, 2 where there is no GPU to use.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$(dirname "$0")/.."

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "gpu_check: no NVIDIA GPU here (nvidia-smi lists none); it needs one" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

needed="import torch, diffusers, transformers, accelerate, peft, scipy, pytest, sys; sys.exit(not torch.cuda.is_available())"
if "${PYTHON:-python3}" -c "$needed" 2>/dev/null; then # all that is needed is installed: take it as it is
    python() { "${PYTHON:-python3}" "$@"; }
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else # any torch: an installed one for CUDA stays, else pip chooses
    grep -v "^torch==" constraints.txt >"$work/constraints.txt"
    prepare "[test,parity]" "$work/constraints.txt"
fi
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu_check: there is a GPU, but this torch cannot use it:" >&2
    python -c "import torch; print(f'torch {torch.__version__}, built for CUDA {torch.version.cuda}')" >&2
    echo "install a build of torch for this machine's driver (https://pytorch.org), and run this again" >&2
    exit 2
fi

python=$(python -c "import sys; print(sys.executable)")
mkdir -p out
report=out/gpu.md
status=0

# Run one part under a limit of seconds; what it prints goes into the report, what it warns of to a log beside it.
part() { # TITLE SECONDS COMMAND...
    local title=$1 limit=$2 code=0
    shift 2
    echo "gpu_check: $title (at most $limit s)" >&2
    printf '\n## %s\n\n' "$title" >>"$report"
    timeout --kill-after=10 "$limit" "$@" >"$work/out" 2>"$work/err" || code=$?
    cat "$work/out" >>"$report"
    if [ "$code" -ne 0 ]; then
        status=1
        [ "$code" -lt 124 ] || printf '\nStopped after %s seconds.\n' "$limit" >>"$report"
        printf '\nFailed with status %s:\n\n```\n%s\n```\n' "$code" "$(tail -n 15 "$work/err")" >>"$report"
        tail -n 3 "$work/err" >&2
    fi
}

benchmark() { # TITLE SECONDS OPTIONS...
    local title=$1 limit=$2
    shift 2
    part "$title" "$limit" "$python" -W ignore scripts/benchmark.py --geometry full --dtype float16 --size 512 \
        --steps 50 --strength 0.8 --repeats 3 --checkpoint "$work/checkpoint" "$@"
}

printf '# depthdiff on a GPU\n' >"$report"
part "Tests" 90 "$python" -m pytest -q -m "gpu and not full" -p no:cacheprovider
benchmark "Eager" 150 --stage text depth encode unet decode call again
benchmark "Captured" 80 --stage call --capture
benchmark "Compiled" 160 --stage unet decode call --compile
cat "$report"
echo "gpu_check: wrote $report" >&2
exit "$status"
