#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, tests. Installs what it needs into
# .venv beside this checkout; no accelerator wanted. Arguments go to pytest: ci/run.sh -k topk
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "ci/run.sh: $("$python" --version) is too old; set PYTHON to Python 3.11 or newer" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -c ci/constraints.txt -e '.[dev]'

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy -p dsa_hal
exec .venv/bin/pytest -q "$@"
