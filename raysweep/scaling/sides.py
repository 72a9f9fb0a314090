"""compare(...) -> Comparison: any number of sides, as a user names them, other things equal."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from raysweep.display import InNotebooks
from raysweep.errors import UserError
from raysweep.results.columns import rows_where
from raysweep.results.store import Results
from raysweep.scaling.compare import Arm, Ratio, Shift, compare_arms, shared_sizes, size_shift
from raysweep.scaling.datasets import data_sets
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits
from raysweep.scaling.plain import to_json
from raysweep.scaling.quantities import ANSWERS
from raysweep.scaling.recommend import Recommendation
from raysweep.scaling.runs import AXES
from raysweep.scaling.summary import ratio_lines
from raysweep.text import read_size, scientific, short, spanned

Source = str | os.PathLike[str] | Results | Fits
"""What a side may be taken from: a folder or URI (`FOLDER#STUDY` is one study of it), or fits."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(InNotebooks):
    """Several arms, what each recommends at one size, and the ratios of each over the first.

    `size` is the (N, D) of `answers`, None where no size suits all arms. `apart` says of an arm, by
    its name, why its losses cannot be compared with the first's.
    """

    arms: tuple[Arm, ...]
    size: tuple[float, float] | None
    apart: dict[str, str]

    @classmethod
    def of(cls, arms: Sequence[Arm], size: tuple[float, float] | None = None) -> Comparison:
        """Of arms at `size`, by default the largest that all measured or else have in range."""
        return cls(tuple(arms), size or _common_size(arms), _apart(arms))

    @cached_property
    def answers(self) -> dict[str, Recommendation]:
        """What each arm recommends at `size`, by its name."""
        return {arm.name: arm.answer(*self.size) for arm in self.arms} if self.size else {}

    @cached_property
    def ratios(self) -> dict[str, list[Ratio]]:
        """Of each arm over the first, by the arm's name."""
        return {arm.name: compare_arms(self.arms[0], arm) for arm in self.arms[1:]}

    @cached_property
    def shifts(self) -> dict[str, Shift]:
        """How each arm's optimum moves with size at equal tokens, by its name, where that shows."""
        found = {arm.name: size_shift(arm) for arm in self.arms}
        return {name: shift for name, shift in found.items() if shift is not None}

    def to_pandas(self) -> pd.DataFrame:
        """One row a side: learning rate, batch, loss and FLOPs at `size`, with their intervals."""
        rows = []
        for name, answer in self.answers.items():
            row: dict[str, object] = {"side": name}
            for key in ANSWERS:
                low, high = getattr(answer, f"{key}_interval")
                row |= {key: getattr(answer, key), f"{key}_low": low, f"{key}_high": high}
            rows.append(row | {"flops": answer.run.compute})
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values: what `raysweep compare --json` prints."""
        found = to_json(
            {
                "sides": [
                    {
                        "name": arm.name,
                        "architecture": arm.architecture,
                        "group": arm.group,
                        "data": arm.data,
                        "n_cells": len(arm.cells),
                    }
                    for arm in self.arms
                ],
                "params": self.size[0] if self.size else None,
                "tokens": self.size[1] if self.size else None,
                "answers": {
                    name: {**answer.to_dict(), "flops": answer.run.compute}
                    for name, answer in self.answers.items()
                },
                "reference": self.arms[0].name,
                "ratios": {
                    name: [
                        {
                            "quantity": r.quantity,
                            "at_equal": r.at_equal,
                            "ratio": r.ratio.value,
                            "interval": [r.ratio.low, r.ratio.high],
                            "status": r.ratio.status,
                            "why": r.ratio.why,
                            "n": r.n,
                            "paired": r.paired,
                        }
                        for r in ratios
                    ]
                    for name, ratios in self.ratios.items()
                },
                "shifts": self.shifts,
                "apart": self.apart,
            }
        )
        assert isinstance(found, dict)
        return found

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(arm.name for arm in self.arms)}>"

    def __str__(self) -> str:
        whys = dict.fromkeys(self.apart.values())
        names = {why: [n for n, own in self.apart.items() if own == why] for why in whys}
        lines = [f"warning: {', '.join(own)}: {why}" for why, own in names.items()]
        lines += [*([""] if lines else []), *self._table()]
        for name, ratios in self.ratios.items():
            lines += ["", *ratio_lines(f"{name} over {self.arms[0].name}", ratios)]
        return "\n".join([*lines, *self._moves()])

    def _moves(self) -> list[str]:
        lines = []
        for name, s in self.shifts.items():
            moved = [
                f"{word} x{spanned(e.value, e.low, e.high, 'ratio')}"
                for word, e in (("learning rate", s.learning_rate), ("batch", s.batch_tokens))
                if e.known
            ]
            sizes = f"{short(s.params[0])} to {short(s.params[1])} parameters"
            lines.append(
                f"  {name}, {sizes}: {', '.join(moved)}; the smallest's settings cost the largest "
                f"{s.cost_said} of its loss"
            )
        head = ["", "How the optimum moves with size at equal tokens (95 % intervals)"]
        return [*head, *lines] if lines else []

    def _table(self) -> list[str]:
        if self.size is None:
            return ["no size lies within the range of every side: ask for one"]
        params, tokens = self.size
        rows: list[Sequence[str]] = [("side", "learning rate", "batch", "loss", "FLOPs")]
        for name, a in self.answers.items():
            rows.append((name, *a.cells(), scientific(a.run.compute)))
        wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        head = f"At {short(params)} active parameters and {short(tokens)} tokens (95 % intervals)"
        return [
            head,
            *(
                "  " + "  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)).rstrip()
                for row in rows
            ),
        ]


def compare(
    *sources: Source | Sequence[Source],
    architectures: Iterable[str] = (),
    group: str | Sequence[str] = (),
    params: float | str | None = None,
    tokens: float | str | None = None,
    where: str | None = None,
    also: str | Sequence[str] = (),
    without: Iterable[str] | None = None,
    literature: Iterable[str] | None = None,
    loss: str | None = None,
) -> Comparison:
    """Compare architectures, groups, studies or folders, as many as there are.

    Args:
        sources: results folders or URIs, opened or not, or fits, or a list of them;
            `FOLDER#STUDY` is one study.
        architectures: names of those to compare only.
        group: columns whose values are sides too.
        params, tokens: the size at which the sides' recommendations stand side by side; by default
            the largest that all measured, or else that lies within the range of all.
        where, also: which rows of each source, and further columns to adjust for; see `fit`.
        without, literature: published laws to leave out, or to trust only; see `fit`.
        loss: whose loss stands for a trial's; see `fit`.

    Raises:
        UserError: fewer than two sides, or one that is not there.
    """
    listed: list[Source] = []
    for each in sources:
        listed += list(each) if isinstance(each, list | tuple) else [each]  # type: ignore[list-item]
    arms = arms_of(
        *listed,
        architectures=architectures,
        group=group,
        where=where,
        also=also,
        without=without,
        literature=literature,
        loss=loss,
    )
    if (params is None) != (tokens is None):
        raise UserError("give both params and tokens to compare at")
    size = None
    if params is not None and tokens is not None:
        size = read_size(params, "params"), read_size(tokens, "tokens")
    return Comparison.of(arms, size)


def arms_of(
    *sources: Source,
    architectures: Iterable[str] = (),
    group: str | Sequence[str] = (),
    where: str | None = None,
    **fit_options: Any,
) -> list[Arm]:
    """The sides of a comparison: an arm an architecture and group of each source, which is fitted
    alone, with `fit_options` as `fit` takes them. One folder of several studies is parted by study,
    unless its groups are compared.

    Raises:
        UserError: fewer than two sides, or one that is not there.
    """
    if not sources:
        raise UserError("a comparison needs results: name one folder or more")
    wanted = list(architectures)
    parts = [
        part
        for source in sources
        for part in _parts(source, alone=len(sources) == 1, grouped=bool(group), where=where)
    ]
    labels = _shared_data([frame for _, frame, _ in parts])
    found: list[tuple[str, Arm]] = []
    for (name, frame, made), data in zip(parts, labels, strict=True):
        fits = made or fit(frame, group=group, **fit_options)
        for architecture in fits.architectures:
            if wanted and architecture not in wanted:
                continue
            label = fits.evidence_of(architecture).dataset
            for value in fits.groups(architecture):
                arm = fits.arm(architecture, value)
                key = data.get(label, f"{name} {label}")
                found.append(
                    (name, Arm(arm.name, arm.evidence, architecture, value, arm.noise, key))
                )
    known = list(dict.fromkeys(arm.architecture for _, arm in found))
    missing = [name for name in wanted if name not in known]
    if missing:
        every = dict.fromkeys(a for _, frame, _ in parts for a in frame["architecture"].astype(str))
        raise UserError(f"no architecture {missing[0]!r} in the results; known: {', '.join(every)}")
    if len(found) < 2:
        only = f"only {found[0][1].name}" if found else "no cell"
        raise UserError(
            f"a comparison needs two sides, and there is {only}: name two folders, or one with "
            "two studies or architectures, or --group COLUMN"
        )
    return _named(found)


def _parts(
    source: Source, *, alone: bool, grouped: bool, where: str | None = None
) -> list[tuple[str, pd.DataFrame, Fits | None]]:
    """(name, rows, fits if there are any) of what a source holds."""
    if isinstance(source, Fits):
        return [("", source.table.trials, source)]
    study = ""
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        folder, _, study = text.partition("#")
        name, results = text.rstrip("/").split("/")[-1], Results.open(folder)
    else:
        name, results = source.uri.rstrip("/").split("/")[-1], source
    frame = results.to_pandas()
    frame = rows_where(frame, where) if where else frame
    studies = frame["study"].astype(str)
    if study and not (studies == study).any():
        known = ", ".join(dict.fromkeys(studies)) or "none"
        raise UserError(f"no study {study!r} in {results.uri}; its studies: {known}")
    if study:
        return [(study, frame[studies == study], None)]
    if alone and not grouped and studies.nunique() > 1:
        return [(s, frame[studies == s], None) for s in dict.fromkeys(studies)]
    return [(name, frame, None)]


def _shared_data(frames: Sequence[pd.DataFrame]) -> list[dict[str, str]]:
    """Of each source, the data that its own data sets (by their label) are of, among all."""
    rows = pd.concat(
        [
            f.assign(study=f["study"].astype(str) + f"\x00{k}", source_=k, own=data_sets(f))
            for k, f in enumerate(frames)
            if len(f)
        ],
        ignore_index=True,
    )
    rows["shared"] = data_sets(rows)
    told = rows.groupby(["source_", "own"], sort=False)["shared"].first()
    found: list[dict[str, str]] = [{} for _ in frames]
    for (k, own), shared in told.items():  # type: ignore[misc]
        found[int(k)][str(own)] = str(shared)
    return found


def _named(found: Sequence[tuple[str, Arm]]) -> list[Arm]:
    """Arms under names as short as tell them apart: of what differs between them."""
    sources, architectures, groups = (
        len({key(name, arm) for name, arm in found}) > 1
        for key in (
            lambda name, arm: name,
            lambda name, arm: arm.architecture,
            lambda name, arm: arm.group,
        )
    )
    arms: list[Arm] = []
    for source, arm in found:
        parts = [source] if sources else []
        parts += [arm.architecture] if architectures else []
        parts += [arm.group] if groups and arm.group else []
        name = " ".join(parts) or arm.architecture
        taken = sum(a.name.partition(" (#")[0] == name for a in arms)
        name += f" (#{taken + 1})" if taken else ""
        arms.append(Arm(name, arm.evidence, arm.architecture, arm.group, arm.noise, arm.data))
    return arms


def _common_size(arms: Sequence[Arm]) -> tuple[float, float] | None:
    """The largest size that every arm measured, or else one within the range of all."""
    first = arms[0]
    shared = [shared_sizes(first, arm) for arm in arms[1:]]
    if shared and all(paired for _, paired in shared):
        common = [
            size
            for size in shared[0][0]
            if all(any(_alike(size, other) for other in sizes) for sizes, _ in shared)
        ]
        if common:
            return common[-1]
    ends = [
        (arm.cells[[AXES["N"], AXES["D"]]].min(), arm.cells[[AXES["N"], AXES["D"]]].max())
        for arm in arms
    ]
    size = tuple(min(float(high[column]) for _, high in ends) for column in (AXES["N"], AXES["D"]))
    low = [max(float(low[column]) for low, _ in ends) for column in (AXES["N"], AXES["D"])]
    inside = all(s >= least for s, least in zip(size, low, strict=True))
    return (size[0], size[1]) if inside else None


def _alike(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return max(abs(math.log(a / b)) for a, b in zip(one, other, strict=True)) < 1e-9


def _apart(arms: Sequence[Arm]) -> dict[str, str]:
    """Of each arm whose losses cannot be compared with the first's, why."""
    why = (
        f"other data than {arms[0].name}, or none is told: losses are not comparable, optima may "
        "be (rows that share data say so in data_hash)"
    )
    return {arm.name: why for arm in arms[1:] if not arms[0].shares_losses(arm)}
