"""fit(results) -> Fits: everything that a results table can tell, in one fitted object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike
from typing import overload

import numpy as np
import pandas as pd

from raysweep.display import InNotebooks, Plots, plots_of
from raysweep.errors import UserError
from raysweep.results.columns import recipe_columns, rows_where, with_loss
from raysweep.results.importers import read_runs
from raysweep.results.store import Results
from raysweep.scaling.adjustment import AS_RUN, Adjustment, adjusted_cells
from raysweep.scaling.cells import CellTable, CellTrials, cell_table
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
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.evidence import Evidence, gather
from raysweep.scaling.held_out import HeldOut, hold_out_largest
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import batch_table, choose_loss
from raysweep.scaling.optima.hyperparameters import (
    HyperparameterOptimum,
    hyperparameter_optima,
)
from raysweep.scaling.optima.literature import OptimumPrior, literature_prior, made_for
from raysweep.scaling.optima.model import BENDS
from raysweep.scaling.optima.noise_scale import (
    NoiseLaw,
    cell_expert_load,
    cell_noise_scale,
    fit_noise_scale,
    noise_along,
)
from raysweep.scaling.optima.readings import Optimum, all_readings, readings_table
from raysweep.scaling.optima.surface import EXPONENTS, TARGETS, Surface
from raysweep.scaling.plain import to_json
from raysweep.scaling.prediction import NEEDED as SIZED
from raysweep.scaling.prediction import Score, predict_runs, score_runs
from raysweep.scaling.recommend import BATCH_WITHIN, Recommendation, recommend
from raysweep.scaling.relations import LossRelation, loss_relation
from raysweep.scaling.summary import summary
from raysweep.study.load import parse_yaml
from raysweep.text import read_number, read_size

__all__ = ["Fits", "Recommendation", "fit"]

Many = float | str | Sequence[float | str] | np.ndarray
"""Numbers, or text such as "7B"."""


@dataclass(frozen=True, eq=False, repr=False)
class Fits(InNotebooks):
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
        name = self._architecture(architecture, experts, group)
        evidence = self.evidence_of(name)
        share = _share(within)

        def one(n: object, d: object) -> Recommendation:
            return recommend(
                evidence,
                name,
                read_size(_scalar(n, "params"), "params"),
                read_size(_scalar(d, "tokens"), "tokens"),
                experts=experts,
                top_k=top_k,
                group=group,
                within=share,
            )

        if _single(params) and _single(tokens):
            return one(params, tokens)
        pairs = np.broadcast(np.atleast_1d(params), np.atleast_1d(tokens))
        rows = [recommendation_row(one(n, d)) for n, d in pairs]
        return pd.DataFrame(rows)

    def predict(
        self,
        learning_rate: Many,
        batch_tokens: Many,
        params: float | str,
        tokens: float | str,
        architecture: str | None = None,
        experts: int | None = None,
        top_k: int | None = None,
        *,
        group: str | None = None,
    ) -> pd.DataFrame:
        """The loss of a run at any learning rates and batches: `loss`, `low`, `high`, and `cost`,
        the share by which it lies above the loss at the optimum.

        Raises:
            UserError: what no results could answer.
        """
        found = self.recommend(
            architecture, params, tokens, experts=experts, top_k=top_k, group=group
        )
        return self.loss_at(found, learning_rate, batch_tokens)

    def loss_at(
        self, found: Recommendation, learning_rate: Many, batch_tokens: Many
    ) -> pd.DataFrame:
        """What `predict` tells, of the run of a recommendation.

        Raises:
            UserError: no trial tells its learning rate and batch.
        """
        evidence = self.evidence_of(found.architecture)
        if evidence.surface is None:
            raise UserError("no trial tells its learning rate and batch: only the loss of cells")
        rate, batch = np.broadcast_arrays(
            _numbers(learning_rate, "learning_rate"), _numbers(batch_tokens, "batch_tokens")
        )
        gap, least, most = evidence.gap(found.run, rate, batch)
        noise = 1.96 * evidence.surface.mode.widths.growth * gap  # of one run, beside the optimum's
        base = np.log(np.array([found.loss, *found.loss_interval]))
        own = base[0] - base[1], base[2] - base[0]
        down = np.sqrt(own[0] ** 2 + (gap - least) ** 2 + noise**2)
        up = np.sqrt(own[1] ** 2 + (most - gap) ** 2 + noise**2)
        with np.errstate(over="ignore"):  # far off the optimum the loss has no upper end
            return pd.DataFrame(
                {
                    "learning_rate": rate,
                    "batch_tokens": batch,
                    "loss": np.exp(base[0] + gap),
                    "low": np.exp(base[0] + gap - down),
                    "high": np.exp(base[0] + gap + up),
                    "cost": np.expm1(gap),
                }
            )

    def predict_runs(
        self, runs: str | PathLike[str] | pd.DataFrame, columns: Mapping[str, str] | None = None
    ) -> pd.DataFrame:
        """The expected final loss of many configurations, with 95 % intervals; see
        `prediction.predict_runs`.

        `runs` is a table with one row a configuration (CSV, JSON lines, Parquet), a DataFrame, or a
        results folder; `columns` are our columns to its own, where their names do not tell.

        Raises:
            UserError: the table will not do.
        """
        return predict_runs(self, read_runs(runs, _mapping(columns), needed=SIZED))

    def score(
        self,
        runs: str | PathLike[str] | pd.DataFrame,
        columns: Mapping[str, str] | None = None,
        *,
        where: str | None = None,
    ) -> Score:
        """The predictions of `predict_runs` against the runs' known losses.

        Raises:
            UserError: the table will not do, or no run of it can be scored.
        """
        frame = read_runs(runs, _mapping(columns))
        return score_runs(self, rows_where(frame, where) if where else frame)

    def split(self, flops: float | str | Sequence[float | str]) -> dict[str, list[Allocation]]:
        """By architecture, the compute-optimal N and D of each training budget.

        Raises:
            UserError: a budget that is no positive number.
        """
        budgets = [flops] if isinstance(flops, float | int | str) else list(flops)
        asked = [read_number(f, "flops") for f in budgets]
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
            rows += [{"dataset": label, **row} for row in _against_prior(evidence.surface)]
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
                label: _laws_dict(e.surface) for label, e in self.evidence.items() if e.surface
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
        result = to_json(said)
        assert isinstance(result, dict)
        return result

    def __repr__(self) -> str:
        n = len(self.cells)
        return f"<Fits: {n} cells of {', '.join(self.architectures) or 'nothing'}>"

    def __str__(self) -> str:
        return self.summary()

    def summary(self, everything: bool = False) -> str:
        """The laws and how they did on what was held out, as text; with `everything` the cells,
        the comparison of architectures, the prior and the checks too."""
        return summary(self, everything)

    def asked(self, experts: int | None = None, group: str | None = None) -> list[str]:
        """The architectures that a request without one means: all that have such experts, and
        cells of such a group.

        Raises:
            UserError: there is none.
        """
        names = self._with_group(group)
        if not names or experts == 1:
            return [self._architecture(None, experts, group)]
        if (experts or 1) > 1:
            moe = [name for name in names if self.kind(name) == "moe"]
            known = [n for n in moe if experts in set(self.cells_of(n)["experts"])]
            return known or moe or [self._architecture(None, experts, group)]
        return names

    def _with_group(self, group: str | None) -> list[str]:
        """Names of the architectures that have cells of a group, or of all."""
        names = self.architectures
        own = [name for name in names if group is None or group in self.groups(name)]
        if names and not own:
            known = ", ".join(dict.fromkeys(g for n in names for g in self.groups(n) if g))
            hint = f"known: {known}" if known else "the results were not grouped: name a column"
            raise UserError(f"no group {group!r} in the results; {hint}")
        return own

    def _architecture(
        self, wanted: str | None, experts: int | None, group: str | None = None
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
            routing = [n for n in of_kind if experts in set(self.cells_of(n)["experts"])]
            return (routing or of_kind)[0]
        if wanted is None and not many:
            return names[0]
        if wanted in ("moe", None):
            raise UserError(
                "no MoE cell in the results, so nothing tells of experts: leave them out"
            )
        raise UserError(f"no architecture {wanted!r} in the results; known: {', '.join(names)}")


def fit(
    results: str | PathLike[str] | Results | pd.DataFrame,
    *,
    group: str | Sequence[str] = (),
    where: str | None = None,
    also: str | Sequence[str] = (),
    without: Iterable[str] | None = None,
    literature: Iterable[str] | None = None,
    loss: str | None = None,
    loss_law: str | None = None,
) -> Fits:
    """Fit everything that a results table can tell.

    Args:
        results: a results folder or URI, opened or not, or a DataFrame with the schema's columns.
        group: columns by which runs differ in their group (optimizer, schedule, ...): they share
            one valley, and have offsets of their own.
        where: only the rows for which this holds, such as 'optimizer == "adamw"'.
        also: further columns (weight_decay, warmup, ...) whose effect on the loss is taken off it;
            see `further`.
        without: keys of published laws to leave out of the prior.
        literature: keys of the only published laws to make the prior of. What is not given here
            is as the search spaces of the results say, if they agree.
        loss: the named validation set (`data.validation`) whose loss stands for a trial's, or `ema`
            for that of its averaged weights, in place of the one that its search minimised.
        loss_law: the law of the loss to answer with, in place of the one that predicts best.

    Raises:
        UserError: no results there, an unknown law or column, or a table without the columns that
            every fit needs.
    """
    if isinstance(results, str | PathLike):
        results = Results.open(results)
    columns = (group,) if isinstance(group, str) else tuple(group)
    if loss_law is not None and loss_law not in LOSS_LAWS:
        raise UserError(f"unknown law of the loss {loss_law!r}; known: {', '.join(LOSS_LAWS)}")
    frame = results if isinstance(results, pd.DataFrame) else results.to_pandas()
    doubt = ""
    if isinstance(results, Results) and (without is None or literature is None):
        out, trusted, doubt = _laws_to_trust(results, frame)
        without = out if without is None else without
        literature = trusted if literature is None else literature
    prior = literature_prior(without or (), literature)
    choices = []
    if loss:
        frame = with_loss(frame, loss)
        choices.append(f"losses are those of {loss}")
    if where:
        taken = rows_where(frame, where)
        choices.append(f"only rows where {where}: {len(taken)} of {len(frame)}")
        frame = taken
    table = cell_table(frame, group=columns)
    adjusted = None
    if also:
        adjusted, table = adjusted_cells(frame, table, columns, also, prior)
        choices.append(str(adjusted))
    trials = table.searched()
    evidence = {}
    for label in dict.fromkeys(table.cells["dataset"]):
        cells = table.cells[table.cells["dataset"] == label]
        own = [t for t in trials if t.name in cells.index]
        evidence[str(label)] = gather(
            str(label), cells, own, prior, None if loss_law is None else (loss_law,)
        )
    cells = pd.concat([e.cells for e in evidence.values()]) if evidence else table.cells
    optima = _optima(evidence.values(), trials)
    cells = _with_optima(cells, optima.get("model", {})).sort_values(
        ["flops", "tokens"], kind="stable"
    )
    left_out = table.left_out["why"].value_counts()
    return Fits(
        n_rows=len(frame),
        left_out={str(k): int(v) for k, v in left_out.items()},
        messages=(
            *([doubt] if doubt else []),
            *table.messages,
            *_messages(table, trials, optima.get("model", {})),
        ),
        group=columns,
        prior=prior,
        evidence=evidence,
        cells=cells,
        optima=optima,
        noise_scale=cell_noise_scale(cells, table.trials),
        expert_load=cell_expert_load(cells, table.trials),
        table=table,
        where=where or "",
        of_loss=loss or "",
        adjusted=adjusted,
        choices=tuple(choices),
    )


def _mapping(columns: Mapping[str, str] | None) -> str | None:
    return ",".join(f"{ours}={theirs}" for ours, theirs in columns.items()) if columns else None


def _laws_to_trust(
    results: Results, frame: pd.DataFrame
) -> tuple[Iterable[str], Iterable[str] | None, str]:
    """`without` and `literature` of the search spaces that rows came of; nothing, and why in a
    sentence, where they differ."""
    own = set(frame["study"].astype(str))
    said = []
    for name, text in results.search_spaces().items():
        if name in own:
            try:
                space, _ = parse_yaml(text, name)
            except UserError:  # a search space that cannot be read is no reason to go without fits
                continue
            keys = space if isinstance(space, dict) else {}
            trusted = keys.get("literature")
            said.append(
                (tuple(keys.get("without") or ()), None if trusted is None else tuple(trusted))
            )
    if len(set(said)) > 1:
        return (), None, "the studies name different published laws: the fits start from all"
    without, literature = said[0] if said else ((), None)
    return without, literature, ""


def recommendation_row(answer: Recommendation) -> dict[str, object]:
    """A recommendation as one row of a table, or as plain values."""
    low, high = "_low", "_high"
    row: dict[str, object] = {
        "architecture": answer.architecture,
        "params": answer.params,
        "tokens": answer.tokens,
        "experts": answer.experts,
        "top_k": answer.top_k,
    }
    for name in ("learning_rate", "batch_tokens", "loss"):
        ends = getattr(answer, f"{name}_interval")
        row |= {name: getattr(answer, name), name + low: ends[0], name + high: ends[1]}
    keep = {f.name for f in fields(answer)} & {"largest_batch", "verdict"}
    return row | {name: getattr(answer, name) for name in sorted(keep)}


def _numbers(values: Many, name: str) -> np.ndarray:
    """[n] positive numbers, of numbers or of text such as "2M"."""
    each = [values] if _single(values) else list(values)  # type: ignore[arg-type]
    read = np.array([read_number(_scalar(v, name), name) for v in each])
    if not (np.isfinite(read) & (read > 0)).all():
        raise UserError(f"{name} must be above zero, not {values}")
    return read


def _single(value: object) -> bool:
    return isinstance(value, str | float | int | np.number)


def _scalar(value: object, name: str) -> str | float:
    if isinstance(value, str):
        if not value:
            raise UserError(f"recommend needs {name}: a number such as 7e9, or '7B'")
        return value
    return float(value)  # type: ignore[arg-type]


def _share(within: float | str) -> float:
    text = str(within).strip()
    return read_number(text[:-1], "within") / 100 if text.endswith("%") else float(text)


def _optima(
    evidence: Iterable[Evidence], trials: Sequence[CellTrials]
) -> dict[str, dict[str, Optimum]]:
    """Optima by every way, over all sets of data."""
    found: dict[str, dict[str, Optimum]] = {}
    for one in evidence:
        if one.surface is None:
            continue
        own = [t for t in trials if t.name in one.cells.index]
        for way, optima in all_readings(one.surface, own).items():
            found.setdefault(way, {}).update(optima)
    return found


def _with_optima(cells: pd.DataFrame, optima: Mapping[str, Optimum]) -> pd.DataFrame:
    found = [optima.get(str(name)) for name in cells.index]
    return cells.assign(
        learning_rate=[o.learning_rate if o else np.nan for o in found],
        batch_tokens=[o.batch_tokens if o else np.nan for o in found],
        status=[o.status if o else "no learning rate or batch" for o in found],
    )


def _messages(
    table: CellTable, trials: Sequence[CellTrials], optima: Mapping[str, Optimum]
) -> list[str]:
    """What a reader must know before any number: in whole sentences."""
    said = []
    if not len(table.trials):
        said.append("no finished trial with a loss counts: nothing can be fitted")
    elif not trials:
        said.append("no trial tells its learning rate and batch: only laws of the loss are fitted")
    recipes = recipe_columns(table.trials)
    if trials and "optimizer" in recipes:
        said += [told] if (told := made_for(recipes["optimizer"].dropna().astype(str))) else []
    statuses = pd.Series([o.status for o in optima.values()], dtype=object).value_counts()
    outside = {str(k): int(v) for k, v in statuses.items() if k != "interior"}
    if outside:
        listed = ", ".join(f"{v} {k}" for k, v in outside.items())
        n = len(optima)
        said.append(f"{n - sum(outside.values())} of {n} optima lie inside their trials ({listed})")
    return said


def _laws_dict(surface: Surface) -> dict[str, object]:
    """The laws of the optimum. ln value = the sum of `terms` times what they read of a run, with
    n = ln(N / centre N), d = ln(D / centre D), s = ln(total / active): 1, n, d, s, then the bends
    n n / 2, n d, d d / 2, and the offset of the run's routing and of its group, if there are any.
    """
    laws = surface.laws
    names = ["at_centre", *EXPONENTS, *BENDS]
    names += [f"routing e{e}k{k}" for e, k in surface.design.routings]
    names += [f"group {g}" for g in surface.design.groups]
    terms = {
        target: dict(zip(names, surface.mode.shared[law].tolist(), strict=True))
        for target, law in zip(TARGETS, surface.problem.layout.law, strict=True)
    }
    return {
        "status": surface.status,
        "centre": {
            "params": float(np.exp(laws.centre[0])),
            "tokens": float(np.exp(laws.centre[1])),
        },
        "at_centre": {
            t: float(np.exp(c)) for t, c in zip(TARGETS, laws.coefficients[:, 0], strict=True)
        },
        "exponents": {t: {n: laws.exponent(t, n) for n in EXPONENTS} for t in TARGETS},
        "learned": {t: {n: laws.learned(t, n) for n in EXPONENTS} for t in TARGETS},
        "terms": terms,
        "one_batch": surface.batch_rule is not None,
    }


def _against_prior(surface: Surface) -> list[dict[str, object]]:
    laws = surface.laws
    size = laws.coefficients.size // 2
    rows = []
    for axis, target in enumerate(TARGETS):
        for column, name in enumerate(("at the centre", *EXPONENTS)):
            at = axis * size + column
            mean, sd = float(laws.prior_mean[at]), float(laws.prior_covariance[at, at] ** 0.5)
            value = float(laws.coefficients[axis, column])
            reach = 1.96 * float(laws.covariance[at, at] ** 0.5)
            found = Estimate(value, value - reach, value + reach)
            if column:
                found = laws.exponent(target, name)
            moved = (value - mean) / sd
            if not column:
                found = Estimate(*np.exp([found.value, found.low, found.high]).tolist())
            rows.append(
                {
                    "target": target,
                    "coefficient": name,
                    "prior": float(np.exp(mean)) if not column else mean,
                    "prior_sd": sd,
                    "value": found.value,
                    "low": found.low,
                    "high": found.high,
                    "moved": moved,
                }
            )
    return rows
