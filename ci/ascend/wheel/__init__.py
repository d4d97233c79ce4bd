"""backends/npu against the real torch_npu wheel on a machine without NPU and CANN; runs in an
environment of its own (ci/ascend/run.sh). ci/notes/ascend/wheel.md says what that shows."""
