"""Benchmarks of the data path, in ratios taken within one run: ``dmaproof bench``."""
