"""What is copied or pickled goes on like the original, and apart from it."""

import copy
import pickle

import numpy as np
import pytest
from tiny_training import DIFFUSION, IMAGES, SMALL, training

from tinyddpm import EMA, Adam, ImageFolder, Parameter, UNet, load_model, sample
from tinyddpm.files.pictures import grid
from tinyddpm.training.optim import flatten


@pytest.fixture(params=[copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def copied(request):
    return request.param


numbers = lambda model: np.concatenate([p.data.ravel() for p in model.parameters()])


def moved(model, optimizer, ema):
    """How an optimizer steps and its model with it, and an average moves and its own."""
    optimizer.step(np.ones_like(optimizer.theta), 0.1)
    ema.update(optimizer.theta)
    np.testing.assert_array_equal([numbers(model), numbers(ema.model)], [optimizer.theta, ema.average])
    return np.array([optimizer.theta, ema.average])


def test_views_of_one_vector_are_views_of_its_copy(copied):
    model = UNet(**SMALL)
    original = model, Adam(flatten(model.parameters())), EMA(model, 0.5)
    moved(*original)
    second = copied(original)
    for _ in range(2):
        np.testing.assert_array_equal(moved(*second), moved(*original))
    np.testing.assert_array_equal(moved(*copied(second)), moved(*original))  # and a copy of the copy


class Named(Parameter):
    """A parameter of one's own."""

    def __init__(self, data, name):
        super().__init__(data)
        self.name = name


MEMORY = np.arange(24, dtype=np.float32)
LIES = [  # alone, in a vector, across its memory, in that of another type, in rows
    MEMORY[:6].reshape(2, 3).copy(), MEMORY[5:11].reshape(2, 3), MEMORY[::4].reshape(2, 3),
    np.arange(24, dtype=np.uint32)[3:9].view(np.float32).reshape(2, 3), np.arange(24.0).reshape(4, 6)[1:3, 2:5],
]  # fmt: skip


@pytest.mark.parametrize("data", LIES)
def test_a_parameter_is_copied_from_wherever_it_lies_with_what_it_has(copied, data):
    for p in (Parameter(data), Named(data, "a")):
        first, second = copied([p, p])
        assert first is second and first is not p and type(first) is type(p) and first.dtype == p.dtype
        assert getattr(first, "name", None) == getattr(p, "name", None)
        np.testing.assert_array_equal(first.data, p.data)
        assert not np.shares_memory(first.data, p.data)


def test_an_average_that_is_no_longer_its_model_s_says_so(copied):
    ema = copied(EMA(UNet(**SMALL)))
    ema.update(theta := np.ones_like(ema.average))
    ema.model.to(dtype="float64")
    with pytest.raises(RuntimeError, match="^model: its parameters were moved or replaced, so the average is no"):
        ema.update(theta)


def test_a_state_of_a_training_is_kept_as_it_was(copied, tmp_path):
    """To save it later, if it should turn out to be the best; in shared memory while it trains, of which a copy is
    not. And a model draws the same, also one whose parameters have been moved into that memory, and out again."""
    unet, states = training(None, 4, unet=UNet(**SMALL))
    kept = [copied(state) for state in states]
    kept[1].save(tmp_path / "second.safetensors")
    again, rest = training(tmp_path / "second.safetensors", 4, unet=UNet(**SMALL, rng=1))
    list(rest)
    np.testing.assert_array_equal(numbers(again), numbers(unet))
    for model, diffusion in (load_model(), (unet, DIFFUSION)):
        second, process = copied((model, diffusion))
        drawn = [sample(d, u, (1, 8, 8, 1), steps=2) for u, d in ((model, diffusion), (second, process))]
        np.testing.assert_array_equal(*drawn)


def test_a_folder_of_pictures_shows_the_same(copied, tmp_path):
    grid(IMAGES[:3]).save(tmp_path / "1.png")
    images = ImageFolder(tmp_path, 8)
    np.testing.assert_array_equal(copied(images)[:], images[:])
