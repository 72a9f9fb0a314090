"""Which parameters a recipe trains alike: by which optimizer, at what rate, with what decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from raysweep.model.parametrization import Parametrization, role_of
from raysweep.study.spec import TrialSpec


@dataclass(frozen=True)
class Group:
    """How some parameters are trained."""

    muon: bool
    rate: float
    """Learning rate over the trial's."""
    weight_decay: float
    """As PyTorch has it: a step shrinks weights by this times the group's own learning rate."""
    eps: float
    """Adam's."""


GroupOf = Callable[[str, Tensor], Group]
"""The group of a parameter, from its name and the parameter itself."""


def groups_of(spec: TrialSpec) -> GroupOf:
    """The groups of a trial's recipe.

    With the learning rate lr(t) of the schedule, its peak lr, batch B and horizon D, a step shrinks
    what decays by lr(t) wd r (`fixed`, r its entry of `group_rates`), wd lr(t)/lr (`independent`),
    or B/(tau D) lr(t)/lr (`timescale`): none depends on the parametrization.
    """
    recipe = spec.recipe
    parametrization = Parametrization.of(recipe, spec.cell.shape)

    def group(name: str, parameter: Tensor) -> Group:
        role = role_of(name, parameter.ndim)
        muon = recipe.optimizer == "muon" and role == "matrices"
        ratio = getattr(recipe.group_rates, role)
        rate = ratio * parametrization.rate(name, role, muon=muon)
        if recipe.weight_decay_rule == "timescale":
            shrink = spec.batch_tokens / (recipe.weight_decay_timescale * spec.horizon)
        else:
            shrink = recipe.weight_decay
        if recipe.weight_decay_rule == "fixed":
            decay = shrink * ratio / rate
        else:
            decay = shrink / (spec.learning_rate * rate)
        return Group(
            muon=muon,
            rate=rate,
            weight_decay=decay if role in recipe.decays_on else 0.0,
            eps=recipe.eps * parametrization.eps(name, role),
        )

    return group
