"""A verdict before the money is spent: live models of several widths, trained for a few steps and compared with a
correct reference of the same shape.

    family.py         the models of a target's shape that are trained, and the recipe under stress
    sizes.py, expense.py        what no check can train; what one costs, and which widths that leaves
    workers.py        runs in several processes
    dropout.py        off, while torch modules are checked
    measuring.py      trains one of them and measures it; replay.py reads η, ε and λ from how weights moved
    reference.py      the correct runs, in plain torch; cache.py keeps them
    megatron_subject.py, modules.py, hugging_face.py, launch_line.py      what is checked
    comparison.py     what of it is off, beyond seeds
    bounds.py         what holds of every right model, for those that share their code with the reference
    depth.py          every layer of the target, once, without training
    later.py          the steps beyond those of a quick check
    causes/           which mistake looks like that
    wider.py, transfer.py      the loss over widths, the basin of the learning rate
    judge.py, run.py  all of it together: a Verdict; report.py and picture.py tell it
    mutants.py        deliberate mistakes, to see that they are found; entries.py which parameters are meant

It reads live models and optimizers and compares them with what the plan says. It changes no user's run.
"""
