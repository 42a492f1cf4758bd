"""What stands beside the trainer: exports, checks, pictures, benchmarks."""
