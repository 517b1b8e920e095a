"""What hypothesis draws from: any schedule, and what goes with it."""

import warnings

import numpy as np
from hypothesis import strategies as st

from tinyddpm import Diffusion, make_schedule
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.diffusion.schedule import BETA, SCHEDULES

SEEDS = st.integers(0, 2**32 - 1)


def make(*args, **kwargs):
    """A schedule that need not end at pure noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_schedule(*args, **kwargs)


@st.composite
def schedules(draw, zero_terminal_snr=True):
    """Any schedule there is, with any parameters, T from 1 to 2000, scaled by any b."""
    name, T = draw(st.sampled_from(SCHEDULES)), draw(st.integers(1, 20) | st.integers(1, 2000))
    between = lambda low, high: draw(st.floats(low, high))
    settings = {"input_scale": between(0.1, 3)}
    if name in BETA:
        a = between(1e-5, 0.02)
        settings |= {"beta_start": a, "beta_end": between(a, 0.05)}
    elif name.endswith("logsnr"):
        settings |= {"logsnr_max": between(5, 20), "logsnr_min": between(-20, -5), "shift": between(-3, 3)}
    elif name in ("cosine", "sigmoid"):
        start, end = (0, between(0.5, 1)) if name == "cosine" else (between(-4, 1), between(2, 4))
        settings |= {"start": start, "end": end, "tau": between(0.1, 3)}
        if name == "cosine":
            settings["s"] = between(0, 0.1)
    if zero_terminal_snr and T > 1:
        settings["zero_terminal_snr"] = draw(st.booleans())
    return make(name, T, **settings)


@st.composite
def processes(draw, least_alpha_bar=1e-9):
    """A diffusion of any objective over any schedule, images x0, noise eps of their shape, and a timestep for each.

    What divides by sqrt(alpha_bar) loses digits there, so where that counts the timesteps are kept from the end.
    """
    objective = draw(st.sampled_from(OBJECTIVES))
    schedule = draw(schedules(zero_terminal_snr=objective != "eps").filter(lambda s: s.alpha_bar[0] >= least_alpha_bar))
    last = np.flatnonzero(schedule.alpha_bar >= least_alpha_bar)[-1]
    t = np.array(draw(st.lists(st.integers(0, last), min_size=1, max_size=4)))
    shape = (len(t), *draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))))
    rng = np.random.default_rng(draw(SEEDS))
    return Diffusion(schedule, objective), rng.uniform(-1, 1, shape), t, rng.standard_normal(shape)
