#!/usr/bin/env bash
# Half an hour on a GPU, in three parts of less than 10 minutes: is it right, how fast is it, and why. From the root:
#
#   benchmarks/gpu.sh 1            is it all there, is it right, how far from the bare products: each product alone,
#                                  whole calls, the table's tiles, peers in one process
#   benchmarks/gpu.sh 2            all GPU tests, autotune, the rows of set headline beside the peers, the tuned ones
#   benchmarks/gpu.sh 3            kernel by kernel, N = 512, Nsight Compute, a training step, the rows of set growth-n
#   benchmarks/gpu.sh              all three, one after the other
#   DRY_RUN=1 benchmarks/gpu.sh 1  its steps on a CPU, interpreted, with small shapes, in a copy (0: no dry run)
#
# OUT=folder         gets results.tgz, all there is, every 20 seconds and at the end, whole or not at all; beside it the
#                    rows as they are. Without OUT the rows go into bench_results/ at the end, and the pages' figures
#                    are drawn anew, unless a check has failed (environment, parity, tests): then they stay.
# WORK=folder        rows and logs until then; a later part, or the same one after Ctrl-C, goes on from them (default:
#                    asft-gpu-UID under TMPDIR). Rows measured after a failed check say so.
# PYTHON=python3.12  another interpreter (default: .venv's, else python3). BUDGET: seconds of a part (default: 570)
# PATIENCE=4         that many times the limits and the BUDGET, for a slow CPU's dry run
# ASFT_BENCHMARK_COMMIT=hash  the commit that rows name where there is no .git
#
# Each step has a limit and a log of its own, and is not begun unless it can end within its part's BUDGET; one that
# fails or runs out of time is reported, and the next begins. What half an hour is too short for, at leisure:
# python -m benchmarks.run gpu and python -m benchmarks.accuracy --random-only, with --out and the file of rows.
# What autotune chooses stays in ~/.cache/asft_kernels (or $XDG_CACHE_HOME), for all later calls of the package.
# Needs torch, triton and pytest. The first part tries `pip install` for what is missing, one by one, replaces nothing
# that is there, and says what stays missing (without a network: PIP_FIND_LINKS=folder of wheels).
set -uo pipefail
caller=$PWD
cd "$(dirname "$0")/.." || exit 2

parts=("$@")
[ $# -eq 0 ] && parts=(1 2 3)
for part in "${parts[@]}"; do
    case $part in 1 | 2 | 3) ;; *) echo "part: got '$part', need 1, 2 or 3; none for all" >&2; exit 2 ;; esac
done
absolute() { case $1 in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }
folder() { mkdir -p "$1" && (cd "$1" && pwd); }
DRY_RUN=${DRY_RUN:-}
[ "$DRY_RUN" = 0 ] && DRY_RUN=
WORK=$(folder "$(absolute "${WORK:-${TMPDIR:-/tmp}/asft-gpu${DRY_RUN:+-dry}-$UID}")") || exit 2
OUT=${OUT:+$(folder "$(absolute "$OUT")")} || exit 2
[ "$OUT" -ef bench_results ] && OUT=
[ -n "$DRY_RUN" ] && OUT=${OUT:-$(mktemp -d)}  # its rows measure nothing
PATIENCE=${PATIENCE:-1}
BUDGET=$((${BUDGET:-570} * PATIENCE))
GRACE=5  # seconds from a step's interrupt to its end
LOOK=10  # seconds that looking for modules or the device's name may take
LOGS=$WORK/logs ROWS=$WORK/rows.jsonl SUMMARY=$WORK/summary.txt FAILED=$WORK/failed
[ "${parts[0]}" = 1 ] && rm -rf "$FAILED" "$SUMMARY" "$WORK/installed"
mkdir -p "$LOGS" "$FAILED"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
elif [ "${PYTHON#*/}" != "$PYTHON" ]; then
    PYTHON=$(absolute "$PYTHON")
fi
copy= saver= running= failed=0 name=start began=0 absent=
if [ -n "$DRY_RUN" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    copy=$(mktemp -d)
    cp -r asft_kernels benchmarks bench_results docs tests ./*.md ./*.toml ./*.txt setup.py "$copy" && cd "$copy" || exit 2
fi
export ASFT_KERNELS_TUNED=0  # the table's first tiles, until a step says otherwise
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1

save() {
    [ -n "$OUT" ] || return
    local file new=$OUT/.new
    tar czf "$new" -C "$(dirname "$WORK")" --exclude='*.ncu-rep' --exclude='results.tgz' "$(basename "$WORK")"
    [ $? -le 1 ] && mv "$new" "$OUT/results.tgz"  # 1: a file grew meanwhile
    for file in rows.jsonl probe.jsonl train.jsonl summary.txt; do
        [ -f "$WORK/$file" ] && cp "$WORK/$file" "$new" && mv "$new" "$OUT/$file"
    done
}

leave() {
    [ -n "$saver" ] && kill -- "-$saver" && wait "$saver"  # as a job it has a process group, with what it runs
    save
    [ -n "$copy" ] && rm -rf "$copy"
} 2> /dev/null
trap leave EXIT

finish() {
    printf '\n== %s steps not ok; rows and logs in %s%s\n' "$failed" "$WORK" "${OUT:+, all in $OUT/results.tgz}"
    cat "$SUMMARY"
}

say() { printf '%-14s %5s s  %s\n' "$1" "$2" "$3" >> "$SUMMARY"; }
left_out() { say "$1" 0 "left out: $2"; }

interrupted() {
    trap '' INT TERM
    [ -n "$running" ] && kill -INT "$running" 2> /dev/null && wait "$running"  # after GRACE `timeout` kills it
    say "${running:+$name}" $((SECONDS - began)) interrupted
    failed=$((failed + 1))
    finish
    exit 130
}
trap interrupted INT TERM
set -m
(while sleep "${SAVE_SECONDS:-20}"; do save; done) > /dev/null 2>&1 &
saver=$!
set +m

step() {  # step NAME LIMIT COMMAND...: at most LIMIT seconds; as_far=1: what it did until then is what was wanted
    local limit=$(($2 * PATIENCE)) log=$LOGS/$1.log left=$((BUDGET - (SECONDS - part_began))) code result tee
    name=$1 began=$SECONDS
    shift 2
    if [ $((limit + GRACE)) -gt "$left" ]; then
        result="not run: may take $limit s and $GRACE to end, $left are left"
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
        kill -KILL -- "-$running" 2> /dev/null  # what is left of it would hold the log open, and this script
        running=
        wait "$tee"
        case $code in
            0) result=ok ;;
            124 | 137) result="${as_far:+ok, }stopped at its limit of $limit s" ;;
            *) result="FAILED with code $code" ;;
        esac
    fi
    say "$name" $((SECONDS - began)) "$result"
    [ "${result%%,*}" = ok ] && return
    failed=$((failed + 1))
    return 1
}

check() {  # a step without which no figure is published: until it has passed, rows carry its name
    touch "$FAILED/$1"
    step "$@" && rm "$FAILED/$1"
    name_failed
}

name_failed() {
    ASFT_BENCHMARK_FAILED_CHECKS=$(ls "$FAILED" | paste -sd, - | sed 's/,/, /g')
    export ASFT_BENCHMARK_FAILED_CHECKS
}
name_failed

missing() { timeout -k 1 "$LOOK" "$PYTHON" - "$@" <<'END'
import importlib.util, sys
print(*(module for module in sys.argv[1:] if importlib.util.find_spec(module) is None))
END
}

environment() {
    nvidia-smi || rocm-smi || echo "neither nvidia-smi nor rocm-smi answers"
    echo "$(nproc) processors; ncu: $(command -v ncu || echo not found)"
    "$PYTHON" -m pip list 2> /dev/null | tee "$WORK/packages.txt" |
        grep -iE '^(torch|triton|liger|cut-cross|trl|transformers|pytest|numpy)'
    "$PYTHON" - <<'END'
import os, sys, torch
if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    sys.exit(f"torch {torch.__version__} is here, asft_kernels needs 2.11 or newer: nothing below can be relied on")
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda, "hip", torch.version.hip)
if os.environ.get("DRY_RUN"):
    sys.exit("no CUDA or ROCm device is used") if torch.cuda.is_available() else print("dry run: no device is asked for")
elif not torch.cuda.is_available():
    sys.exit("torch finds no CUDA or ROCm device: everything below will be skipped or fail")
else:
    print(torch.cuda.get_device_properties(0))
END
}

# One process compiles for minutes while the other processors stand idle.
tests() {
    local spread=() most
    most=$(nproc)
    [ -z "$(missing xdist)" ] && spread=(-n $((most < 12 ? most : 12)))
    "$PYTHON" -m pytest -q -rs -W default -p no:cacheprovider ${spread[@]+"${spread[@]}"} "$@"
}
probe() { "$PYTHON" -m benchmarks.gpu_probe "$WORK/probe.jsonl" ${TINY:+"$TINY"} "$@"; }
# One call may take 30 s; a first one, which compiles, five times that: a hung contestant takes no more.
measure() { "$PYTHON" -m benchmarks.run --out "$ROWS" --limit 30 "$@"; }
# Into the same rows: the contestant takes what autotune stored, beside the table's first tile and the bare products.
# Rows carry a digest of the stored times, so that a second run with new ones measures again.
tuned() { measure --contestants "triton, tuned" -- "$@"; }
# Interpreted times are not stored, so that nobody takes them for a device's: a dry run sees that, and the contestant.
untuned() { tuned "$@" 2>&1 | tee /dev/stderr | grep -q "no stored tile"; }
autotune() {
    "$PYTHON" -m asft_kernels.tools.autotune "$@" || return
    cp "${XDG_CACHE_HOME:-$HOME/.cache}"/asft_kernels/tiles-*.json "$WORK" 2> /dev/null || echo "no times are stored"
}
# The third launch of the kernel, and what the profiler says of it in words.
launch() {
    ncu --clock-control none --set full -k regex:logits_exp -s 2 -c 1 -o "$WORK/logits_exp" -f \
        "$PYTHON" -m benchmarks.gpu_probe "$WORK/launch.jsonl" --stages one &&
        ncu --import "$WORK/logits_exp.ncu-rep" --page details | tee "$WORK/ncu-logits_exp.txt"
}
# WANTED by module, which pip takes for the package. What is here keeps its version, the rest has constraints.txt's.
install() {
    local module result=0
    "$PYTHON" -m pip list --format=freeze 2> /dev/null > "$LOGS/installed.txt"
    awk -F '==' 'function key(name) { gsub(/[_.]/, "-", name); return tolower(name) }
        NR == FNR { here[key($1)]; print; next }
        NF > 1 && !/^#/ && !(key($1) in here)' "$LOGS/installed.txt" constraints.txt > "$LOGS/pins.txt"
    if [ -z "${PIP_NO_INDEX:-}" ] && ! timeout -k 1 8 "$PYTHON" -m pip index versions --retries 0 --timeout 4 pip; then
        echo "no package index answers"
        export PIP_NO_INDEX=1
    fi
    if [ -n "${PIP_NO_INDEX:-}" ] && [ -z "${PIP_FIND_LINKS:-}" ]; then
        echo "nothing to install from: PIP_FIND_LINKS may name a folder of wheels"
        return 1
    fi
    for module in $(missing $WANTED); do
        "$PYTHON" -m pip install -q --retries 1 --timeout 5 -c "$LOGS/pins.txt" "$module" || result=1
    done
    return $result
}
export -f missing environment tests probe measure tuned untuned autotune launch install
export PYTHON DRY_RUN WORK LOGS ROWS LOOK TINY=${DRY_RUN:+--tiny}
export WANTED="torch triton pytest hypothesis tqdm numpy matplotlib transformers liger_kernel cut_cross_entropy trl"

look() {  # what is missing; the first part that looks tries to install it
    absent=$(missing $WANTED)
    [ -z "$absent" ] && return
    if [ -z "$DRY_RUN" ] && [ ! -e "$WORK/installed" ]; then
        touch "$WORK/installed"
        step install 40 bash -c install
        absent=$(missing $WANTED)
    fi
    [ -n "$absent" ] && say modules 0 "missing, and what needs them is left out or fails: $absent"
}
has() { case " $absent " in *" $1 "*) return 1 ;; esac; }

if [ -z "$DRY_RUN" ]; then
    key=(tests/test_gpu.py -k "parity and (bfloat16 or float32)")
    rest=(tests/test_gpu.py -k "not (parity and (bfloat16 or float32))")
    # Without the one test that starts the interpreter, in a process of its own: it says nothing of the device.
    kernels=(tests/test_kernels.py tests/test_triton_backend.py tests/test_functional.py tests/test_noisy_kernels.py
        tests/test_autotune.py --deselect tests/test_autotune.py::test_the_command)
    headline=headline growth=growth-n tuned=tuned few=()
    shape=(--hidden-size 4096 --vocab 151936 --tokens 2048 8192)
else
    key=(tests/test_kernels.py -k "with_each_tile and float32")
    rest=(tests/test_gpu.py)
    kernels=(tests/test_triton_backend.py -k "no_tokens or smallest")
    headline=smoke growth=smoke tuned=untuned few=(--rounds 1 --contestants "asft_kernels triton" "plain torch" --)
    shape=(--hidden-size 32 --vocab 70 --tokens 16 33)
fi
interprets=1
if [ -n "$DRY_RUN" ] && ! timeout -k 1 60 "$PYTHON" -c "# Does Triton's interpreter go with this NumPy?
import sys, numpy, triton
versions = [tuple(map(int, package.__version__.split('.')[:2])) for package in (triton, numpy)]
sys.exit(versions[0] < (3, 7) and versions[1] >= (2, 4))"; then
    interprets=
    unset TRITON_INTERPRET  # what follows has the torch backend alone
fi
interpreted() {  # a step of kernels, which a dry run leaves out where nothing can interpret them
    if [ -n "$interprets" ]; then "$@"; else left_out "$2" "Triton's interpreter does not go with this NumPy"; fi
}

# The limits of a part's steps, with GRACE after each and LOOK for what is looked up between them, stay within BUDGET.
part_1() {
    check environment 60 bash -c environment
    look
    interpreted check parity 90 bash -c 'tests "$@"' - "${key[@]}"
    step qwen3 130 bash -c 'probe "$@"' - --models Qwen3 --stages ceilings products calls tiles
    step llama-1b 60 bash -c 'probe "$@"' - --models Llama-3.2-1B --stages products calls tiles
    step peers 75 bash -c 'probe "$@"' - --models Qwen3 Llama-3.2-1B --stages peers
    check gpu-rest 55 bash -c 'tests "$@"' - "${rest[@]}"
}

part_2() {
    look
    check gpu-tests 70 bash -c 'tests "$@"' - tests/test_gpu.py
    interpreted check kernel-tests 140 bash -c 'tests "$@"' - "${kernels[@]}"
    interpreted step autotune 45 bash -c 'autotune "$@"' - "${shape[@]}" --dtype bfloat16
    step headline 185 bash -c 'measure "$@"' - ${few[@]+"${few[@]}"} "$headline"
    interpreted step tuned 50 bash -c '"$@"' - "$tuned" "$headline"
}

part_3() {
    look
    step kernels 60 bash -c 'probe "$@"' - --stages kernels
    step small-n 50 bash -c 'probe "$@"' - --tokens 512 --stages calls kernels graphs
    if [ -n "$DRY_RUN" ]; then
        step launch 90 bash -c 'probe "$@"' - --stages one
    elif command -v ncu > /dev/null; then
        step launch 90 bash -c launch
    else
        left_out launch "no ncu, the command of Nsight Compute"
    fi
    if has transformers; then
        step train 90 "$PYTHON" -m benchmarks.gpu_train "$WORK/train.jsonl" ${TINY:+"$TINY"}
    else
        left_out train "transformers is not installed"
    fi
    # First what the headline had no time for.
    as_far=1 step growth 200 bash -c 'measure "$@"' - ${few[@]+"${few[@]}"} "$headline" "$growth"
}

report() {
    local drawn slug
    if [ ! -s "$ROWS" ]; then
        left_out report "no rows of benchmarks.run, which parts 2 and 3 measure"
        return
    elif ! has matplotlib || ! has numpy; then
        left_out report "matplotlib or numpy is not installed"
        return
    elif [ -n "$OUT" ]; then
        drawn=(--out "$WORK/report" "$ROWS")
        [ -n "$DRY_RUN" ] && drawn+=(bench_results/*.jsonl)  # smoke's rows are left out: something is to be drawn
    elif [ -n "$ASFT_BENCHMARK_FAILED_CHECKS" ]; then
        drawn=(--out "$WORK/unchecked" "$ROWS")  # over no page that is published
        echo "the pages are left as they were: not ok: $ASFT_BENCHMARK_FAILED_CHECKS; drawn: ${drawn[*]}" >> "$SUMMARY"
    else
        slug=$(timeout -k 1 "$LOOK" "$PYTHON" -c "import torch
from benchmarks.machine import device_slug
print(device_slug('cuda' if torch.cuda.is_available() else 'cpu'))" 2> /dev/null || echo unknown)
        cp "$ROWS" "bench_results/$(date +%F)-$slug.jsonl"
        drawn=(--write)
    fi
    step report 25 "$PYTHON" -m benchmarks.report "${drawn[@]}"
}

for part in "${parts[@]}"; do
    part_began=$SECONDS
    echo "-- part $part, $(date '+%F %T')" | tee -a "$SUMMARY"
    "part_$part"
done
report
finish
[ "$failed" -eq 0 ]
