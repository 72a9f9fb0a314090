"""The registry of the laws of the loss: each formula declared once, with units and source."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raysweep.scaling.form import Coefficient, Form, Power, Term
from raysweep.scaling.loss_fit import LossFit
from raysweep.scaling.loss_law import Law

__all__ = ["LOSS_LAWS", "Law", "LossFit"]

Values = Mapping[str, np.ndarray]


def _amplitude(name: str) -> Coefficient:
    # A term below e^-9 (0.01 %) of the loss at the data's centre cannot be seen in any data.
    return Coefficient(name, "amplitude", -9.0, 6.0)


def _decay(name: str) -> Coefficient:
    """An exponent that must be positive: more of the input lowers the loss."""
    return Coefficient(name, "exponent", 0.005, 4.0, (0.05, 1.2))


def _growth(name: str) -> Coefficient:
    """The same with the sign written into the coefficient."""
    return Coefficient(name, "exponent", -4.0, -0.005, (-1.2, -0.05))


def _either(name: str, reach: float = 0.8, bound: float = 4.0) -> Coefficient:
    """An exponent of either sign."""
    return Coefficient(name, "exponent", -bound, bound, (-reach, reach))


# Clark's E_start lies between 1 (a dense model counts as one expert) and a few; E_max is where more
# experts stop helping, seen between tens and thousands.
_E_START = Coefficient("E_start", "saturation", 0.0, np.log(20.0), (np.log(1.2), np.log(4.0)))
_E_MAX = Coefficient(
    "E_max", "saturation", np.log(24.0), np.log(1e6), (np.log(60.0), np.log(1500.0))
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
    form=Form(
        (_amplitude("E0"), _amplitude("A"), _decay("a")),
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
    form=Form(
        (_amplitude("E0"), _amplitude("A"), _amplitude("B"), _decay("a"), _decay("b")),
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
    form=Form(
        (
            _amplitude("A"),
            _amplitude("B"),
            _amplitude("s"),
            _decay("a"),
            _decay("b"),
            _either("g", bound=2.0),
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
    parameter_count="params_active_non_embedding",
    form=Form(
        (
            _amplitude("A"),
            _amplitude("B"),
            _amplitude("C"),
            _amplitude("F"),
            _decay("a"),
            # Below 0.05 the experts' term is a constant in all but name, which F already is.
            Coefficient("b", "exponent", 0.05, 4.0, (0.1, 1.5)),
            _decay("g"),
            Coefficient("d", "exponent", -0.2, 0.2, (-0.01, 0.01)),
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
    note="Active parameters equal the dense model's at top-1; at top-k they count k experts.",
    starts=48,
)

_CLARK = Law(
    key="clark",
    name="Clark: routed models, bilinear in log N and log experts",
    formula="log₁₀ L = a · log₁₀ N + b · log₁₀ Ê + c · log₁₀ N · log₁₀ Ê + d",
    symbols={"L": _LOSS, "N": f"{_N} of the corresponding dense model", "Ê": _EH},
    source="Clark et al. 2022, arXiv 2202.01169, eqs. 2 and 9 (S-BASE values)",
    parameter_count="params_active",
    form=Form(
        (
            _either("a"),
            _either("b"),
            _either("c", reach=0.1),
            Coefficient("d", "log10", -60.0, 60.0),
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
    form=Form(
        (
            _amplitude("a"),
            _amplitude("b"),
            _amplitude("c"),
            _growth("al"),
            _growth("be"),
            _either("d"),
            _either("w"),
            _either("g", reach=0.05),
            _either("z", reach=0.05),
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
    form=Form(
        (
            _amplitude("a"),
            _amplitude("b"),
            _amplitude("c"),
            _amplitude("d"),
            _amplitude("e"),
            _decay("al"),
            _decay("be"),
            _either("lam", bound=2.0),
            _either("del", bound=2.0),
            _decay("gam"),
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
    form=Form(
        (
            _amplitude("c"),
            _amplitude("g"),
            _amplitude("a"),
            _amplitude("b"),
            _decay("gam"),
            _decay("al"),
            _decay("be"),
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
    form=Form(
        (
            _amplitude("E0"),
            _amplitude("A"),
            _amplitude("B"),
            _amplitude("C"),
            _decay("a"),
            _decay("b"),
            _decay("g"),
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
