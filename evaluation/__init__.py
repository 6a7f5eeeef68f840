"""Evaluation: benchmarks, samples, the run over them, statistics and reports."""
