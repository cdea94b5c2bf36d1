"""Model files and recipes ↔ Megatron-LM's arguments: as flags, as parsed values, and in launch scripts. Pure.

`line` reads what a user gives; `effects` is the table of all flags, `programs` of the programs that take them;
`vocabulary` reads tokenizers' files; `native/` makes a recipe of a line with Megatron-Core's own μP. Needs neither
Megatron nor torch. The flags are those of core_v0.16.1 to core_v0.19.0, which agree on all that are read. Not the place
where arguments meet a run: that is `megatron/pretrain/`.
"""
