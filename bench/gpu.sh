#!/usr/bin/env bash
# Everything that a GPU must prove, in one command of less than 9 minutes and without a network:
#   bash bench/gpu.sh OUT [all|tests|bench|variants|products|matrices|masks|pretrain] [--installed]
# builds the package, runs `pytest -m gpu`, times steps, matrix products and whole steps of
# Muon beside torch, and every backend and arithmetic, and trains a Llama of 1.1 B parameters for some steps.
# OUT gets summary.json, a log and JSON for every part, and report/ with charts. A failing part stops no other.
# Without a GPU every part does what it can here and says what it leaves out. --installed skips the build.
set -uo pipefail

usage() { sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed -n '2,7p'; exit 2; }

[[ $# -ge 1 && $# -le 3 ]] || usage
selected=${2:-all} installed=${3:-}
[[ $selected =~ ^(all|tests|bench|variants|products|matrices|masks|pretrain)$ && ( -z $installed || $installed == --installed ) ]] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for python in ${PYTHON:-python3 "$root/.venv/bin/python"}; do
  "$python" -c 'import torch' 2>/dev/null && python=$(command -v "$python") && break
  python=""
done
[[ -n $python ]] || { echo "no Python with torch here: set PYTHON to one that has it" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Seconds: all parts together, and the report, stay under 9 minutes; a single part gets most of them.
build_limit=95 tests_limit=140 bench_limit=80 variants_limit=45 products_limit=30 matrices_limit=35 masks_limit=30
pretrain_limit=45 report_limit=30
[[ $selected == all ]] ||
  tests_limit=400 bench_limit=400 variants_limit=400 products_limit=400 matrices_limit=400 masks_limit=400 pretrain_limit=400

# Only bench/ and tests/ come from the checkout: its fused_optim/ lacks kernels/ and would hide the installed one.
mkdir "$work/checkout" && ln -s "$root/bench" "$root/tests" "$work/checkout"
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 CMAKE_BUILD_PARALLEL_LEVEL=$(nproc)
export PYTHONPATH=$work/site:$work/checkout${PYTHONPATH:+:$PYTHONPATH}
cd "$work" || exit 2

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || gpu=""
names=() states=() seconds=()

# part NAME LIMIT COMMAND...: runs one part, its output in OUT/NAME.log (the last MiB) and on the terminal.
part() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  echo "== $name (at most $limit s): $*"
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$work/$name.log"
  code=${PIPESTATUS[0]}
  tail -c 1048576 "$work/$name.log" >"$out/$name.log"
  names+=("$name") seconds+=($((SECONDS - begin)))
  case $code in
    0) states+=(ok) ;;
    124 | 137) states+=("stopped after $limit s") ;;
    *) states+=("failed with code $code") ;;
  esac
}

wanted() { [[ $selected == all || $selected == "$1" ]]; }

build() {
  local source=$work/source
  mkdir "$source" && cp -r "$root"/{csrc,fused_optim,kernels,pyproject.toml,README.md} "$source" &&
    cp "$root"/LICENSE* "$source" &&
    "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$work/site" "$source" &&
    find "$work/site" -name '*.so' -exec ls -l {} +
}
export -f build
export root python work

if [[ -z $gpu ]]; then
  # Nobody pays for a CPU's time.
  build_limit=900 tests_limit=900 bench_limit=900 variants_limit=900 products_limit=900 matrices_limit=900 masks_limit=900
  pretrain_limit=900 report_limit=120
  echo "no GPU that torch can see. This machine can build, collect the GPU tests and try the benchmarks on its CPU;"
  echo "it cannot run the GPU tests, time a GPU or compare backends and arithmetics."
else
  echo "$gpu"
fi

[[ -n $installed ]] || part build $build_limit bash -c build
if wanted tests; then
  pytest=("$python" -m pytest "$root/tests" --rootdir "$root" -c "$root/pyproject.toml" -p no:cacheprovider -m gpu)
  if [[ -z $gpu ]]; then
    part tests $tests_limit "${pytest[@]}" --collect-only --quiet --quiet
  else
    # Most of the time goes into Triton's compiler: more processes than the GPU needs.
    workers=$(($(nproc) < 12 ? $(nproc) : 12))
    part tests $tests_limit "${pytest[@]}" -n "$workers" --continue-on-collection-errors --durations 10 -rfE --quiet
  fi
fi
step=("$python" -m bench step)
if wanted bench; then
  if [[ -z $gpu ]]; then
    part bench $bench_limit "${step[@]}" --suite catalogue --rules lion --quick --peers none --device cpu --out "$out/bench.json"
  else
    part bench $bench_limit "${step[@]}" --suite gpu --rounds 20 --budget 3 --deadline $((bench_limit - 25)) \
      --out "$out/bench.json"
  fi
fi
if wanted variants; then
  if [[ -z $gpu ]]; then
    part variants $variants_limit "${step[@]}" --suite variants --list
  else
    part variants $variants_limit "${step[@]}" --suite variants --shapes llama-1.1b --rounds 15 --budget 3 \
      --deadline $((variants_limit - 25)) --out "$out/variants.json"
  fi
fi
if wanted products; then
  part products $products_limit "$python" -m bench products --budget 1 --deadline $((products_limit - 15)) \
    --out "$out/products.json"
fi
quick=(--rounds 7 --budget 2) suites=step,muon,clip
[[ -n $gpu ]] || quick=(--quick) suites=muon
if wanted matrices; then
  part matrices $matrices_limit "$python" -m bench newton_schulz --suites $suites "${quick[@]}" \
    --out "$out/matrices.json"
fi

if wanted masks; then
  part masks $masks_limit "$python" -m bench masks "${quick[@]}" --out "$out/masks.json"
fi
if wanted pretrain; then
  pretrain=("$python" -m fused_optim pretrain --out "$out/pretrain")
  if ! "$python" -c 'import matplotlib, tqdm, transformers' 2>/dev/null; then
    part pretrain $pretrain_limit echo "left out: pip install transformers tqdm matplotlib"
  elif [[ -z $gpu ]]; then
    part pretrain $pretrain_limit "${pretrain[@]}" --preset nano --steps 3 --sequence-length 32
  else
    part pretrain $pretrain_limit "${pretrain[@]}" --preset llama-1b --steps 10 --batch-size 2
  fi
fi

failed=0
{
  printf '{"gpu": "%s", "seconds": %d, "parts": {' "$gpu" "$SECONDS"
  for i in "${!names[@]}"; do
    [[ $i == 0 ]] || printf ', '
    printf '"%s": {"state": "%s", "seconds": %d}' "${names[i]}" "${states[i]}" "${seconds[i]}"
  done
  printf '}}\n'
} >"$out/summary.json"
echo "== summary (${gpu:-no GPU: a dry run}), $SECONDS s, results in $out"
for i in "${!names[@]}"; do
  printf '%-10s %4d s  %s\n' "${names[i]}" "${seconds[i]}" "${states[i]}"
  [[ ${states[i]} == ok ]] || failed=1
done
timeout $report_limit "$python" -m bench report --results "$out" --out "$out/report" || echo "no charts were drawn of $out"
exit $failed
