"""How diffusion works, shown on the digit 3 in three minutes: `python examples/lesson.py`

Six short steps, each of which prints what it shows; 1, 3 and 6 draw pictures into runs/lesson too. Read along here:
every step is a function, and the formulas are those of Ho et al. 2020. Nothing else need be read before.
"""

import pathlib

import numpy as np

from tinyddpm import Diffusion, UNet, cli, load_digits, make_schedule, no_grad, sample, train
from tinyddpm.autograd.tensor import as_array
from tinyddpm.bar import progress_bar
from tinyddpm.files.pictures import rows

T = 1000
SHOWN = [49, 99, 199, 299, 399, 499, 699, 999]  # timesteps of which pictures are drawn and numbers printed


def say(text):
    print(text, flush=True)


def at(t):
    return f"t = {t}"


def noise_step_by_step(diffusion, x0, out, rng):
    """1. A digit becomes noise: step by step, or in one jump."""
    say("""
1. Noise, step by step

A digit x_0 is 784 numbers from -1, black, to 1, white. At each of 1,000 steps a little random noise is added to each
of them, and each is shrunk a little, so that their spread does not grow:

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps,    eps ~ N(0, 1) for each pixel        (equation 2)

A thousand steps need not be taken, though. With alpha_bar_t = (1 - beta_1) (1 - beta_2) ... (1 - beta_t), they come to

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                                   (equation 4)

Here are 200 copies of one digit, noised either way; the program counts t from 0, so that its 999 is the paper's 1000.
At the brightest pixel, over the copies:

          by the formula      step by step       in one jump
    t     mean   variance    mean   variance    mean   variance""")
    copies, pixel = x0.repeat(200, axis=0), np.unravel_index(x0[0].argmax(), x0[0].shape)
    s, x, pictures = diffusion.schedule, copies, {"step by step": [x0[0]], "in one jump": [x0[0]]}
    for t in range(T):
        ts = np.full(len(copies), t)
        x = diffusion.q_step(x, ts, rng.standard_normal(x.shape, np.float32))
        if t in SHOWN:
            jumped = diffusion.q_sample(copies, ts, rng.standard_normal(x.shape, np.float32))
            seen = [values[(slice(None), *pixel)] for values in (x, jumped)]
            formula = np.sqrt(s.alpha_bar[t]) * x0[0][pixel], 1 - s.alpha_bar[t]
            numbers = [*formula, *(f(values) for values in seen for f in (np.mean, np.var))]
            say(f"    {t:3}  " + "   ".join(f"{a:6.2f} {b:8.2f}" for a, b in zip(numbers[::2], numbers[1::2])))
            pictures["step by step"].append(x[0])
            pictures["in one jump"].append(jumped[0])
    page = rows({name: np.stack(images) for name, images in pictures.items()}, columns=["x_0", *map(at, SHOWN)])
    page.save(out / "1_noise.png")
    say("\nThey agree, as far as 200 copies can. At the end nothing is left of the digit. Look at 1_noise.png.")


def step_back(diffusion, rng):
    """2. One step back, if the digit were known."""
    t, x0, n = 300, 0.7, 2_000_000
    s = diffusion.schedule
    before = np.sqrt(s.alpha_bar_prev[t]) * x0 + np.sqrt(1 - s.alpha_bar_prev[t]) * rng.standard_normal(n)
    after = np.sqrt(1 - s.beta[t]) * before + np.sqrt(s.beta[t]) * rng.standard_normal(n)
    say(f"""
2. One step back

Can noise be taken away again? One step, if the digit is known, yes: of all x_{{t-1}} that may have become the x_t that
we see, Bayes' rule says how likely each is. It is a normal distribution again, with mean and variance

    mean = (sqrt(alpha_bar_{{t-1}}) beta_t x_0 + sqrt(1 - beta_t) (1 - alpha_bar_{{t-1}}) x_t) / (1 - alpha_bar_t)
    variance = beta_t (1 - alpha_bar_{{t-1}}) / (1 - alpha_bar_t)                              (equation 7)

Is that so? Take a pixel with x_0 = {x0}, noise it {n:,} times to t = {t}, and look only at those that arrived near x_t:

               by the formula     of those that came by
     x_t       mean   variance       mean   variance""")
    for x_t in (-1.0, 0.0, 1.0):
        mean = s.posterior_mean_coef_x0[t] * x0 + s.posterior_mean_coef_xt[t] * x_t
        near = before[np.abs(after - x_t) < 0.005]
        say(f"    {x_t:4.1f}    {mean:7.3f}   {s.posterior_variance[t]:8.4f}    {near.mean():7.3f}   {near.var():8.4f}")
    say("\nIt is, but for chance. Only, we do not know x_0. Something has to guess it: that is all the network does.")


def ideal(data, schedule):
    """The best guess of x_0 from x_t, if it must be one of the images `data`: a function (x_t, t) -> x_0.

    Each of them, y_i, would have become this x_t with a probability that falls with its distance, so that the mean is

        E[x_0 | x_t] = sum_i w_i y_i,   w = softmax(-||x_t - sqrt(alpha_bar_t) y_i||^2 / (2 (1 - alpha_bar_t)))
    """
    y = data.reshape(len(data), -1)

    def guess(x_t, t):
        x, bar = x_t.reshape(len(x_t), -1), schedule.alpha_bar[t][:, None].astype(x_t.dtype)
        away = (x * x).sum(1)[:, None] - 2 * np.sqrt(bar) * x @ y.T + bar * (y * y).sum(1)
        logits = -away / (2 * (1 - bar))
        w = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (w / w.sum(axis=1, keepdims=True) @ y).reshape(x_t.shape).astype(x_t.dtype)

    return guess


def best_guess(diffusion, x0, guess, out, rng):
    """3. The best guess that can be made."""
    x = np.concatenate(
        [diffusion.q_sample(x0, np.array([t]), rng.standard_normal(x0.shape, np.float32)) for t in SHOWN]
    )
    page = rows({"x_t": x, "best guess": guess(x, np.array(SHOWN))}, columns=[*map(at, SHOWN)])
    page.save(out / "3_best_guess.png")
    say("""
3. The best guess

If all that exists are the 1,000 threes that we have, the best guess of what is behind x_t can be computed: the mean of
all of them, of which each counts as much as it is likely to have become this x_t. Look at 3_best_guess.png: under
little noise it is the very digit; under much, the mean of all, since it may be any. A network that is trained on these
digits is pushed towards this guess. On them nothing has a smaller error; but the network cannot look them up.""")


def learn(diffusion, threes, steps, workers, seed):
    """4. A network learns to guess."""
    # patch=2: it takes squares of 2 x 2 pixels as one, which is less work
    unet = UNet(channels=(32, 64), blocks=1, attention=(False, False), patch=2, rng=seed)
    say(f"""
4. A network learns to guess

A U-Net of {unet.size:,} parameters is shown noisy threes, {steps:,} times 32 of them, each at a t and with noise drawn
anew, and is told t. Each time its parameters are changed a little to make

    loss = mean of (x_0 - guess(x_t, t))^2                     (equation 14, but for x_0 rather than the noise)

smaller; the gradient, which says in which direction, comes from autograd/backward.py. Ho et al. let the network guess
eps instead; by equation 4 either tells the other, but x_0 is what one can look at.""")
    loop = train(unet, diffusion, threes, steps, 32, lr=4e-3, decay_steps=steps // 2, workers=workers, seed=seed)
    bar = progress_bar(loop, "training", steps, unit="step")
    for state in bar:
        bar.set_postfix_str(f"loss {state.loss:.3f}", refresh=False)
    return state.ema.model


def compare(diffusion, guesses, threes, unseen, rng):
    """5. Who guesses best?"""
    say("""
5. Who guesses best?

The error of both, mean of (x_0 - guess)^2, for threes that both have seen and for others that neither has; the bars
are the network's, for others:

      t   known: ideal  network    others: ideal  network""")
    for t in SHOWN:
        errors = []
        for images in (threes[::20], unseen[::4]):
            ts = np.full(len(images), t)
            x = diffusion.q_sample(images, ts, rng.standard_normal(images.shape, np.float32))
            errors += [np.mean((guess(x, ts) - images) ** 2) for guess in guesses]
        known, others = (f"{best:.3f}    {learned:.3f}" for best, learned in (errors[:2], errors[2:]))
        say(f"    {t:3}         {known}            {others}   {'#' * round(50 * errors[3])}")
    say("""
Of what it knows, the ideal guesser is better, as it must be. Of others the network is better, until noise hides nearly
everything: the ideal guesser can only ever guess what it has, the network has had to find out what makes a three.""")


def generate(diffusion, unet, guess, threes, unseen, out, seed, workers):
    """6. From noise to digits."""
    say("""
6. From noise to digits

Begin with nothing but noise, x_T, and go back: guess x_0, take the step of 2. with the guess, add noise as it says, and
again. Fifty steps that are twenty times as long do about as well as all thousand.""")
    ts, guessed = [], []

    def watch(t, x, x0):
        ts.append(t)
        guessed.append(x0[0])

    settings = {"shape": (10, *threes.shape[1:]), "steps": 50, "rng": seed}
    path = sample(diffusion, unet, callback=watch, trajectory=True, workers=workers, **settings)  # all x_t
    digits, repeated = path[-1], sample(diffusion, guess, workers=1, **settings)
    chosen = np.linspace(0, 49, 10).round().astype(int)
    way = {"x_t": path[chosen, 0], "guess": np.stack([guessed[i] for i in chosen])}
    rows(way, columns=[at(ts[i]) for i in chosen]).save(out / "6_way_back.png")

    def nearest(images):
        away = np.sqrt(((images[:, None] - threes) ** 2).mean(axis=(2, 3, 4)))
        return threes[away.argmin(axis=1)], away.min(axis=1).mean()

    (of_network, far), (of_ideal, near), (_, apart) = nearest(digits), nearest(repeated), nearest(unseen[::4])
    names = "network's digits", "nearest known", "ideal guesser's", "nearest to these"
    rows(dict(zip(names, (digits, of_network, repeated, of_ideal)))).save(out / "6_digits.png")
    say(f"""
6_way_back.png is one digit on its way, 6_digits.png the outcome: ten by the network, ten by the ideal guesser, and
under each the known digit that is nearest to it: {far:.2f} away from the network's, on average (root mean square), and
{near:.2f} away from the ideal guesser's; real threes that neither has seen are {apart:.2f} away from theirs. So the one
makes threes that nobody has written, not all of them good after so short a training; the other, whose loss on the known
digits is the least there can be, only repeats these.
""")


def main(steps, seed, workers, out):
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    (images, labels), (others, of_others) = load_digits(), load_digits(train=False)
    threes, unseen = images[labels == 3], others[of_others == 3]
    diffusion = Diffusion(make_schedule("linear", T), objective="x0")
    guess = ideal(threes, diffusion.schedule)

    noise_step_by_step(diffusion, threes[:1], out, rng)
    step_back(diffusion, rng)
    best_guess(diffusion, threes[:1], guess, out, rng)
    unet = learn(diffusion, threes, steps, workers, seed)

    def network(x, t):
        with no_grad():
            return as_array(unet(x, t))

    compare(diffusion, (guess, network), threes, unseen, rng)
    generate(diffusion, unet, guess, threes, unseen, out, seed, workers)
    say(f"All pictures are in {out}. How the same is done for all ten digits: examples/mnist_ddpm.py.")


if __name__ == "__main__":
    options = cli.Options(__doc__)
    options.add("--steps", type=int, default=300, least=1, help="of training [%(default)s]")
    options.add("--seed", type=int, default=0, least=0, help="another one gives other digits [%(default)s]")
    options.add("--workers", type=int, least=1, help="how many work side by side [one per CPU]")
    options.add("--out", type=cli.any_path, default=pathlib.Path("runs/lesson"), help="folder [%(default)s]")
    cli.run(lambda: main(**vars(options.parse_args())))
