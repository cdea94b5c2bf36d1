"""A live model or optimizer and its plan: what every adapter does alike, whatever framework the model is of.

An adapter collects what is live (names and shapes, hooks, scales, an optimizer's values) and hands it over here. No
theory: what should be there is the plan's to say.

compare.py   what is live against the plan → problems.py, and one message of many
weights.py   initial weights against the plan
hooks.py     forward factors put at the plan's sites, and read back
applied.py   which plan was applied to which model
"""
