"""A training loop on Megatron-Core, and data in Megatron's indexed format. Knows nothing of searches."""
