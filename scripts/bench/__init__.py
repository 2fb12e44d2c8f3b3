"""What scripts/benchmark.py is made of: meters, the stages of one process, the stages of fresh ones, peak memory."""
