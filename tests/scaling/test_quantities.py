"""The registry of quantities: what it says of each, and that nothing is said of none."""

import pytest

from raysweep.scaling.quantities import MEASURED, QUANTITIES, SEARCHED
from raysweep.text import STYLES


@pytest.mark.parametrize(
    ("key", "optimal", "star", "axis", "value"),
    [
        ("learning_rate", "optimal learning rate", "lr*", "optimal learning rate", "1.20e-3"),
        ("batch_tokens", "optimal batch", "batch*", "optimal batch, tokens", "0.00120"),
        ("loss", "loss", "L", "loss, nats a token", "0.0012"),
        ("tokens", "tokens", "D", "D, tokens", "0.0012"),
        ("flops", "training FLOPs", "C", "C, training FLOPs", "1.2e-3"),
        ("params_active_non_embedding", "active parameters", "N", "N, active parameters", "0.0012"),
        (
            *("noise_scale_tokens", "gradient noise scale", "B"),
            *("gradient noise scale, tokens", "0.00120"),
        ),
    ],
)
def test_what_is_said(key: str, optimal: str, star: str, axis: str, value: str) -> None:
    quantity = QUANTITIES[key]
    assert (quantity.optimal, quantity.star, quantity.axis) == (optimal, star, axis)
    assert quantity.write(1.2e-3) == value


def test_keys_and_styles_exist() -> None:
    assert set(SEARCHED) < set(MEASURED) < set(QUANTITIES)
    assert {q.style for q in QUANTITIES.values()} <= set(STYLES)
