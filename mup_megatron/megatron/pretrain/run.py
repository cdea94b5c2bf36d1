"""The run of this process: from parsed arguments to a model and an optimizer that are what the plan says.

One for each process, because Megatron-LM's arguments, model and optimizer are. What calls it is in `hooks.py`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import get_standard_config_overrides

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import remarks_on
from mup_megatron.collectives import gathered, raise_together
from mup_megatron.errors import InputError
from mup_megatron.megatron import guard
from mup_megatron.megatron.arguments.convert import model_from_values, not_in_model_file, remarks_of
from mup_megatron.megatron.model import applied_plan, apply_plan, configure
from mup_megatron.megatron.names import unwrapped
from mup_megatron.megatron.optimizer import config_overrides
from mup_megatron.megatron.pretrain import checkpoints, flags, groups, run_values, telemetry
from mup_megatron.megatron.pretrain import observer as observers
from mup_megatron.megatron.versions import core_version, range_remark
from mup_megatron.messages import is_first, say
from mup_megatron.plan_table import print_plan
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

_SOURCE = "the command line"


@dataclasses.dataclass
class Run:
    """The state of a run so far; filled in as Megatron goes along."""

    recipe: Recipe
    options: flags.Options
    provisional: ModelFile
    """The model, with a vocabulary that Megatron knows only once it has read the tokenizer."""
    owned: frozenset[str]
    """Megatron's arguments that the recipe decides."""
    model: ModelFile | None = None
    plan: Plan | None = None
    checkpoint: checkpoints.SavedRecipe | None = None
    """What was loaded, if anything was."""
    loading_into: Any = None
    """The optimizer that a checkpoint is being loaded into."""
    built: bool = False
    """Whether a model has been made what the plan says."""
    steps: int = 0
    """Since the start of this process."""
    coordinates: telemetry.Coordinates | None = None
    observer: observers.Observer | None = None

    @property
    def loaded(self) -> bool:
        """True where weights came from a checkpoint."""
        return self.checkpoint is not None

    @classmethod
    def begin(cls, values: argparse.Namespace) -> "Run | None":
        """Takes a recipe over into Megatron's arguments, before Megatron validates them; None without one.

        Raises:
            InputError: the arguments do not go with a recipe, or the recipe not with the model.
        """
        given = flags.take_given(values)
        options = flags.options_of(values)
        if options is None:
            return None
        recipe = flags.take_over(values, given, options)
        # With --use-checkpoint-args the checkpoint's arguments are among the values by now.
        described = {**vars(values), "use_checkpoint_args": False}
        release = core_version()[:2]
        # Only the padding depends on the vocabulary, so nothing else can go wrong later.
        model = model_from_values(
            described,
            vocab_size=values.vocab_size or 1,
            source=_SOURCE,
            release=release,
            custom=recipe.megatron_base.custom_tensors,
            script=sys.argv[0],
        )
        run = cls(recipe, options, model, flags.owned(recipe, values))
        run._plan_for(model)
        remark = range_remark()
        if remark is not None:
            say(remark)
        for name in not_in_model_file(described):
            say(f"{name}: a model file has no key for it. Take care that the recipe's base was tuned with it as well.")
        for sentence in remarks_of(described, release, script=sys.argv[0]):
            say(sentence)
        return run

    def sign(self, values: argparse.Namespace) -> None:
        """Puts the recipe among the arguments, which Megatron writes into checkpoints and to wandb.

        Raises:
            InputError: Megatron has understood them as another run than the one that the recipe's values are for.
        """
        flags.require_horizon(self.recipe, values)
        checkpoints.sign(values, self.recipe)

    def prepare(self, values: argparse.Namespace) -> Plan:
        """Makes the plan for the model that is about to be built. Collective; does nothing the second time."""
        if self.plan is not None:
            return self.plan
        self.model = self.provisional.model_copy(
            update={"vocab_size": values.padded_vocab_size, "make_vocab_size_divisible_by": 1}
        )
        plan = self._plan_for(self.model)
        fingerprints = gathered(self.recipe.fingerprint)
        raise_together(
            [
                f"--mup-recipe {self.options.recipe}: not the same file on all ranks: fingerprints "
                f"{', '.join(sorted(set(fingerprints)))}. Put one recipe where all of them read it."
            ]
            if len(set(fingerprints)) > 1
            else []
        )
        self.plan = plan
        changed = sum(entry.lr != plan.lr for entry in plan.entries)
        say(
            f"recipe {self.options.recipe} (fingerprint {self.recipe.fingerprint[:12]}) from width "
            f"{self.recipe.megatron_base.hidden_size} to {self.model.hidden_size}: {changed} of {len(plan.entries)} "
            "parameters get a learning rate of their own."
        )
        for sentence in remarks_on(self.recipe.megatron_base, self.model):
            say(sentence)
        if self.options.print_plan and is_first():
            print_plan(plan, brief=True, moved=self.recipe.told_horizon)
        return plan

    def configure(self, config: Any) -> None:
        """Puts the attention scale into the configuration of a model that is about to be built."""
        assert self.plan is not None
        configure(config, self.plan)

    def applied(self, chunks: Sequence[torch.nn.Module]) -> Sequence[torch.nn.Module]:
        """This rank's freshly built model, made what the plan says. Collective."""
        assert self.plan is not None
        config: Any = unwrapped(chunks[0]).config
        apply_plan(chunks, self.plan, initialize=config.perform_initialization)
        if self.options.coordinates_interval is not None:
            self.coordinates = telemetry.Coordinates(chunks, self.plan)
        self.built = True
        return chunks

    def overrides(self, config: Any, chunks: Sequence[torch.nn.Module], given: Any) -> Mapping[Any, Any]:
        """Returns what the optimizer takes in place of Megatron's standard overrides. Collective.

        Raises:
            InputError: the script has overrides of its own, which would be lost.
        """
        assert self.plan is not None
        standard = get_standard_config_overrides(config)
        own = [key for key, value in (given or {}).items() if standard.get(key) != value]
        raise_together(
            [
                f"the script gives the optimizer overrides of its own ({', '.join(map(str, own))}), which the plan "
                "would replace. Say it with per_parameter in the recipe."
            ]
            if own
            else []
        )
        return config_overrides(chunks, self.plan, config)

    @contextmanager
    def loading(self, optimizer: Any, scheduler: Any) -> Iterator[None]:
        """Around Megatron's loading of a checkpoint: what the plan gave the optimizer's groups is there afterwards."""
        self.checkpoint = None
        if optimizer is None:
            yield
            return
        self.loading_into = optimizer
        with groups.values_kept(optimizer):
            yield
        self.loading_into = None
        # The schedule has computed learning rates from what the checkpoint said.
        if self.loaded and scheduler is not None:
            scheduler.step(increment=0)

    def found(self, saved: Any, values: argparse.Namespace) -> None:
        """A checkpoint is about to be loaded that was written with the arguments `saved`.

        Raises:
            InputError: it is of another recipe.
        """
        if self.model is None or self.loaded:
            return  # Megatron looks for arguments alone, or once more
        problems = []
        try:
            self.checkpoint = checkpoints.recipe_within(saved)
            checkpoints.require_same(self.checkpoint, self.recipe, accept=self.options.accept_recipe_change)
            if self.loading_into is not None and not (values.no_load_optim or values.finetune):
                checkpoints.require_matching_optimizer(self.checkpoint)
                assert self.plan is not None
                assert self.checkpoint.recipe is not None
                groups.show_as(self.loading_into, self.checkpoint.recipe.plan(self.model), self.plan)
        except InputError as error:
            problems.append(str(error))
        raise_together(problems)  # each rank may have a disk of its own

    def leave_recipe(self, folder: str | None) -> None:
        """Puts the recipe beside checkpoints, for people and for a launcher that is given no recipe."""
        problem = checkpoints.write_sidecar(folder, self.recipe)
        if problem is not None:
            say(f"warning: {problem} The recipe is in the checkpoint itself all the same.")

    def verify_set_up(
        self, chunks: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any, values: argparse.Namespace
    ) -> None:
        """Model and optimizer are built, and what there was to load is loaded. Collective.

        Raises:
            InputError: something is not what the plan says, or the model did not come by a way that the plug-in knows.
        """
        raise_together(
            [
                "--mup-recipe: the model was built by something else than megatron.training, so the recipe was not "
                'applied. Apply the plan yourself (README, "In your own Megatron-Core code").'
                for chunk in chunks
                if applied_plan(chunk) is None
            ]
        )
        self.verify(chunks, optimizer, scheduler, at_start=True)
        if self.options.verify:
            raise_together(run_values.problems(self.recipe, values, optimizer, scheduler))
        if self.options.observe is not None:
            assert self.model is not None
            scene = observers.Scene(
                chunks=chunks,
                optimizer=optimizer,
                scheduler=scheduler,
                model=self.model,
                recipe=self.recipe,
                values=values,
            )
            self.observer = observers.observer(self.options.observe, scene)

    def _plan_for(self, model: ModelFile) -> Plan:
        try:
            return self.recipe.plan(model)
        except InputError as error:
            raise InputError(f"{self.options.recipe} for {_SOURCE}: {error}") from None

    def verify(self, chunks: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any, *, at_start: bool) -> None:
        """Compares the live model and optimizer with the plan. Collective.

        Raises:
            InputError: on every rank, if anything on any rank is not what the plan says.
        """
        assert self.plan is not None
        if self.options.verify:
            weights = at_start and not self.loaded
            guard.require_as_planned(chunks, self.plan, optimizer, scheduler, weights=weights)

    def stepping(self, iteration: int, iterators: Any) -> Any:
        """An iteration is about to begin; returns the iterators of data that it reads."""
        interval = self.options.coordinates_interval
        if self.coordinates is not None and interval is not None:
            self.coordinates.measure(iteration % interval == 0)
        return iterators if self.observer is None else self.observer.stepping(iterators)

    def stepped(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        values: Any,
        losses: Mapping[str, Any],
    ) -> None:
        """An iteration is over. Looks again after the first ones, then ever more rarely."""
        assert self.plan is not None
        self.steps += 1
        if guard.is_due(self.steps):
            self.verify(chunks, optimizer, scheduler, at_start=False)
        iteration = values.curr_iteration + 1
        if values.tensorboard_log_interval and iteration % values.tensorboard_log_interval == 0:
            telemetry.log_lr_per_role(self.plan, optimizer, iteration)
        if self.coordinates is not None and self.coordinates.measuring:
            self.coordinates.log(iteration)
        if self.observer is not None:
            self.observer.stepped(losses)
