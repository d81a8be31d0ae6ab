#!/usr/bin/env bash
# Everything that a GPU must prove, in one command of less than 9 minutes and without a network:
#   bash bench/gpu.sh OUT [all|tests|bench|variants|products|matrices|masks|pretrain] [--installed] [--loose]
# builds the package, runs `pytest -m gpu`, times steps, masked steps, whole steps of Muon and matrix products
# beside torch, and every backend and arithmetic, and trains a Llama of 970 M parameters for some steps.
# OUT gets summary.json and results.tar.gz: a log and JSON for every part, and report/ with charts; --loose
# leaves them there as files. Another part in the same OUT adds to them. A failing part stops no other.
# Without a GPU every part says what it would do on one and does what it can here. --installed skips the build.
# FUSED_OPTIM_COMMIT names the commit of a copy without .git, PYTHON the interpreter that has torch.
set -uo pipefail

usage() { sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed -n '2,9p'; exit 2; }

[[ $# -ge 1 ]] || usage
target=$1 selected=all installed="" loose=""
for argument in "${@:2}"; do
  case $argument in
    all | tests | bench | variants | products | matrices | masks | pretrain) selected=$argument ;;
    --installed) installed=yes ;;
    --loose) loose=yes ;;
    *) usage ;;
  esac
done
for python in ${PYTHON:-python3 "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"}; do
  python=$(command -v "$python") && "$python" -c 'import torch' 2>/dev/null && break
  python=""
done
[[ -n $python ]] || { echo "no Python with torch here: set PYTHON to one that has it" >&2; exit 2; }
# Not its real path: that of a virtual environment's link lies outside of it.
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
mkdir -p "$target" && target=$(cd "$target" && pwd) || exit 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -n $loose ]]; then
  out=$target
else
  mkdir "$work/out" && out=$work/out
  [[ ! -f $target/results.tar.gz ]] || tar -C "$out" -xzf "$target/results.tar.gz"
fi
[[ ! -f $out/summary.json ]] || cp "$out/summary.json" "$work/earlier.json"

# Seconds. A part gets what those before it left over as well: all of them, with the start and ten seconds for
# what is stopped late, stay under 9 minutes. A single part gets most of them.
build_limit=80 tests_limit=130 bench_limit=100 masks_limit=35 matrices_limit=40 pretrain_limit=45
variants_limit=50 products_limit=25 report_limit=20
[[ $selected == all ]] ||
  tests_limit=400 bench_limit=400 masks_limit=400 matrices_limit=400 pretrain_limit=400 variants_limit=400 \
    products_limit=400

# Only bench/ and tests/ come from the checkout: its fused_optim/ lacks kernels/ and would hide the installed one.
mkdir "$work/checkout" && ln -s "$root/bench" "$root/tests" "$work/checkout"
sources() { (cd "$root" && find csrc fused_optim kernels pyproject.toml -type f ! -path '*/__pycache__/*' -print0 |
  LC_ALL=C sort -z | xargs -0 sha256sum && "$python" -VV) | sha256sum | cut -c1-12; }
site=${TMPDIR:-/tmp}/fused_optim-gpu-$UID-$(sources)
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) PATH=$(dirname "$python"):$PATH
export PYTHONPATH=$work/checkout${PYTHONPATH:+:$PYTHONPATH}
[[ -n $installed ]] || PYTHONPATH=$site:$PYTHONPATH
cd "$work" || exit 2

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || gpu=""
commit=${FUSED_OPTIM_COMMIT:-}
[[ ! -e $root/.git ]] || commit=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null) || commit=""
export FUSED_OPTIM_COMMIT=$commit
records=() allowed=0 failed=0

# Writes summary.json, with the parts of earlier runs into the same OUT, and packs what is there.
keep() {
  "$python" - "$work/earlier.json" "$out/summary.json" "$gpu" "$commit" "$SECONDS" "${records[@]}" <<'END'
import json, pathlib, sys
earlier, path, gpu, commit, seconds, *records = sys.argv[1:]
found = pathlib.Path(earlier)
summary = json.loads(found.read_text()) if found.is_file() else {"seconds": 0, "parts": {}}
parts = {records[i]: {"state": records[i + 1], "seconds": int(records[i + 2])} for i in range(0, len(records), 3)}
summary |= {"gpu": gpu, "commit": commit or None, "seconds": summary["seconds"] + int(seconds)}
summary["parts"] |= parts
pathlib.Path(path).write_text(json.dumps(summary, indent=1) + "\n")
END
  [[ -z $loose ]] || return 0
  (cd "$out" && find . -type f -size -8192k -print0 | tar --null -T - -czf "$work/results.tar.gz") &&
    cp "$work/results.tar.gz" "$target/results.part" && mv "$target/results.part" "$target/results.tar.gz" &&
    cp "$out/summary.json" "$target"
}

# Notes how a part ended.
note() {
  records+=("$1" "$2" "$3")
  [[ $2 == ok ]] || failed=1
  keep
}

# Gives a part its own seconds and what is left of earlier ones': $limit, and $deadline for its last case to start.
prepare() {
  allowed=$((allowed + $1)) limit=$1
  [[ -z $gpu ]] || limit=$((allowed - SECONDS > 15 ? allowed - SECONDS : 15))
  deadline=$((limit > 40 ? limit - 20 : limit / 2))
}

# A command without this machine's folders.
plainly() {
  local text="$*"
  text=${text//"$out"/OUT} text=${text//"$python"/python}
  echo "${text//"$root/"/}"
}

# part NAME: runs the command on_gpu, or here without one; its output in NAME.log (the last MiB) and on the terminal.
part() {
  local name=$1 begin=$SECONDS code command=("${on_gpu[@]}")
  if [[ -z $gpu ]]; then
    echo "== $name, on a GPU (at most $limit s): $(plainly "${on_gpu[@]}")"
    command=("${here[@]}") limit=900
    echo "   here: $(plainly "${here[@]}")"
  else
    echo "== $name (at most $limit s): $(plainly "${command[@]}")"
  fi
  timeout -s "${signal:-TERM}" -k 10 "$limit" "${command[@]}" 2>&1 | tee "$work/$name.log"
  code=${PIPESTATUS[0]}
  tail -c 1048576 "$work/$name.log" >"$out/$name.log"
  case $code in
    0) note "$name" ok $((SECONDS - begin)) ;;
    124 | 137) note "$name" "stopped after $limit s" $((SECONDS - begin)) ;;
    *) note "$name" "failed with code $code" $((SECONDS - begin)) ;;
  esac
}

left_out() {
  echo "== $1: left out: $2"
  note "$1" "left out: $2" 0
}

wanted() { [[ $selected == all || $selected == "$1" ]]; }
has() { "$python" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; }

# The package as pip installs it; without scikit-build-core the same files, and libraries by CMake alone.
build() {
  local source=$work/source made=$work/site
  mkdir "$source" && cp -r "$root"/{csrc,fused_optim,kernels,pyproject.toml,README.md} "$source" &&
    cp "$root"/LICENSE* "$source" || return
  if ! "$python" -c 'import pip, scikit_build_core' 2>/dev/null ||
    ! "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$made" "$source"; then
    echo "not by pip and scikit-build-core; by CMake alone:"
    command -v cmake || { echo "no cmake either: pip install scikit-build-core cmake"; return 1; }
    rm -rf "$made" && mkdir -p "$made/fused_optim/lib" && cp -r "$source/fused_optim" "$made" &&
      cp -r "$source/kernels" "$made/fused_optim" && cmake -S "$source/csrc" -B "$work/plain" &&
      cmake --build "$work/plain" && cp "$work"/plain/*.so "$made/fused_optim/lib" || return
  fi
  find "$made" -name '*.so' -exec ls -l {} +
  # All at once: what lies there is whole, for this run and the next.
  mv -T "$made" "$site"
}
export -f build
export root python work site

if [[ -z $gpu ]]; then
  report_limit=120
  echo "no GPU that torch can see. This machine can build, collect the GPU tests and try the benchmarks on its CPU;"
  echo "it cannot run the GPU tests, time a GPU or compare backends and arithmetics."
else
  echo "$gpu"
fi

prepare $build_limit
if [[ -z $installed ]]; then
  if [[ -d $site && -O $site ]]; then
    echo "== build: these sources were built before, in $site"
  else
    on_gpu=(bash -c build) here=(bash -c build)
    part build
  fi
  if [[ ! -d $site ]]; then
    # Triton's kernels need no library: most of what follows can still be had.
    export PYTHONPATH=$work/python:$PYTHONPATH
    mkdir "$work/python" && cp -r "$root/fused_optim" "$work/python" && cp -r "$root/kernels" "$work/python/fused_optim"
  fi
fi
if wanted tests; then
  prepare $tests_limit
  if ! has pytest pytest_timeout; then
    left_out tests "pip install pytest pytest-timeout pytest-xdist"
  else
    # What no other test proves first, should time run out: every backend beside the reference, then whole matrices.
    files=(gpu triton gpu_matrices triton_products masks triton_masks sparse_export process flips codecs layouts)
    pytest=("$python" -m pytest)
    for file in "${files[@]}"; do pytest+=("$root/tests/test_$file.py"); done
    pytest+=("$root/tests" --rootdir "$root" -c "$root/pyproject.toml" -p no:cacheprovider -m gpu)
    on_gpu=("${pytest[@]}" --continue-on-collection-errors --durations 10 -rfE --quiet --junitxml "$out/tests.xml")
    # Most of the time goes into Triton's compiler.
    ! has xdist || on_gpu+=(-n "$(nproc)")
    here=("${pytest[@]}" --collect-only --quiet --quiet)
    # An interrupted pytest still says what it found.
    signal=INT part tests
  fi
fi
quick=(--quick --device cpu)
step=("$python" -m bench step)
if wanted bench; then
  prepare $bench_limit
  on_gpu=("${step[@]}" --suite gpu --rounds 9 --budget 1 --deadline $deadline --out "$out/bench.json")
  here=("${step[@]}" --suite catalogue --rules lion --peers none "${quick[@]}" --out "$out/bench.json")
  part bench
fi
if wanted masks; then
  prepare $masks_limit
  on_gpu=("$python" -m bench masks --rounds 7 --budget 0.5 --deadline $deadline --out "$out/masks.json")
  here=("$python" -m bench masks "${quick[@]}" --out "$out/masks.json")
  part masks
fi
if wanted matrices; then
  prepare $matrices_limit
  matrices=("$python" -m bench newton_schulz --out "$out/matrices.json")
  on_gpu=("${matrices[@]}" --suites step,muon,clip --rounds 7 --budget 0.3 --deadline $deadline)
  here=("${matrices[@]}" --suites muon "${quick[@]}")
  part matrices
fi
if wanted pretrain; then
  prepare $pretrain_limit
  if ! has matplotlib tqdm transformers; then
    left_out pretrain "pip install transformers tqdm matplotlib"
  else
    rm -f "$out"/pretrain/{results.json,report.png}
    pretrain=("$python" -m fused_optim pretrain --out "$out/pretrain" --no-checkpoint)
    on_gpu=("${pretrain[@]}" --preset llama-1b --steps 10 --eval-every 10 --batch-size 2)
    here=("${pretrain[@]}" --preset nano --steps 3 --sequence-length 32)
    part pretrain
  fi
fi
if wanted variants; then
  prepare $variants_limit
  on_gpu=("${step[@]}" --suite variants --shapes llama-1.1b --rounds 7 --budget 1 --deadline $deadline)
  on_gpu+=(--out "$out/variants.json")
  here=("${step[@]}" --suite variants --list --device cpu)
  part variants
fi
if wanted products; then
  prepare $products_limit
  on_gpu=("$python" -m bench products --rounds 10 --budget 0.3 --deadline $deadline --out "$out/products.json")
  here=("${on_gpu[@]}")
  part products
fi

keep
timeout -k 5 $report_limit "$python" -m bench report --results "$out" --out "$out/report" || echo "no charts were drawn of $out"
keep
echo "== summary (${gpu:-no GPU: a dry run}), $SECONDS s, results in $target"
for ((i = 0; i < ${#records[@]}; i += 3)); do
  printf '%-10s %4d s  %s\n' "${records[i]}" "${records[i + 2]}" "${records[i + 1]}"
done
exit $failed
