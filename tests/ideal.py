"""The ideal denoiser: for a finite data set, the best prediction has a closed form, so it needs no training.

If x_0 is one of the images y_1 ... y_n, each as likely, then q(y_i | x_t) is a softmax over the data,

    w_i = softmax_i(-||x_t - sqrt(alpha_bar_t) b y_i||^2 / (2 (1 - alpha_bar_t)))

and the x_0 that is right on average is E[x_0 | x_t] = sum_i w_i y_i. No network has a smaller squared error.
"""

import numpy as np


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
    s = diffusion.schedule

    def model(x, t):
        column = lambda table: table[t].reshape(-1, *[1] * (x.ndim - 1))
        bar = column(s.alpha_bar)
        x_t = x * np.sqrt((s.input_scale**2 - 1) * bar + 1)  # what a network sees is divided by this
        x0 = expected_x0(data, s, x_t, t)
        if diffusion.objective == "x0":
            prediction = x0
        else:
            eps = (x_t - np.sqrt(bar) * s.input_scale * x0) / np.sqrt(1 - bar)
            v = np.sqrt(bar) * eps - np.sqrt(1 - bar) * s.input_scale * x0
            prediction = eps if diffusion.objective == "eps" else v
        return prediction.astype(x.dtype)

    return model
