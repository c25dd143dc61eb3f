"""Where made-up results of benchmarks are from."""

WHERE = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.15.0",
    "triton": "3.9.0",
    "setriton": "0.1.0",
    "commit": "abc",
    "date": "2026-11-24",
    "source": "0123",
}
