"""Adapters after training: exact low-rank algebra, merging, and choosing among merges by held-out data."""
