"""The surface model: loss over (learning rate, batch) in all cells at once, and each cell's optimum.

The log loss of a run in cell c at (ln learning rate, ln batch tokens) = p is modelled as

    ln L = level_c + e^{k_c} gap(p - m_c) + noise,        m_c = law(N_c, D_c, sparsity_c) + shift_c

where `gap` is the convex valley of `surface_shape`, shared by all cells up to a slowly varying scale
e^{k_c}; the optimum m_c moves as a power law of the cell's sizes; shift_c and the levels are random
effects. The noise has sd sqrt(floor^2 + (growth * gap)^2): far from the optimum the valley's shape is only
roughly known. Runs that diverged, or that ended absurdly high, say only that the gap there is large.
The widths of the random effects and the noise are learned from the data (empirical Bayes, MacKay's
updates); everything else has a weak normal prior. The posterior is Laplace's, around the mode that
damped Gauss-Newton finds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import linalg, stats

from raysweep.errors import UserError
from raysweep.scaling.surface_features import (
    CellFeatures,
    Covariates,
    covariates_of,
    prior_optimum,
)
from raysweep.scaling.surface_fit import Layout, Observations, fit_mode, standardised_prior
from raysweep.scaling.surface_shape import curvature, gap
