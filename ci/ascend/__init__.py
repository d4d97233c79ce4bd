"""Proof of backends/npu without an NPU: torch_npu's schemas (`schemas`), its ops on the processor
(`emulated`), and the wheel itself (`wheel`)."""
