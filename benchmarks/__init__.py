"""benchmarks: every figure that the README and docs/benchmarks.md claim, measured beside peers in one run."""
