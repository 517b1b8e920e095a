"""examples/measure/evaluate_digits.py: each number against a plain computation of it, and all as a user runs it."""

import gzip
import json
import pathlib
import sys

import numpy as np
import pytest
from gradcheck import check_op
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tinyddpm
from tinyddpm import Diffusion, UNet, make_schedule, sample, save_model
from tinyddpm.files import data
from tinyddpm.files.data import COUNTS, read_idx
from tinyddpm.files.pictures import to_uint8

MNIST = pathlib.Path(__file__).parents[3] / "shared" / "data" / "mnist"


@pytest.fixture(scope="module")
def evaluation(script):
    sys.modules["evaluate_digits"] = evaluation = script.loaded("evaluate_digits")
    return evaluation


@pytest.fixture(scope="module")
def classifier(evaluation):
    return evaluation.load_classifier(evaluation.CLASSIFIER)


@pytest.fixture(scope="module")
def held_out(digits):
    return digits(train=False)


@pytest.fixture(scope="module")
def forty(digits):
    """Real digits, four of each."""
    return digits()[0][::250]


def test_frechet_distance(evaluation):
    """tr (S T)^(1/2) is the sum of the square roots of the eigenvalues of S T itself."""
    rng = np.random.default_rng(1)
    f, g = (rng.standard_normal((400, 4)) @ rng.standard_normal((4, 4)) for _ in range(2))
    S, T = np.cov(f, rowvar=False), np.cov(g, rowvar=False)
    expected = ((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(S + T) - 2 * np.sqrt(np.linalg.eigvals(S @ T).real).sum()
    np.testing.assert_allclose(evaluation.frechet_distance(f, g), expected, rtol=1e-9)
    np.testing.assert_allclose(evaluation.frechet_distance(g, f), expected, rtol=1e-9)
    few = rng.standard_normal((10, 64)).astype(np.float32)  # fewer than dimensions: roots of what is nearly 0
    assert abs(evaluation.frechet_distance(few, few)) < 1e-4


@given(st.integers(6, 20), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_precision_and_recall_one_by_one(evaluation, n, k, seed):
    rng = np.random.default_rng(seed)
    real, generated = rng.standard_normal((n, 3)), 0.7 * rng.standard_normal((n, 3)) + 0.5

    def share_within(points, centers):
        reach = [sorted(np.linalg.norm(c - other) for other in centers)[k] for c in centers]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centers, reach)) for p in points]
        return sum(inside) / len(points)

    expected = share_within(generated, real), share_within(real, generated)
    np.testing.assert_allclose(evaluation.precision_and_recall(real, generated, k), expected)


def test_nearest(evaluation):
    rng = np.random.default_rng(0)
    training = rng.uniform(-1, 1, (230, 28, 28, 1)).astype(np.float32)
    others = rng.uniform(-1, 1, (20, 28, 28, 1))
    images = np.concatenate([training[[7, 211]], training[[3]] + np.float32(2 / 255), others])
    found = evaluation.nearest(images.astype(np.float32), training, "")
    levels = 127.5 * (images[:, None] - training)
    expected = np.sqrt((levels**2).mean(axis=(2, 3, 4))).min(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found[0] == found[1] == 0 and abs(found[2] - 1) < 1e-3  # one grey level


def test_the_classifier_is_small_and_right_about_held_out_digits(evaluation, classifier, held_out):
    images, labels = (part[::4] for part in held_out)
    _, p = classifier.look(images)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
    assert (p.argmax(axis=1) == labels).mean() > 0.995
    assert evaluation.CLASSIFIER.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="the full MNIST is not at hand")
def test_it_is_right_about_99_5_percent_of_mnist_s_test_digits(classifier):
    count = COUNTS["t10k"]
    pixels = read_idx(gzip.open(MNIST / "t10k-images-idx3-ubyte.gz").read(), (count, 28, 28))
    labels = read_idx(gzip.open(MNIST / "t10k-labels-idx1-ubyte.gz").read(), (count,))
    assert (classifier.look(pixels[..., None] / np.float32(127.5) - 1)[1].argmax(axis=1) == labels).mean() > 0.9945


def test_the_loss_and_its_gradient(evaluation):
    labels = np.array([0, 2, 2, 1])
    scores = np.random.default_rng(0).standard_normal((4, 3))
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    loss = evaluation.cross_entropy(scores, labels=labels).data
    np.testing.assert_allclose(loss, -np.log(p[np.arange(4), labels]).mean())
    check_op(evaluation.cross_entropy, scores, labels=labels)
    assert np.isfinite(evaluation.cross_entropy(1e5 * scores, labels=labels).data)


def test_shifts_move_the_digit_and_lose_nothing_of_it(evaluation):
    x, seen = np.full((50, 28, 28, 1), -1, np.float32), []
    x[:, 10:18, 12:16] = 1
    evaluation.Shifted.loss(seen.append, x, np.random.default_rng(0))
    (y,) = seen
    assert y.shape == x.shape and ((y > 0).sum(axis=(1, 2, 3)) == 32).all()
    assert set((y[..., 0] > 0).any(axis=2).argmax(axis=1)) == set(range(7, 14))  # three up to three down


@pytest.mark.slow
def test_the_bundled_digits_alone_teach_it_to_be_right_about_98_percent_of_the_held_out(evaluation, digits, held_out):
    classifier = evaluation.train_classifier(*digits(), steps=800, seed=0, workers=None)
    assert (classifier.look(held_out[0])[1].argmax(axis=1) == held_out[1]).mean() >= 0.98


def test_training_it_takes_only_digits_that_do_not_come_along(evaluation, classifier, held_out, tmp_path, monkeypatch):
    """Those that come along are the first 1,000 of each class (test_data_and_pictures.py)."""
    taken, there, unseen = [], evaluation.train_and_test.__globals__, [part[::100] for part in held_out]
    images, labels = np.arange(10500), np.random.default_rng(0).permutation(10500) % 10  # any will do
    train_classifier = lambda *given, **_: taken.append(given[:2]) or classifier
    monkeypatch.setitem(there, "load_mnist", lambda full, train=True: (images, labels) if train else unseen)
    monkeypatch.setitem(there, "train_classifier", train_classifier)
    monkeypatch.setattr(sys, "argv", ["evaluate_digits.py", "--train", str(tmp_path / "c.safetensors")])
    evaluation.main()
    expected = [i for i, label in enumerate(labels) if np.count_nonzero(labels[:i] == label) >= 1000]
    assert len(expected) == 500
    np.testing.assert_array_equal(taken[0][0], images[expected])
    np.testing.assert_array_equal(taken[0][1], labels[expected])
    evaluation.load_classifier(tmp_path / "c.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, forty):
    """The forty in a folder of pictures and in .npz files of several kinds."""
    folder, pixels = tmp_path_factory.mktemp("digits"), to_uint8(forty)[..., 0]
    (folder / "pictures").mkdir()
    for i, digit in enumerate(pixels):
        Image.fromarray(digit).save(folder / "pictures" / f"{i:02}.png")
    np.savez(folder / "uint8.npz", pixels)
    np.savez(folder / "floats.npz", images=forty, labels=np.arange(40))
    np.savez(folder / "channels_first.npz", images=forty.transpose(0, 3, 1, 2).astype(np.float64))
    return folder


@pytest.mark.parametrize("name", ["pictures", "uint8.npz", "floats.npz", "channels_first.npz"])
def test_a_folder_and_arrays_are_the_same_images(evaluation, folder, forty, name):
    """Of more than are wanted some are drawn, not the first, for they may be sorted: few of ten are of one class."""
    images = evaluation.read_images(folder / name, 1000, 0)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, forty, atol=1e-6)
    which = [np.abs(forty - x).max(axis=(1, 2, 3)).argmin() for x in evaluation.read_images(folder / name, 10, 0)]
    assert len(set(which)) == 10 and len({i // 4 for i in which}) > 4


@given(st.integers(1, 20), st.booleans(), st.integers(0, 2**32 - 1))
def test_real_digits_stand_in_for_generated_ones_class_by_class(evaluation, n, asked, seed):
    rng = np.random.default_rng(seed)
    of_others = rng.permutation(1000) % 10
    labels = rng.integers(0, 10, n) if asked else None
    drawn = evaluation.draws(of_others, n, labels, rng)
    assert drawn.shape == (5, n) and len(set(drawn.ravel())) == 5 * n
    if asked:
        for row in drawn:
            np.testing.assert_array_equal(np.bincount(of_others[row], minlength=10), np.bincount(labels, minlength=10))


class FixedClassifier:
    """Its features are the first two pixels, and the third says which of two digits it is, and how surely."""

    def look(self, images, workers=None, what=""):
        x = images.reshape(len(images), -1)
        sure = np.abs(x[:, 2])
        p = np.zeros((len(x), 10))
        p[np.arange(len(x)), np.where(x[:, 2] > 0, 7, 4)] = sure
        p[:, 0] = 1 - sure
        return x[:, :2], p


def test_every_number_is_what_it_is_called(evaluation):
    rng = np.random.default_rng(0)
    held_out, others, training, images = (
        rng.uniform(-1, 1, (n, 28, 28, 1)).astype(np.float32) for n in (60, 100, 30, 20)
    )
    images[:3] = training[:3]  # repeated; the others are as far away as held-out ones
    held_out.reshape(60, -1)[:, 2] = np.where(np.arange(60) < 30, 0.7, -0.7)
    sure = np.array([0.95] * 8 + [-0.95] * 5 + [0.85] * 7)
    images.reshape(20, -1)[:, 2] = sure
    labels, of_others = np.array([7] * 10 + [4] * 10), np.arange(100) % 10
    others.reshape(100, -1)[:, 2] = np.where(of_others < 5, 0.9001, -0.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluation.evaluate.__globals__, "draws", lambda *_: np.arange(100).reshape(5, 20))
        result = evaluation.evaluate(images, held_out, others, of_others, training, FixedClassifier(), 3, labels)
    generated, real = result["generated"], result["real"]
    features = lambda x: x.reshape(len(x), -1)[:, :2]
    of_real = features(held_out)[np.random.default_rng(3).permutation(60)[:20]]
    assert (result["samples"], result["held_out"], result["training"]) == (20, 60, 30)
    assert generated["frechet"] == evaluation.frechet_distance(features(images), features(held_out))
    assert (generated["precision"], generated["recall"]) == evaluation.precision_and_recall(of_real, features(images))
    assert generated["confident"] == 13 / 20  # more than 0.9
    assert generated["classes"] == [0, 0, 0, 0, 5 / 20, 0, 0, 15 / 20, 0, 0]
    assert generated["as_asked"] == (8 + 3) / 20  # of the first ten 8 are sevens, of the others 3 fours
    five = [evaluation.frechet_distance(features(others[i : i + 20]), features(held_out)) for i in range(0, 100, 20)]
    np.testing.assert_allclose([real["frechet"], real["frechet_deviation"]], [np.mean(five), np.std(five, ddof=1)])
    both = [evaluation.precision_and_recall(of_real, features(others[i : i + 20])) for i in range(0, 100, 20)]
    np.testing.assert_allclose([real["precision"], real["recall"]], np.mean(both, axis=0))
    assert real["confident"] == 0.5 and real["classes"] == [0, 0, 0, 0, 0.5, 0, 0, 0.5, 0, 0]
    away = {name: evaluation.nearest(x, training, "") for name, x in (("generated", images), ("real", held_out))}
    assert generated["nearest"] == away["generated"].mean() and real["nearest"] == away["real"].mean()
    sevens, fours = (np.percentile(away["real"][half], 1) for half in (slice(30), slice(30, 60)))
    assert sevens != fours
    assert generated["repeated"] == (away["generated"] < np.where(sure > 0, sevens, fours)).mean() == 3 / 20
    assert real["repeated"] == 2 / 60  # one of each 30 lies below the first percent of them


def test_the_table_has_each_number_in_its_place(evaluation):
    names = ("frechet", "confident", "as_asked", "precision", "recall", "nearest", "repeated")
    generated = {name: 0.1 * (i + 1) for i, name in enumerate(names)} | {"classes": [0.01 * i for i in range(10)]}
    real = {name: 0.1 * (i + 1) + 0.01 for i, name in enumerate(names)} | {"classes": [0.1] * 10}
    text = evaluation.table({"generated": generated, "real": real | {"frechet_deviation": 0.025}})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:5] == [
        "generated real digits", "Frechet distance 0.100 0.110 +- 0.025", "confident (> 0.9) 0.200 0.210",
        "as asked 0.300", "precision 0.400 0.410",
    ]  # fmt: skip
    assert lines[5:8] == ["recall 0.500 0.510", "nearest, mean 0.6 0.6", "repeated 0.700 0.710"]
    ten = " ".join(f"{i}:{i}%" for i in range(10)), " ".join(f"{i}:10%" for i in range(10))
    assert lines[8:] == [f"classes, generated {ten[0]}", f"classes, real {ten[1]}"]


def test_what_it_says_of_real_digits(digits, folder, example, monkeypatch, tmp_path):
    """With a tenth of those that come along, for comparison."""
    monkeypatch.setattr(tinyddpm, "load_digits", lambda: [part[::10] for part in digits()])
    monkeypatch.setattr(data, "load_digits", lambda train: [part[::10] for part in digits(train)])
    _, printed, progress = example("evaluate_digits", folder / "pictures", f"--json={tmp_path / 'r.json'}")
    assert "Frechet distance" in printed and "generated:" in progress  # a bar
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["source"] == str(folder / "pictures") and result["samples"] == 40
    assert result["held_out"] == 200 and result["training"] == 1000
    generated, real = result["generated"], result["real"]
    assert generated["nearest"] == 0 and generated["repeated"] == 1  # these are training digits themselves
    assert real["nearest"] > 20 and real["repeated"] == 1 / 20  # one of 20 of each digit
    assert generated["classes"] == [0.1] * 10 and generated["confident"] > 0.9
    assert abs(generated["frechet"] - real["frechet"]) < 5 * real["frechet_deviation"]  # and as good as others


@pytest.mark.slow
def test_what_is_no_digit_is_found_out(evaluation, classifier, digits, held_out):
    """Noise, halves of digits, and one digit many times over: each shows in the numbers that are about it."""
    (training, labels), rng = digits(), np.random.default_rng(0)
    real = training[5::50]
    few = np.repeat(real[:4], 50, axis=0) + rng.normal(0, 0.01, (200, 28, 28, 1)).astype(np.float32)
    half = np.where(np.arange(28)[:, None, None] < 14, real, -1).astype(np.float32)
    noise = rng.uniform(-1, 1, real.shape).astype(np.float32)
    results = {
        name: evaluation.evaluate(x, held_out[0][::4], training, labels, training, classifier)
        for name, x in (("real", real), ("half", half), ("noise", noise), ("few", few))
    }
    generated = {name: result["generated"] for name, result in results.items()}
    floor = results["real"]["real"]
    assert generated["real"]["frechet"] < floor["frechet"] + 5 * floor["frechet_deviation"]
    for name in ("half", "noise", "few"):
        assert generated[name]["frechet"] > 5 * floor["frechet"], name
    assert floor["confident"] > 0.95 and generated["half"]["confident"] < 0.8
    assert min(floor["precision"], floor["recall"]) > 0.7
    assert generated["noise"]["precision"] < 0.1 and generated["noise"]["recall"] < 0.1
    assert generated["few"]["precision"] > 0.7 and generated["few"]["recall"] < 0.2
    assert sorted(generated["few"]["classes"])[:9] == [0] * 9  # all of them are zeros
    assert generated["few"]["nearest"] < 0.1 * floor["nearest"] < generated["noise"]["nearest"]


@pytest.mark.slow
def test_a_model_is_sampled_with_its_labels_and_the_same_images_give_the_same_numbers(classifier, example, tmp_path):
    unet = UNet(channels=(8, 8), blocks=1, attention=(False, True), classes=10, label_dropout=0.1, patch=2)
    diffusion = Diffusion(make_schedule("cosine", 30), "x0")
    for p in unet.parameters():  # so that samplers differ
        p.data = p.data + np.float32(0.05) * np.cos(np.arange(p.data.size, dtype=np.float32)).reshape(p.shape)
    save_model(tmp_path / "m.safetensors", unet, diffusion)
    labels, found = np.arange(12) % 10, []
    said = lambda *arguments: (example("evaluate_digits", *arguments), json.loads((tmp_path / "r.json").read_text()))
    for method in ("ddpm", "ddim"):
        settings = ["--steps=3", "--guidance=2", f"--method={method}", "--seed=5", f"--json={tmp_path / 'r.json'}"]
        printed, result = said(tmp_path / "m.safetensors", "--samples=12", *settings)
        assert "as asked" in printed.out
        images = sample(diffusion, unet, (12, 28, 28, 1), method, 3, 5, labels=labels, guidance=2)
        np.savez(tmp_path / "a.npz", images)
        again = said(tmp_path / "a.npz", *settings[3:])[1]["generated"]
        right = classifier.look(images)[1].argmax(axis=1) == labels
        found.append(result["generated"])
        assert found[-1].pop("as_asked") == right.mean() and found[-1] == again
    assert found[0] != found[1]
