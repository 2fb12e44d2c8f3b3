#!/usr/bin/env bash
# Try everything that needs an NVIDIA GPU, in under 8 minutes and without a network: the GPU tests; then, where diffusers
# can be imported, parity with it on the GPU, and the whole published geometry beside it (random weights, float16,
# 512x512, 50 steps at strength 0.8, guidance): eager, captured, and the UNet compiled; last the tests of compiled networks.
#
#     scripts/gpu_check.sh [SECONDS [SECONDS_OF_A_PART]]     (470, and what each part is given below)
#
# Needs Python (PYTHON, or python3) with torch for CUDA, pytest, and what the package itself requires. A package that is
# missing is taken from a wheel in .whl/ for this run, if there is one; pip is used for that alone, and no index is asked.
# Writes out/gpu.md, line by line as the results come: what has been found is there, whatever ends the run.
# Exit status: 0; 1 where a part failed, ran out of time, or was stopped or left out for want of time; 2 where nothing
# was tried, as there is no GPU to use, or something is missing. Parts left out for want of diffusers do not count.
set -euo pipefail
cd "$(dirname "$0")/.."
total=${1:-470} most=${2:-470}

refuse() { # WHY
    echo "gpu_check: $1" >&2
    exit 2
}

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    refuse "no NVIDIA GPU here (nvidia-smi lists none); it needs one"
fi
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$work/site" HF_HUB_OFFLINE=1

if compgen -G ".whl/*.whl" >/dev/null; then
    wanted=$("$python" - .whl/*.whl <<'END'
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

for name in sorted({Path(wheel).name.partition("-")[0] for wheel in sys.argv[1:]}):
    try:
        distribution(name)
    except PackageNotFoundError:
        print(name)
END
    )
    # shellcheck disable=SC2086
    [ -z "$wanted" ] || "$python" -m pip install -q --disable-pip-version-check --no-index --find-links .whl --no-deps \
        --target "$work/site" $wanted >&2 || refuse "pip cannot install ${wanted//$'\n'/, } from .whl"
fi
missing=$("$python" - torch numpy PIL safetensors tokenizers huggingface_hub tqdm pytest <<'END'
import importlib.util
import sys

print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
END
)
[ -z "$missing" ] || refuse "missing: $missing; install it, or put its wheel into .whl/"
about=$("$python" - <<'END'
import platform
import sys

import torch

print(f"torch {torch.__version__} for CUDA {torch.version.cuda}, Python {platform.python_version()}")
sys.exit(not torch.cuda.is_available())
END
) || refuse "there is a GPU, but this torch cannot use it (${about:-it cannot be imported}); install a build of torch for \
this machine's driver (https://pytorch.org)"
commit=unknown
[ ! -e .git ] || commit=$(git describe --always --dirty 2>/dev/null) || commit=unknown

mkdir -p out
report=out/gpu.md
status=0 child='' fence=''
cat >"$report" <<END
# depthdiff on a GPU

- $(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | paste -sd ';')
- $about
- commit $commit, $(date -u '+%F %T') UTC
END

close() { # REMARK: end a part of the report
    [ -z "$fence" ] || echo "$fence" >>"$report"
    printf '\n%s\n' "$1" >>"$report"
    fence=''
}

stop() { # End the present part when the script itself is told to end.
    trap '' INT TERM HUP
    [ -z "$child" ] || kill "$child" || true
    wait || true
    close "Stopped from outside after $SECONDS s in all."
    exit 1
}
trap stop INT TERM HUP
set -m # a part is a process group of its own, and can be interrupted

# Run one part under a limit of seconds; what it prints goes into the report at once, what it warns of only if it fails.
part() { # TITLE SECONDS COMMAND...
    local title=$1 limit=$2 code=0 begin=$SECONDS left=$((total - SECONDS))
    shift 2
    limit=$((limit < most ? limit : most))
    limit=$((limit < left ? limit : left))
    printf '\n## %s\n' "$title" >>"$report"
    if [ "$limit" -lt 1 ]; then
        status=1 fence=''
        close "Left out: no time was left."
        return
    fi
    echo "gpu_check: $title (at most $limit s)" >&2
    printf '\n%s\n' "$fence" >>"$report"
    timeout --signal=INT --kill-after=5 "$limit" "$@" </dev/null >>"$report" 2>"$work/err" &
    child=$!
    wait "$child" || code=$?
    child=''
    if [ "$code" -eq 0 ]; then
        close "Took $((SECONDS - begin)) s."
    else
        status=1
        case $code in
            124 | 137) close "Stopped after $limit s." ;;
            *) close "Failed with status $code after $((SECONDS - begin)) s." ;;
        esac
        [ ! -s "$work/err" ] || printf '\n```\n%s\n```\n' "$(tail -n 15 "$work/err")" >>"$report"
        tail -n 3 "$work/err" >&2
    fi
}

tests() { # TITLE SECONDS ARGUMENTS...
    local title=$1 limit=$2
    shift 2
    fence='```'
    part "$title" "$limit" "$python" -m pytest -v --tb=short --show-capture=no -m "gpu and not full" -p no:cacheprovider "$@"
    fence=''
}

benchmark() { # TITLE SECONDS OPTIONS...
    local title=$1 limit=$2
    shift 2
    part "$title" "$limit" "$python" -W ignore scripts/benchmark.py --geometry full --dtype float16 --size 512 \
        --steps 50 --strength 0.8 --repeats 3 --checkpoint "$work/checkpoint" "$@"
}

tests "Tests" 120 tests/fast/test_gpu.py tests/test_pipeline.py -k "not compiled"
if why=$("$python" -W ignore -c "from diffusers import StableDiffusionDepth2ImgPipeline" 2>&1); then
    tests "Parity" 60 tests/parity/test_gpu.py
    benchmark "Eager" 150 --stage text depth encode unet decode call
    benchmark "Captured" 80 --stage call --capture
    benchmark "Compiled" 220 --stage unet --compile
else
    printf '\n## Parity and timings\n' >>"$report"
    close "Left out, as diffusers cannot be imported: ${why##*$'\n'}"
fi
tests "Tests of compiled networks" 300 tests/fast/test_gpu.py -k compiled
cat "$report"
echo "gpu_check: wrote $report" >&2
exit "$status"
