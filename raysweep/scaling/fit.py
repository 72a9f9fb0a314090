"""fit(results) -> Fits: from a results table to everything that is fitted to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.columns import recipe_columns, rows_where, with_loss
from raysweep.results.store import Results
from raysweep.scaling.adjustment import adjusted_cells
from raysweep.scaling.cells import CellTable, CellTrials, cell_table
from raysweep.scaling.evidence import Evidence, gather
from raysweep.scaling.fits import Fits
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.optima.literature import literature_prior, made_for
from raysweep.scaling.optima.noise_scale import cell_expert_load, cell_noise_scale
from raysweep.scaling.optima.readings import Optimum, all_readings
from raysweep.study.load import parse_yaml


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
            see `adjustment.py`.
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
        said.append("no trial tells both learning rate and batch: only laws of the loss are fitted")
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
