#!/usr/bin/env bash
# What a machine with a GPU has to show, on one that is bare: python3 with torch, nothing installed.
#
#   ci/device.sh REPORTS [PART ...]     parts: matrix determinism sanitize suite; default: all
#
# REPORTS  folder for the reports; the exit code is 1 if a part failed
# Variables: BACKEND (cuda), JOBS (processes at a time), LIMIT (seconds a part may take, 600),
# GFLOP (costliest case of the matrix, 100), OPS (these ops alone), PEERS (folder of other
# libraries, put behind everything else on the path)
set -uo pipefail
cd "$(dirname "$0")/.."

reports=${1:?usage: ci/device.sh REPORTS [PART ...]}
shift
parts=${*:-matrix determinism sanitize suite}
backend=${BACKEND:-cuda}
jobs=${JOBS:-$(($(nproc) / 2 + 1))}
limit=${LIMIT:-600}
gflop=${GFLOP:-100}
read -ra ops <<<"${OPS:-}"
mkdir -p "$reports" || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}${PEERS:+:$PEERS} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

# judge FILE OPTIONS...: the matrix, in processes of their own.
judge() {
  timeout "$limit" python3 -m dsa_hal test "${ops[@]}" --backend "$backend" --jobs "$jobs" \
    --patience "$limit" "${@:2}" >"$reports/$1" 2>"$reports/$1.log"
}

matrix() { judge matrix.txt --max-gflop "$gflop"; }

determinism() { judge determinism.txt --repeats 20; }

# Small cases of every kernel of our own, under the memory checker and the race checker.
sanitize() {
  python3 ci/sanitized.py "$backend" "${ops[@]}" >"$reports/sanitize.list" || return 1
  local checked=0 tool
  for tool in memcheck racecheck; do
    while read -r op impl cases; do
      printf '%s %s %s %s\0' "$tool" "$op" "$impl" "$cases"
    done <"$reports/sanitize.list"
  done | timeout "$limit" xargs -0 -P "$jobs" -I{} bash ci/sanitize.sh {} "$backend" \
    >"$reports/sanitize.txt" 2>"$reports/sanitize.log" || checked=1
  sort -o "$reports/sanitize.txt" "$reports/sanitize.txt"
  return $checked
}

suite() {
  local plot=()
  python3 -c 'import matplotlib' 2>/dev/null && plot=(--plot "$reports/h200.png")
  timeout "$limit" python3 -m dsa_hal bench "${ops[@]:0:1}" --suite h200 --backend "$backend" \
    --output "$reports/h200.json" "${plot[@]}" >"$reports/h200.txt" 2>"$reports/h200.log"
}

for part in $parts; do
  SECONDS=0
  case $part in
    matrix | determinism | sanitize | suite)
      if "$part"; then verdict=ok; else verdict="failed (exit code $?)"; fi
      ;;
    *) verdict="failed (no such part)" ;;
  esac
  echo "$part: $verdict, $SECONDS s"
done | tee "$reports/summary.txt"
! grep -q failed "$reports/summary.txt"
