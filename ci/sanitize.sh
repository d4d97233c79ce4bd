#!/usr/bin/env bash
# One implementation under one tool: ci/sanitize.sh "TOOL OP IMPL CASE..." BACKEND; a line of report.
read -r tool op impl cases <<<"$1"
# shellcheck disable=SC2086
log=$(timeout "${PATIENCE:-120}" compute-sanitizer --tool "$tool" --error-exitcode 99 \
  python3 -m dsa_hal test "$op" --impl "$impl" --backend "$2" --case $cases 2>&1)
code=$?
summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' <<<"$log" | tail -1)
case $code in
  0) echo "$tool $op $impl: clean (${cases// /, })" ;;
  124) echo "$tool $op $impl: not done in ${PATIENCE:-120} s" ;;
  *)
    echo "$tool $op $impl: FAILED with exit code $code; ${summary#=========}"
    printf '%s %s %s\n%s\n' "$tool" "$op" "$impl" "$log" >&2
    ;;
esac
[ $code -eq 0 ] || exit 1
