"""Published laws of the optimal learning rate and batch, to set beside one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The run that a published law is asked about; every count in parameters, tokens or FLOPs.

    Counts that are not known may be None; a law that needs one then has no answer.
    """

    params_active_non_embedding: float
    tokens: float
    params_total_non_embedding: float | None = None
    params_active: float | None = None
    head_params: float | None = None
    flops_per_token: float | None = None
    experts: int = 1
    top_k: int = 1

    @property
    def is_moe(self) -> bool:
        return self.experts > 1

    @property
    def flops(self) -> float:
        """Training FLOPs: counted exactly where that is known, else 6 N D."""
        each = self.flops_per_token or 6 * self.params_active_non_embedding
        return each * self.tokens

    @property
    def flops_non_embedding(self) -> float:
        """The same without the output head, 6 FLOPs a parameter and token; 6 N D at least."""
        floor = 6 * self.params_active_non_embedding * self.tokens
        return max(self.flops - 6 * (self.head_params or 0.0) * self.tokens, floor)


@dataclass(frozen=True)
class PublishedLaw:
    """One published law: each side a function of a `Setting`, or None where the source has none.

    `applies` is `dense`, `moe` or `both`; `convention` says which N or C the source means;
    `verified` is False where the value was seen in a secondary source only.
    """

    key: str
    source: str
    learning_rate_formula: str
    batch_formula: str
    convention: str
    applies: str
    notes: str = ""
    verified: bool = True
    _learning_rate: Callable[[Setting], float | None] | None = None
    _batch: Callable[[Setting], float | None] | None = None

    def learning_rate(self, setting: Setting) -> float | None:
        """The peak learning rate it gives, or None."""
        return _answer(self._learning_rate, setting)

    def batch_tokens(self, setting: Setting) -> float | None:
        """The batch in tokens it gives, or None."""
        return _answer(self._batch, setting)

    def covers(self, setting: Setting) -> bool:
        """Whether it was stated for this kind of model."""
        return self.applies == "both" or self.applies == ("moe" if setting.is_moe else "dense")

    def to_dict(self, setting: Setting | None = None) -> dict[str, object]:
        """Plain values; with a setting, its answers too."""
        plain: dict[str, object] = {
            "law": self.key,
            "source": self.source,
            "learning_rate_formula": self.learning_rate_formula,
            "batch_formula": self.batch_formula,
            "convention": self.convention,
            "applies": self.applies,
            "notes": self.notes,
            "verified": self.verified,
        }
        if setting is not None:
            plain["learning_rate"] = self.learning_rate(setting)
            plain["batch_tokens"] = self.batch_tokens(setting)
        return plain


def published_answers(setting: Setting) -> list[dict[str, object]]:
    """What every published law that covers this kind of model says, one dict a law."""
    return [law.to_dict(setting) for law in PUBLISHED_LAWS.values() if law.covers(setting)]


def _answer(rule: Callable[[Setting], float | None] | None, setting: Setting) -> float | None:
    value = None if rule is None else rule(setting)
    return value if value is not None and math.isfinite(value) else None


def _step_law_params(s: Setting) -> float:
    # On the source's own MoE grids its law holds with total, not active, parameters.
    return s.params_total_non_embedding or s.params_active_non_embedding


def _porian_params(s: Setting) -> float:
    return s.params_active_non_embedding + (s.head_params or math.nan)


PUBLISHED_LAWS: dict[str, PublishedLaw] = {
    law.key: law
    for law in (
        PublishedLaw(
            key="step_law",
            source="Step Law, arXiv 2503.04715",
            learning_rate_formula="1.79 N^-0.713 D^0.307",
            batch_formula="0.58 D^0.571",
            convention="N non-embedding; total for MoE",
            applies="both",
            notes="dense 215M-1.07B, 4-100B tokens; 95 %: N -0.774..-0.655, D 0.271..0.345, "
            "batch 0.534..0.606",
            _learning_rate=lambda s: 1.79 * _step_law_params(s) ** -0.713 * s.tokens**0.307,
            _batch=lambda s: 0.58 * s.tokens**0.571,
        ),
        PublishedLaw(
            key="deepseek",
            source="DeepSeek LLM, arXiv 2401.02954",
            learning_rate_formula="0.3118 C^-0.1250",
            batch_formula="0.2920 C^0.3271",
            convention="C = M D, M non-embedding FLOPs per token",
            applies="dense",
            notes="from points within 0.25 % of the best",
            _learning_rate=lambda s: 0.3118 * s.flops_non_embedding**-0.1250,
            _batch=lambda s: 0.2920 * s.flops_non_embedding**0.3271,
        ),
        PublishedLaw(
            key="porian",
            source="Porian et al., arXiv 2406.19146",
            learning_rate_formula="0.0047 (N/108e6)^(-1/3)",
            batch_formula="2048*160 (N/108e6)^(2/3)",
            convention="N with the head, without input embedding; D/N = 20",
            applies="dense",
            notes="beta2 tuned: a high beta2 matters at small batch",
            _learning_rate=lambda s: 0.0047 * (_porian_params(s) / 108e6) ** (-1 / 3),
            _batch=lambda s: 2048 * 160 * (_porian_params(s) / 108e6) ** (2 / 3),
        ),
        PublishedLaw(
            key="ling",
            source="Ling, arXiv 2507.17702",
            learning_rate_formula="1.1576 C^-0.1529",
            batch_formula="0.0694 C^0.3644",
            convention="C training FLOPs; the source's exact count was not checked",
            applies="moe",
            notes="WSD schedule; 7.8 % of parameters active",
            _learning_rate=lambda s: 1.1576 * s.flops**-0.1529,
            _batch=lambda s: 0.0694 * s.flops**0.3644,
        ),
        PublishedLaw(
            key="ludziejewski",
            source="Ludziejewski et al., arXiv 2502.05172",
            learning_rate_formula="exp(8.39 - 0.81 ln N - 0.25 ln E)",
            batch_formula="",
            convention="N active, non-embedding",
            applies="both",
            notes="top-1 experts; the batch is ramped up, so the source gives no law of it",
            _learning_rate=lambda s: math.exp(
                8.39 - 0.81 * math.log(s.params_active_non_embedding) - 0.25 * math.log(s.experts)
            ),
        ),
        PublishedLaw(
            key="bjorck",
            source="Bjorck et al., arXiv 2409.19913",
            learning_rate_formula="~ N^-0.23 D^-0.32",
            batch_formula="fixed",
            convention="N parameters, at one fixed batch",
            applies="dense",
            notes="exponents only; the sign in D is opposite where the batch is tuned too",
        ),
        PublishedLaw(
            key="schaipp",
            source="Schaipp et al., arXiv 2607.01487",
            learning_rate_formula="",
            batch_formula="0.667 D^0.566",
            convention="D tokens",
            applies="dense",
            notes="from the three-term law of the loss",
            _batch=lambda s: 0.667 * s.tokens**0.566,
        ),
        PublishedLaw(
            key="zhang",
            source="Zhang et al., arXiv 2410.21676",
            learning_rate_formula="",
            batch_formula="critical batch ~ D^0.47",
            convention="D tokens; 20 % more steps define the critical batch",
            applies="dense",
            notes="exponent only: the prefactor was seen in a secondary source",
            verified=False,
        ),
        PublishedLaw(
            key="power_lines",
            source="Power Lines, arXiv 2505.13738",
            learning_rate_formula="AdamW timescale B/(lr wd D) = 1.084 (D/N)^-0.527",
            batch_formula="~ D^0.383 (critical ~ D^0.462)",
            convention="N parameters, D tokens",
            applies="dense",
            notes="exponents only for the batch; the timescale ties lr to batch and weight decay",
        ),
        PublishedLaw(
            key="nanochat",
            source="nanochat, scripts/base_train.py",
            learning_rate_formula="~ sqrt(B / B_ref)",
            batch_formula="~ D^0.383",
            convention="rounded to a power of two",
            applies="dense",
            notes="exponents only",
        ),
    )
}
"""By key. Laws of which only exponents are published answer None."""
