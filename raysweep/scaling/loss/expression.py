"""The expression that all laws of the loss share: a sum of power-law terms, with derivatives.

Every law of the registry can be written

    log L = log sum_k exp(z_k) + interaction,    z_k = log A_k + sum_j theta_j * feature_kj

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
    solved for linearly). `prior` is a weak belief, as mean and sd: of an exponent itself, of the
    log of a saturation; of an amplitude, its term's share of a typical loss and the sd of that
    share's log, so that it follows the loss's own scale."""

    name: str
    kind: Kind
    low: float
    high: float
    start: tuple[float, float] = (0.0, 0.0)
    prior: tuple[float, float] = (0.0, 1.0)

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
class Expression:
    """A sum of terms times an optional interaction; the whole of a law's mathematics."""

    coefficients: tuple[Coefficient, ...]
    terms: tuple[Term, ...]
    interaction: tuple[Power, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.coefficients)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The symbols it reads, in the order of first use."""
        groups = [*(t.powers for t in self.terms), self.interaction]
        used = [s for powers in groups for power in powers for s in power.symbols.split()]
        return tuple(dict.fromkeys(used))

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


def input_columns(expression: Expression, inputs: Inputs) -> dict[str, np.ndarray]:
    """The named inputs an expression reads, checked, as arrays of one common length [n].

    Scalars are broadcast. `sparsity` may be left out where `experts` and `top_k` are given.
    Raises UserError for a missing column, a NaN, or a value outside its range."""
    given = dict(inputs)
    if (
        "1-S" in expression.symbols
        and "sparsity" not in given
        and {"experts", "top_k"} <= set(given)
    ):
        experts = np.asarray(given["experts"], dtype=float)
        given["sparsity"] = 1.0 - np.asarray(given["top_k"], dtype=float) / experts
    needed = list(dict.fromkeys(SYMBOL_INPUTS[s] for s in expression.symbols))
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


def read_inputs(expression: Expression, inputs: Inputs) -> dict[str, np.ndarray]:
    """The log of every symbol [n]; see `input_columns` for what it accepts."""
    columns = input_columns(expression, inputs)
    return {
        s: np.log1p(-columns["sparsity"]) if s == "1-S" else np.log(columns[SYMBOL_INPUTS[s]])
        for s in expression.symbols
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

    index: np.ndarray  # [q] which coefficients, the amplitude first (none for the interaction)
    base: np.ndarray  # [n, q]
    slope: np.ndarray | None  # [n, q], only where the term reads Eh


@dataclass(frozen=True)
class Design:
    """An expression compiled on given inputs, in centred coordinates.

    Centring the logs takes the near-collinearity out of amplitude and exponent (the condition
    number of Chinchilla's problem falls by many orders); `to_centred` is the linear map between
    the two."""

    expression: Expression
    blocks: tuple[Block, ...]  # one a term
    interaction: Block | None
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


def compile_expression(
    expression: Expression,
    logs: Mapping[str, np.ndarray],
    centre: bool,
    weights: np.ndarray | None = None,
) -> Design:
    """Lay out an expression's features on given log inputs [n]; `centre` moves the origin to their
    mean."""
    n = len(next(iter(logs.values()))) if logs else 1
    origin = {s: float(np.average(v, weights=weights)) if centre else 0.0 for s, v in logs.items()}
    log_experts = logs.get(SATURATING)
    if log_experts is not None and centre:
        middle = [np.mean(c.start) for c in expression.coefficients if c.kind == "saturation"]
        h, _, _ = saturating_log(log_experts, np.array(middle[0]), np.array(middle[1]))
        origin[SATURATING] = float(np.average(h, weights=weights))
    to_centred = np.eye(len(expression.names))

    def block(powers: Sequence[Power], amplitude: str | None) -> Block:
        owners: dict[frozenset[str], tuple[str, float]] = {
            p.parts: (p.coefficient, p.scale) for p in powers
        }
        if amplitude is not None:
            owners[frozenset()] = (amplitude, 1.0)
        index, bases, slopes = [], [], []
        if amplitude is not None:
            index, bases, slopes = [expression.index(amplitude)], [np.ones(n)], [np.zeros(n)]
        for power in powers:
            j, parts = expression.index(power.coefficient), power.parts
            smaller = [frozenset(c) for r in range(len(parts)) for c in combinations(parts, r)]
            # A product can be centred only where the term owns every smaller product it spills
            # into.
            shift = origin if all(s in owners for s in smaller) else dict.fromkeys(origin, 0.0)
            for rest in smaller:
                if rest in owners:
                    owner, scale = owners[rest]
                    spill = np.prod([shift[s] for s in parts - rest])
                    to_centred[expression.index(owner), j] += power.scale / scale * spill
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

    blocks = tuple(block(t.powers, t.amplitude) for t in expression.terms)
    interaction = block(expression.interaction, None) if expression.interaction else None
    return Design(
        expression, blocks, interaction, to_centred, log_experts, origin.get(SATURATING, 0.0), n
    )


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


@dataclass(frozen=True)
class Part:
    """One term, or the interaction, at a batch of coefficients: z's derivative by its own ones."""

    share: np.ndarray | None  # [B, n] its share of the loss; None for the interaction
    index: np.ndarray  # [q]
    features: np.ndarray  # [n, q] shared by the batch, or [B, n, q]
    slope: np.ndarray | None  # [n, q - 2] derivative of the features by log Eh
    pull: np.ndarray | None  # [B, n] dz / d log Eh


@dataclass(frozen=True)
class Evaluation:
    """A law at a batch of coefficients; `value` is the predicted log loss [B, n]."""

    value: np.ndarray
    parts: tuple[Part, ...]
    second: tuple[np.ndarray, np.ndarray, np.ndarray] | None  # of log Eh by its two coefficients
    first: tuple[np.ndarray, np.ndarray] | None
    size: int

    def jacobian(self) -> np.ndarray:
        """d value / d coefficients, [B, n, p]."""
        jacobian = np.zeros((*self.value.shape, self.size))
        for part in self.parts:
            features = np.broadcast_to(part.features, (*self.value.shape, len(part.index)))
            weighted = features if part.share is None else features * part.share[..., None]
            for column, j in enumerate(part.index):
                jacobian[..., j] += weighted[..., column]
        return jacobian

    def gradient(self, pull: np.ndarray) -> np.ndarray:
        """sum_i pull_i d value_i / d coefficients, [B, p], for `pull` [B, n]."""
        gradient = np.zeros((len(self.value), self.size))
        for part in self.parts:
            weight = pull if part.share is None else pull * part.share
            gradient[:, part.index] += _total(weight, part.features)
        return gradient

    def hessian(self, curvature: np.ndarray, pull: np.ndarray) -> np.ndarray:
        """sum_i curvature_i J_i J_i^T + pull_i d2 value_i / d coefficients^2, [B, p, p]."""
        hessian = np.zeros((len(self.value), self.size, self.size))
        for k, one in enumerate(self.parts):
            for two in self.parts[k:]:
                # log-sum-exp: d2 value = sum_k share_k F_k F_k^T - (mean F)(mean F)^T; an
                # interaction adds to the Jacobian only.
                if one.share is None:
                    weight = curvature
                elif two.share is None:
                    weight = curvature * one.share
                else:
                    weight = (curvature - pull) * one.share * two.share
                    if one is two:
                        weight = weight + pull * one.share
                block = _cross(weight, one.features, two.features)
                hessian[:, one.index[:, None], two.index[None, :]] += block
                if one is not two:
                    hessian[:, two.index[:, None], one.index[None, :]] += block.swapaxes(1, 2)
        if self.first is not None and self.second is not None:
            self._add_saturation(hessian, pull)
        return hessian

    def _add_saturation(self, hessian: np.ndarray, pull: np.ndarray) -> None:
        """The part of the Hessian from z being bilinear in coefficients and log Eh."""
        assert self.first is not None
        assert self.second is not None
        for part in self.parts:
            if part.slope is None or part.pull is None:
                continue
            weight = pull if part.share is None else pull * part.share
            s, t = part.index[-2:]
            own = part.index[:-2]
            for j, first in ((s, self.first[0]), (t, self.first[1])):
                mixed = (weight * first) @ part.slope
                hessian[:, own, j] += mixed
                hessian[:, j, own] += mixed
            weight = weight * part.pull
            h_ss, h_st, h_tt = ((weight * d).sum(axis=1) for d in self.second)
            hessian[:, s, s] += h_ss
            hessian[:, t, t] += h_tt
            hessian[:, s, t] += h_st
            hessian[:, t, s] += h_st


def evaluate(design: Design, theta: np.ndarray, derivatives: bool = True) -> Evaluation:
    """Evaluate a compiled law at centred coefficients `theta` [B, p]."""
    h = first = second = None
    saturation = [j for j, c in enumerate(design.expression.coefficients) if c.kind == "saturation"]
    if design.log_experts is not None:
        log_start, log_max = (theta[:, j, None] for j in saturation)
        h, first, second = saturating_log(design.log_experts, log_start, log_max)
        h = h - design.reference

    def exponent(block: Block) -> tuple[np.ndarray, np.ndarray | None]:
        own = theta[:, block.index]
        z, pull = own @ block.base.T, None
        if block.slope is not None and h is not None:
            pull = own @ block.slope.T
            z = z + h * pull
        return z, pull

    exponents = [exponent(block) for block in design.blocks]
    top_z = exponents[0][0]
    for z, _ in exponents[1:]:
        top_z = np.maximum(top_z, z)
    weights = [np.exp(z - top_z) for z, _ in exponents]
    total = weights[0] if len(weights) == 1 else sum(weights[1:], start=weights[0])
    value = top_z + np.log(total)
    pieces: list[tuple[Block, np.ndarray | None, np.ndarray | None]] = [
        (b, w / total, pull)
        for b, w, (_, pull) in zip(design.blocks, weights, exponents, strict=True)
    ]
    if design.interaction is not None:
        z, pull = exponent(design.interaction)
        value = value + z
        pieces.append((design.interaction, None, pull))
    if not derivatives:
        return Evaluation(value, (), None, None, theta.shape[1])

    parts = []
    for block, share, pull in pieces:
        if block.slope is None or h is None or first is None or pull is None:
            parts.append(Part(share, block.index, block.base, None, None))
            continue
        features = block.base + h[..., None] * block.slope
        through = np.stack([pull * first[0], pull * first[1]], axis=-1)
        index = np.concatenate([block.index, saturation])
        features = np.concatenate([features, through], axis=-1)
        parts.append(Part(share, index, features, block.slope, pull))
    return Evaluation(value, tuple(parts), second, first, theta.shape[1])


def _total(weight: np.ndarray, features: np.ndarray) -> np.ndarray:
    """sum over points of weight [B, n] * features ([n, q] or [B, n, q]) -> [B, q]."""
    if features.ndim == 2:
        return weight @ features
    return np.matmul(weight[:, None, :], features)[:, 0, :]


def _cross(weight: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """sum over points of weight [B, n] * one (x) two -> [B, q, r]."""
    if one.ndim == 2 and two.ndim == 2:
        outer = (one[:, :, None] * two[:, None, :]).reshape(len(one), -1)
        return (weight @ outer).reshape(len(weight), one.shape[1], two.shape[1])
    left = (one if one.ndim == 3 else one[None]) * weight[..., None]
    return np.matmul(left.swapaxes(1, 2), two)
