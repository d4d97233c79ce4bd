#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, every Triton kernel compiled for
# every target, tests. Installs what it needs into .venv beside this checkout; no accelerator wanted.
# Arguments go to pytest, and then nothing is compiled but what tests compile, and the wheel of
# torch_npu is left alone: ci/run.sh -k topk
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
# Kernels are compiled for sm90, gfx950 and gfx942 by Triton 3.7 and 3.6, and what came out is that of
# the committed tables. Minutes from nothing; what did not change since is taken from DSA_HAL_CACHE.
[ $# -gt 0 ] || bash ci/cross_compile/both.sh --check
# backends/npu against the real torch_npu wheel, in .venv-npu beside .venv.
[ $# -gt 0 ] || bash ci/ascend/run.sh
exec .venv/bin/pytest -q "$@"
