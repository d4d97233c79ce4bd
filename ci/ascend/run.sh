#!/usr/bin/env bash
# backends/npu against the real torch_npu wheel, without an NPU and without CANN: the wheel's shape
# functions, its schemas, and its C++ host code over host memory. Wants gcc, binutils and what
# ci/run.sh installs. The wheel goes to .venv-npu, which sees the packages of .venv; .venv does not see
# it. Arguments go to pytest: ci/ascend/run.sh -k prefill
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
    echo "ci/ascend/run.sh: $1" >&2
    exit 2
}
plain=${VENV:-.venv}
npu=$plain-npu
[ -x "$plain/bin/python" ] || fail "there is no $plain; run bash ci/run.sh, which makes it"
for tool in gcc nm; do
    command -v "$tool" >/dev/null || fail "$tool is not in PATH; install gcc and binutils"
done

export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # torch imports torch_npu when it is told to
export TASK_QUEUE_ENABLE=0             # torch_npu calls CANN in the thread that called it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
version=$("$plain/bin/python" -c 'from ci.ascend.schemas import CURRENT; print(CURRENT)')
"$plain/bin/python" - "$version" <<'CHECK' || fail "torch-npu $version wants the same torch"
import sys
import torch
sys.exit(torch.__version__.split(".")[:2] != sys.argv[1].split(".")[:2])
CHECK
packages=$("$plain/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
[ ! -e "$packages/torch_npu" ] ||
    fail "$plain has torch_npu itself; remove it there: $plain/bin/pip uninstall torch-npu"

link="import site; site.addsitedir('$packages')"
if ! grep -qsxF "$link" "$npu"/lib/python*/site-packages/plain.pth; then
    "$plain/bin/python" -m venv --clear --without-pip "$npu"
    echo "$link" >"$("$npu/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/plain.pth"
fi
"$plain/bin/python" -m pip --python "$npu/bin/python" --disable-pip-version-check \
    install --quiet --no-deps "torch-npu==$version" ||
    fail "torch-npu $version could not be installed in $npu (pip says why above), and without it backends/npu is not proved"

"$npu/bin/python" -m pytest -q -p no:cacheprovider ci/ascend/wheel "$@"
# The emulated model is the ordinary run's too; here its ops stand under the wheel's own schemas.
[ $# -gt 0 ] || exec "$npu/bin/python" -m pytest -q -p no:cacheprovider -p ci.ascend.wheel.conftest \
    tests/test_npu_emulated.py::test_64_greedy_tokens_are_the_processors
