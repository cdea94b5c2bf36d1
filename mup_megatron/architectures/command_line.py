"""The part of Megatron-LM's command line that one architecture has for itself, beside what it says of every model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mup_megatron.architectures.flag import Flag
from mup_megatron.architectures.model_file import ModelFile

Release = tuple[int, int]
"""Of Megatron-Core: (major, minor)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The content of a model file, as parsed arguments say it."""

    content: Mapping[str, Any]
    """Keys of a model file with their values; None where the line's own does not count and the file finds it itself."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Key → the flag that said it, for messages."""
    remarks: tuple[str, ...] = ()
    """What to know beside it, in sentences."""


@dataclass(frozen=True)
class CommandLine:
    """The programs that build an architecture, and the flags that no other has."""

    programs: tuple[str, ...] = ()
    """Megatron-LM's scripts that build it."""
    providers: tuple[str, ...] = ()
    """What other programs of theirs call it in --model-provider."""
    keys: Mapping[str, tuple[Flag, ...]] = field(default_factory=dict)
    """Keys of its model files that others do not have → the flags that say the same, today's before older ones."""
    details: Mapping[str, Flag] = field(default_factory=dict)
    """Further keys of theirs → their flags, which do not tell the architecture: every model of Megatron's has them."""
    optional: tuple[str, ...] = ()
    """Those of the keys that a line of its programs need not say."""
    markers: tuple[Flag, ...] = ()
    """Flags that go with those and say nothing of their own."""
    refused: tuple[Flag, ...] = ()
    """Flags that change its layers in a way that its model file cannot say."""
    specs: Mapping[str, str] = field(default_factory=dict)
    """Values of --spec that leave its layers what a model file says → the `transformer_impl` that they are."""

    @property
    def flags(self) -> tuple[Flag, ...]:
        """All flags that are read into its model file."""
        return (*self.own_flags, *self.details.values())

    @property
    def own_flags(self) -> tuple[Flag, ...]:
        """Those that no other architecture has."""
        return (*(flag for flags in self.keys.values() for flag in flags), *self.markers)

    def named(self, values: Mapping[str, Any]) -> Flag | None:
        """Returns the flag by which parsed arguments ask for it; None if they do not."""
        return next((flag for flag in self.own_flags if flag.changed(values)), None)

    def read(self, values: Mapping[str, Any], release: Release | None) -> Reading:
        """Returns what parsed arguments say.

        Args:
            values: attributes that are missing count as Megatron's default.
            release: the Megatron-Core that is meant, where it is known.

        Raises:
            InputError: that release refuses them; names the flag.
        """
        said = {key: flags[-1] for key, flags in self.keys.items()} | {
            key: flag for key, flags in self.keys.items() for flag in reversed(flags) if flag.changed(values)
        }
        said |= self.details
        content = {key: flag.found(values) for key, flag in said.items()}
        return Reading(content, {key: flag.name for key, flag in said.items()})

    def written(self, model: ModelFile, release: Release) -> Sequence[str]:
        """Returns the words that say it to a release, beside those of every model."""
        said = {key: flags[0] for key, flags in self.keys.items()}
        return [*self._words(model, said), *self._words(model, self.details)]

    def _words(self, model: ModelFile, said: Mapping[str, Flag]) -> Iterator[str]:
        for key, flag in said.items():
            if (value := getattr(model, key)) != flag.default:
                yield from flag.words(value)
