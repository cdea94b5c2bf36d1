"""The adapter to Megatron-Core: applies a plan to a live model and optimizer. It holds no theory."""
