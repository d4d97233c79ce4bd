#!/usr/bin/env bash
# ci.cross_compile with each Triton that has a table: .venv's, and 3.6.0, which stands in a folder of
# its own and is put before it; torch is .venv's. Arguments go to the command: both.sh --check
set -euo pipefail
cd "$(dirname "$0")/../.."

older=3.6.0
folder=.venv/triton-$older
[ -d "$folder" ] || {
    rm -rf "$folder.new"
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target "$folder.new" \
        "triton==$older"
    mv "$folder.new" "$folder"
}
.venv/bin/python -m ci.cross_compile "$@"
PYTHONPATH=$folder exec .venv/bin/python -m ci.cross_compile "$@"
