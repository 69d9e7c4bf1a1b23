"""What `benchmark.py` measures: one benchmark a file."""
