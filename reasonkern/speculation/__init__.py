"""Speculative decoding without a draft model: n-gram draft trees, verified without loss."""
