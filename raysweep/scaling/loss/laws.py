"""The laws of the loss: what a law is, and the registry, each formula with units and source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from raysweep.errors import UserError
from raysweep.scaling.loss.expression import (
    SYMBOL_INPUTS,
    Coefficient,
    Expression,
    Inputs,
    Power,
    Term,
    compile_expression,
    evaluate,
    read_inputs,
)

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Law:
    """A law of the loss.

    `expression` is its mathematics; the rest is what a reader needs to know: the formula in words
    that print anywhere, each symbol with its unit, where it comes from, and which count of
    parameters it means by N (a column of the results table)."""

    key: str
    name: str
    formula: str
    symbols: Mapping[str, str]  # symbol -> meaning and unit
    source: str
    parameter_count: str
    expression: Expression
    derived: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = field(
        default_factory=dict
    )
    note: str = ""
    published: Mapping[str, float] = field(default_factory=dict)  # where the source gives values
    candidates: int = 1024  # starting points looked at
    starts: int = 24  # starting points polished

    @property
    def names(self) -> tuple[str, ...]:
        """The coefficients' names, in order."""
        return self.expression.names

    @property
    def inputs(self) -> tuple[str, ...]:
        """The named inputs it reads."""
        return tuple(dict.fromkeys(SYMBOL_INPUTS[s] for s in self.expression.symbols))

    def predict(self, coefficients: Mapping[str, float] | np.ndarray, inputs: Inputs) -> np.ndarray:
        """The loss [n] for one set of coefficients, or [B, n] for an array of them [B, p]."""
        values = self._array(coefficients)
        design = compile_expression(
            self.expression, read_inputs(self.expression, inputs), centre=False
        )
        theta = self.expression.unstate(np.atleast_2d(values))
        log_loss = evaluate(design, theta, derivatives=False).value
        return np.exp(log_loss[0] if values.ndim == 1 else log_loss)

    def _array(self, coefficients: Mapping[str, float] | np.ndarray) -> np.ndarray:
        if isinstance(coefficients, Mapping):
            missing = [n for n in self.names if n not in coefficients]
            if missing:
                raise UserError(f"law '{self.key}' needs the coefficient '{missing[0]}' too")
            return np.array([float(coefficients[n]) for n in self.names])
        return np.asarray(coefficients, dtype=float)


# Priors are weak: what the published laws spread over, and wider where they are few. Shares of the
# terms are those of a loss half as far again as its floor.
_FLOOR = (0.65, 0.25)
_SIZE_EXPONENT, _TOKENS_EXPONENT = (0.34, 0.1), (0.32, 0.1)


def _amplitude(name: str, share: float, spread: float = 1.0) -> Coefficient:
    """A term of about `share` of a typical loss, known to a factor of exp(`spread`)."""
    # A term below e^-9 (0.01 %) of the loss at the data's centre cannot be seen in any data.
    return Coefficient(name, "amplitude", -9.0, 6.0, prior=(share, spread))


def _decay(name: str, prior: tuple[float, float]) -> Coefficient:
    """An exponent that must be positive: more of the input lowers the loss."""
    return Coefficient(name, "exponent", 0.005, 4.0, (0.05, 1.2), prior)


def _growth(name: str, prior: tuple[float, float]) -> Coefficient:
    """The same with the sign written into the coefficient."""
    return Coefficient(name, "exponent", -4.0, -0.005, (-1.2, -0.05), prior)


def _either(
    name: str, prior: tuple[float, float], reach: float = 0.8, bound: float = 4.0
) -> Coefficient:
    """An exponent of either sign."""
    return Coefficient(name, "exponent", -bound, bound, (-reach, reach), prior)


# Clark's E_start lies between 1 (a dense model counts as one expert) and a few; E_max is where more
# experts stop helping, seen between tens and thousands.
_E_START = Coefficient(
    "E_start", "saturation", 0.0, np.log(20.0), (np.log(1.2), np.log(4.0)), (np.log(2.0), 0.3)
)
_E_MAX = Coefficient(
    "E_max",
    "saturation",
    np.log(24.0),
    np.log(1e6),
    (np.log(60.0), np.log(1500.0)),
    (np.log(300.0), 0.7),
)

_LOSS = "loss, nats per token"
_N = "parameters"
_D = "training tokens"
_EH = "saturating expert count: 1/Ê = 1/(E - 1 + (1/E_start - 1/E_max)⁻¹) + 1/E_max"


def _n_opt(c: Values) -> np.ndarray:
    """N_opt ~ C^(b/(a+b)) for A/N^a + B/D^b at C proportional to N D."""
    return c["b"] / (c["a"] + c["b"])


def _d_opt(c: Values) -> np.ndarray:
    return c["a"] / (c["a"] + c["b"])


def _critical_compute(c: Values) -> np.ndarray:
    return c["A"] ** (1.0 / np.asarray(c["a"]))


def _batch_opt(c: Values) -> np.ndarray:
    """M_opt ~ D^(g/(b+g)) for B/M^b + C/K^g at D = M K."""
    return c["g"] / (c["b"] + c["g"])


def _sparse_n_opt(c: Values) -> np.ndarray:
    return c["be"] / (c["al"] + c["be"])


_ALLOCATION = {"N_opt exponent": _n_opt, "D_opt exponent": _d_opt}

_KAPLAN = Law(
    key="kaplan",
    name="Kaplan: a power of compute",
    formula="L = E0 + A / C^a,  A = C_c^a",
    symbols={"L": _LOSS, "C": "training FLOPs", "E0": "floor; hold it at 0 for Kaplan's own form"},
    source="Kaplan et al. 2020, arXiv 2001.08361, eq. 1.3; the floor after Henighan et al. 2020",
    parameter_count="params_active_non_embedding",
    expression=Expression(
        (_amplitude("E0", *_FLOOR), _amplitude("A", 0.35), _decay("a", (0.16, 0.06))),
        (Term("E0"), Term("A", (Power("a", "C"),))),
    ),
    derived={"C_c": _critical_compute},
    note="Meant for compute-optimal runs: FLOPs alone do not say how they were split.",
)

_CHINCHILLA = Law(
    key="chinchilla",
    name="Chinchilla: parameters and tokens",
    formula="L = E0 + A / N^a + B / D^b",
    symbols={"L": _LOSS, "N": _N, "D": _D, "E0": "irreducible loss"},
    source="Hoffmann et al. 2022, arXiv 2203.15556, eq. 2; refit in arXiv 2404.10102",
    parameter_count="params_total",
    expression=Expression(
        (
            _amplitude("E0", *_FLOOR),
            _amplitude("A", 0.18),
            _amplitude("B", 0.18),
            _decay("a", _SIZE_EXPONENT),
            _decay("b", _TOKENS_EXPONENT),
        ),
        (Term("E0"), Term("A", (Power("a", "N"),)), Term("B", (Power("b", "D"),))),
    ),
    derived=_ALLOCATION,
    published={"E0": 1.8172, "A": 482.01, "B": 2085.43, "a": 0.3478, "b": 0.3658},
)

_WANG = Law(
    key="wang",
    name="Wang: dense and MoE in one law",
    formula="L = A / (N^a · E^g) + B / D^b + s",
    symbols={"L": _LOSS, "N": _N, "D": _D, "E": "experts; 1 for dense, below 100", "s": "floor"},
    source="Wang et al. 2024, arXiv 2410.05661, eq. 5",
    parameter_count="params_active_non_embedding",
    expression=Expression(
        (
            _amplitude("A", 0.18),
            _amplitude("B", 0.18),
            _amplitude("s", *_FLOOR),
            _decay("a", _SIZE_EXPONENT),
            _decay("b", _TOKENS_EXPONENT),
            _either("g", (0.15, 0.15), bound=2.0),
        ),
        (Term("A", (Power("a", "N"), Power("g", "E"))), Term("B", (Power("b", "D"),)), Term("s")),
    ),
    derived=_ALLOCATION,
)

_YUN = Law(
    key="yun",
    name="Yun: saturating experts, with an interaction",
    formula="log L = log(A / N^a + B / Ê^b + C / D^g + F) + d · log N · log Ê",
    symbols={"L": _LOSS, "N": f"{_N} of the corresponding dense model", "D": _D, "Ê": _EH},
    source="Yun et al. 2024, arXiv 2404.02852, eq. 4",
    parameter_count="params_dense",
    expression=Expression(
        (
            _amplitude("A", 0.18),
            _amplitude("B", 0.1),
            _amplitude("C", 0.18),
            _amplitude("F", *_FLOOR),
            _decay("a", _SIZE_EXPONENT),
            # Below 0.05 the experts' term is a constant in all but name, which F already is.
            Coefficient("b", "exponent", 0.05, 4.0, (0.1, 1.5), (0.5, 0.3)),
            _decay("g", _TOKENS_EXPONENT),
            Coefficient("d", "exponent", -0.2, 0.2, (-0.01, 0.01), (0.0, 0.005)),
            _E_START,
            _E_MAX,
        ),
        (
            Term("A", (Power("a", "N"),)),
            Term("B", (Power("b", "Eh"),)),
            Term("C", (Power("g", "D"),)),
            Term("F"),
        ),
        (Power("d", "N Eh", 1.0),),
    ),
    note="N is the dense model that the experts are added to, not the active parameters.",
    starts=48,
)

_CLARK = Law(
    key="clark",
    name="Clark: routed models, bilinear in log N and log experts",
    formula="log₁₀ L = a · log₁₀ N + b · log₁₀ Ê + c · log₁₀ N · log₁₀ Ê + d",
    symbols={"L": _LOSS, "N": f"{_N} of the corresponding dense model", "Ê": _EH},
    source="Clark et al. 2022, arXiv 2202.01169, eqs. 2 and 9 (S-BASE values)",
    parameter_count="params_dense",
    expression=Expression(
        (
            _either("a", (-0.08, 0.05)),
            _either("b", (-0.1, 0.1)),
            _either("c", (0.0, 0.02), reach=0.1),
            Coefficient("d", "log10", -60.0, 60.0, prior=(1.0, 1.0)),
            _E_START,
            _E_MAX,
        ),
        (
            Term(
                "d",
                (
                    Power("a", "N", 1.0),
                    Power("b", "Eh", 1.0),
                    Power("c", "N Eh", 1.0 / np.log(10.0)),
                ),
            ),
        ),
    ),
    note="At one number of tokens: it has no D.",
    published={
        "a": -0.082,
        "b": -0.108,
        "c": 0.009,
        "d": 1.104,
        "E_start": 1.847,
        "E_max": 314.478,
    },
)

_JOINT = Law(
    key="joint_moe",
    name="Joint MoE: experts act on both exponents",
    formula="L = a · Ê^d · N^(al + g·ln Ê) + b · Ê^w · D^(be + z·ln Ê) + c",
    symbols={
        "L": _LOSS,
        "N": "active parameters, with embeddings",
        "D": _D,
        "Ê": _EH,
        "c": "floor",
    },
    source="Ludziejewski et al. 2025, arXiv 2502.05172",
    parameter_count="params_active",
    expression=Expression(
        (
            _amplitude("a", 0.18),
            _amplitude("b", 0.18),
            _amplitude("c", *_FLOOR),
            _growth("al", (-0.28, 0.1)),
            _growth("be", (-0.27, 0.1)),
            _either("d", (-0.15, 0.2)),
            _either("w", (0.1, 0.3)),
            _either("g", (0.0, 0.02), reach=0.05),
            _either("z", (0.0, 0.03), reach=0.05),
            _E_START,
            _E_MAX,
        ),
        (
            Term("a", (Power("d", "Eh", 1.0), Power("al", "N", 1.0), Power("g", "N Eh", 1.0))),
            Term("b", (Power("w", "Eh", 1.0), Power("be", "D", 1.0), Power("z", "D Eh", 1.0))),
            Term("c"),
        ),
    ),
    published={
        "a": 35.91,
        "b": 35.98,
        "c": 1.3637,
        "al": -0.1889,
        "be": -0.1775,
        "d": -0.2285,
        "w": 0.5529,
        "g": 0.0098,
        "z": -0.0259,
        "E_start": 2.0732,
        "E_max": 290.4521,
    },
    starts=48,
)

_SPARSITY = Law(
    key="sparsity",
    name="Sparsity: total parameters and the idle share of experts",
    formula="L = a / N^al + b / D^be + c / (1-S)^lam + d / ((1-S)^del · N^gam) + e",
    symbols={"L": _LOSS, "N": "total parameters", "D": _D, "S": "sparsity (E - K)/E", "e": "floor"},
    source="Abnar et al. 2025, arXiv 2501.12370",
    parameter_count="params_total",
    expression=Expression(
        (
            _amplitude("a", 0.15),
            _amplitude("b", 0.18),
            _amplitude("c", 0.1),
            _amplitude("d", 0.1),
            _amplitude("e", *_FLOOR),
            _decay("al", _SIZE_EXPONENT),
            _decay("be", _TOKENS_EXPONENT),
            _either("lam", (-0.1, 0.2), bound=2.0),
            _either("del", (0.1, 0.2), bound=2.0),
            _decay("gam", (0.25, 0.1)),
        ),
        (
            Term("a", (Power("al", "N"),)),
            Term("b", (Power("be", "D"),)),
            Term("c", (Power("lam", "1-S"),)),
            Term("d", (Power("del", "1-S"), Power("gam", "N"))),
            Term("e"),
        ),
    ),
    starts=64,
    candidates=4096,
)

_FINE_GRAINED = Law(
    key="fine_grained",
    name="Fine-grained: granularity of the experts",
    formula="L = c + (g / G^gam + a) / N^al + b / D^be",
    symbols={"L": _LOSS, "N": _N, "D": _D, "G": "granularity: FFN width over expert width"},
    source="Krajewski et al. 2024, arXiv 2402.07871",
    parameter_count="params_total_non_embedding",
    expression=Expression(
        (
            _amplitude("c", *_FLOOR),
            _amplitude("g", 0.05),
            _amplitude("a", 0.18),
            _amplitude("b", 0.18),
            _decay("gam", (0.5, 0.3)),
            _decay("al", _SIZE_EXPONENT),
            _decay("be", _TOKENS_EXPONENT),
        ),
        (
            Term("c"),
            Term("g", (Power("gam", "G"), Power("al", "N"))),
            Term("a", (Power("al", "N"),)),
            Term("b", (Power("be", "D"),)),
        ),
    ),
    derived={"N_opt exponent": _sparse_n_opt},
    published={"c": 0.47, "g": 2.1, "a": 18.1, "b": 30.8, "gam": 0.58, "al": 0.115, "be": 0.147},
    note="At a fixed expansion rate (64 in the source).",
)

_THREE_TERM = Law(
    key="three_term",
    name="Three-term: batch size and steps",
    formula="L = E0 + A / N^a + B / M^b + C / K^g",
    symbols={"L": _LOSS, "N": _N, "M": "batch, tokens", "K": "steps", "E0": "irreducible loss"},
    source="Schaipp et al. 2026, arXiv 2607.01487",
    parameter_count="params_total_non_embedding",
    expression=Expression(
        (
            _amplitude("E0", *_FLOOR),
            _amplitude("A", 0.18),
            _amplitude("B", 0.1),
            _amplitude("C", 0.1),
            _decay("a", _SIZE_EXPONENT),
            _decay("b", (0.4, 0.2)),
            _decay("g", (0.4, 0.2)),
        ),
        (
            Term("E0"),
            Term("A", (Power("a", "N"),)),
            Term("B", (Power("b", "M"),)),
            Term("C", (Power("g", "K"),)),
        ),
    ),
    derived={"batch_opt exponent": _batch_opt},
    note="Uses runs at batch sizes away from the optimum too.",
)

LOSS_LAWS: dict[str, Law] = {
    law.key: law
    for law in (
        _KAPLAN,
        _CHINCHILLA,
        _WANG,
        _YUN,
        _CLARK,
        _JOINT,
        _SPARSITY,
        _FINE_GRAINED,
        _THREE_TERM,
    )
}
