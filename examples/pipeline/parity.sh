#!/bin/sh
# Verify a bundle, compare it with the last release's, write the reports, and fail on drift.
#
# usage: parity.sh NEW [RELEASE] [-- EXPORT_OPTIONS...]
#
#   NEW             the bundle to release; exported first where options follow "--"
#   RELEASE         the last release's bundle; without it there is nothing to compare with
#   EXPORT_OPTIONS  of `deploykit export`, such as resnet50 --runtime openvino
#
# environment:
#   REPORTS          where report.html, report.md, compare.json and verify.json go (default: parity-reports)
#   VERIFY_OPTIONS   further options of `deploykit verify`, such as --min-sqnr-db 20
#   COMPARE_OPTIONS  further options of `deploykit compare`, such as --max-drop-db 0.5 --allow labels
#   REPORT_OPTIONS   further options of `deploykit report`, such as --no-run
#   DEPLOYKIT        the command (default: deploykit)
#
# exit code: 0 within all tolerances; 1 drift, or a step failed; 2 bad usage. The reports are written wherever the export worked.

set -u

usage() {
    echo "usage: parity.sh NEW [RELEASE] [-- EXPORT_OPTIONS...]" >&2
    exit 2
}

[ $# -ge 1 ] && [ "$1" != "--" ] && [ -n "$1" ] || usage
new=$1
shift
release=""
if [ $# -gt 0 ] && [ "$1" != "--" ]; then
    release=$1
    shift
fi
if [ $# -gt 0 ]; then
    [ "$1" = "--" ] || usage
    shift
fi

command=${DEPLOYKIT:-deploykit}
reports=${REPORTS:-parity-reports}
mkdir -p "$reports" || exit 1
status=0

# The variables hold several words: they are split on purpose.
if [ $# -gt 0 ]; then
    $command export "$@" --output "$new" || exit 1
fi

$command verify "$new" ${VERIFY_OPTIONS:-} --json > "$reports/verify.json" || status=1
if [ -n "$release" ]; then
    $command compare "$release" "$new" ${COMPARE_OPTIONS:-} --output "$reports/compare.json" || status=1
fi
for page in report.md report.html; do
    $command report ${release:+"$release"} "$new" ${REPORT_OPTIONS:-} --output "$reports/$page" || status=1
done

if [ "$status" -eq 0 ]; then
    echo "parity: $new is within all tolerances; see $reports."
else
    echo "parity: $new is OUTSIDE the tolerances, or a step failed; see above and $reports." >&2
fi
exit "$status"
