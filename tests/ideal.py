"""Models without a network whose answer is known, above all the ideal denoiser of a finite data set, in closed form.

If x_0 is one of the images y_1 ... y_n, each as likely, then q(y_i | x_t) is a softmax over the data,

    w_i = softmax_i(-||x_t - sqrt(alpha_bar_t) b y_i||^2 / (2 (1 - alpha_bar_t)))

and the x_0 that is right on average is E[x_0 | x_t] = sum_i w_i y_i. No network has a smaller squared error.
"""

import numpy as np


def at(*t):
    return np.array(t)


def image(*values):
    """Images of one pixel."""
    return np.array(values, dtype=float).reshape(-1, 1, 1, 1)


def column(table, t):
    """table[t] to go with images (N, H, W, C)."""
    return table[t].reshape(-1, 1, 1, 1)


def behind(schedule, x, t):
    """The x_t of which a network sees x, and alpha_bar_t."""
    bar = column(schedule.alpha_bar, t)
    return x * np.sqrt((schedule.input_scale**2 - 1) * bar + 1), bar


def zeros(x, t):
    return np.zeros_like(x)


def in_float64(model):
    """A function (x, t) as a model that works in float64."""
    model.dtype = np.dtype("float64")
    return model


def moved(network, by=0.1, seed=0):
    """A network whose weights are no longer those that it starts with, some of which are 0."""
    for p in network.parameters():
        p.data = (p.data + by * np.random.default_rng(seed).standard_normal(p.shape)).astype(p.dtype)
    return network


def prediction(diffusion, x_t, bar, x0):
    """What the network is to say of x_0, for the diffusion's objective, worked out here."""
    b_x0 = diffusion.schedule.input_scale * x0
    eps = (x_t - np.sqrt(bar) * b_x0) / np.sqrt(1 - bar)
    return {"x0": x0, "eps": eps, "v": np.sqrt(bar) * eps - np.sqrt(1 - bar) * b_x0}[diffusion.objective]


def expected_x0(data, schedule, x_t, t):
    """E[x_0 | x_t] for images x_t (N, H, W, C), timesteps t (N,) and data (n, H, W, C)."""
    bar = schedule.alpha_bar[t].reshape(-1, 1)
    x, y = x_t.reshape(len(x_t), -1).astype(float), data.reshape(len(data), -1).astype(float)
    away = x[:, None] - np.sqrt(bar)[:, None] * schedule.input_scale * y
    logits = -(away**2).sum(2) / (2 * (1 - bar))
    w = np.exp(logits - logits.max(1, keepdims=True))
    return (w / w.sum(1, keepdims=True) @ y).reshape(x_t.shape)


def ideal_denoiser(data, diffusion):
    """A model (x, t) -> prediction that makes the best of what it sees, for the diffusion's objective."""

    def model(x, t):
        x_t, bar = behind(diffusion.schedule, x, t)
        return prediction(diffusion, x_t, bar, expected_x0(data, diffusion.schedule, x_t, t)).astype(x.dtype)

    return model


def gaussian(diffusion, s=0.5):
    """The ideal denoiser of data N(0, s^2): linear, and nothing like any picture."""

    def model(x, t):
        (x_t, bar), b = behind(diffusion.schedule, x, t), diffusion.schedule.input_scale
        return prediction(diffusion, x_t, bar, s * s * b * np.sqrt(bar) / (bar * b * b * s * s + 1 - bar) * x_t)

    return in_float64(model)
