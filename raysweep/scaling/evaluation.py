"""Value, Jacobian, gradient and Hessian of a compiled law, for a batch of coefficients.

Shapes: B problems, n points, p coefficients, q coefficients of one term. Sums over points are
matrix products wherever the features are shared by the batch, which is what makes a bootstrap
cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysweep.scaling.form import Block, Design, saturating_log


@dataclass(frozen=True)
class Part:
    """One term (or the tilt) at a batch of coefficients: z's derivative by its own coefficients."""

    share: np.ndarray | None  # [B, n] its share of the loss; None for the tilt, which multiplies it
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
                # log-sum-exp: d2 value = sum_k share_k F_k F_k^T - (mean F)(mean F)^T; a tilt adds
                # to the Jacobian only.
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


def evaluate(
    design: Design, theta: np.ndarray, derivatives: bool = True, paired: bool = False
) -> Evaluation:
    """Evaluate a compiled law at centred coefficients `theta` [B, p].

    `paired`, for values only, takes the b-th coefficients at the b-th point alone (n = B): value
    [B]."""
    assert not (paired and derivatives)
    h = first = second = None
    saturation = [j for j, c in enumerate(design.form.coefficients) if c.kind == "saturation"]
    if design.log_experts is not None:
        start, top = saturation
        log_start, log_max = theta[:, start], theta[:, top]
        if not paired:
            log_start, log_max = log_start[:, None], log_max[:, None]
        h, first, second = saturating_log(design.log_experts, log_start, log_max)
        h = h - design.reference

    def times(own: np.ndarray, features: np.ndarray) -> np.ndarray:
        return (own * features).sum(axis=1) if paired else own @ features.T

    def exponent(block: Block) -> tuple[np.ndarray, np.ndarray | None]:
        own = theta[:, block.index]
        z, pull = times(own, block.base), None
        if block.slope is not None and h is not None:
            pull = times(own, block.slope)
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
    if design.tilt is not None:
        z, pull = exponent(design.tilt)
        value = value + z
        pieces.append((design.tilt, None, pull))
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
