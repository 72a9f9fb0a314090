"""Expected final losses of given configurations, and how they do against known ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.rows import routing
from raysweep.scaling.cells import cell_table, group_values
from raysweep.scaling.evidence import REACH, Evidence
from raysweep.scaling.fitted import Fitted
from raysweep.scaling.loss.model import NORMAL
from raysweep.scaling.plain import plain_dict
from raysweep.scaling.recommend import Recommendation
from raysweep.text import short, written

N = "params_active_non_embedding"
NEEDED = (N, "tokens")
SAME_SIZE = 0.005
"""Configurations whose ln N and ln D agree so well are answered for as one run."""
SAME_BATCH = math.log(1.5)
"""Where no cell varied its batch, runs within this of it, in ln, are still told."""
FEWEST_RANKED = 3
UNKNOWN = "\x00"
"""Of a run whose set of data is not among the fitted."""


def predict_runs(fits: Fitted, runs: pd.DataFrame) -> pd.DataFrame:
    """The expected final loss of each run, in the order of `runs`.

    `runs` has the schema's columns. Returned are `architecture` (the fitted one that answers),
    `group`, `params`, `tokens`, `learning_rate`, `batch_tokens`, `loss` with its 95 % interval
    `low` and `high`, `cost` (the share by which it lies above the loss at the optimum), and `why`,
    empty where there is a loss. A run that tells neither learning rate nor batch is taken at its
    optimum.
    """
    runs = runs.reset_index(drop=True)
    frame = pd.DataFrame(
        {
            "architecture": _text(runs, "architecture"),
            "group": group_values(runs, fits.group),
            "params": _number(runs, N),
            "tokens": _number(runs, "tokens"),
            "learning_rate": _number(runs, "learning_rate"),
            "batch_tokens": _number(runs, "batch_tokens"),
            "loss": math.nan,
            "low": math.nan,
            "high": math.nan,
            "cost": math.nan,
            "why": "its size is not told: N and D",
        }
    )
    experts = _number(runs, "experts").fillna(1).astype(int)
    top_k = _number(runs, "top_k").fillna(1).astype(int)
    sized = frame[(frame["params"] > 0) & (frame["tokens"] > 0)]
    size = np.log(sized[["params", "tokens"]].to_numpy(float)) / SAME_SIZE
    at = [pd.Series(column.round(), index=sized.index) for column in size.T]
    dataset = _data_of(fits, runs)
    keys = [frame["architecture"], dataset, frame["group"], experts, top_k, *at]
    for _, part in sized.groupby([k[sized.index] for k in keys], sort=False):
        first = part.index[0]
        routed = int(experts[first]), int(top_k[first])
        try:
            found = _one_size(fits, part, str(dataset[first]), *routed)
        except UserError as error:
            frame.loc[part.index, "why"] = str(error)
            continue
        frame.loc[part.index, found.columns] = found
    if fits.adjusted is not None:
        factor = np.exp(fits.adjusted.offset(runs))
        frame = frame.assign(**{n: frame[n] * factor for n in ("loss", "low", "high")})
    return frame


def predict_around(
    evidence: Evidence, best: Recommendation, rate: np.ndarray, batch: np.ndarray
) -> pd.DataFrame:
    """The loss of a recommended run at other learning rates and batches (tokens), arrays that
    broadcast: `learning_rate`, `batch_tokens`, `loss`, the ends `low` and `high` of its 95 %
    interval, and `cost`, the share by which it lies above the loss at the optimum. They are NaN
    where no cell varied its batch and another one is asked.

    Raises:
        UserError: no trial tells both learning rate and batch.
    """
    if evidence.surface is None:
        raise UserError("no trial tells both learning rate and batch: only the loss of cells")
    rate, batch = np.broadcast_arrays(rate, batch)
    surface, run = evidence.surface, best.run
    unseen = evidence.unseen(best.architecture, run)
    base = np.log(np.array([best.loss, *best.loss_interval]))
    if run.name in evidence.losses:
        # Level and gap err against each other: near the trials their sum is known best.
        expected, se = surface.predict(run, rate, batch)
        level = surface.optimum(run).log_loss
        gap, shift = np.log(expected) - level, max(base[0] - level, 0.0)
        sd = np.sqrt((se / expected) ** 2 + surface.noise_variance(gap))
        down = up = REACH * np.hypot(sd, unseen * _hidden(shift, gap))
    else:
        (gap, least, most), shift = evidence.gap(run, rate, batch), unseen
        noise = NORMAL * surface.mode.widths.growth * gap  # of one run, beside the optimum's
        common = (NORMAL * unseen) ** 2 * (1 - _hidden(shift, gap) ** 2)
        own = (base[0] - base[1]) ** 2 - common, (base[2] - base[0]) ** 2 - common
        down = np.sqrt(own[0] + (gap - least) ** 2 + noise**2)
        up = np.sqrt(own[1] + (most - gap) ** 2 + noise**2)
    cost = gap - shift * (1 - _hidden(shift, gap))
    if surface.batch_rule is not None:
        cost = np.where(abs(np.log(batch) - surface.law(run)[1]) < SAME_BATCH, cost, math.nan)
    with np.errstate(over="ignore"):  # far off the optimum the loss has no upper end
        return pd.DataFrame(
            {
                "learning_rate": rate,
                "batch_tokens": batch,
                "loss": np.exp(base[0] + cost),
                "low": np.exp(base[0] + cost - down),
                "high": np.exp(base[0] + cost + up),
                "cost": np.expm1(cost),
            }
        )


def _hidden(shift: float, gap: np.ndarray) -> np.ndarray:
    """The share of what trials leave unseen at `gap` above the optimum's loss, which the surface
    expects `shift` below the loss that is told: all at the optimum, and nothing as high as the best
    trial, at twice that."""
    return np.maximum(1 - gap / max(2 * shift, 1e-9), 0.0)


def _data_of(fits: Fitted, runs: pd.DataFrame) -> pd.Series:
    """The set of data of each run, as `evidence` names it: that of its data's hash, or else of its
    study; UNKNOWN where the fits know neither, or have them in several sets."""
    trials = fits.table.trials
    found = [UNKNOWN] * len(runs)
    for column in ("study", "data_hash"):
        sets = trials["dataset"].groupby(_text(trials, column)).unique()
        known = {of: each[0] for of, each in sets.items() if of and len(each) == 1}
        found = [known.get(of, f) for of, f in zip(_text(runs, column), found, strict=True)]
    return pd.Series(found, index=runs.index, dtype=object)


def _answering(fits: Fitted, name: str, dataset: str, routed: tuple[int, int]) -> tuple[str, bool]:
    """The fitted architecture that answers for a run, and whether it is the one that it names.

    Names are told apart by their data (`dense (web)`), and compared without case. A run that names
    no fitted one is answered for by the only one of its kind and data.

    Raises:
        UserError: there is none, or several might be meant.
    """
    known = fits.architectures if dataset == UNKNOWN else fits.evidence[dataset].architectures
    wanted = name.casefold(), f"{name} ({dataset})".casefold()
    alike = [n for n in known if n.casefold() in wanted]
    if name in known or len(alike) == 1:
        return (name if name in known else alike[0]), True
    experts, top_k = routed
    many = experts > 1
    if many:
        fits.asked(experts, top_k)  # says so where there is no MoE
    own = [n for n in known if (fits.kind(n) == "moe") == many] or ([] if many else known)
    cells = {n: fits.cells_of(n) for n in own}
    alike = [n for n, c in cells.items() if (c["experts"].eq(experts) & c["top_k"].eq(top_k)).any()]
    own = alike or own
    # Where names say the routing only, another number of experts is asked of any of them.
    by_routing = set(own) <= set(routing(fits.cells["experts"], fits.cells["top_k"]))
    if name in fits.architectures or not own or (len(own) > 1 and not by_routing):
        to = "" if dataset in (UNKNOWN, "") else f" to {dataset}"
        listed = ", ".join(known)
        raise UserError(f"architecture {name!r} is not among those fitted{to}: {listed}")
    return own[0], False


def _one_size(
    fits: Fitted, part: pd.DataFrame, dataset: str, experts: int, top_k: int
) -> pd.DataFrame:
    """Columns of `predict_runs` for runs of one size."""
    params, tokens = (float(np.exp(np.log(part[n]).mean())) for n in ("params", "tokens"))
    name, group = str(part["architecture"].iloc[0]), str(part["group"].iloc[0])
    known, named = _answering(fits, name, dataset, (experts, top_k))
    # A table that names a MoE need not repeat its routing.
    told = experts > 1 or not named or fits.kind(known) == "dense"
    routed = {"experts": experts, "top_k": top_k} if told else {}
    best = fits.recommend(known, params, tokens, **routed, group=group or None)
    evidence = fits.evidence_of(known)
    made = pd.DataFrame({"architecture": known}, index=part.index)
    made["loss"], (made["low"], made["high"]) = best.loss, best.loss_interval
    made["cost"], made["why"] = math.nan, ""
    rate, batch = part["learning_rate"], part["batch_tokens"]
    if evidence.surface is not None:
        ran = float(np.exp(evidence.surface.law(best.run)[1]))
        if evidence.surface.batch_rule is not None:
            batch = batch.where(batch.notna() | rate.isna(), ran)
        both = (rate > 0) & (batch > 0) & np.isfinite(rate * batch)
        if both.any():
            found = predict_around(evidence, best, rate[both].to_numpy(), batch[both].to_numpy())
            for column in ("loss", "low", "high", "cost"):
                made.loc[both, column] = found[column].to_numpy()
            made.loc[both & made["loss"].isna(), "why"] = (
                f"no cell varied its batch: only runs at about {short(ran)} tokens can be predicted"
            )
        half = (rate.notna() | batch.notna()) & ~both
        made.loc[half, ["loss", "low", "high"]] = math.nan
        made.loc[half, "why"] = "only one of learning rate and batch is told"
    if not math.isfinite(best.loss):
        made["why"] = "; ".join(best.warnings) or "the loss is not determined"
    for column in ("learning_rate", "batch_tokens"):
        wrong = part[column].notna() & ~((part[column] > 0) & np.isfinite(part[column]))
        made.loc[wrong, ["loss", "low", "high", "cost"]] = math.nan
        made.loc[wrong, "why"] = f"its {column} is not a number above zero"
    return made


@dataclass(frozen=True)
class GroupScore:
    """How predicted losses did on the runs of one group."""

    group: str
    n: int
    mae: float
    """Mean of |predicted - known|, nats a token."""
    median: float
    """Its median: runs far off the optimum weigh on the mean."""
    bias: float
    """Mean of predicted - known."""
    rank_correlation: float
    """Spearman's; NaN of fewer than three runs, or of equal losses."""
    covered: int
    """Runs whose known loss lies in the 95 % interval."""

    @property
    def coverage(self) -> float:
        return self.covered / self.n if self.n else math.nan


@dataclass(frozen=True, eq=False)
class Score:
    """Predicted losses against known ones.

    `overall` is over all runs, `groups` over those of each architecture and group; `runs` are those
    of `predict_runs` with `known`. `fitted` of them are among the rows that the fit was made of,
    `skipped` counts runs that could not be scored, by reason.
    """

    overall: GroupScore
    groups: tuple[GroupScore, ...]
    runs: pd.DataFrame
    fitted: int
    skipped: dict[str, int]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values: what `raysweep score --json` prints."""
        rows = [{**vars(g), "coverage": g.coverage} for g in (self.overall, *self.groups)]
        said = {
            "overall": rows[0],
            "groups": rows[1:],
            "fitted": self.fitted,
            "skipped": self.skipped,
            "runs": self.runs.to_dict("records"),
        }
        return plain_dict(said)

    def __str__(self) -> str:
        lines = [f"{self.overall.n} runs, predicted from their N, D, learning rate and batch"]
        lines += [f"  {count} not scored: {why}" for why, count in self.skipped.items()]
        if self.fitted:
            lines.append(
                f"  warning: {self.fitted} of them are among the rows that were fitted: hold runs "
                "out (--where) to see how far to trust it"
            )
        wide = max(len(g.group) for g in (self.overall, *self.groups))
        lines.append(
            f"{'':<{wide}}  {'runs':>5}  {'MAE':>7}  {'median':>7}  {'bias':>8}  "
            f"{'rank corr.':>10}  inside 95 %"
        )
        for g in (*self.groups, self.overall):
            rank = f"{g.rank_correlation:.3f}" if math.isfinite(g.rank_correlation) else "-"
            lines.append(
                f"{g.group:<{wide}}  {g.n:>5}  {g.mae:>7.4f}  {g.median:>7.4f}  {g.bias:>+8.4f}  "
                f"{rank:>10}  {g.covered} of {g.n}"
            )
        return "\n".join(lines)


def score_runs(fits: Fitted, runs: pd.DataFrame) -> Score:
    """Hold predictions against the known losses of runs with the schema's columns: of those that
    would count in a fit.

    Raises:
        UserError: no run with a loss can be predicted.
    """
    table = cell_table(runs, group=fits.group)
    counted = table.trials
    # As the runs name it, not told apart among themselves.
    named = runs["architecture"].reset_index(drop=True)
    counted = counted.assign(architecture=named[counted.index])
    found = predict_runs(fits, counted).assign(known=counted["loss"].to_numpy(float))
    skipped = pd.concat([table.left_out["why"], found["why"][found["why"] != ""]]).value_counts()
    done = found[found["why"] == ""].drop(columns="why")
    if not len(done):
        first = f": {skipped.index[0]}" if len(skipped) else ""
        raise UserError(f"no run can be scored{first}")
    keys = set(fits.table.trials["trial_key"].dropna())
    fitted = int(counted["trial_key"].isin(keys).sum())
    names = [
        name + (f", {group}" if group else "")
        for name, group in zip(done["architecture"], done["group"], strict=True)
    ]
    groups = [_scored(str(n), part) for n, part in done.groupby(names, sort=False)]
    return Score(
        overall=_scored("all", done),
        groups=tuple(groups) if len(groups) > 1 else (),
        runs=done,
        fitted=fitted,
        skipped={str(k): int(v) for k, v in skipped.items()},
    )


def _scored(name: str, runs: pd.DataFrame) -> GroupScore:
    off = runs["loss"] - runs["known"]
    rank = math.nan
    if len(runs) >= FEWEST_RANKED and runs["known"].nunique() > 1 and runs["loss"].nunique() > 1:
        rank = float(runs["loss"].rank().corr(runs["known"].rank()))  # Spearman
    inside = (runs["low"] <= runs["known"]) & (runs["known"] <= runs["high"])
    return GroupScore(
        group=name,
        n=len(runs),
        mae=float(off.abs().mean()),
        median=float(off.abs().median()),
        bias=float(off.mean()),
        rank_correlation=rank,
        covered=int(inside.sum()),
    )


def predictions_text(found: pd.DataFrame) -> str:
    """Predictions as a table for a terminal."""
    head = ("architecture", "N", "D", "learning rate", "batch", "loss", "95 %", "over the optimum")
    rows: list[Sequence[str]] = [head]
    for row in found.to_dict("records"):
        of = row["architecture"] + (f", {row['group']}" if row["group"] else "")
        ends = f"{written(row['low'], 'loss')} to {written(row['high'], 'loss')}"
        rows.append(
            (
                of,
                _or_dash(row["params"], short),
                _or_dash(row["tokens"], short),
                _or_dash(row["learning_rate"], lambda v: written(v, "rate")),
                _or_dash(row["batch_tokens"], lambda v: written(v, "batch")),
                _or_dash(row["loss"], lambda v: written(v, "loss")),
                row["why"] or ends,
                _or_dash(row["cost"], lambda v: written(v, "percent")),
            )
        )
    wide = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)).rstrip() for row in rows
    )


def _or_dash(value: float, show: object) -> str:
    return show(value) if math.isfinite(value) else "-"  # type: ignore[operator]


def _number(frame: pd.DataFrame, name: str) -> pd.Series:
    if name not in frame:
        return pd.Series(math.nan, index=frame.index)
    return pd.to_numeric(frame[name], errors="coerce").astype(float)


def _text(frame: pd.DataFrame, name: str) -> pd.Series:
    if name not in frame:
        return pd.Series("", index=frame.index, dtype=object)
    return frame[name].astype(object).where(frame[name].notna(), "").astype(str)
