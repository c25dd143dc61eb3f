"""What pytest-benchmark writes: this project's account of the machine instead of its own, and no single samples."""

from typing import Any

import pytest

STATISTICS = ("min", "median", "mean", "stddev", "iqr", "rounds")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Called with --benchmark-json, and only where the plugin is installed."""
    from setriton.bench.environment import environment

    benchmarks = [
        {
            "name": benchmark["name"],
            "params": benchmark["params"],
            "seconds": {name: benchmark["stats"][name] for name in STATISTICS},
        }
        for benchmark in output_json["benchmarks"]
    ]
    output_json.clear()
    output_json.update(environment=environment(), benchmarks=benchmarks)
