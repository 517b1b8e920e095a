"""Whatever `sample` is asked for: it visits the timesteps it should, and an image depends on nothing but its seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, schedules

from tinyddpm import Diffusion, sample
from tinyddpm.diffusion.checks import OBJECTIVES, SPACINGS, VARIANCES
from tinyddpm.diffusion.sample import SAMPLERS, timesteps


def model(x, t):
    return np.sin(3 * x + t.reshape(-1, 1, 1, 1))


def model_with_spread(x, t):
    return np.concatenate([model(x, t), np.cos(5 * x)], axis=-1)


model.dtype = model_with_spread.dtype = np.dtype("float64")


@st.composite
def requests(draw):
    """What `sample` may be asked for, and the timesteps that this should visit, in that order."""
    objective, variance = draw(st.sampled_from(OBJECTIVES)), draw(st.sampled_from(VARIANCES))
    loss = "hybrid" if variance == "learned_range" else "simple"
    d = Diffusion(draw(schedules(zero_terminal_snr=objective != "eps")), objective, variance, loss)
    shape = (draw(st.integers(1, 9)), 2, 2, 1)
    asked = {"rng": draw(SEEDS), "clip": draw(st.sampled_from([True, False, 0.5, "dynamic"]))}
    asked["method"] = draw(st.sampled_from(sorted(SAMPLERS)))
    if asked["method"] == "ddim":
        asked["eta"] = draw(st.floats(0, 1))
    if draw(st.booleans()):
        asked["start"] = np.random.default_rng(draw(SEEDS)).standard_normal(shape)
    if draw(st.booleans()):
        steps = draw(st.lists(st.integers(0, d.T - 1), min_size=1, max_size=8, unique=True).map(sorted))
        visited = steps[::-1]
        asked["steps"] = draw(st.sampled_from([steps, visited]))
    else:
        spacing = draw(st.sampled_from(SPACINGS))
        asked |= {"spacing": spacing, "steps": draw(st.integers(1, min(d.T, 12)))}
        visited = timesteps(d.T, asked["steps"], spacing)[::-1].tolist()
    return d, model_with_spread if variance == "learned_range" else model, shape, asked, visited


@pytest.mark.filterwarnings("ignore:steps")  # of which the first may be far from noise
@settings(max_examples=100)
@given(requests(), st.data())
def test_the_timesteps_lead_from_the_start_to_images_that_depend_neither_on_workers_nor_on_others(request, data):
    d, predict, shape, asked, visited = request
    seen = []

    def look(x, t):
        assert len(set(t)) == 1 and x.dtype == np.float64
        seen.append(t[0])
        return predict(x, t)

    look.dtype = np.dtype("float64")
    path = sample(d, look, shape, **asked, trajectory=True, workers=1)
    assert list(dict.fromkeys(seen)) == visited
    assert path.shape == (len(visited) + 1, *shape) and np.isfinite(path).all()
    noise = np.stack([rng.standard_normal(shape[1:]) for rng in np.random.default_rng(asked["rng"]).spawn(shape[0])])
    np.testing.assert_array_equal(path[0], asked.get("start", noise) / d.schedule.input_scale)
    if asked["clip"] is not False:
        most = 0.5 if asked["clip"] == 0.5 else 1
        assert np.abs(path[-1]).max() <= most + 1e-12  # the weight of x_0 in the last mean is 1 but for rounding
    for workers in (1, 2):
        np.testing.assert_array_equal(sample(d, predict, shape, **asked, workers=workers), path[-1])
    fewer = data.draw(st.integers(1, shape[0]))
    if "start" in asked:
        asked = asked | {"start": asked["start"][:fewer]}
    alone = sample(d, predict, (fewer, *shape[1:]), **asked, workers=1)
    np.testing.assert_allclose(alone, path[-1, :fewer], rtol=0, atol=1e-9 * (1 + np.abs(path[-1]).max()))
