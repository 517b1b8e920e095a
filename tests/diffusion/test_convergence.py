"""Of which order the samplers are, against paths that are known.

If x_0 is drawn from a mixture of Gaussians, then E[x_0 | x_t] has a closed form, and the path along which `ddim` and
`dpm++` go in ever smaller steps (Song et al. 2021, Score-based generative modeling through SDEs, equation 13) comes of
the Runge-Kutta method: z = x_t / sqrt(alpha_bar_t) obeys, along l = ln sqrt(alpha_bar_t / (1 - alpha_bar_t)),

    dz/dl = b E[x_0 | x_t] - z
"""

import numpy as np
import pytest
from ideal import behind

from tinyddpm import Diffusion, make_schedule, sample

STEPS, FINE, STARTS = [8, 16, 32, 64, 128], 40 * 128, np.linspace(-2, 2, 41).reshape(1, -1, 1, 1)
W, M, S = np.array([0.4, 0.6]), np.array([-0.7, 0.5]), np.array([0.15, 0.2])  # weights, means, standard deviations


class Ideal:
    """E[x_0 | x_t] of the mixture, in every pixel for itself."""

    dtype = np.dtype("float64")

    def __init__(self, b):
        self.b, self.schedule = b, make_schedule("sigmoid_logsnr", FINE + 1, input_scale=b, logsnr_min=-5, logsnr_max=3)

    def x0(self, x_t, bar):
        v = bar * self.b**2 * S**2 + 1 - bar
        away = x_t[..., None] - np.sqrt(bar) * self.b * M
        p = W / np.sqrt(v) * np.exp(-(away**2) / (2 * v))
        return (p * (M + np.sqrt(bar) * self.b * S**2 / v * away)).sum(-1) / p.sum(-1)

    def __call__(self, x, t):
        x_t, bar = behind(self.schedule, x, t)
        return self.x0(x_t, bar[..., None])

    def end_of_path(self, n=500):
        def slope(z, l):
            bar = 1 / (1 + np.exp(-2 * l))
            return self.b * self.x0(np.sqrt(bar) * z, bar) - z

        ends = self.schedule.alpha_bar[[-1, 0]]
        first, last = 0.5 * (np.log(ends) - np.log1p(-ends))
        z, h = STARTS / np.sqrt(ends[0]), (last - first) / n
        for l in first + h * np.arange(n):
            k1 = slope(z, l)
            k2 = slope(z + h / 2 * k1, l + h / 2)
            k3 = slope(z + h / 2 * k2, l + h / 2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(z + h * k3, l + h))
        return np.sqrt(ends[1]) * z


@pytest.mark.parametrize("b", [1.0, 0.5])
@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++", 2)])
def test_the_error_falls_with_this_power_of_the_number_of_steps(method, order, b):
    """In steps of equal length in ln SNR, to the lowest timestep: the last jump, to x_0, is of its own length."""
    ideal, errors = Ideal(b), []
    d, known = Diffusion(ideal.schedule, "x0", clip=False), ideal.end_of_path()
    for n in STEPS:
        ts = np.arange(n + 1) * (FINE // n)
        path = sample(d, ideal, STARTS.shape, method, ts, start=STARTS, trajectory=True, workers=1)
        errors.append(np.abs(b * path[-2] - known).mean())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])  # from 8 steps to 16, from 16 to 32 ...
    assert np.all(np.abs(orders / order - 1) < 0.1) and abs(orders[-1] / order - 1) < 0.03
