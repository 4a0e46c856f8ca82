#!/usr/bin/env bash
# The first minutes on a GPU: is it all there, is it right, is it fast. From the repository's root:
#
#   benchmarks/gpu.sh                      results in bench_results/, or in the folder that OUT names
#   DRY_RUN=1 benchmarks/gpu.sh            every step on a CPU, interpreted, with small shapes, in a copy;
#                                          results in OUT, else in a new folder under /tmp (0: no dry run)
#   PYTHON=python3.12 BUDGET=1800 ...      another interpreter (default .venv's, else python3), more seconds
#
# Steps come in the order of their worth: parity and the headline end within 8 minutes, all within BUDGET
# (25). Each has a limit of its own and a log in $OUT/gpu-logs; one that fails or runs out of time is
# reported, and the next begins. Rows are written as they are measured, and a second run goes on from them:
# after Ctrl-C, too, which ends the running step and the script.
# README.md's figures are drawn anew where OUT is bench_results/, whose files they link; else OUT has all there is.
# Where a check has failed (environment, parity, tests) README.md stays as it is, and rows measured after it say so.
# What autotune chooses stays in ~/.cache/asft_kernels (or $XDG_CACHE_HOME), for all later calls of the package.
# Needs torch, triton and pytest; tries `pip install` for what is missing, one by one, never replaces a torch or
# Triton that is there, and says what stays missing (PIP_NO_INDEX=1 PIP_FIND_LINKS=folder: without a network).
set -uo pipefail
caller=$PWD
cd "$(dirname "$0")/.." || exit 2

DRY_RUN=${DRY_RUN:-}
[ "$DRY_RUN" = 0 ] && DRY_RUN=
[ -n "${OUT:-}" ] && [ "${OUT#/}" = "$OUT" ] && OUT=$caller/$OUT
[ -n "$DRY_RUN" ] && OUT=${OUT:-$(mktemp -d)}  # its rows measure nothing
OUT=$(mkdir -p "${OUT:-bench_results}" && cd "${OUT:-bench_results}" && pwd) || exit 2
BUDGET=$((${BUDGET:-1500} - 60))  # the last minute is the report's
GRACE=5                           # seconds from a step's interrupt to its end
LOOK=10                           # seconds that looking for a module or a device may take
LOGS=$OUT/gpu-logs
SUMMARY=$LOGS/summary.txt
mkdir -p "$LOGS" && : > "$SUMMARY"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
elif [ "${PYTHON#*/}" != "$PYTHON" ] && [ "${PYTHON#/}" = "$PYTHON" ]; then
    PYTHON=$caller/$PYTHON
fi
if [ -n "$DRY_RUN" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    copy=$(mktemp -d) && trap 'rm -rf "$copy"' EXIT
    cp -r asft_kernels benchmarks bench_results docs tests ./*.md ./*.toml ./*.txt setup.py "$copy" && cd "$copy" || exit 2
fi
export ASFT_KERNELS_TUNED=0  # the table's first tiles, until a step says otherwise
unset ASFT_BENCHMARK_FAILED_CHECKS
failed=0 unchecked= name=start began=0 running=

finish() {
    printf '\n== %s steps not ok; rows in %s, logs in %s\n' "$failed" "${ROWS:-$OUT (none yet)}" "$LOGS"
    cat "$SUMMARY"
}

interrupted() {
    trap '' INT TERM
    [ -n "$running" ] && kill -INT "$running" 2> /dev/null && wait "$running"  # after GRACE `timeout` kills it
    printf '%-14s %5s s  interrupted\n' "${running:+$name}" $((SECONDS - began)) >> "$SUMMARY"
    failed=$((failed + 1))
    finish
    exit 130
}
trap interrupted INT TERM

step() {  # step NAME LIMIT COMMAND...: at most LIMIT seconds, and never past BUDGET
    local limit=$2 log=$LOGS/$1.log code result tee
    name=$1 began=$SECONDS
    shift 2
    [ $((BUDGET - SECONDS)) -lt "$limit" ] && limit=$((BUDGET - SECONDS))
    if [ "$limit" -lt 5 ]; then
        result="not run: BUDGET is used up"
    else
        printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*"
        # In the background, as bash sees a signal only while it waits; as a job, which does not ignore Ctrl-C.
        exec 3> >(exec tee -i "$log")
        tee=$!
        set -m
        timeout -s INT -k "$GRACE" "$limit" "$@" >&3 2>&1 &
        set +m
        running=$!
        exec 3>&-
        wait "$running"
        code=$?
        running=
        wait "$tee"
        case $code in
            0) result=ok ;;
            124 | 137) result="stopped at its limit of $limit s" ;;
            *) result="FAILED with code $code" ;;
        esac
    fi
    [ "$result" = ok ] || failed=$((failed + 1))
    printf '%-14s %5s s  %s\n' "$name" $((SECONDS - began)) "$result" >> "$SUMMARY"
    [ "$result" = ok ]
}

check() {  # a step without which no figure is published: rows measured after its failure carry its name
    step "$@" && return
    unchecked="${unchecked:+$unchecked, }$1"
    export ASFT_BENCHMARK_FAILED_CHECKS=$unchecked
    return 1
}

have() { timeout -k 1 "$LOOK" "$PYTHON" - "$@" <<'END'
import importlib.util, sys
missing = [m for m in sys.argv[1:] if importlib.util.find_spec(m) is None]
print("missing:", *missing) if missing else print("all found:", *sys.argv[1:])
sys.exit(bool(missing))
END
}

environment() {
    nvidia-smi || rocm-smi || echo "neither nvidia-smi nor rocm-smi answers"
    "$PYTHON" -m pip list 2> /dev/null | grep -iE '^(torch|triton|liger|cut-cross|trl|transformers|pytest|numpy)'
    have torch triton pytest hypothesis tqdm numpy matplotlib || echo "-> tests, benchmarks or pictures will fail"
    have liger_kernel cut_cross_entropy trl || echo "-> these peers will be left out of the benchmark"
    "$PYTHON" - <<'END'
import os, sys, torch
if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    sys.exit(f"torch {torch.__version__} is here, asft_kernels needs 2.11 or newer: nothing below can be relied on")
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda, "hip", torch.version.hip)
if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("no CUDA or ROCm device is used") if torch.cuda.is_available() else print("dry run: no device is asked for")
elif not torch.cuda.is_available():
    sys.exit("torch finds no CUDA or ROCm device: everything below will be skipped or fail")
else:
    print(torch.cuda.get_device_properties(0))
END
}

tests() { "$PYTHON" -m pytest -q -rs -W default -p no:cacheprovider "$@"; }
# A first call compiles: 2 minutes, of which a hung contestant may take no more.
measure() { "$PYTHON" -m benchmarks.run --out "$ROWS" --limit 120 "$@"; }
# Into the same rows: the contestant takes what autotune stored, beside the table's first tile and the bare products.
# Rows carry a digest of the stored times, so that a second run with new ones measures again.
tuned() { "$PYTHON" -m benchmarks.run --out "$ROWS" --limit 120 --contestants "triton, tuned" -- "$@"; }
# Interpreted times are not stored, so that nobody takes them for a device's: a dry run sees that, and the contestant.
untuned() { tuned "$@" 2>&1 | tee /dev/stderr | grep -q "no stored tile"; }
# WANTED by module, which pip takes for the package. The versions are those of constraints.txt, but for what is here.
install() {
    {
        "$PYTHON" -m pip list --format=freeze 2> /dev/null | grep -iE '^(torch|triton|pytorch-triton[a-z-]*)=='
        grep -vE '^(torch|triton)==' constraints.txt
    } > "$LOGS/pins.txt"
    local module result=0
    for module in $WANTED; do
        have "$module" > /dev/null && continue
        "$PYTHON" -m pip install -q --retries 1 --timeout 10 -c "$LOGS/pins.txt" "$module" || result=1
    done
    return $result
}
export -f have environment tests measure tuned untuned install
export PYTHON LOGS OUT LOOK WANTED="torch triton pytest hypothesis tqdm numpy matplotlib liger_kernel cut_cross_entropy trl"

check environment 30 bash -c environment
if ! have $WANTED > /dev/null; then
    step install 70 bash -c install
    have $WANTED | tee -a "$SUMMARY"
fi
slug=$(timeout -k 1 "$LOOK" "$PYTHON" -c "import torch
from benchmarks.machine import device_slug
print(device_slug('cuda' if torch.cuda.is_available() else 'cpu'))" 2> /dev/null || echo unknown)
ROWS=$OUT/$(date +%F)-$slug.jsonl
export ROWS

if [ -z "$DRY_RUN" ]; then
    key=(tests/test_gpu.py -k "parity and (bfloat16 or float32)")
    rest=(tests/test_gpu.py -k "not (parity and (bfloat16 or float32))")
    kernels=(tests/test_kernels.py tests/test_triton_backend.py tests/test_autotune.py tests/test_functional.py)
    headline=headline suite=gpu shape=(--hidden-size 4096 --vocab 151936 --tokens 2048 8192) tuned=tuned pairs=()
else
    key=(tests/test_kernels.py -k "with_each_tile and float32")
    rest=(tests/test_gpu.py)
    kernels=(tests/test_triton_backend.py -k "no_tokens or smallest")
    headline=smoke suite=smoke shape=(--hidden-size 24 --vocab 70 --tokens 16 33) tuned=untuned pairs=(--pairs 1)
fi
# Up to the headline all limits, with GRACE after each step and LOOK before, stay within 8 minutes.
check parity 140 bash -c 'tests "$@"' - "${key[@]}"
step headline 180 bash -c 'measure "$@"' - "$headline"
check device-tests 240 bash -c 'tests "$@"' - "${rest[@]}"
step accuracy 150 "$PYTHON" -m benchmarks.accuracy --random-only --limit 120 --out "$ROWS" ${pairs[@]+"${pairs[@]}"}
check kernel-tests 240 bash -c 'tests "$@"' - "${kernels[@]}"
step autotune 90 "$PYTHON" -m asft_kernels.autotune "${shape[@]}" --dtype bfloat16
step tuned 90 bash -c '"$@"' - "$tuned" "$headline"
step suite "$BUDGET" bash -c 'measure "$@"' - "$suite"
BUDGET=$((SECONDS + 60))
if [ bench_results -ef "$OUT" ] && [ -n "$unchecked" ]; then
    drawn=(--out "$LOGS/unchecked" "$ROWS")  # over no page that is published
elif [ bench_results -ef "$OUT" ]; then
    drawn=(--write)
elif [ -z "$DRY_RUN" ]; then
    drawn=(--out "$OUT" "$ROWS")
else
    drawn=(--out "$OUT" "$ROWS" bench_results/*.jsonl)  # the smoke suite's are left out: something is to be drawn
fi
step report 60 "$PYTHON" -m benchmarks.report "${drawn[@]}"
[ -n "$unchecked" ] && echo "README.md is left as it was: not ok: $unchecked; drawn: ${drawn[*]}" >> "$SUMMARY"

finish
[ "$failed" -eq 0 ]
