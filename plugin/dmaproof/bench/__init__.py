"""Benchmarks of the data path, as ratios measured within one run: ``dmaproof bench``."""
