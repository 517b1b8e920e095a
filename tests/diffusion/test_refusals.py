"""What the diffusion side refuses, and in which words: a row for each message, with one or more inputs that are wrong.

Every wrong kind of every argument, such as nan, True and "2" for a number, is in tests/test_arguments.py.
"""

import math

import numpy as np
import pytest
from ideal import at, zeros
from test_every_use import OF_PICTURES, USES

from tinyddpm import Diffusion, Schedule, Tensor, UNet, make_schedule, sample
from tinyddpm.diffusion.bound import vlb_terms
from tinyddpm.diffusion.checks import LOSSES
from tinyddpm.diffusion.clipping import limit
from tinyddpm.diffusion.editing import denoise, inpaint, interpolate
from tinyddpm.diffusion.sample import respace, timesteps
from tinyddpm.diffusion.schedule import BETA, GAMMA, SCHEDULES, linear

nan, inf = math.nan, math.inf
S = Schedule(linear(30, 1e-4, 0.5))
D, LEARNED = Diffusion(S), Diffusion(S, variance="learned_range", loss_type="vlb")
ENDS = make_schedule("cosine", 10, zero_terminal_snr=True)
X, T2, RNG = np.zeros((2, 4, 4, 1)), at(0, 1), np.random.default_rng(0)
TOLD = UNet(channels=(4,), blocks=1, attention=(False,), groups=2, classes=5)
LEVELS, HALF = np.arange(256) / 127.5 - 1, np.eye(4) > 0
OFF = [LEVELS / 2 + 0.5, 0.999 * LEVELS, LEVELS + 2 / 255, LEVELS - 2 / 255, 255 * LEVELS]
twice = lambda x, t: np.concatenate([x, x], -1)
wide = lambda x, t: np.sin(3 * x.astype(np.float64))
draw = lambda model=zeros, shape=X.shape, **settings: sample(D, model, shape, **settings)
bits = lambda x0=X + 1, model=zeros, **settings: D.bits_per_dim(model, x0, progress=False, **settings)
loss = lambda model=zeros, x0=X, rng=RNG, **settings: Diffusion(S, **settings).loss(model, x0, rng)


def asks(function, *names, of=(), **settings):
    """The function of what the argument of this name is, or those of several are."""
    return lambda value: function(*of, **settings, **dict(zip(names, value if len(names) > 1 else [value])))


# fmt: off
REFUSED = [  # a function of the wrong value, wrong values, what is said, the error if it is no ValueError
    (Schedule, ([], [0.0, 0.1], [1.0, 0.1], [0.1, 1.0, 0.1], [0.1, 1.1], [-0.1], [[0.1]], [0.1, nan], 0.1),
     r"^beta: expected a vector of one or more numbers in \(0, 1\), of which the last may be 1, got "),
    (Schedule, ([1e-17, 0.5], [0.5, 1e-17], [0.999] * 200),
     "^beta: alpha_bar must fall at every step, but .* is 0 before the last; got"),
    (asks(make_schedule, "shift", of=("cosine_logsnr", 10)), (nan, inf, "0.02", None),
     "^shift: expected a finite number, got (nan|inf|'0.02'|None)$"),
    (make_schedule, ("liner",), f"name: unknown schedule 'liner'; known: {', '.join(SCHEDULES)}"),
    (make_schedule, (np.array([0.1, 0.2]),), r"name: unknown schedule array.*\(of your own: Schedule\(beta\)\)"),
    *[(asks(make_schedule, "beta_start", "beta_end", of=(name, 10)), ((0, 0.1), (0.2, 0.1), (0.1, 1.0), (-0.1, 0.1)),
       "beta_start, beta_end: expected 0 < beta_start <= beta_end < 1, got") for name in BETA],
    *[row for name in ("cosine", "sigmoid") for row in (
       (asks(make_schedule, "start", "end", of=(name, 10)), ((0.5, 0.5), (0.7, 0.2)),
        "start, end: expected .*start < end.*, got (0.5, 0.5|0.7, 0.2)"),
       (asks(make_schedule, "tau", of=(name, 10)), (0, -1), "tau: expected a number > 0, got"))],
    (asks(make_schedule, "start", "end", of=("cosine", 10)), ((-0.1, 1), (0, 1.1)),
     "start, end: expected 0 <= start < end <= 1"),
    *[(asks(make_schedule, "logsnr_max", "logsnr_min", of=(name, 10)), ((1, 1), (-1, 1), (101, 0), (0, -101)),
       r"logsnr_max, logsnr_min: expected -100 <= logsnr_min < logsnr_max <= 100, got (1|-1|101|0).0, (1|0|-101).0$")
      for name in ("cosine_logsnr", "sigmoid_logsnr")],
    *[(asks(make_schedule, key, of=(name, 100)), (value,),
       "^gamma: with these parameters it is flat at most of the steps, which add no noise$")
      for name, key, value in (("sigmoid", "tau", 1e-3), ("sigmoid", "end", 1e6), ("cosine", "tau", 1e4))],
    (asks(make_schedule, "name", T=10, slope=1), (*BETA, *GAMMA), "slope", TypeError),
    (asks(make_schedule, "T", zero_terminal_snr=True), (1,), "zero_terminal_snr: takes 2 steps or more, got T = 1"),

    (Diffusion, ("linear",), "schedule: expected a Schedule from make_schedule, got str", TypeError),
    (asks(Diffusion, "objective", of=(S,)), ("noise",), "objective: unknown 'noise'; known: eps, x0, v$"),
    (asks(timesteps, "spacing", of=(10, [1, 2])), ("karras",),
     "spacing: unknown 'karras'; known: trailing, leading, linspace"),
    (asks(Diffusion, "loss_type", of=(S,), variance="learned_range"), LOSSES[:-2],
     "loss_type: '(simple|weighted_eps|weighted_mu|min_snr)' cannot train variance 'learned_range'"),
    (asks(Diffusion, "variance", of=(S,), loss_type="hybrid"), ("small", "large"),
     "'hybrid' trains variance 'learned_range', but variance is '(small|large)"),
    *[(asks(Diffusion, "objective", "loss_type", of=(ENDS,)), (pair,),
       rf"{name}: the schedule ends with alpha_bar = 0 \(zero terminal SNR\), where the {said}$")
      for pair, name, said in (
       (("eps", "simple"), "objective", "noise does not tell the image; take 'v' or 'x0', not 'eps'"),
       (("v", "weighted_eps"), "loss_type", "weight is infinite; take another than 'weighted_eps'"),
       (("x0", "min_snr"), "loss_type", "weight is 0, .* take another than 'min_snr'"))],
    (asks(limit, "clip", of=(X,)), ("static", None, 0, -1, inf, nan, ("dynamic", 0.5), ("dynamic", 0.5, 0.9),
      ("dynamic", 1.1, 2), ("dynamic", -0.1, 2), ("dynamic", "a", 2), ("static", 0.5, 2)),
     "clip: expected True, False, a number > 0, 'dynamic' or .* with 0 <= quantile <= 1 <= most, got "),

    (asks(D.q_sample, "t", x0=X, eps=X), (at(0, 30), at(-1, 0)),
     "t: timesteps run from 0 to 29, got (0 ... 30|-1 ... 0)$"),
    (asks(Diffusion(S, "x0").predict_x0, "t", x_t=X, prediction=X), (at(1),),
     "^t: expected 2 timesteps, one for each image, got shape"),
    (asks(Diffusion(S, "x0").predict_x0, "t", x_t=X, prediction=X), (at(0.0, 1.0), [0, 1], 3),
     "^t: expected a NumPy array of integers, got (float64|list|int)", TypeError),
    *[(asks(getattr(D, method), name, t=T2, **{x: X}), (X[:, :2],),
       rf"^{name}: expected the shape of the images, \(2, 4, 4, 1\), got \(2, 2, 4, 1\)") for method, x, name in (
       ("q_step", "x_prev", "eps"), ("q_sample", "x0", "eps"), ("target", "x0", "eps"), ("posterior_mean", "x_t", "x0"),
       ("predict_x0", "x_t", "prediction"), ("predict_eps", "x_t", "prediction"), ("eps_from_x0", "x_t", "x0"))],
    *[(use, (X.astype(np.uint8),), "^images: expected floats in .-1, 1., got uint8", TypeError)
      for use in (asks(D.q_sample, "x0", t=T2, eps=X), asks(D.log_variance, "x_t", t=T2))],
    *[(use, (X,), "^spread: with variance 'learned_range' it is needed, the second half of")
      for use in (lambda x: LEARNED.log_variance(x, T2), lambda x: vlb_terms(LEARNED, x, x, T2, x))],
    (asks(loss, "rng"), (0,), "rng: expected a generator from numpy.random.default_rng, got int", TypeError),
    *[row for use in (asks(loss, "x0"), bits) for row in (
       (use, (X[:0], X[0]), "x0: expected one or more images"),
       (use, (X.astype("uint8"), X.astype("float16")),
        "x0: expected float32 or float64 images in .-1, 1., got (uint8|float16)", TypeError),
       (use, (X.tolist(), Tensor(X)), "x0: expected an array of images, got (list|Tensor)", TypeError))],
    (lambda levels: bits(levels.reshape(1, -1, 1, 1)), [*OFF, *[np.append(wrong, nan) for wrong in (*OFF, LEVELS)]],
     "x0: expected the levels k / 127.5 - 1 of 8-bit images.* got values from"),

    *[(use, (None,), r"^model: expected a function \(x_t, t\) -> prediction, got NoneType$", TypeError)
      for use in (draw, loss, asks(bits, "model"))],
    (asks(draw, "callback"), ("a",), r"^callback: expected a function \(t, x, x0\), got str$", TypeError),
    (lambda model: LEARNED.p_mean_variance(model, X, T2), (zeros,),
     r"it must return 2 channels for images of 1 \(a U-Net with out_channels=2\)"),
    (draw, (lambda x, t: x[..., :0], lambda x, t: x[:1], twice),
     r"model: expected it to return the shape of x_t, \(2, 4, 4, 1\), got \((1|2), 4, 4, (0|1|2)\)$"),
    (asks(loss, "model", x0=X.astype(np.float32)), (wide,),
     "^model: expected it to return float32, as x_t is, got float64", TypeError),
    (draw, (lambda x, t: x * np.float32(nan),), r"^model: it led to images .* not finite; are its weights\?$",
     FloatingPointError),
    (asks(draw, "start"), (X * nan,), "not finite; are its weights, and the start?", FloatingPointError),

    (asks(draw, "method"), ("dpm",), r"method: unknown sampler 'dpm'; known: ddpm, ddim, dpm\+\+"),
    (asks(draw, "eta", seed=1), (0.5,), "settings: 'ddpm' takes none, got (eta, seed|seed, eta)$", TypeError),
    (asks(draw, "shape"), ((2, 2, 1), (0, 2, 2, 1), (2, True, 2, 1), 16),
     r"shape: expected \(N, H, W, C\), each at least 1"),
    *[(asks(use, "steps", of=of), (0, 31, 2.0, "3"),
       "steps: expected an integer from 1 to 30, the steps of the schedule, got")
      for use, of in ((draw, ()), (denoise, (D, zeros, X, 0.5)))],
    (asks(draw, "steps"), ([], [3, 3], [5, 2, 9], [-1, 4], [0, 30], [30], [1.0, 2.0], [[1]], [5, 5, 3], ["a"]),
     "steps: expected timesteps within 0 ... 29 in order, each once, got"),
    (lambda ts: respace(D, np.array(ts, int)), ([], [3, 3], [5, 2], [-1, 4], [0, 30]),
     "ts: expected ascending timesteps within 0 ... 29, got"),
    (asks(draw, "start"), (X[:1], X > 0, X * 1j, X.tolist(), 1.0),
     r"start: expected .* of the images, \(2, 4, 4, 1\), got (float64 \(1, 4, 4, 1\)|bool|complex|list|float)"),
    (asks(draw, "labels"), ([1], [[1, 2]], 3), "labels: expected 2, one for each image, got shape"),
    (asks(draw, "guidance", model=TOLD), (2.0,), "guidance: 2.0 towards which labels[?] Give labels too"),
    (asks(draw, "guidance", model=TOLD, labels=[0, 1]), (2.0,),
     "labels: expected .*; a network made with label_dropout can do without", TypeError),

    *[row for name, (use, fixed) in USES.items() for row in (
       (lambda d, use=use: use(zeros, d, X), (D,), "diffusion: expected a Diffusion, got function", TypeError),
       (asks(use, "colour", of=(D, zeros, X)), ("red",), r"settings: '[a-z_+]+' takes .*, got colour$", TypeError),
       *[(asks(use, key, of=(D, zeros, X)), (1,), f"settings: {name} sets {key} itself", TypeError) for key in fixed])],
    (asks(denoise, "sigma", of=(D, zeros, X)), (105,), "sigma: 105.0 is more noise than this schedule knows, 101.9"),
    (lambda d: denoise(d, zeros, X, 0.5), (Diffusion(Schedule([0.1])),), "sigma: 0.5 is more noise .*, 0.3333$"),
    (asks(denoise, "sigma", of=(Diffusion(ENDS, "v"), zeros, X)), (1e5,), "sigma: 100000.0 is more noise .*, [0-9]+"),
    (asks(denoise, "noisy", of=(D, zeros), sigma=0.5), (255 * (X + 1),),
     r"noisy: expected values within \[-6, 6\], got -?[0-9.]+ to 255; of 8-bit"),
    (asks(denoise, "steps", of=(D, zeros, X, 0.5)), ([3, 4],),
     "steps: expected how many, since which they are depends on where to begin"),
    (asks(interpolate, "count", of=(D, zeros, X, X)), (1, 2.0, "3"), "count: expected an integer >= 2, got"),
    (asks(interpolate, "last", of=(D, zeros, X)), (X[:1],),
     r"first, last: expected two arrays of one shape, got \(2, .* and \(1, 4, 4, 1"),
    (asks(interpolate, "last", of=(D, zeros, X)), (X + 1.5, X - 1.5), r"last: expected values within \[-1, 1\], got"),
    (asks(interpolate, "labels", of=(D, zeros, X, X)), ([1], 3), "labels: expected 2, one for each pair, got shape"),
    (asks(inpaint, "mask", of=(D, zeros, X)), [np.ones(n, bool) for n in ((4, 5), (5, 4, 4), (2, 4, 4, 1), ())],
     r"mask: expected shape \(4, 4\) or \(2, 4, 4\), as the images have, got"),
    (asks(inpaint, "mask", of=(D, zeros, X)), (HALF.astype(int), HALF.astype(float), None),
     "mask: expected booleans, True where pixels are known, got", TypeError),
    *[row for use, name in zip(OF_PICTURES, ("noisy", "images", "images", "first", "images")) for row in (
       (asks(USES[use][0], "x", of=(D, zeros)), (X.astype(np.uint8),),
        f"^{name}: expected an array of floats, images in .-1, 1., got uint8", TypeError),
       (asks(USES[use][0], "x", of=(D, zeros)), (X[0], X[:0], X[..., 0]),
        rf"^{name}: expected one or more images \(N, H, W, C\), got shape"),
       (asks(USES[use][0], "x", of=(D, zeros)), (127.5 * (X + 1), X * nan, X + inf),
        f"^{name}: expected values within .*, got .*; of 8-bit levels k, images are"))],
]
# fmt: on


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[2][:60])
def test_what_is_wrong_is_refused_in_these_words(row):
    use, wrong, said, error = (*row, ValueError)[:4]
    for value in wrong:
        with pytest.raises(error, match=said):
            use(value)
            pytest.fail(f"{value!r} is taken")


def test_what_looks_alike_is_taken():
    for objective, variance, loss_type in (("x0", "small", "weighted_mu"), ("v", "large", "vlb")):
        Diffusion(ENDS, objective, variance, loss_type)
    Diffusion(ENDS, "v", "learned_range", "vlb")
    bits(LEVELS.reshape(1, -1, 1, 1).astype(np.float32))
