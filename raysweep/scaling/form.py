"""The shape that all laws of the loss share: a sum of power-law terms, its value and derivatives.

Every law of the registry can be written

    log L = log sum_k exp(z_k) + tilt,    z_k = log A_k + sum_j theta_j * feature_kj

where a feature is a product of log inputs ("N", "N Eh", ...). So one evaluator gives value,
gradient and exact Hessian for all of them, over a batch of coefficient vectors at once. Shapes:
B problems, n points, p coefficients, q coefficients of one term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from raysweep.errors import UserError

LN10 = float(np.log(10.0))

# symbol -> the named input it reads. "Eh" is Clark's saturating expert count, a function of
# experts and of two coefficients; "1-S" is the active share of the experts.
SYMBOL_INPUTS = {
    "N": "params",
    "D": "tokens",
    "C": "flops",
    "E": "experts",
    "Eh": "experts",
    "1-S": "sparsity",
    "G": "granularity",
    "M": "batch_tokens",
    "K": "steps",
}
SATURATING = "Eh"

Inputs = Mapping[str, npt.ArrayLike]
Kind = Literal["amplitude", "log10", "exponent", "saturation"]


@dataclass(frozen=True)
class Coefficient:
    """One coefficient of a law.

    `kind` says how the stated value relates to the fitted one: an amplitude and a saturation are
    fitted as their natural log, a "log10" as an intercept in base 10, an exponent as itself.
    `low`, `high` bound the *fitted* value: for an amplitude the log of its term's share of the loss
    at the centre of the data, for an exponent its value at the centre of the data.
    `start` is the range that starting points are drawn from (unused for amplitudes, which are
    solved for linearly)."""

    name: str
    kind: Kind
    low: float
    high: float
    start: tuple[float, float] = (0.0, 0.0)

    def state(self, fitted: np.ndarray) -> np.ndarray:
        """The value as the law's formula states it."""
        if self.kind == "log10":
            return fitted / LN10
        return fitted if self.kind == "exponent" else np.exp(fitted)

    def unstate(self, stated: np.ndarray) -> np.ndarray:
        """The inverse of `state`; an amplitude of zero becomes a term too small to matter."""
        if self.kind == "log10":
            return stated * LN10
        return stated if self.kind == "exponent" else np.log(np.maximum(stated, 1e-200))

    def slope(self, fitted: np.ndarray) -> np.ndarray:
        """d fitted / d stated, for the chain rule."""
        if self.kind == "log10":
            return np.full_like(fitted, LN10)
        return np.ones_like(fitted) if self.kind == "exponent" else np.exp(-fitted)


@dataclass(frozen=True)
class Power:
    """A factor exp(scale * coefficient * product of log symbols) of a term."""

    coefficient: str
    symbols: str  # one symbol, or several separated by blanks
    scale: float = -1.0

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(self.symbols.split())


@dataclass(frozen=True)
class Term:
    """amplitude * product of powers: one summand of the loss."""

    amplitude: str
    powers: tuple[Power, ...] = ()


@dataclass(frozen=True)
class Form:
    """A sum of terms times an optional tilt; the whole of a law's mathematics."""

    coefficients: tuple[Coefficient, ...]
    terms: tuple[Term, ...]
    tilt: tuple[Power, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.coefficients)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The symbols it reads, in the order of first use."""
        groups = [*(t.powers for t in self.terms), self.tilt]
        used = [s for powers in groups for power in powers for s in power.symbols.split()]
        return tuple(dict.fromkeys(used))

    @property
    def saturates(self) -> bool:
        return SATURATING in self.symbols

    def index(self, name: str) -> int:
        return self.names.index(name)

    def state(self, fitted: np.ndarray) -> np.ndarray:
        """Fitted values [..., p] -> stated values [..., p]."""
        return np.stack([c.state(fitted[..., j]) for j, c in enumerate(self.coefficients)], axis=-1)

    def unstate(self, stated: np.ndarray) -> np.ndarray:
        """Stated values [..., p] -> fitted values [..., p]."""
        return np.stack(
            [c.unstate(stated[..., j]) for j, c in enumerate(self.coefficients)], axis=-1
        )


def input_columns(form: Form, inputs: Inputs) -> dict[str, np.ndarray]:
    """The named inputs a form reads, checked, as arrays of one common length [n].

    Scalars are broadcast. `sparsity` may be left out where `experts` and `top_k` are given.
    Raises UserError for a missing column, a NaN, or a value outside its range."""
    given = dict(inputs)
    if "1-S" in form.symbols and "sparsity" not in given and {"experts", "top_k"} <= set(given):
        experts = np.asarray(given["experts"], dtype=float)
        given["sparsity"] = 1.0 - np.asarray(given["top_k"], dtype=float) / experts
    needed = list(dict.fromkeys(SYMBOL_INPUTS[s] for s in form.symbols))
    for name in needed:
        if name not in given:
            raise UserError(f"the law needs a column '{name}', which was not given")
    arrays = [checked(name, given[name]) for name in needed]
    try:
        arrays = [np.atleast_1d(a) for a in np.broadcast_arrays(*arrays)]
    except ValueError:
        sizes = ", ".join(f"{n}: {a.size}" for n, a in zip(needed, arrays, strict=True))
        raise UserError(f"the columns differ in length ({sizes})") from None
    return dict(zip(needed, arrays, strict=True))


def read_inputs(form: Form, inputs: Inputs) -> dict[str, np.ndarray]:
    """The log of every symbol [n]; see `input_columns` for what it accepts."""
    columns = input_columns(form, inputs)
    return {
        s: np.log1p(-columns["sparsity"]) if s == "1-S" else np.log(columns[SYMBOL_INPUTS[s]])
        for s in form.symbols
    }


def checked(name: str, values: object) -> np.ndarray:
    """`values` as floats, every one finite and inside the range of the column `name`."""
    array = np.asarray(values, dtype=float)
    flat = array.ravel()
    if name == "sparsity":
        bad, wanted = ~((flat >= 0) & (flat < 1)), "at least 0 and below 1"
    elif name == "experts":
        bad, wanted = ~((flat >= 1) & np.isfinite(flat)), "at least 1"
    else:
        bad, wanted = ~((flat > 0) & np.isfinite(flat)), "positive and finite"
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"column '{name}' must be {wanted}, but row {row} holds {flat[row]:g}: "
            "mend the value or leave the row out"
        )
    return array


@dataclass(frozen=True)
class Block:
    """One term's features on given inputs: feature = base + (log Eh - reference) * slope."""

    index: np.ndarray  # [q] which coefficients, the amplitude first (none for the tilt)
    base: np.ndarray  # [n, q]
    slope: np.ndarray | None  # [n, q], only where the term reads Eh


@dataclass(frozen=True)
class Design:
    """A form compiled on given inputs, in centred coordinates.

    Centring the logs takes the near-collinearity out of amplitude and exponent (the condition
    number of Chinchilla's problem falls by many orders); `to_centred` is the linear map between
    the two."""

    form: Form
    blocks: tuple[Block, ...]  # one a term
    tilt: Block | None
    to_centred: np.ndarray  # [p, p]: centred = to_centred @ fitted
    log_experts: np.ndarray | None  # [n]
    reference: float  # log Eh at the centre of the data
    n: int

    def centre(self, fitted: np.ndarray) -> np.ndarray:
        """Fitted coefficients [..., p] -> centred coordinates."""
        return fitted @ self.to_centred.T

    def uncentre(self, centred: np.ndarray) -> np.ndarray:
        """Centred coordinates [..., p] -> fitted coefficients."""
        return np.linalg.solve(self.to_centred, centred[..., None])[..., 0]


def compile_form(
    form: Form, logs: Mapping[str, np.ndarray], centre: bool, weights: np.ndarray | None = None
) -> Design:
    """Lay out a form's features on given log inputs [n]; `centre` moves the origin to their
    mean."""
    n = len(next(iter(logs.values()))) if logs else 1
    origin = {s: float(np.average(v, weights=weights)) if centre else 0.0 for s, v in logs.items()}
    log_experts = logs.get(SATURATING)
    if log_experts is not None and centre:
        middle = [np.mean(c.start) for c in form.coefficients if c.kind == "saturation"]
        h, _, _ = saturating_log(log_experts, np.array(middle[0]), np.array(middle[1]))
        origin[SATURATING] = float(np.average(h, weights=weights))
    to_centred = np.eye(len(form.names))

    def block(powers: Sequence[Power], amplitude: str | None) -> Block:
        owners: dict[frozenset[str], tuple[str, float]] = {
            p.parts: (p.coefficient, p.scale) for p in powers
        }
        if amplitude is not None:
            owners[frozenset()] = (amplitude, 1.0)
        index, bases, slopes = [], [], []
        if amplitude is not None:
            index, bases, slopes = [form.index(amplitude)], [np.ones(n)], [np.zeros(n)]
        for power in powers:
            j, parts = form.index(power.coefficient), power.parts
            smaller = [frozenset(c) for r in range(len(parts)) for c in combinations(parts, r)]
            # A product can be centred only where the term owns every smaller product it spills
            # into.
            shift = origin if all(s in owners for s in smaller) else dict.fromkeys(origin, 0.0)
            for rest in smaller:
                if rest in owners:
                    owner, scale = owners[rest]
                    spill = np.prod([shift[s] for s in parts - rest])
                    to_centred[form.index(owner), j] += power.scale / scale * spill
            others = np.full(n, power.scale)
            for s in parts - {SATURATING}:
                others = others * (logs[s] - shift[s])
            index.append(j)
            if SATURATING in parts:
                # (h - shift) = (h - reference) + (reference - shift)
                bases.append(others * (origin[SATURATING] - shift[SATURATING]))
                slopes.append(others)
            else:
                bases.append(others)
                slopes.append(np.zeros(n))
        reads = any(SATURATING in p.parts for p in powers)
        return Block(
            np.array(index, dtype=int),
            np.stack(bases, axis=1),
            np.stack(slopes, axis=1) if reads else None,
        )

    blocks = tuple(block(t.powers, t.amplitude) for t in form.terms)
    tilt = block(form.tilt, None) if form.tilt else None
    return Design(form, blocks, tilt, to_centred, log_experts, origin.get(SATURATING, 0.0), n)


def saturating_log(
    log_experts: np.ndarray, log_start: np.ndarray, log_max: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """log of Clark's saturating expert count Eh, with first and second derivatives.

    1/Eh = 1/(E - 1 + (1/E_start - 1/E_max)^-1) + 1/E_max (Clark et al. 2022,
    arXiv 2202.01169, eq. 9).
    The three arguments broadcast. Returns h; its derivatives by log_start and log_max; and its
    second derivatives (start start, start max, max max), all of the common shape."""
    start, top = np.exp(-log_start), np.exp(-log_max)
    more = np.expm1(log_experts)  # E - 1
    q = start - top
    m = q / (1 + q * more)
    m1 = (1 + q * more) ** -2
    m2 = -2 * more * (1 + q * more) ** -3
    v = m + top
    # v by start and top, then by their logs (d start = -start d log_start, and again)
    v_s, v_t = -m1 * start, -(1 - m1) * top
    v_ss = m2 * start**2 + m1 * start
    v_st = -m2 * start * top
    v_tt = m2 * top**2 + (1 - m1) * top
    h_s, h_t = -v_s / v, -v_t / v
    second = (-v_ss / v + h_s * h_s, -v_st / v + h_s * h_t, -v_tt / v + h_t * h_t)
    return -np.log(v), (h_s, h_t), second
