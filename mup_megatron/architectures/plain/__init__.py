"""The models of all architectures in plain PyTorch: they compute what Megatron-Core's compute with its local layers.

Written from the models' definition, as what a live one is compared with: no Megatron, no plan, no rule of μP. Their
parameters have Megatron's names and layouts, so one `state_dict` fits both. Multipliers and the softmax scale are plain
numbers. No dropout, no parallelism, batch first.
"""
