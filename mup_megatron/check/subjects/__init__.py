"""The subjects of a check: live models as somebody's run would build them, each ready to be measured.

megatron.py           a Megatron-Core model, in the layout of the ranks
scripts.py            what a script is given, and what it makes of a torch module
modules.py            that module in training: with an optimizer of torch, or in a DeepSpeed engine
sight.py              what is looked at of it
deepspeed.py          the engines of a DeepSpeed configuration
launch_line.py        a Megatron-LM launch line, changed to train models of a check
run_request.py        what one run of it is to measure
pretrain_observer.py  measures it, inside of that run
"""
