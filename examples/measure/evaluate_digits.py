"""How good are generated digits? `python examples/measure/evaluate_digits.py runs/mnist/model.safetensors`

Of a model or a training's checkpoint 1,000 digits are drawn; a folder of pictures or an .npz of images is taken as it
is. A small classifier looks at them and at real digits, and beside each number stands what as many real digits score:

    Frechet distance   ||m - m'||^2 + tr(S + S' - 2 (S S')^(1/2)) between the means and covariances of the classifier's
                       features of these digits and of held-out ones (Heusel et al. 2017, with a network of their own)
    confident          share that it calls some digit with a probability above 0.9
    as asked           share that it calls what the model was asked for
    classes            share of each digit: about a tenth
    precision          share that lies among real digits, as far apart as these lie from their third neighbours
    recall             share of real digits that lies, likewise, among these (Kynkaanniemi et al. 2019, section 2)
    nearest            distance of the pixels from those of the nearest digit that the model has learned from; a
                       smooth digit is nearer to others than a real one is
    repeated           share that is nearer than all but 1 % of the held-out digits that are read as the same: much
                       more hints at digits learned by heart

Real digits are drawn five times, and if the model was asked for classes, as many of each. The classifier learned from
the 50,000 of MNIST's training digits that do not come with the package, by `python examples/measure/evaluate_digits.py
--train examples/measure/digit_classifier.safetensors`. Held-out are 2,000 digits of MNIST's test set that come with the
package, or with --data mnist all 10,000, which take part in no training.
"""

import json
import pathlib
import zipfile

import numpy as np

from tinyddpm import ImageFolder, cli, load_digits, load_model, sample, train
from tinyddpm.autograd.functional import softmax_rows
from tinyddpm.autograd.tensor import as_array, no_grad, op
from tinyddpm.bar import progress_bar
from tinyddpm.diffusion.sample import SAMPLERS
from tinyddpm.files.data import load_mnist
from tinyddpm.files.replacing import replacing
from tinyddpm.files.run_folder import model_in
from tinyddpm.files.tensors import stored_tensors, write_tensors
from tinyddpm.network.nn import Conv2d, GroupNorm, Linear, Module
from tinyddpm.speed.workers import worker_threads

CLASSIFIER = pathlib.Path(__file__).with_name("digit_classifier.safetensors")

# ---------------------------------------------------------------------------------------------------- the classifier


@op
def cross_entropy(scores, *, labels):
    """Mean of -ln p(label), p = softmax(scores): scores (N, K), labels (N,). The gradient is (p - one_hot) / N."""
    p, one_hot = softmax_rows(scores), np.eye(scores.shape[1], dtype=scores.dtype)[labels]
    highest = scores.max(axis=1)
    log_sum = np.log(np.exp(scores - highest[:, None]).sum(axis=1)) + highest
    return (log_sum - (scores * one_hot).sum(axis=1)).mean(), lambda g: g * (p - one_hot) / len(labels)


class Classifier(Module):
    """Five convolutions, of which two halve, the mean over what is left of the picture, and a linear layer."""

    def __init__(self, rng):
        layers = [(1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2), (64, 64, 1)]  # inputs, outputs, stride
        rng = np.random.default_rng(rng)
        self.conv = [Conv2d(inputs, outputs, 3, rng, stride, padding=1) for inputs, outputs, stride in layers]
        self.norm = [GroupNorm(outputs, 8) for _, outputs, _ in layers]
        self.out = Linear(64, 10, rng)

    def features(self, x):
        for conv, norm in zip(self.conv, self.norm):
            x = norm(conv(x), silu=True)
        return x.mean(axis=(1, 2))

    def __call__(self, x, labels):
        return cross_entropy(self.out(self.features(x)), labels=labels)

    def look(self, images, workers=None, what="looking"):
        """Return features (N, 64) and probabilities (N, 10) of images (N, 28, 28, 1)."""

        def features(start):
            with no_grad():
                return as_array(self.features(images[start : start + 50]))

        starts = range(0, len(images), 50)
        with worker_threads(workers) as run:
            parts = progress_bar(run(features, starts), what, len(starts), unit="part")
            found = np.concatenate(list(parts))
        with no_grad():
            return found, softmax_rows(as_array(self.out(found)))


class Shifted:
    """The loop that trains diffusion models asks for a loss, and takes that of any network: here, of shifted images."""

    @staticmethod
    def loss(classifier, images, rng):
        padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), constant_values=-1)
        at = rng.integers(0, 7, (len(images), 2))
        return classifier(np.stack([x[i : i + 28, j : j + 28] for x, (i, j) in zip(padded, at)]))


def train_classifier(images, labels, steps, seed, workers):
    settings = {"lr": 3e-3, "decay_steps": steps // 2, "labels": labels, "seed": seed, "workers": workers}
    loop = train(Classifier(seed), Shifted, images, steps, **settings)
    *_, state = progress_bar(loop, "training", steps, unit="step")
    return state.ema.model


def load_classifier(path):
    classifier = Classifier(0)
    try:
        with stored_tensors(path) as (stored, _):
            classifier.load_state_dict({name: tensor.read(np.float32) for name, tensor in stored.items()})
        return classifier
    except (ValueError, OSError) as error:
        raise ValueError(f"--classifier: {path} is none that --train wrote: {error}") from error


# ------------------------------------------------------------------------------------------------------- the numbers


def frechet_distance(f, g):
    """Between normal distributions with the means and covariances of features f (M, D) and g (N, D), float64.

    tr (S S')^(1/2) is the sum of the roots of the eigenvalues of S^(1/2) S' S^(1/2), which is symmetric.
    """
    (m, S), (n, T) = ((x.mean(axis=0, dtype=float), np.cov(x, rowvar=False, dtype=float)) for x in (f, g))
    values, vectors = np.linalg.eigh(S)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ T @ root).clip(0)).sum()
    return float(((m - n) ** 2).sum() + np.trace(S) + np.trace(T) - 2 * cross)


def distances(x, y):
    """From each of x (M, D) to each of y (N, D): (M, N), float64."""
    x, y = x.astype(float), y.astype(float)
    square = (x * x).sum(axis=1)[:, None] - 2 * x @ y.T + (y * y).sum(axis=1)
    return np.sqrt(square.clip(0))


def precision_and_recall(real, generated, k=3):
    """Share of `generated` within the balls around `real` features that reach to the k-th neighbour there, and share
    of `real` within those of `generated`. Of both there should be as many."""
    between = distances(real, generated)
    reach = [np.sort(distances(x, x), axis=1)[:, k] for x in (real, generated)]  # 0 is the distance from itself
    precision = (between <= reach[0][:, None]).any(axis=0).mean()
    recall = (between <= reach[1]).any(axis=1).mean()
    return float(precision), float(recall)


def nearest(images, training, what):
    """How far the pixels of each image are from those of the nearest training image: root mean square, of 0 ... 255."""
    x, y = images.reshape(len(images), -1), training.reshape(len(training), -1)
    y_square, found = (y * y).sum(axis=1), []
    for start in progress_bar(range(0, len(x), 100), what, unit="part"):
        part = x[start : start + 100]
        index = (y_square - 2 * part @ y.T).argmin(axis=1)
        found.append(127.5 * np.sqrt(((part - y[index]) ** 2).mean(axis=1)))
    return np.concatenate(found)


def draws(of_others, n, labels, rng):
    """Which of other real digits, of classes `of_others`, stand in for n images: five draws (5, n), of which no two
    share a digit, and with as many of each class as `labels` has, if there are labels."""
    order = rng.permutation(len(of_others))
    if labels is None:
        return order[: 5 * n].reshape(5, n)
    asked = [(order[of_others[order] == digit], np.count_nonzero(labels == digit)) for digit in range(10)]
    return np.concatenate([those[: 5 * count].reshape(5, count) for those, count in asked], axis=1)


def evaluate(images, held_out, others, of_others, training, classifier, seed=0, labels=None, workers=None):
    """What the table shows, as {"generated": numbers, "real": the same of real digits, ...}, of JSON's types.

    Args: images: (N, 28, 28, 1) in [-1, 1], to be judged. held_out: at least N real digits to compare with. others: at
    least 5 N more, and of_others: their classes. training: those the model learned from. labels: (N,), what the images
    were to be.
    """
    n, rng = len(images), np.random.default_rng(seed)
    chosen = draws(of_others, n, labels, rng)
    (f, p), (f_held, p_held), (f_other, p_other) = (
        classifier.look(x, workers, what)
        for x, what in ((images, "generated"), (held_out, "held-out"), (others[chosen.ravel()], "other real"))
    )
    real = f_held[rng.permutation(len(held_out))[:n]]  # precision and recall take as many of both

    def numbers(f, p):
        precision, recall = precision_and_recall(real, f)
        classes = np.bincount(p.argmax(axis=1), minlength=10) / len(p)
        return {
            "frechet": frechet_distance(f, f_held),
            "confident": float((p.max(axis=1) > 0.9).mean()),
            "precision": precision,
            "recall": recall,
            "classes": [round(float(share), 6) for share in classes],
        }

    by_chance = [numbers(f_other[start : start + n], p_other[start : start + n]) for start in range(0, 5 * n, n)]
    floor = {name: np.mean([one[name] for one in by_chance], axis=0).tolist() for name in by_chance[0]}
    floor["frechet_deviation"] = float(np.std([one["frechet"] for one in by_chance], ddof=1))
    generated, read, read_held = numbers(f, p), p.argmax(axis=1), p_held.argmax(axis=1)
    if labels is not None:
        generated["as_asked"] = float((read == labels).mean())
    distance, of_held = nearest(images, training, "neighbours"), nearest(held_out, training, "of held-out")
    near = {digit: np.percentile(of_held[read_held == digit], 1) for digit in set(read_held)}
    for row, found, digits in ((generated, distance, read), (floor, of_held, read_held)):
        row["nearest"] = float(found.mean())
        row["repeated"] = float(np.mean([d < near.get(digit, 0) for d, digit in zip(found, digits)]))
    return {"samples": n, "held_out": len(held_out), "training": len(training), "generated": generated, "real": floor}


def table(result):
    """The result as lines to read."""
    generated, real = result["generated"], result["real"]
    lines = [f"{'':22}{'generated':>10}{'real digits':>16}"]

    def add(name, key, digits=3, deviation=""):
        lines.append(f"{name:22}{generated[key]:10.{digits}f}{real[key]:10.{digits}f}{deviation}")

    add("Frechet distance", "frechet", deviation=f" +- {real['frechet_deviation']:.3f}")
    add("confident (> 0.9)", "confident")
    if "as_asked" in generated:
        lines.append(f"{'as asked':22}{generated['as_asked']:10.3f}")
    add("precision", "precision")
    add("recall", "recall")
    add("nearest, mean", "nearest", 1)
    add("repeated", "repeated")
    for name, row in (("classes, generated", generated), ("classes, real", real)):
        lines.append(f"{name:22}" + " ".join(f"{digit}:{share:.0%}" for digit, share in enumerate(row["classes"])))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- where from


def parse_arguments(argv, **settings):
    parser = cli.Options(__doc__, **settings)
    add = parser.add
    add(
        "source", nargs="?", type=cli.any_path, help="a model or checkpoint, a folder of pictures, or an .npz of images"
    )
    add("--samples", type=int, default=1000, least=10, most=2000, help="how many digits to draw or take [%(default)s]")
    add("--data", default="digits", choices=("digits", "mnist"), help="what the model learned from [%(default)s]")
    add("--method", default="ddpm", choices=SAMPLERS, help="the sampler, of a model [%(default)s]")
    add("--steps", type=int, default=25, least=1, help="of the sampler, at most T [%(default)s]")
    told = "of the sampler, if the model knows labels [%(default)s]"
    add("--guidance", type=float, default=cli.GUIDANCE, least=-1000, most=1000, help=told)
    add("--seed", type=int, default=0, least=0, help="the same one gives the same numbers [%(default)s]")
    add("--workers", type=int, least=1, help="how many work side by side [one per CPU]")
    add("--classifier", type=cli.any_path, default=CLASSIFIER, help="another than the one that comes along")
    add("--json", type=cli.any_path, help="write the numbers to this file too")
    add("--train", type=cli.any_path, metavar="FILE", help="train the classifier anew and write it to this file")
    add("--train-steps", type=int, default=4000, least=1, help="of that [%(default)s]")
    args = parser.parse_args(argv)
    if (args.source is None) == (args.train is None):
        parser.error("expected what to evaluate, or --train FILE")
    if args.source and not args.source.exists():
        parser.error(f"there is no {args.source}")
    if args.source:  # if it is the folder of a training, not its pictures, which are pages of many
        args.source = model_in(args.source)
    for name in ("json", "train"):  # better to know now than after the work
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name}: cannot write {path}, which is a folder or in none")
    if args.json and args.train:
        parser.error("--json: with --train nothing is evaluated, so leave it out")
    if args.json and args.json.resolve() == args.source.resolve():
        parser.error(f"--json: {args.json} is what is to be evaluated")
    return args


def read_images(path, most, seed):
    """Return images (N, 28, 28, 1) in [-1, 1] from a folder of pictures or an .npz; `most` of them, drawn by lot, if
    there are more, since they may be sorted."""
    if path.is_dir():
        folder = ImageFolder(path, 28, channels=1)
        return folder[by_lot(len(folder), most, seed)]
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected arrays in a file as np.savez writes it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            name = "images" if "images" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise ValueError(f"expected an array 'images', or only one, got {', '.join(names) or 'none'}")
            images = arrays[name]
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error
    if images.dtype == np.uint8:
        images = images / np.float32(127.5) - 1
    if images.ndim == 3 or images.ndim == 4 and images.shape[1] == 1 != images.shape[3]:
        images = images.reshape(len(images), *images.shape[-2:], 1)
    if images.dtype.kind != "f" or images.shape[1:] != (28, 28, 1) or len(images) == 0:
        raise ValueError(
            f"{path}: expected images (N, 28, 28), uint8 or floats in [-1, 1], got {images.dtype} {images.shape}"
        )
    if not (np.abs(images).max() <= 1.01 and images.min() < -0.1):
        raise ValueError(f"{path}: expected floats in [-1, 1], got {images.min():.4g} ... {images.max():.4g}")
    return images[by_lot(len(images), most, seed)].astype(np.float32)


def by_lot(count, most, seed):
    """Up to `most` of 0 ... count - 1, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def draw(path, args):
    """Return digits that the model in a file draws, and which they were to be or None."""
    unet, diffusion = load_model(path)
    channels, classes, size = (unet.config[name] for name in ("in_channels", "classes", "image_size"))
    if channels != 1 or classes not in (None, 10) or size not in (None, (28, 28)):
        raise ValueError(
            f"{path}: expected a model of grey digits of 28 x 28 pixels, got one of {channels} channels, {classes} "
            f"classes, for images of {size}"
        )
    labels = np.arange(args.samples) % 10 if classes else None
    guided = {"labels": labels, "guidance": args.guidance if unet.config["label_dropout"] else None} if classes else {}
    images = sample(
        diffusion, unet, (args.samples, 28, 28, 1), args.method, min(args.steps, diffusion.T), args.seed,
        workers=args.workers, progress=True, **guided,
    )  # fmt: skip
    return images, labels


def not_bundled(labels):
    """Which of MNIST's training digits do not come with the package: all but the first 1,000 of each class."""
    chosen = np.ones(len(labels), bool)
    for digit in range(10):
        chosen[np.flatnonzero(labels == digit)[:1000]] = False
    return chosen


def train_and_test(args):
    """Write a classifier to args.train, and say how often it is right. Neither the digits with which generated ones are
    compared nor those that stand in for them take part."""
    images, labels = load_mnist(full=True)
    unseen, truth = load_mnist(full=True, train=False)
    chosen = not_bundled(labels)
    classifier = train_classifier(images[chosen], labels[chosen], args.train_steps, args.seed, args.workers)
    with replacing(args.train) as (unfinished,):
        state = {name: w.astype(np.float16) for name, w in classifier.state_dict().items()}
        write_tensors(unfinished, state, {"digits": f"{chosen.sum()} of mnist"})
    right = (load_classifier(args.train).look(unseen, args.workers, "testing")[1].argmax(axis=1) == truth).mean()
    print(f"right about {right:.2%} of {len(truth):,} digits it has not learned from: {args.train}")


def main(argv=None, **settings):
    args = parse_arguments(argv, **settings)
    if args.train:
        return train_and_test(args)
    classifier, full = load_classifier(args.classifier), args.data == "mnist"
    held_out, (others, of_others) = load_mnist(full, train=False)[0], load_digits()
    training = load_mnist(full)[0] if full else others
    if args.source.is_dir() or args.source.suffix == ".npz":
        images, labels = read_images(args.source, args.samples, args.seed), None
        if len(images) < 10:
            raise ValueError(f"{args.source}: expected at least 10 images, got {len(images)}")
    else:
        images, labels = draw(args.source, args)
    result = evaluate(images, held_out, others, of_others, training, classifier, args.seed, labels, args.workers)
    print(table(result))
    if args.json:
        with replacing(args.json) as (unfinished,):
            unfinished.write_text(json.dumps({"source": str(args.source)} | result, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
