"""Benchmarks. They run from a checkout and are not installed."""
