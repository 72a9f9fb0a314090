"""The registry of quantities: what it says of each, and that every style exists."""

import pytest

from raysweep.report.figure import Axis
from raysweep.scaling.quantities import ANSWERS, QUANTITIES, TARGETS
from raysweep.text import STYLES


@pytest.mark.parametrize(
    ("key", "label", "axis", "best", "value"),
    [
        ("learning_rate", "learning rate", "learning rate", "optimal learning rate", "1.20e-3"),
        ("batch_tokens", "batch", "batch, tokens", "optimal batch, tokens", "0.00120"),
        ("loss", "loss", "loss, nats a token", "loss, nats a token", "0.0012"),
        ("tokens", "D", "D, tokens", "D, tokens", "0.0012"),
        ("flops", "C", "C, training FLOPs", "C, training FLOPs", "1.2e-3"),
        ("params_active_non_embedding", "N", *("N, active parameters",) * 2, "0.0012"),
        ("noise_scale_tokens", *("gradient noise scale", "gradient noise scale, tokens"),
         "gradient noise scale, tokens", "0.0012"),
    ],
)  # fmt: skip
def test_what_is_said(key: str, label: str, axis: str, best: str, value: str) -> None:
    quantity = QUANTITIES[key]
    assert (quantity.label, quantity.axis, quantity.write(1.2e-3)) == (label, axis, value)
    assert Axis.of(key) == Axis(axis, quantity.style)
    assert Axis.of(key, best=True) == Axis(best, quantity.style)


def test_keys_and_styles_exist() -> None:
    assert set(TARGETS) < set(ANSWERS) < set(QUANTITIES)
    for quantity in QUANTITIES.values():
        assert {quantity.style, quantity.ratio_style} <= set(STYLES)
