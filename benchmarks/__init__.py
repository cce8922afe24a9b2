"""Benchmarks of reasonkern: interleaved pairs, correctness before time, gates as data."""
