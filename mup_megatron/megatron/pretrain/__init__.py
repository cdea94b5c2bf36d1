"""The plug-in into Megatron-LM's own training loop, `megatron.training`: flags on a launch script that runs already."""
