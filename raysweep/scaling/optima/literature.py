"""Published laws of the optimal learning rate and batch, as data, and the prior that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache

import numpy as np

from raysweep.errors import UserError
from raysweep.study.shape import RunSize

BATCH_SLOPE = 0.5
"""ln learning rate per ln batch along the valley: how a rate moves that was tuned at one batch."""

REFERENCE = (math.log(3e8), math.log(1e10))
"""ln N (active, non-embedding) and ln D at which the laws are compared."""

COLUMNS = ("intercept", "params", "tokens", "sparsity")
"""Coefficients of one target's law: at `REFERENCE`; per ln N; per ln D; per ln(total / active)."""

_HEAD_PARAMS = 3e7  # of the models in the range of the reference, for laws that count the head
_SIZE = 2 * len(COLUMNS)

Rule = Callable[[RunSize], float]


@dataclass(frozen=True)
class Statement:
    """What a source measured: row . theta = value, give or take `error` (sd).

    theta holds the coefficients `COLUMNS` of ln learning rate, then those of ln batch."""

    row: np.ndarray  # [8]
    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class PublishedLaw:
    """One published law.

    `applies` is `dense`, `moe` or `both`; `convention` says which N or C the source means;
    `recipe` and `measured` how and where it was measured; `verified` is False where the value was
    seen in a secondary source only. `statements` are what the prior takes from it: none where a
    source gives no law of a run's size, or is of another kind of training. A law with `data_of`
    rests on the data of that other law and goes out with it.
    """

    key: str
    source: str
    learning_rate_formula: str = ""
    batch_formula: str = ""
    convention: str
    recipe: str
    measured: str
    applies: str = "dense"
    notes: str = ""
    verified: bool = True
    data_of: str = ""
    rate: Rule | None = None
    batch: Rule | None = None
    fixed_batch: float | None = None
    """The batch in tokens at which `rate` was tuned, where the batch was not."""
    statements: tuple[Statement, ...] = field(default=(), repr=False)

    def learning_rate(self, run: RunSize) -> float | None:
        """The peak learning rate it gives, or None."""
        return _answer(self.rate, run)

    def batch_tokens(self, run: RunSize) -> float | None:
        """The batch in tokens it gives, or None."""
        return _answer(self.batch, run)

    def covers(self, run: RunSize) -> bool:
        """Whether it was stated for this kind of model."""
        return self.applies == "both" or self.applies == ("moe" if run.experts > 1 else "dense")

    def to_dict(self, run: RunSize | None = None) -> dict[str, object]:
        """Plain values; with a run, its answers too."""
        plain: dict[str, object] = {
            "law": self.key,
            "source": self.source,
            "learning_rate_formula": self.learning_rate_formula,
            "batch_formula": self.batch_formula,
            "convention": self.convention,
            "recipe": self.recipe,
            "measured": self.measured,
            "applies": self.applies,
            "notes": self.notes,
            "verified": self.verified,
        }
        if run is not None:
            plain["learning_rate"] = self.learning_rate(run)
            plain["batch_tokens"] = self.batch_tokens(run)
        return plain


def published_answers(run: RunSize) -> list[dict[str, object]]:
    """What every published law that covers this kind of model and gives a number says of a run."""
    said = [law.to_dict(run) for law in PUBLISHED_LAWS.values() if law.covers(run)]
    return [a for a in said if a["learning_rate"] is not None or a["batch_tokens"] is not None]


def made_for(optimizers: Iterable[str]) -> str:
    """One sentence where some of these optimizers are of another kind than the published laws';
    else empty. Adam's own variants count as Adam."""
    foreign = []
    for name in dict.fromkeys(optimizers):
        plain = _plain(name)
        if plain and plain != "unknown" and "adam" not in plain:
            of = [key for key, law in PUBLISHED_LAWS.items() if plain in _plain(law.recipe)]
            foreign.append(name + (f" (but for {', '.join(of)})" if of else ""))
    if not foreign:
        return ""
    return (
        "the published laws, and the prior made of them, are of Adam and its kin: no guide to "
        + ", ".join(foreign)
    )


def law_keys(names: Iterable[str]) -> tuple[str, ...]:
    """The keys that a user means by `names`: case, blanks, dashes and underscores don't count.

    Raises:
        UserError: a name that is no law's, with the nearest.
    """
    plain = {_plain(key): key for key in PUBLISHED_LAWS}
    found = []
    for name in names:
        if _plain(name) not in plain:
            near = get_close_matches(_plain(name), plain, 1)
            hint = f"did you mean {plain[near[0]]}? " if near else ""
            raise UserError(
                f"no published law {name!r}: {hint}known are {', '.join(PUBLISHED_LAWS)}"
            )
        found.append(plain[_plain(name)])
    return tuple(dict.fromkeys(found))


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _answer(rule: Rule | None, run: RunSize) -> float | None:
    value = math.nan if rule is None else rule(run)
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------- the prior


@dataclass(frozen=True)
class OptimumPrior:
    """A prior of the law of the optimum, for rate and batch together, in natural logs.

    A multivariate Student's t of `degrees` degrees of freedom with this mean and scale matrix, of
    theta (see `Statement`) read at `centre` = (ln N, ln D). `laws` are the estimates theta of the
    laws it was made of, by key.
    """

    mean: np.ndarray  # [8]
    scale: np.ndarray  # [8, 8]
    centre: tuple[float, float] = REFERENCE
    degrees: float = 5.0
    laws: dict[str, np.ndarray] = field(default_factory=dict)

    def at(self, centre: Sequence[float] | np.ndarray) -> OptimumPrior:
        """The same law read at another centre: the intercepts move along the exponents."""
        move = np.eye(_SIZE)
        for start in (0, len(COLUMNS)):
            move[start, start + 1 : start + 3] = np.asarray(centre) - self.centre
        return OptimumPrior(
            move @ self.mean,
            move @ self.scale @ move.T,
            (float(centre[0]), float(centre[1])),
            self.degrees,
            {key: move @ theta for key, theta in self.laws.items()},
        )

    def shifted(self, log_rate: float) -> OptimumPrior:
        """The same with every learning rate off by a factor: how much do answers lean on it?"""
        mean = self.mean.copy()
        mean[0] += log_rate
        return OptimumPrior(mean, self.scale, self.centre, self.degrees, self.laws)


INFLATE = 2.0
"""Factor on the sds of the laws' scatter. At its centre Laplace's approximation of a t is
(degrees + dimensions) / degrees = 2.6 times as sharp as its scale matrix says."""

_SET_UP = np.array([0.6, 0.2, 0.2, 0.15, 0.5, 0.2, 0.15, 0.15])  # what set-ups may differ by
_SET_UP_WEIGHT = 4.0  # and how many laws that guess is worth
_MEAN = np.array([math.log(1.5e-3), -0.2, -0.1, 0.0, math.log(5e5), 0.1, 0.4, 0.0])
_MEAN_SD = np.array([2.0, 0.4, 0.4, 0.3, 2.0, 0.4, 0.4, 0.3])
_ITERATIONS = 300


def literature_prior(
    without: Iterable[str] = (), trust: Iterable[str] | None = None
) -> OptimumPrior:
    """What the published laws lead one to expect of a new set-up.

    A random-effects model: each set-up's theta is a draw from a normal distribution, of which its
    law tells what it measured (`Statement`). Mean and covariance by expectation maximization, the
    covariance held by a guess that counts as a few laws; the prior is the predictive distribution
    of one more set-up.

    Args:
        without: keys of laws to leave out, with those that rest on the same data.
        trust: keys of the only laws to use; all by default.

    Raises:
        UserError: an unknown key, or no law left.
    """
    out = set(law_keys(without))
    kept = set(law_keys(trust)) if trust is not None else set(PUBLISHED_LAWS)
    keys = tuple(
        key
        for key, law in PUBLISHED_LAWS.items()
        if key in kept and key not in out and law.data_of not in out and law.statements
    )
    if not keys:
        raise UserError("no published law is left for the prior: name at least one with numbers")
    return _random_effects(keys)


def flat_prior() -> OptimumPrior:
    """A prior that knows the order of magnitude only: 1e-3, half a million tokens, any exponent."""
    mean = np.array([math.log(1e-3), 0, 0, 0, math.log(5e5), 0, 0, 0], dtype=float)
    sd = np.array([0.6, 0.2, 0.2, 0.15, 0.6, 0.2, 0.2, 0.15])
    return OptimumPrior(mean, np.diag((INFLATE * sd) ** 2))


@lru_cache(maxsize=64)
def _random_effects(keys: tuple[str, ...]) -> OptimumPrior:
    data = {}
    for key in keys:
        said = PUBLISHED_LAWS[key].statements
        row = np.array([s.row for s in said])
        weighted = row.T / np.array([s.error for s in said]) ** 2
        data[key] = (weighted @ row, weighted @ np.array([s.value for s in said]))
    mean, spread = _MEAN.copy(), np.diag(_SET_UP**2)
    known = np.diag(_MEAN_SD**-2.0)
    information = np.array([i for i, _ in data.values()])  # [laws, 8, 8]
    pull = np.array([p for _, p in data.values()])
    each = pull
    for _ in range(_ITERATIONS):
        precision = np.linalg.inv(spread)
        variances = np.linalg.inv(precision + information)
        each = np.einsum("kij,kj->ki", variances, pull + precision @ mean)
        mean = np.linalg.solve(
            len(data) * precision + known, precision @ each.sum(0) + known @ _MEAN
        )
        off = each - mean
        spread = (_SET_UP_WEIGHT * np.diag(_SET_UP**2) + off.T @ off + variances.sum(0)) / (
            _SET_UP_WEIGHT + len(data)
        )
    # Of the mean: each law tells of it through its own scatter, (spread + information^-1)^-1.
    eye = np.eye(_SIZE)
    of_mean = known + sum(np.linalg.solve(eye + i @ spread, i) for i in information)
    predictive = spread + np.linalg.inv(0.5 * (of_mean + of_mean.T))
    return OptimumPrior(
        mean,
        INFLATE**2 * 0.5 * (predictive + predictive.T),
        laws=dict(zip(data, each, strict=True)),
    )


# ---------------------------------------------------------------------- statements


def _run(params: float, tokens: float, sparsity: float = 0.0) -> RunSize:
    """A run of a statement: `sparsity` is ln(total / active)."""
    total = params * math.exp(sparsity)
    return RunSize(
        params_active_non_embedding=params,
        tokens=tokens,
        experts=max(1, round(math.exp(sparsity))),
        params_total_non_embedding=total,
        params_active=params + 2 * _HEAD_PARAMS,
        params_total=total + 2 * _HEAD_PARAMS,
        head_params=_HEAD_PARAMS,
        flops=6 * (params + _HEAD_PARAMS) * tokens,
    )


def _row(target: int, run: RunSize) -> np.ndarray:
    row = np.zeros(_SIZE)
    start = target * len(COLUMNS)
    n, d = math.log(run.params_active_non_embedding), math.log(run.tokens)
    row[start : start + 4] = [1.0, n - REFERENCE[0], d - REFERENCE[1], run.log_sparsity]
    return row


def _at(target: int, rule: Rule, error: float, *runs: RunSize) -> tuple[Statement, ...]:
    """The law's own values at runs where it was measured."""
    return tuple(Statement(_row(target, r), math.log(rule(r)), error) for r in runs)


def _plane(
    params: tuple[float, float], tokens: tuple[float, float], sparsity: float = 0.0
) -> tuple[RunSize, ...]:
    """Three corners of a plane in ln N and ln D."""
    corners = ((params[0], tokens[0]), (params[1], tokens[0]), (params[0], tokens[1]))
    return tuple(_run(n, d, sparsity) for n, d in corners)


def _along(
    target: int,
    rule: Rule,
    compute: tuple[float, float],
    ratio: float,
    sparsity: float = 0.0,
    error: float = 0.05,
    across: float = 0.3,
) -> tuple[Statement, ...]:
    """A law of compute, measured at D = ratio N: its values along, and a weak word on the
    difference of the exponents of N and D, which it takes for none."""
    params = [(c / (6 * ratio)) ** 0.5 for c in compute]
    said = _at(target, rule, error, *(_run(n, ratio * n, sparsity) for n in params))
    middle = math.sqrt(params[0] * params[1])
    large = _run(2 * middle, ratio * middle / 2, sparsity)
    small = _run(middle / 2, 2 * ratio * middle, sparsity)
    row = (_row(target, large) - _row(target, small)) / (2 * math.log(4))
    difference = math.log(rule(large) / rule(small)) / (2 * math.log(4))
    return (*said, Statement(row, difference, across))


def _at_batch(batch: float, said: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """Statements of the rate at a fixed batch: of ln rate less `BATCH_SLOPE` ln(batch* / batch)."""
    moved = []
    for s in said:
        row = s.row.copy()
        row[len(COLUMNS) :] -= BATCH_SLOPE * row[: len(COLUMNS)]
        moved.append(Statement(row, s.value - BATCH_SLOPE * math.log(batch), s.error))
    return tuple(moved)


def _exponent(target: int, column: str, value: float, error: float) -> Statement:
    row = np.zeros(_SIZE)
    row[target * len(COLUMNS) + COLUMNS.index(column)] = 1.0
    return Statement(row, value, error)


# ---------------------------------------------------------------------- the laws


def _total(run: RunSize) -> float:
    # On the source's own MoE grids its law holds with total, not active, parameters.
    return run.params_active_non_embedding * math.exp(run.log_sparsity)


def _with_head(run: RunSize) -> float:
    return run.params_active_non_embedding + run.head_params


def _no_head(run: RunSize) -> float:
    """FLOPs without the output head, 6 a parameter and token; 6 N D at least."""
    head = 0.0 if math.isnan(run.head_params) else 6 * run.head_params * run.tokens
    return max(run.compute - head, 6 * run.params_active_non_embedding * run.tokens)


def _six_nd(run: RunSize) -> float:
    return 6 * run.params_active_non_embedding * run.tokens


def _width(run: RunSize) -> float:
    """d_model of a usual shape: N = 12 layers d^2, at 128 of width a layer."""
    return (run.params_active_non_embedding * 128 / 12) ** (1 / 3)


def _step_rate(run: RunSize) -> float:
    return 1.79 * _total(run) ** -0.713 * run.tokens**0.307


def _step_batch(run: RunSize) -> float:
    return 0.58 * run.tokens**0.571


def _openeuro_rate(run: RunSize) -> float:
    return 0.3714 * run.params_active_non_embedding**-0.417 * run.tokens**0.086


def _openeuro_batch(run: RunSize) -> float:
    return 4096 * 9.901e-5 * run.params_active_non_embedding**0.145 * run.tokens**0.460


def _deepseek_rate(run: RunSize) -> float:
    return 0.3118 * _no_head(run) ** -0.1250


def _deepseek_batch(run: RunSize) -> float:
    return 0.2920 * _no_head(run) ** 0.3271


def _moonlight_rate(run: RunSize) -> float:
    return 0.0127 * _six_nd(run) ** -0.057


def _moonlight_batch(run: RunSize) -> float:
    return 0.0065 * _six_nd(run) ** 0.4138


def _porian_rate(run: RunSize) -> float:
    return 3.7 * _with_head(run) ** -0.36


def _porian_batch(run: RunSize) -> float:
    return 0.7576 * _with_head(run) ** 0.703


def _bjorck_rate(run: RunSize) -> float:
    return 1.55e-3 * (run.params_active_non_embedding / 1e9) ** -0.23 * (run.tokens / 1e9) ** -0.32


def _kaplan_rate(run: RunSize) -> float:
    rate = 0.003239 - 0.0001395 * math.log(run.params_active_non_embedding)
    return rate if rate > 0 else math.nan


def _mm1_rate(run: RunSize) -> float:
    return math.exp(-0.4214 * math.log(run.params_active_non_embedding) - 0.5535)


def _ling_rate(run: RunSize) -> float:
    return 1.1576 * _no_head(run) ** -0.1529


def _ling_batch(run: RunSize) -> float:
    return 0.0694 * _no_head(run) ** 0.3644


def _ling_sparsity_rate(run: RunSize) -> float:
    return 0.8343 * _no_head(run) ** -0.1385 * math.exp(-0.1361 * run.log_sparsity)


def _ling_sparsity_batch(run: RunSize) -> float:
    return 6.4765 * run.tokens**0.5181 * math.exp(0.0841 * run.log_sparsity)


def _ludziejewski_rate(run: RunSize) -> float:
    sparse = math.log(run.experts) if run.experts > 1 else 0.0
    return math.exp(8.39 - 0.81 * math.log(run.params_active_non_embedding) - 0.25 * sparse)


def _delphi_rate(run: RunSize) -> float:
    return 0.0063 * (2.5e9 / run.tokens) ** 0.3


def _grug_rate(run: RunSize) -> float:
    batch = 5e5 / 4096
    return 1.63 * run.tokens**-0.2813 * _width(run) ** -0.3678 * batch**0.5


def _schaipp_batch(run: RunSize) -> float:
    return 0.667 * run.tokens**0.566


def _zhang_batch(run: RunSize) -> float:
    return 512 * 22.91 * (run.tokens / 1e9) ** 0.47


_LING_RANGE = ((3e18, 3e20), 40.0)

PUBLISHED_LAWS: dict[str, PublishedLaw] = {
    law.key: law
    for law in (
        PublishedLaw(
            key="step_law",
            source="Step Law, arXiv 2503.04715",
            learning_rate_formula="1.79 N^-0.713 D^0.307",
            batch_formula="0.58 D^0.571",
            convention="N non-embedding; total for MoE",
            recipe="AdamW, cosine to 1e-5",
            measured="dense 215M-1.07B, 4-100B tokens, about 1,900 runs",
            applies="both",
            notes="95 %: N -0.774..-0.655, D 0.271..0.345, batch 0.534..0.606",
            rate=_step_rate,
            batch=_step_batch,
            statements=(
                *_at(0, _step_rate, 0.05, *_plane((2.15e8, 1.07e9), (4e9, 1e11))),
                *_at(1, _step_batch, 0.05, *_plane((2.15e8, 1.07e9), (4e9, 1e11))),
                *_at(0, _step_rate, 0.2, _run(3e8, 1e10, 2.0)),
                *_at(1, _step_batch, 0.2, _run(3e8, 1e10, 2.0)),
            ),
        ),
        PublishedLaw(
            key="openeurollm",
            source="OpenEuroLLM, arXiv 2608.28308",
            learning_rate_formula="0.3714 N^-0.417 D^0.086",
            batch_formula="9.901e-5 N^0.145 D^0.460 sequences of 4096",
            convention="N non-embedding",
            recipe="AdamW (beta2 0.99), WSD",
            measured="dense 48M-983M, 6-300B tokens, 45 cells",
            notes="standard errors .034 and .030 (rate), .022 and .019 (batch)",
            rate=_openeuro_rate,
            batch=_openeuro_batch,
            statements=(
                *_at(0, _openeuro_rate, 0.05, *_plane((4.8e7, 9.8e8), (6e9, 3e11))),
                *_at(1, _openeuro_batch, 0.05, *_plane((4.8e7, 9.8e8), (6e9, 3e11))),
            ),
        ),
        PublishedLaw(
            key="deepseek",
            source="DeepSeek LLM, arXiv 2401.02954",
            learning_rate_formula="0.3118 C^-0.1250",
            batch_formula="0.2920 C^0.3271",
            convention="C = M D, M non-embedding FLOPs per token",
            recipe="AdamW, multi-step decay",
            measured="dense, 1e17-2e19 FLOPs",
            notes="from points within 0.25 % of the best",
            rate=_deepseek_rate,
            batch=_deepseek_batch,
            statements=(
                *_along(0, _deepseek_rate, (1e18, 2e19), 20),
                *_along(1, _deepseek_batch, (1e18, 2e19), 20),
            ),
        ),
        PublishedLaw(
            key="moonlight",
            source="Moonlight, arXiv 2502.16982",
            learning_rate_formula="0.0127 C^-0.057",
            batch_formula="0.0065 C^0.4138",
            convention="C = 6 N D",
            recipe="AdamW, cosine",
            measured="dense, 2e19-3e20 FLOPs",
            rate=_moonlight_rate,
            batch=_moonlight_batch,
            statements=(
                *_along(0, _moonlight_rate, (2e19, 3e20), 22),
                *_along(1, _moonlight_batch, (2e19, 3e20), 22),
            ),
        ),
        PublishedLaw(
            key="porian",
            source="Porian et al., arXiv 2406.19146",
            learning_rate_formula="3.7 N^-0.36",
            batch_formula="0.7576 N^0.703",
            convention="N with the head, without input embedding; D / N = 20",
            recipe="AdamW, beta2 tuned",
            measured="dense 7M-900M, D = 20 N",
            notes="a high beta2 matters at small batch",
            rate=_porian_rate,
            batch=_porian_batch,
            statements=(
                *_at(0, _porian_rate, 0.05, _run(7e7, 1.4e9), _run(8e8, 1.6e10)),
                *_at(1, _porian_batch, 0.05, _run(7e7, 1.4e9), _run(8e8, 1.6e10)),
            ),
        ),
        PublishedLaw(
            key="bjorck",
            source="Bjorck et al., arXiv 2409.19913",
            learning_rate_formula="1.55e-3 (N/1e9)^-0.23 (D/1e9)^-0.32",
            batch_formula="fixed at 0.5M tokens",
            convention="N parameters",
            recipe="AdamW, cosine, one batch size",
            measured="dense 50M-1.3B, 25-200B tokens",
            notes="the sign in D is opposite where the batch is tuned too",
            fixed_batch=5e5,
            rate=_bjorck_rate,
            statements=_at_batch(
                5e5, _at(0, _bjorck_rate, 0.05, *_plane((5e7, 1.3e9), (2.5e10, 2e11)))
            ),
        ),
        PublishedLaw(
            key="kaplan",
            source="Kaplan et al., arXiv 2001.08361",
            learning_rate_formula="0.003239 - 0.0001395 ln N",
            batch_formula="critical batch 2e8 L^-4.76",
            convention="N non-embedding; L loss in nats",
            recipe="Adam, cosine, batch of 512 x 1024 tokens",
            measured="dense 1M-1.5B",
            notes="also the rule of Yun et al.",
            fixed_batch=5.2e5,
            rate=_kaplan_rate,
            statements=_at_batch(
                5.2e5, _at(0, _kaplan_rate, 0.3, _run(5e7, 1.3e11), _run(1e9, 1.3e11))
            ),
        ),
        PublishedLaw(
            key="mm1",
            source="MM1, arXiv 2403.09611",
            learning_rate_formula="exp(-0.4214 ln N - 0.5535)",
            convention="N non-embedding",
            recipe="AdamW, continued from a pretrained language model",
            measured="dense 9M-85M",
            notes="multimodal training goes on from a trained model, so the prior leaves it out",
            rate=_mm1_rate,
        ),
        PublishedLaw(
            key="ling",
            source="Ling, arXiv 2507.17702",
            learning_rate_formula="1.1576 C^-0.1529",
            batch_formula="0.0694 C^0.3644",
            convention="C = M D, M non-embedding FLOPs per token",
            recipe="AdamW, WSD",
            measured="MoE with 7.8 % of parameters active, 3e17-3e20 FLOPs",
            applies="moe",
            rate=_ling_rate,
            batch=_ling_batch,
            statements=(
                *_along(0, _ling_rate, *_LING_RANGE, 2.0, 0.1),
                *_along(1, _ling_batch, *_LING_RANGE, 2.0, 0.1),
            ),
        ),
        PublishedLaw(
            key="ling_sparsity",
            source="Ling, arXiv 2609.08690",
            learning_rate_formula="0.8343 C^-0.1385 A^0.1361",
            batch_formula="6.4765 D^0.5181 A^-0.0841",
            convention="C = M D; A the active share of parameters",
            recipe="Muon, WSD",
            measured="MoE, A from 1 to 1/32, 1,800 runs",
            applies="moe",
            rate=_ling_sparsity_rate,
            batch=_ling_sparsity_batch,
            statements=(
                *_along(0, _ling_sparsity_rate, *_LING_RANGE, 0.0, 0.2),
                *_along(0, _ling_sparsity_rate, *_LING_RANGE, 2.5, 0.2),
                *_at(
                    1,
                    _ling_sparsity_batch,
                    0.2,
                    *(_run(3e8, 5e9), _run(3e8, 5e10), _run(3e8, 1.5e10, 2.5)),
                ),
            ),
        ),
        PublishedLaw(
            key="ludziejewski",
            source="Ludziejewski et al., arXiv 2502.05172",
            learning_rate_formula="exp(8.39 - 0.81 ln N - 0.25 ln E)",
            convention="N active, non-embedding; E experts",
            recipe="AdamW, the batch ramped up",
            measured="dense and top-1 MoE",
            applies="both",
            notes="the batch is ramped up, so the source gives no law of it",
            rate=_ludziejewski_rate,
            statements=_at(
                0,
                _ludziejewski_rate,
                0.3,
                *(_run(6e7, 2.4e9), _run(9e8, 3.6e10), _run(3e8, 1.2e10, 2.0)),
            ),
        ),
        PublishedLaw(
            key="marin_delphi",
            source="Marin, Delphi",
            learning_rate_formula="0.0063 sqrt(B/64) (2.5e9/D)^0.3",
            batch_formula="a rule of its own",
            convention="B sequences of 4096; answered at 64 of them",
            recipe="AdamH, linear decay; Adam's rate is 3/13 of it",
            measured="dense",
            fixed_batch=64 * 4096.0,
            rate=_delphi_rate,
            statements=_at_batch(
                64 * 4096.0,
                _at(0, lambda r: 3 / 13 * _delphi_rate(r), 0.4, _run(3e8, 2.5e9), _run(3e8, 5e10)),
            ),
        ),
        PublishedLaw(
            key="marin_grug",
            source="Marin, grug",
            learning_rate_formula="1.63 D^-0.2813 d_model^-0.3678 sqrt(B)",
            batch_formula="a rule of its own",
            convention="B sequences of 4096, answered at 0.5M tokens; d_model of a usual shape",
            recipe="Adam, linear decay",
            measured="MoE, 186 runs",
            applies="moe",
            fixed_batch=5e5,
            rate=_grug_rate,
            statements=_at_batch(
                5e5, _at(0, _grug_rate, 0.2, *_plane((1e8, 1e9), (5e9, 5e10), 1.7))
            ),
        ),
        PublishedLaw(
            key="schaipp",
            source="Schaipp et al., arXiv 2607.01487",
            batch_formula="0.667 D^0.566",
            convention="D tokens",
            recipe="AdamW, cosine",
            measured="Step Law's grids, by a three-term law of the loss",
            data_of="step_law",
            notes="batches within 5 % of the best loss span a factor of 4",
            batch=_schaipp_batch,
            statements=_at(1, _schaipp_batch, 0.1, _run(4e8, 4e9), _run(4e8, 1e11)),
        ),
        PublishedLaw(
            key="minicpm",
            source="MiniCPM, arXiv 2404.06395",
            learning_rate_formula="0.01 under muP",
            batch_formula="1.21e9 L^-6.24",
            convention="L loss on C4",
            recipe="Adam, WSD, muP",
            measured="dense 9M-170M",
            notes="under muP the rate does not move with width; the batch is a law of the loss",
        ),
        PublishedLaw(
            key="power_lines",
            source="Power Lines, arXiv 2505.13738",
            learning_rate_formula="AdamW timescale B/(lr wd D) = 1.084 (D/N)^-0.527",
            batch_formula="~ D^0.383 (critical ~ D^0.462)",
            convention="N parameters, D tokens",
            recipe="AdamW, linear decay, muP",
            measured="dense 0.1-3.3B",
            notes="exponents only for the batch; the timescale ties lr to batch and weight decay",
            statements=(_exponent(1, "tokens", 0.383, 0.1),),
        ),
        PublishedLaw(
            key="zhang",
            source="Zhang et al., arXiv 2410.21676",
            batch_formula="critical batch 22.91 (D/1e9)^0.47 sequences of 512",
            convention="D tokens; 20 % more steps define the critical batch",
            recipe="Adam, constant rate with weight averaging",
            measured="dense 85M-1.2B",
            notes="a critical batch lies above the best one, so the prior takes its exponent only",
            batch=_zhang_batch,
            statements=(_exponent(1, "tokens", 0.47, 0.1),),
        ),
        PublishedLaw(
            key="merrill",
            source="Merrill et al., arXiv 2505.23971",
            learning_rate_formula="times sqrt 2 per doubling of the batch",
            batch_formula="critical batch about 0 at the start, then a plateau",
            convention="within one run",
            recipe="AdamW, batch warm-up",
            measured="dense 1B and 7B",
            notes="tells of a run's course, not of its size",
        ),
        PublishedLaw(
            key="nanochat",
            source="nanochat, scripts/base_train.py",
            learning_rate_formula="~ sqrt(B / B_ref)",
            batch_formula="~ D^0.383",
            convention="rounded to a power of two",
            recipe="Muon with AdamW",
            measured="depth 12 to 26",
            notes="exponents only, the batch's being that of Power Lines; beyond depth 26 its rule "
            "made models 4-6 times less token-efficient",
        ),
    )
}
"""By key. Laws of which only exponents are published answer None."""
