"""Tables that are looked up before the stacks, and readouts behind them."""

from dataclasses import replace

from mup_megatron.theory import Property, Side, Tensor


def embedding(name: str, entries: Side, hidden: Side) -> Tensor:
    """Returns a table that is looked up, with the embedding multiplier on what it gives."""
    return Tensor(
        name=name,
        shape=(entries.size, hidden.size),
        fan_in=entries,
        fan_out=hidden,
        properties=frozenset({Property.EMBEDDING}),
    )


def stepped_as_matrix(tensor: Tensor) -> Tensor:
    """Returns a table or readout that Megatron's optimizers of matrices step: they spare the vocabulary's alone."""
    return replace(tensor, stepped_as_matrix=True)


def readout(name: str, hidden: Side, outputs: Side) -> Tensor:
    """Returns a weight that computes what the model is asked for, with the output multiplier on its input."""
    return Tensor(
        name=name,
        shape=(outputs.size, hidden.size),
        fan_in=hidden,
        fan_out=outputs,
        properties=frozenset({Property.READOUT}),
    )
