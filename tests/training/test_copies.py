"""What is copied or pickled goes on like the original, and apart from it."""

import copy
import pickle

import numpy as np
import pytest
from tiny_training import DIFFUSION, IMAGES, TINY, training

from tinyddpm import EMA, Adam, ImageFolder, Parameter, UNet, load_model, sample, train
from tinyddpm.files.pictures import grid
from tinyddpm.training.optim import flatten

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


def numbers(model):
    """The model's parameters in one vector."""
    return np.concatenate([p.data.ravel() for p in model.parameters()])


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


def moves(ema):
    """How an average moves, and its model with it."""
    ema.update(np.ones_like(ema.average))
    np.testing.assert_array_equal(numbers(ema.model), ema.average)
    return ema.average.copy()


def steps(pair):
    """How an optimizer steps, and the model with it."""
    model, adam = pair
    adam.step(np.ones_like(adam.theta), 0.1)
    np.testing.assert_array_equal(numbers(model), adam.theta)
    return adam.theta.copy()


def flat_pair(model):
    return model, Adam(flatten(model.parameters()))


@pytest.mark.parametrize(
    "make, use", [(lambda m: EMA(m, 0.5), moves), (flat_pair, steps), (lambda m: (EMA(m), flat_pair(m))[1], steps)]
)
def test_views_of_one_vector_are_views_of_its_copy(copied, make, use):
    original = make(UNet(**TINY))
    use(original)
    second = copied(original)
    for _ in range(2):
        np.testing.assert_array_equal(use(second), use(original))
    np.testing.assert_array_equal(use(copied(second)), use(original))  # and a copy of the copy


@pytest.mark.parametrize("lies", ["alone", "in a vector", "across its memory", "in another type's memory", "in rows"])
def test_a_parameter_is_copied_from_wherever_it_lies(copied, lies):
    memory, bits = np.arange(24, dtype=np.float32), np.arange(24, dtype=np.uint32)
    p = {
        "alone": Parameter(memory[:6].reshape(2, 3).copy()),
        "in a vector": Parameter(memory[5:11].reshape(2, 3)),
        "across its memory": Parameter(memory[::4].reshape(2, 3)),
        "in another type's memory": Parameter(bits[3:9].view(np.float32).reshape(2, 3)),
        "in rows": Parameter(np.arange(24.0).reshape(4, 6)[1:3, 2:5]),
    }[lies]
    second = copied([p, p])
    assert second[0] is second[1] and type(second[0]) is Parameter and second[0] is not p
    np.testing.assert_array_equal(second[0].data, p.data)
    assert second[0].dtype == p.dtype and not np.shares_memory(second[0].data, p.data)


class Named(Parameter):
    """A parameter of one's own."""

    def __init__(self, data, name):
        super().__init__(data)
        self.name = name


def test_a_parameter_of_one_s_own_keeps_what_it_has(copied):
    p = copied(Named(np.arange(6.0)[1:3], "a"))
    assert type(p) is Named and p.name == "a" and p.data.tolist() == [1, 2]


def test_an_average_that_is_no_longer_its_model_s_says_so(copied):
    ema = copied(EMA(UNet(**TINY)))
    theta = np.ones_like(ema.average)
    ema.update(theta)
    ema.model.to(dtype="float64")
    with pytest.raises(RuntimeError, match="model: its parameters were moved or replaced, so the average is no longer"):
        ema.update(theta)


def test_a_state_of_a_training_is_kept_as_it_was(copied, tmp_path):
    """To save it later, if it should turn out to be the best; in shared memory while it trains, of which a copy is
    not."""
    unet, states = training(None)
    kept = [copied(next(states)) for _ in range(3)]
    list(states)
    kept[2].save(tmp_path / "third.safetensors")
    again, rest = training(tmp_path / "third.safetensors", rng=1)
    list(rest)
    np.testing.assert_array_equal(numbers(again), numbers(unet))


def test_a_model_draws_the_same(copied):
    """Also one whose parameters have been moved into shared memory, and out again."""
    trained = UNet(**TINY)
    list(train(trained, DIFFUSION, IMAGES, 1, 8, workers=2))
    for unet, diffusion in (load_model(), (trained, DIFFUSION)):
        second, process = copied((unet, diffusion))
        drawn = [sample(d, u, (1, 8, 8, 1), steps=2) for u, d in ((unet, diffusion), (second, process))]
        np.testing.assert_array_equal(*drawn)


def test_a_folder_of_pictures_shows_the_same(copied, tmp_path):
    grid(IMAGES[:3]).save(tmp_path / "1.png")
    images = ImageFolder(tmp_path, 8)
    np.testing.assert_array_equal(copied(images)[:], images[:])
