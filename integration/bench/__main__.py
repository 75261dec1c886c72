"""Run the benchmark that the command line names."""

from __future__ import annotations

import sys
from importlib import import_module

BENCHMARKS = (
    "cache",
    "calls",
    "dns",
    "fleet",
    "growth",
    "kv",
    "oslo",
    "rpc",
    "service",
    "watch",
)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        print(f"usage: python -m integration.bench {'|'.join(BENCHMARKS)} [--help]")
        return 2
    module = import_module(f"integration.bench.{sys.argv[1]}")
    return int(module.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
