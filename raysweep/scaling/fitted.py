"""Everything fitted to one results table, which of it a request means, and what is read off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import pandas as pd

from raysweep.display import InNotebooks, Plots, plots_of
from raysweep.errors import UserError
from raysweep.scaling.adjustment import AS_RUN, Adjustment
from raysweep.scaling.cells import CellTable
from raysweep.scaling.claims import Claim, claims
from raysweep.scaling.compare import Arm, Ratio, compare_arms
from raysweep.scaling.compute.allocation import Allocation
from raysweep.scaling.compute.budgets import (
    Exponents,
    Split,
    allocation_exponents,
    best_splits,
    split_budget,
)
from raysweep.scaling.compute.candidates import candidates_of
from raysweep.scaling.compute.serving import LossCurve, Serving, ServingLaw, Solution
from raysweep.scaling.evidence import Evidence
from raysweep.scaling.held_out import HeldOut, hold_out_largest
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import batch_table, choose_loss
from raysweep.scaling.optima.coefficients import against_prior, laws_to_dict
from raysweep.scaling.optima.hyperparameters import (
    HyperparameterOptimum,
    hyperparameter_optima,
)
from raysweep.scaling.optima.literature import OptimumPrior
from raysweep.scaling.optima.noise_scale import (
    NoiseLaw,
    fit_noise_scale,
    noise_along,
)
from raysweep.scaling.optima.readings import Optimum, readings_table
from raysweep.scaling.plain import plain_dict
from raysweep.scaling.quantities import TARGETS
from raysweep.scaling.recommend import BATCH_WITHIN, Recommendation, recommend
from raysweep.scaling.relations import LossRelation, loss_relation
from raysweep.text import read_number, read_size

Many = float | str | Sequence[float | str] | np.ndarray
"""Numbers, or text such as "7B"."""


@dataclass(frozen=True, eq=False, repr=False)
class Fitted(InNotebooks):
    """Everything fitted to one results table. Each of its answers is read off `evidence`.

    `evidence` holds one entry a set of data, by its label (one, "", where all rows share data).
    `cells` has one row a cell (index its name), smallest compute first, of all sets together:
    sizes, numbers of trials, `loss` at the optimum (`loss_from` says what told it) and its
    `loss_se`, `learning_rate`, `batch_tokens` and `status` of the optimum. `optima[way][cell]` are
    the optima by the model and by the readings that check it. `noise_scale` and `expert_load` are
    what trials measured beside their loss. `group` are the columns that results were grouped by,
    `where` the condition on rows, `of_loss` the loss that stands for a trial's if it is not the one
    that was minimised, `adjusted` the effects of further columns that losses were adjusted for, if
    any, and `choices` say these three in sentences.
    """

    n_rows: int
    left_out: dict[str, int]
    messages: tuple[str, ...]
    group: tuple[str, ...]
    prior: OptimumPrior
    evidence: dict[str, Evidence]
    cells: pd.DataFrame
    optima: dict[str, dict[str, Optimum]]
    noise_scale: pd.DataFrame
    expert_load: pd.DataFrame
    table: CellTable
    where: str = ""
    of_loss: str = ""
    adjusted: Adjustment | None = None
    choices: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """The words of a command line that fit the same."""
        also = [e.column for e in self.adjusted.effects] if self.adjusted else []
        said = {
            "--group": ",".join(self.group),
            "--where": self.where,
            "--also": ",".join(also),
            "--loss": self.of_loss,
        }
        return [word for option, value in said.items() if value for word in (option, value)]

    # ------------------------------------------------------------------ what there is

    @cached_property
    def architectures(self) -> list[str]:
        """Names of the architectures, dense ones first."""
        names = [name for e in self.evidence.values() for name in e.architectures]
        return sorted(names, key=lambda name: self.kind(name) != "dense")

    def evidence_of(self, architecture: str) -> Evidence:
        """What was fitted to the data of an architecture.

        Raises:
            UserError: no architecture of that name.
        """
        for evidence in self.evidence.values():
            if architecture in evidence.architectures:
                return evidence
        known = ", ".join(self.architectures) or "none"
        raise UserError(f"no architecture {architecture!r} in the results; known: {known}")

    def cells_of(self, architecture: str) -> pd.DataFrame:
        """The rows of `cells` of an architecture."""
        return self.cells[self.cells["architecture"] == architecture]

    def kind(self, architecture: str) -> str:
        """`dense` or `moe`."""
        return str(self.cells_of(architecture)["architecture_kind"].iloc[0])

    def groups(self, architecture: str) -> list[str]:
        """The values of `group` among an architecture's cells."""
        return list(dict.fromkeys(self.cells_of(architecture)["group"]))

    # ------------------------------------------------------------------ what it answers

    @overload
    def recommend(  # pyright: ignore[reportOverlappingOverload] # text is a sequence, too
        self,
        architecture: str | None = None,
        params: float | str = "",
        tokens: float | str = "",
        experts: int | None = None,
        top_k: int | None = None,
        *,
        group: str | None = None,
        within: float | str = BATCH_WITHIN,
    ) -> Recommendation: ...

    @overload
    def recommend(
        self,
        architecture: str | None = None,
        params: Many = "",
        tokens: Many = "",
        experts: int | None = None,
        top_k: int | None = None,
        *,
        group: str | None = None,
        within: float | str = BATCH_WITHIN,
    ) -> pd.DataFrame: ...

    def recommend(
        self,
        architecture: str | None = None,
        params: Many = "",
        tokens: Many = "",
        experts: int | None = None,
        top_k: int | None = None,
        *,
        group: str | None = None,
        within: float | str = BATCH_WITHIN,
    ) -> Recommendation | pd.DataFrame:
        """What to run for `params` active non-embedding parameters on `tokens` tokens.

        Numbers, text such as "7B", or sequences of either: then a DataFrame, one row a run.
        `architecture` is a name in the results, or `dense` or `moe`; without one, `experts`
        decides. `within` is the share of the best loss that the largest batch may cost.

        Raises:
            UserError: what no results could answer.
        """
        name = self._architecture(architecture, experts, top_k, group)
        evidence = self.evidence_of(name)
        share = _share(within)

        def one(n: object, d: object) -> Recommendation:
            return recommend(
                evidence,
                name,
                read_size(scalar(n, "params"), "params"),
                read_size(scalar(d, "tokens"), "tokens"),
                experts=experts,
                top_k=top_k,
                group=group,
                within=share,
            )

        if single(params) and single(tokens):
            return one(params, tokens)
        pairs = np.broadcast(*paired(params=params, tokens=tokens))
        rows = [one(n, d).to_row() for n, d in pairs]
        return pd.DataFrame(rows)

    def split(self, flops: float | str | Sequence[float | str]) -> dict[str, list[Allocation]]:
        """By architecture, the compute-optimal N and D of each training budget.

        Raises:
            UserError: a budget that is no positive number.
        """
        one = isinstance(flops, float | int | str | np.number)
        asked = [read_number(f, "flops") for f in ([flops] if one else flops)]
        return {
            name: best_splits(self.loss_model(name), asked, self.cells_of(name))
            for name in self.architectures
        }

    @cached_property
    def allocation(self) -> dict[str, Split]:
        """By architecture, how its largest cell's budget is best split, and others on the way."""
        return {
            name: split_budget(self.loss_model(name), self.cells_of(name))
            for name in self.architectures
        }

    def serve(
        self,
        flops: float | Sequence[float],
        serving: Serving,
        experts: Sequence[float] = (),
        reference: str | float | None = None,
        law: str | None = None,
    ) -> list[Solution]:
        """What training budgets buy with each architecture: loss-optimal, at equal quality, and at
        a bounded serving cost; see `serving.Kind` and `serving_law`."""
        budgets = np.atleast_1d(np.asarray(flops, dtype=float)).tolist()
        return self.serving_law(serving, experts, reference, law).solutions(budgets)

    def serving_law(
        self,
        serving: Serving,
        experts: Sequence[float] = (),
        reference: str | float | None = None,
        law: str | None = None,
    ) -> ServingLaw:
        """Loss and serving cost of each architecture at any size and budget.

        `experts` are the numbers to weigh, by default those trained; `reference` the architecture
        (or its experts) that others are held against; `law` the key of the law of the loss, by
        default the one that predicts best.

        Raises:
            UserError: no law over several numbers of experts is determined.
        """
        whys = []
        for evidence in self.evidence.values():
            model = evidence.shared_loss
            if len(set(evidence.cells["experts"])) < 2:
                whys.append("these results know one number of experts only")
            elif not model.ok and law is None:
                whys.append(f"the law of the loss is not determined: {model.why}")
            else:
                curve = LossCurve.of(model, law)
                candidates = candidates_of(evidence.cells, experts)
                return ServingLaw.of(curve, serving, candidates, reference)
        raise UserError(
            f"serving weighs several numbers of experts, and {(whys or ['there is no cell'])[0]}"
        )

    def arm(self, architecture: str, group: str = "") -> Arm:
        """One side of a comparison."""
        name = architecture + (f", {group}" if group else "")
        return Arm(name, self.evidence_of(architecture), architecture, group, self.noise_scale)

    @cached_property
    def comparison(self) -> dict[str, list[Ratio]]:
        """Each MoE architecture over the dense one of its data, by its name; empty without both."""
        found = {}
        for evidence in self.evidence.values():
            dense = [n for n in evidence.architectures if self.kind(n) == "dense"]
            for name in evidence.architectures:
                if dense and self.kind(name) == "moe":
                    found[name] = compare_arms(self.arm(dense[0]), self.arm(name))
        return found

    @cached_property
    def claims(self) -> dict[str, list[Claim]]:
        """By MoE architecture, what Wang et al. claim of it against dense, and what is seen."""
        found = {}
        for name, ratios in self.comparison.items():
            evidence = self.evidence_of(name)
            dense = next(n for n in evidence.architectures if self.kind(n) == "dense")
            found[name] = claims(evidence, dense, name, ratios, self.noise_scale)
        return found

    @cached_property
    def exponents(self) -> list[Exponents]:
        """How the best N and D of a budget grow with it, each architecture by its own cells, all in
        one count of parameters; see `budgets.allocation_exponents`."""
        return [
            row
            for name in self.architectures
            for row in allocation_exponents(name, self.kind(name), self.cells_of(name))
        ]

    @cached_property
    def relations(self) -> dict[str, dict[str, LossRelation]]:
        """By architecture, the optimal batch and learning rate as power laws of the loss (Wang et
        al.: B = B0 / L^a); only those that are determined."""
        found: dict[str, dict[str, LossRelation]] = {}
        for name in self.architectures:
            known = {t: loss_relation(self.evidence_of(name), name, t) for t in TARGETS}
            found[name] = {t: r for t, r in known.items() if r is not None}
        return found

    @cached_property
    def by_batch(self) -> dict[str, LossModel]:
        """By architecture, the three-term law of parameters, batch and steps (Schaipp et al.),
        fitted to the best runs of each batch, suboptimal ones too."""
        return {
            name: choose_loss(
                LossData.from_cells(batch_table(self.cells_of(name), self.table.trials)),
                ["three_term"],
            )
            for name in self.architectures
        }

    @cached_property
    def noise_along(self) -> pd.DataFrame:
        """The noise scale in each quarter of each cell's best runs, against the loss there."""
        return noise_along(self.cells, self.table.trials)

    @cached_property
    def noise_laws(self) -> dict[str, NoiseLaw]:
        """By architecture, the measured gradient noise scale as a power law of the loss."""
        found = {}
        for name in self.architectures:
            cells = self.cells_of(name)
            law = fit_noise_scale(cells, self.noise_scale.loc[cells.index])
            if law is not None:
                found[name] = law
        return found

    @cached_property
    def hyperparameters(self) -> dict[str, dict[str, HyperparameterOptimum]]:
        """Of hyperparameters beside learning rate and batch, in which runs of a cell differ: where
        each is best and whether that moves with size, by set of data and name."""
        named = [effect.column for effect in self.adjusted.effects] if self.adjusted else []
        found = {}
        for label, evidence in self.evidence.items():
            own = self.table.trials[self.table.trials["cell"].isin(evidence.cells.index)]
            if AS_RUN in own:
                own = own.assign(loss=own[AS_RUN])
            if evidence.surface is not None:
                known = hyperparameter_optima(evidence.surface, own, named)
                found |= {label: known} if known else {}
        return found

    @property
    def plot(self) -> Plots:
        """Figures of Matplotlib: `optima()`, `loss()`, `surface(cell)`, `trials()`."""
        return plots_of(self)

    # ------------------------------------------------------------------ how far to trust it

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The largest cells, predicted by a fit of the smaller ones; None where they are too
        few."""
        return hold_out_largest(list(self.evidence.values()), self.table.searched(), self.prior)

    @cached_property
    def readings(self) -> pd.DataFrame:
        """How other ways to read optima compare with the model, one row a way."""
        return readings_table(self.optima, self.cells)

    @cached_property
    def prior_table(self) -> pd.DataFrame:
        """What the literature says of each exponent and intercept, and how far the data moved it.

        One row a set of data, target and coefficient: `prior`, `prior_sd`, `value`, `low`, `high`,
        and `moved`, the distance from the prior's mean in its sds."""
        rows = []
        for label, evidence in self.evidence.items():
            if evidence.surface is None:
                continue
            rows += [{"dataset": label, **row} for row in against_prior(evidence.surface)]
        return pd.DataFrame(rows)

    def loss_model(self, architecture: str) -> LossModel:
        """The law that tells the loss of an architecture's runs."""
        return self.evidence_of(architecture).loss_model(architecture)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values: what `raysweep fit --json` prints."""
        said = {
            "n_rows": self.n_rows,
            "left_out": self.left_out,
            "messages": self.messages,
            "group": self.group,
            "choices": self.choices,
            "cells": self.cells,
            "optima": self.optima["model"] if self.optima else {},
            "laws": {
                label: laws_to_dict(e.surface) for label, e in self.evidence.items() if e.surface
            },
            "loss": {name: self.loss_model(name).to_dict() for name in self.architectures},
            "relations": self.relations,
            "comparison": self.comparison,
            "claims": self.claims,
            "allocation": self.allocation,
            "exponents": self.exponents,
            "noise_scale": self.noise_scale,
            "noise_laws": self.noise_laws,
            "hyperparameters": self.hyperparameters,
            "expert_load": self.expert_load,
            "prior": self.prior_table,
            "readings": self.readings if self.optima else {},
            "held_out": self.held_out,
        }
        return plain_dict(said)

    def __repr__(self) -> str:
        n = len(self.cells)
        return f"<{type(self).__name__}: {n} cells of {', '.join(self.architectures) or 'nothing'}>"

    def asked(
        self, experts: int | None = None, top_k: int | None = None, group: str | None = None
    ) -> list[str]:
        """The architectures that a request without one means: all that have such experts, and
        cells of such a group.

        Raises:
            UserError: there is none.
        """
        names = self._with_group(group)
        if not names or experts == 1:
            return [self._architecture(None, experts, top_k, group)]
        if (experts or 1) > 1:
            moe = [name for name in names if self.kind(name) == "moe"]
            return self._routed(moe, experts, top_k) or [
                self._architecture(None, experts, top_k, group)
            ]
        return names

    def _routed(self, names: list[str], experts: int | None, top_k: int | None) -> list[str]:
        """Those with cells of such a routing; else of as many experts; else all."""
        routings = {
            n: set(self.cells_of(n)[["experts", "top_k"]].itertuples(index=False)) for n in names
        }
        same = [n for n in names if any(e == experts for e, _ in routings[n])]
        exact = [n for n in same if (experts, top_k) in routings[n]]
        return exact or same or names

    def _with_group(self, group: str | None) -> list[str]:
        """Names of the architectures that have cells of a group, or of all."""
        names = self.architectures
        own = [name for name in names if group is None or group in self.groups(name)]
        if names and not own:
            known = ", ".join(dict.fromkeys(g for n in names for g in self.groups(n) if g))
            hint = (
                f"known: {known}"
                if known
                else "the results were not grouped: fit them with --group COLUMN"
            )
            raise UserError(f"no group {group!r} in the results; {hint}")
        return own

    def _architecture(
        self, wanted: str | None, experts: int | None, top_k: int | None, group: str | None
    ) -> str:
        """The name that a request means."""
        if not self.architectures:
            raise UserError("the results hold no cell, so there is nothing to recommend from")
        if wanted in self.architectures:
            return str(wanted)
        names = self._with_group(group)
        many = (experts or 1) > 1
        kind = wanted if wanted is not None else "moe" if many else "dense"
        of_kind = [n for n in names if self.kind(n) == kind]
        if wanted in ("dense", "moe", None) and of_kind:
            return self._routed(of_kind, experts, top_k)[0]
        if wanted is None and not many:
            return names[0]
        if wanted in ("moe", None):
            raise UserError(
                "no MoE cell in the results, so nothing tells of experts: leave them out"
            )
        raise UserError(f"no architecture {wanted!r} in the results; known: {', '.join(names)}")


def paired(**given: Many) -> list[np.ndarray]:
    """Values by name as arrays of one length; one value stands for as many as there are."""
    arrays = {name: np.atleast_1d(value) for name, value in given.items()}
    try:
        return list(np.broadcast_arrays(*arrays.values()))
    except ValueError:
        counts = " and ".join(f"{value.size} of {name}" for name, value in arrays.items())
        raise UserError(f"{counts}: give as many of each, or one") from None


def single(value: object) -> bool:
    return isinstance(value, str | float | int | np.number)


def scalar(value: object, name: str) -> str | float:
    if isinstance(value, str):
        if not value:
            raise UserError(f"recommend needs {name}: a number such as 7e9, or '7B'")
        return value
    return float(value)  # type: ignore[arg-type]


def _share(within: float | str) -> float:
    text = str(within).strip()
    share = read_number(text.removesuffix("%"), "within")
    return share / 100 if text.endswith("%") else share
