"""A verdict before the money is spent: live models of several widths, trained for a few steps and compared with a
correct reference of the same shape.

    entries.py            which parameters of a plan are meant
    measure/              trains one model and measures it, whoever built it; what subject and reference share
    family/               the small models that stand for a target, and the recipe under stress
    reference/            the correct runs, in plain torch; kept on disk
    subjects/             what is checked: Megatron-Core, torch modules, DeepSpeed engines, launch lines
    verdict/              compares the two, and says what is off and why; plain numbers
    report/               tells a verdict: in words, as data, as a picture
    mutants/              deliberate mistakes, to see that they are found; loaded where one is asked for
    transfer.py           trains at several learning rates, for the basins of `verdict/`
    gpt_family.py         the models of a GPT target with their correct runs
    module_family.py      likewise of torch modules, with the script's runs
    run_megatron.py, run_modules.py, run_huggingface.py, run_launch_line.py
                          all of it together, for one kind of target each
    pytest_plugin.py      the fixture `assert_mup`

It reads live models and optimizers and compares them with what the plan says. It changes no user's run. Who may import
whom is in docs/architecture.md.
"""
