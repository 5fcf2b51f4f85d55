"""Networks in a box for the demo, the tests and the benchmarks. Nothing under src/ imports this package."""
