#!/usr/bin/env bash
# One implementation under one tool: ci/sanitize.sh "TOOL OP IMPL CASE..." BACKEND; a line of report.
read -r tool op impl cases <<<"$1"
patience=${PATIENCE:-120}
skip=() # kernels of torch and its libraries, which references are made of, where this version can
# leave some out: products and sorts take the race checker longer than what it is to judge
if compute-sanitizer --help 2>&1 | grep -q -e --kernel-name-exclude; then
  for part in at6native 3cub xmma cutlass sgemm gemv gemmSN splitKreduce; do
    skip+=(--kernel-name-exclude "kns=$part")
  done
fi
# A library that asks the driver for what it does not have is no fault of a kernel.
[ "$tool" = memcheck ] && skip+=(--report-api-errors no)
# shellcheck disable=SC2086
log=$(timeout "$patience" compute-sanitizer --tool "$tool" --error-exitcode 99 "${skip[@]}" \
  python3 -m dsa_hal test "$op" --impl "$impl" --backend "$2" --case $cases 2>&1)
code=$?
case $code in
  0) echo "$tool $op $impl: clean (${cases// /, })" ;;
  124) echo "$tool $op $impl: not done in $patience s" ;;
  *)
    echo "$tool $op $impl: FAILED with exit code $code;" \
      "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' <<<"$log" | tail -1 | tr -d =)"
    printf '%s %s %s\n%s\n' "$tool" "$op" "$impl" "$log" >&2
    ;;
esac
[ $code -eq 0 ] || exit 1
