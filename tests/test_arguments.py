"""Whatever a public function is handed that it cannot take is refused by the name of the argument, with what was given.

Each argument of each is in TABLE, with its kind, and WRONG has what is wrong for each kind; a new argument, or a new
function, has to be added there, or a test fails.
"""

import inspect
import math

import numpy as np
import pytest
from PIL import Image
from tiny_training import DIFFUSION, IMAGES, TINY

import tinyddpm
from tinyddpm import EMA, Adam, Diffusion, Parameter, Schedule, UNet, make_schedule, sample
from tinyddpm.autograd.functional import dropout, embedding
from tinyddpm.autograd.fused import group_norm
from tinyddpm.backend import plain
from tinyddpm.diffusion import bound, clipping, editing
from tinyddpm.files import pictures
from tinyddpm.training import optim

nan, inf, thing = math.nan, math.inf, object()
WRONG = {
    "integer >= 0": (-1, 1.5, 2.0, True, nan, inf, "2", [2]),
    "integer >= 1": (0, -1, 1.5, 2.0, True, nan, inf, "2", [2]),
    "seed": (-1, 1.5, True, nan, "a", [], [1, -1], ["a"], thing, np.random.RandomState(0)),
    "generator": (0, 1.5, "a", np.random.RandomState(0)),
    "number": (nan, inf, -inf, True, "1", [1.0], np.ones(2), thing),
    "number >= 0": (-1, nan, inf, True, "1", [1.0], np.ones(2)),
    "number > 0": (0, -1.0, nan, inf, True, "1", [1.0], np.ones(2)),
    "number > 0 or inf": (0, -1.0, nan, True, "1", [1.0], np.ones(2)),
    "number in (0, 1]": (0, 1.1, -1.0, nan, inf, True, "1", [1.0], np.ones(2)),
    "number in [0, 1]": (1.1, -1.0, nan, inf, True, "1", [1.0], np.ones(2)),
    "number in [0, 1)": (1, -1.0, nan, inf, True, "1", [1.0], np.ones(2)),
    "betas": (0.9, (0.9,), (0.9, 1), (nan, 0.9), ("a", 0.9), thing),
    "steps": (0, -1, 10**6, 1.5, 2.0, True, nan, "2", [], [1.0], [[1]]),
    "shape": ((1, 2, 2), (0, 2, 2, 1), (1.0, 2, 2, 1), (-1, 2, 2, 1), "abcd", 4, thing, [[1], 2, 3, 4]),
    "images": (None, "a", 3, [[1.0]], np.ones((3, 4, 4, 1), int), np.ones((3, 4, 4, 1), bool), thing),
    "array": (None, "a", 3, [1.0], thing),
    "labels": ([1], [0.5] * 3, ["a"] * 3, [True] * 3, 3, np.zeros((3, 1), int), thing),
    "mask": (None, np.ones((4, 4)), np.ones((4, 5), bool), thing),
    "timesteps": (None, 3, [1, 2, 3], np.ones(3), np.array([1]), np.array([0, 1, 999]), np.array([-1, 0, 1])),
    "timesteps >= 0": (None, 3, [1, 2, 3], np.ones(3), np.array([1]), np.array([-1, 0, 1])),
    "vector": ([1.0], None, 3, np.ones((2, 2)), np.arange(3), thing),
    "fractions": ([-0.1], [1.1], [nan], ["a"], "a", None, thing),
    "model": (None, "a", 3, np.ones(2), thing),
    "function": ("a", 3, np.ones(2), thing),
    "module": (None, "a", 3, np.ones(2), thing),
    "diffusion": (None, "a", 3, np.ones(2), thing),
    "clip": ("static", 0, -1, nan, inf, ("dynamic", 2, 3), thing, np.ones(2)),
    "name": ("unknown", None, 3, [], ["a"], thing, np.ones(2)),
    "words": (None, 3, thing, ["a", 3]),
    "text": (None, 3, [], thing),
    "mapping": (None, "a", 3, [1], thing),
    "beta": ([], 0.1, [[0.1]], [0.1, nan], [2.0, 0.1], "a", None, thing, [[0.1], 0.2]),
    "path": (3, 1.5, [], True, thing),
    "dtype": ("int32", "float16", "word", 3, thing, []),
    "device": ("gpu", "cuda:x", 3, thing),
    "frames": ([], None, 3, ["a"], [Image.new("CMYK", (2, 2))], thing),
    "picture": (None, "a", 3, thing),
    "numbers": ([], "a", ["a"], [[1.0]], thing),
    "channels": (0, 3, [], [3, 8], [True, 8], "ab", [1.5, 8], [-4, 8]),
    "sequence": (3, [], [True], "a"),
    "boolean": (3, "a", None, 0.0),
    "size": (0, 3, 2.5, "a", (4,), (4, 4, 4), [nan, 4]),
    "loss": (None, 3, np.ones(2), "a"),
    "any": (),  # True or False, as Python sees it, or anything
}
FREE = {"progress", "trajectory", "flip", "zero_terminal_snr", "copy", "full", "train"}
# of files and models on the disk, each of which has tests of its own
ON_THE_DISK = {
    "ImageFolder", "load_diffusers", "load_digits", "load_fashion_mnist", "load_mnist", "load_model", "load_original",
    "save_diffusers", "save_model",
}  # fmt: skip
MADE_BY_TRAIN = {"TrainState", "no_grad"}  # the latter has no arguments

UNET, TOLD = UNet(**TINY), UNet(**TINY, classes=5, label_dropout=0.1)
X, T, RNG = IMAGES[:3], np.array([0, 1, 2]), np.random.default_rng(0)
LEARNED = Diffusion(DIFFUSION.schedule, variance="learned_range", loss_type="vlb")
COMMON = {
    "diffusion": (DIFFUSION, "diffusion"), "model": (UNET, "model"), "images": (X, "images"), "steps": (2, "steps"),
    "rng": (0, "seed"), "clip": (True, "clip"), "workers": (1, "integer >= 1"), "t": (T, "timesteps"),
    "labels": ([1, 2, 3], "labels"), "x0": (X, "images"), "x_t": (X, "images"), "x_prev": (X, "images"),
    "eps": (X, "array"), "prediction": (X, "array"), "path": ("a.gif", "path"), "max_norm": (1.0, "number > 0 or inf"),
    "theta": (np.ones(3), "vector"), "gradient": (np.ones(3), "vector"), "input_scale": (1.0, "number > 0"),
    "spacing": ("trailing", "name"), "columns": (2, "integer >= 1"), "scale": (2, "integer >= 1"),
    "gap": (2, "integer >= 0"), "objective": ("eps", "name"), "loss_type": ("simple", "name"),
}  # fmt: skip
"""What an argument of this name is, where TABLE does not say: something right, and its kind."""


PARAMETER = Parameter(np.ones(3))
TABLE = {
    tinyddpm.sample: dict(
        model=(TOLD, "model"), shape=(X.shape, "shape"), method=("ddim", "name"), callback=(None, "function"),
        guidance=(2.0, "number"), start=(X, "array"), eta=(0.5, "number in [0, 1]"),
    ),
    editing.denoise: dict(noisy=(X, "images"), sigma=(0.5, "number > 0"), method=("ddim", "name")),
    editing.sdedit: dict(strength=(0.5, "number in (0, 1]"), method=("ddim", "name")),
    editing.invert: dict(steps=(10, "steps"), iterations=(3, "integer >= 1")),
    editing.interpolate: dict(
        model=(TOLD, "model"), first=(X, "images"), last=(np.roll(X, 1, 0), "images"), count=(2, "integer >= 1"),
        steps=(10, "steps"), iterations=(3, "integer >= 1"),
    ),
    editing.inpaint: dict(mask=(np.eye(4) > 0, "mask"), jump=(1, "integer >= 1"), resamplings=(1, "integer >= 1")),
    editing.slerp: dict(a=(X, "images"), b=(np.roll(X, 1, 0), "images"), fractions=([0, 0.5], "fractions")),
    tinyddpm.EMA: dict(model=(UNET, "module"), decay=(0.5, "number in [0, 1)")),
    tinyddpm.Adam: dict(
        lr=(0.1, "number > 0"), betas=((0.9, 0.99), "betas"), eps=(1e-8, "number > 0"),
        weight_decay=(0.0, "number >= 0"),
    ),
    tinyddpm.Diffusion: dict(
        schedule=(DIFFUSION.schedule, "diffusion"), variance=("small", "name"),
        min_snr_gamma=(5.0, "number > 0 or inf"),
    ),
    tinyddpm.Schedule: dict(beta=([0.1, 0.2], "beta"), name=("a", "text"), parameters=({}, "mapping")),
    tinyddpm.make_schedule: dict(
        name=("cosine", "name"), T=(20, "integer >= 1"), s=(0.1, "number >= 0"), start=(0.0, "number in [0, 1)"),
        end=(1.0, "number in (0, 1]"), tau=(1.0, "number > 0"),
    ),
    tinyddpm.UNet: dict(
        dict.fromkeys(("in_channels", "out_channels", "blocks", "heads", "patch"), (1, "integer >= 1")),
        channels=((4, 8), "channels"), attention=((False, True), "sequence"), groups=(2, "integer >= 1"),
        dropout=(0.0, "number in [0, 1)"), encoding=("ddpm", "name"), head_channels=(None, "integer >= 1"),
        middle_attention=(True, "boolean"), norm_eps=(1e-6, "number > 0"), downsample_padding=(0, "integer >= 0"),
        center_input=(False, "boolean"), classes=(3, "integer >= 1"), image_size=(4, "size"),
        label_dropout=(0.1, "number in [0, 1)"),
    ),
    tinyddpm.Tensor: dict(data=(np.ones(3), "images")),
    tinyddpm.Parameter: dict(data=(np.ones(3), "images")),
    tinyddpm.backward: dict(loss=(PARAMETER.sum(), "loss")),
    tinyddpm.train: dict(
        model=(TOLD, "module"), images=(X, "array"), batch=(3, "integer >= 1"), steps=(1, "integer >= 1"),
        micro_batch=(3, "integer >= 1"), lr=(0.1, "number > 0"), warmup_steps=(0, "integer >= 0"),
        decay_steps=(0, "integer >= 0"), ema_decay=(0.5, "number in [0, 1)"), seed=(0, "integer >= 0"),
        resume=(None, "path"), stop=(None, "function"), ranks=(None, "function"), flip=(False, "boolean"),
    ),
    UNet.__call__: dict(x=(X, "images"), t=(T, "timesteps >= 0"), rng=(RNG, "generator"), labels=(T, "labels")),
    UNet.to: dict(device=("cpu", "device"), dtype=("float32", "dtype"), precision=("tf32", "name")),
    UNet.load_state_dict: dict(state=(UNET.state_dict(), "mapping")),
    Adam.step: dict(lr=(0.1, "number >= 0")),
    EMA.update: dict(theta=(np.ones(UNET.size, np.float32), "vector")),
    Diffusion.loss: dict(rng=(RNG, "generator")),
    Diffusion.posterior_mean: dict(x0=(X, "array")),
    Diffusion.eps_from_x0: dict(x0=(X, "array")),
    Diffusion.log_variance: dict(spread=(X, "array")),
    bound.vlb_terms: dict(spread=(X, "array"), diffusion=(LEARNED, "any"), x0=(X, "array"), clip=(False, "clip")),
    bound.prior_terms: dict(diffusion=(DIFFUSION, "any")),
    bound.bits_per_dim: dict(diffusion=(DIFFUSION, "any"), x0=(np.sign(X), "images"), model=(TOLD, "model")),
    clipping.limit: {},
    optim.clip_norm: {},
    pictures.to_uint8: {},
    pictures.grid: {},
    pictures.rows: dict(named=({"a": X}, "mapping"), columns=(("b",), "words")),
    pictures.page: dict(classes=(None, "any")),
    pictures.noising_strip: dict(diffusion=(DIFFUSION, "any")),
    pictures.format_of: {},
    pictures.save_picture: dict(picture=(Image.new("L", (2, 2)), "picture")),
    pictures.save_gif: dict(
        frames=([Image.new("L", (2, 2))], "frames"), seconds=(1.0, "number > 0"), hold=(1.0, "number >= 0")
    ),
    pictures.save_loss_curve: dict(losses=([1.0, 2.0], "numbers"), steps=([1, 2], "numbers")),
}  # fmt: skip
TABLE |= {
    getattr(Diffusion, name): {}
    for name in (
        "q_step", "q_sample", "target", "predict_x0", "predict_eps", "predict", "denoise", "p_mean_variance", "loss_at",
    )
}  # fmt: skip
OF = {  # whose methods are called
    "Diffusion": lambda: DIFFUSION, "UNet": lambda: TOLD, "Module": lambda: UNet(**TINY),
    "Adam": lambda: Adam(np.ones(3)), "EMA": lambda: EMA(UNET, 0.5),
}  # fmt: skip

# What is named otherwise in what is said, since it is checked where it is of that name.
ALSO = {"x0": "images", "x_t": "images", "x_prev": "images", "eps": "images"}


def arguments_of(function):
    """{name: (something right, its kind)} of all that a function takes by name, and what TABLE adds to that."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    known = COMMON | dict.fromkeys(FREE, (False, "any")) | TABLE[function]
    return {name: known[name] for name in [*names, *TABLE[function]] if name != "self"}


def call(function, tmp_path, name=None, value=None):
    """Call it with all that is right, but for this argument."""
    given = {argument: right for argument, (right, _) in arguments_of(function).items()}
    given |= {"path": tmp_path / given["path"]} if "path" in given else {}
    kind = function.__qualname__.rpartition(".")[0]
    owner = [OF[kind]()] if kind in OF and function is not Diffusion.log_variance else [LEARNED] if kind else []
    result = function(*owner, **given | ({} if name is None else {name: value}))
    return next(result) if function is tinyddpm.train else result


def public(*modules_and_classes):
    """Their functions that are not private, and were written there."""
    for place in modules_and_classes:
        for name, member in vars(place).items():
            here = getattr(member, "__module__", None) == getattr(place, "__module__", place.__name__)
            if inspect.isfunction(member) and here and not name.startswith("_"):
                yield member


def test_the_table_is_complete():
    exported = {getattr(tinyddpm, name) for name in set(tinyddpm.__all__) - ON_THE_DISK - MADE_BY_TRAIN}
    samplers = {editing.by_sampling, editing.ddim_inversion, editing.repaint}  # `sample` calls these
    editors = set(public(editing)) - samplers
    methods = {f for f in public(Diffusion, UNet, Adam, EMA, UNet.__base__) if len(inspect.signature(f).parameters) > 1}
    tables = {Diffusion.gather, Diffusion.signal_and_noise}  # what they take comes from the others
    assert exported | editors | methods - tables | set(public(pictures)) <= set(TABLE)
    for function in TABLE:
        arguments_of(function)  # a KeyError names the argument that no table knows


@pytest.mark.parametrize("function", TABLE, ids=lambda f: f.__qualname__)
def test_what_is_wrong_is_named(function, tmp_path):
    """And what is right is taken, or the rest would prove nothing."""
    if function is pictures.save_loss_curve:
        pytest.importorskip("matplotlib")
    call(function, tmp_path)
    for name, (_, kind) in arguments_of(function).items():
        for wrong in WRONG[kind]:
            if wrong is None and inspect.signature(function).parameters[name].default is None:
                continue
            what = f"{name} = {wrong!r}"
            with pytest.raises((TypeError, ValueError)) as refused:
                call(function, tmp_path, name, wrong)
                pytest.fail(f"{what} is taken")
            named, _, said = str(refused.value).partition(": ")
            assert {name, ALSO.get(name)} & {*named.split(", ")}, f"{what}: {refused.value}"
            given = (repr(wrong), type(wrong).__name__) if np.isscalar(wrong) else ("got ", "unknown")
            assert any(words in said for words in given), f"{what}: {refused.value}"


@pytest.mark.parametrize("function", TABLE, ids=lambda f: f.__qualname__)
def test_numbers_of_numpy_are_numbers(function, tmp_path):
    for name, (right, _) in arguments_of(function).items():
        for kind in {int: [np.int64], float: [np.float32]}.get(type(right), ()):
            call(function, tmp_path, name, kind(right))


@pytest.mark.parametrize("workers", WRONG["integer >= 1"])
def test_within_plain_too(workers):
    """Though there are no workers then."""
    with plain(), pytest.raises(ValueError, match="^workers: expected an integer >= 1, got"):
        sample(DIFFUSION, UNET, X.shape, workers=workers)


ZERO, ONE = np.zeros((2, 3)), np.ones((2, 3))
NORM = dict(gamma=np.ones(4), beta=np.zeros(4), groups=2)
BENT, DARK = Diffusion(DIFFUSION.schedule, "x0"), Diffusion(Schedule(DIFFUSION.schedule.beta, 0.5))
SLERP = "a, b: expected finite vectors, not 0 nor opposite"
STEPS = "steps, iterations: of so few, x_t are off by as much as"
FLAT = "gamma: with these parameters it is flat at most of the steps"


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda: editing.slerp(ZERO, ONE, [0.5]), SLERP),
        (lambda: editing.slerp(ONE, np.array([[1, 1, 1], [0, 0, 0.0]]), [0.5]), SLERP),
        (lambda: editing.slerp(ONE * nan, ONE, [0.5]), SLERP),
        (lambda: editing.slerp(ONE, ONE * 1e200, [0.5]), SLERP),  # whose length is not finite
        (lambda: editing.slerp(ONE, -2 * ONE, [0.25]), SLERP),
        (lambda: editing.slerp(ONE, [0, 0, 1e-9] - ONE, [0.5]), SLERP),
        (lambda: editing.slerp(ONE, ONE[:1], [0.5]), r"a, b: expected two arrays \(N, ...\) of one shape"),
        (lambda: editing.interpolate(DIFFUSION, lambda x, t: 0 * x, 0 * X, X, steps=9), SLERP),
        (lambda: editing.invert(BENT, lambda x, t: np.sin(9 * x), X, 1), STEPS),
        (lambda: editing.invert(BENT, lambda x, t: np.sin(9 * x), X, 2, 1), STEPS),
        (lambda: sample(DIFFUSION, UNET, X.shape, steps=1, spacing="linspace"), "steps: the first, t = 0, is 1 image"),
        (lambda: sample(DIFFUSION, UNET, X.shape, steps=2, spacing="leading"), "steps: the first, t = 10, is 0.1"),
        (lambda: sample(DARK, UNET, X.shape, steps=1, spacing="linspace"), "steps: the first, t = 0, is 0.25 image"),
        (lambda: make_schedule("sigmoid", 100, tau=0.1), "gamma: it is flat at 20 of 100 steps, which add no noise"),
        (lambda: make_schedule("sigmoid", start=-1000, end=-999), FLAT),
        (lambda: make_schedule("cosine", end=1e-300), FLAT),
        (lambda: Diffusion(make_schedule()).loss(UNET, X * np.float32(nan), RNG), "x0: .* values from nan to nan"),
        (lambda: group_norm(np.ones((1, 4)), **NORM, eps=0), "eps: expected a number > 0, got 0"),
        (lambda: group_norm(np.ones((1, 4)), **NORM, eps=nan), "eps: expected a number > 0, got nan"),
        (lambda: embedding(ONE, index=np.array([-1])), r"index: expected integers in 0 ... 1, got \[-1\]"),
        (lambda: embedding(ONE, index=np.array([2])), r"index: expected integers in 0 ... 1, got \[2\]"),
        (lambda: embedding(ONE, index=np.array([0.5])), r"index: expected integers in 0 ... 1, got \[0.5\]"),
        (lambda: PARAMETER**nan, "exponent: expected a finite number, got nan"),
        (lambda: dropout(ONE, 0.5, 3), "rng: expected a generator from numpy.random.default_rng, or None, got int"),
        (lambda: pictures.grid(X * np.float32(nan)), "images: expected numbers in .-1, 1., got nan"),
        (lambda: pictures.grid(np.zeros((1, 4, 4, 1), np.uint8)), "images: expected an array of floats .*, got uint8"),
        (lambda: pictures.rows({"a": np.zeros((1, 4, 4, 1), int)}), "named: expected arrays of floats .*, got int64"),
    ],
)  # fmt: skip
def test_what_has_no_answer_is_said(use, said):
    """In an error or a warning, which is an error here."""
    with pytest.raises((TypeError, ValueError, UserWarning), match=f"^{said}"):
        use()


def test_what_is_degenerate_and_has_an_answer():
    np.testing.assert_array_equal(clipping.limit(ZERO, "dynamic"), ZERO)
    theta = np.ones(3)
    Adam(theta, betas=(0, 0)).step(np.zeros(3))
    Adam(theta).step(np.ones(3), lr=0)
    assert (theta == 1).all()
    np.testing.assert_array_equal(group_norm(np.ones((2, 3, 4)), **NORM).data, np.zeros((2, 3, 4)))
    ones = np.ones((1, 2))
    np.testing.assert_allclose(editing.slerp(ones, 3 * ones, [0, 0.5, 1])[0], [[1, 1], [2, 2], [3, 3]], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:steps, iterations")
@pytest.mark.parametrize("T", [1, 2, 3])
def test_a_schedule_of_few_steps(T):
    d = Diffusion(Schedule([0.3, 0.6, 0.9][-T:]))
    for use in (
        lambda: [sample(d, UNET, X.shape, method) for method in ("ddpm", "ddim", "dpm++")],
        lambda: [editing.denoise(d, UNET, X, 0.5), editing.sdedit(d, UNET, X, 0.5), editing.invert(d, UNET, X)],
        lambda: [editing.inpaint(d, UNET, X, np.eye(4) > 0), d.bits_per_dim(UNET, np.sign(X), progress=False).terms],
    ):
        assert np.isfinite(np.concatenate([np.ravel(result) for result in use()])).all()
