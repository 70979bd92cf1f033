"""The workloads are what they say, and start and step alike in both frameworks."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from benchmarks._jax import training as training_jax
from benchmarks._jax.workloads import digits as digits_jax
from benchmarks._jax.workloads import finetuning
from benchmarks._runs import Task
from benchmarks._torch import training as training_torch
from benchmarks._torch.our_optimizers import OPTIMIZERS
from benchmarks.workloads import ALONE, NAMES, digits, load
from relatives import crossed, relatives

SMALL = ("shakespeare-small", "digits-conv", "digits-vit")


"""Every model that has a twin, in its smallest size."""


NEW = ("char-lstm", "table-mlp", "digits-diffusion", "digits-resnet")


CHEAP = ("digits-conv", "digits-vit", "finetuning-vit", "cartpole", *NEW)


# The longest sums, over 64 images of 8 x 8 positions, have 4,096 terms, and a sum's error grows as
# the root of their number.
ROUNDINGS = 64 * 2.0**-23


def task(workload, optimizer, rate=3e-3, steps=20):
    return Task(workload, optimizer, rate, 0, steps, (steps,))


def first_batches(workload, seed, count=3):
    return list(itertools.islice(workload.batches(seed), count))


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# Flax has a kernel's outputs last and its inputs before them, PyTorch the outputs first.
AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


def named_arrays(tree):
    """Parameters or gradients of a Flax model by their name and in their layout in PyTorch."""
    arrays = {}
    for path, leaf in nnx.to_flat_state(tree):
        *module, kind = map(str, path)
        array = np.array(jax.device_get(leaf[...]))
        if kind == "kernel":
            array = array.transpose(AXES[array.ndim])
        arrays[".".join([*module, "bias" if kind == "bias" else "weight"])] = array
    return arrays


@pytest.mark.parametrize(("name", "seed"), crossed(SMALL, [0, 3]))
def test_models_start_alike_in_both_frameworks(name, seed):
    flax = named_arrays(load(name).init(seed))
    for key, parameter in load(name, framework="torch").init(seed).named_parameters():
        # A square, what the inverse error function makes of it, and two products.
        ours = parameter.detach().cpu().numpy()
        np.testing.assert_allclose(ours, flax.pop(key), rtol=4 * 2.0**-23, err_msg=key)
    assert not flax


@pytest.mark.parametrize("name", SMALL)
def test_batches_are_the_same_in_both_frameworks(name):
    assert same(first_batches(load(name), 1), first_batches(load(name, framework="torch"), 1))


@pytest.mark.parametrize(
    "name",
    relatives(
        ["shakespeare-small", *CHEAP],
        ["shakespeare-small", "digits-vit", "cartpole", "char-lstm", "table-mlp"],
    ),
)
def test_seed_decides_weights_and_batches(name):
    workload = load(name)
    assert workload.name == name
    assert same(first_batches(workload, 1), first_batches(workload, 1))
    assert not same(first_batches(workload, 1), first_batches(workload, 2))
    assert same(workload.init(1), workload.init(1))
    assert not same(workload.init(1), workload.init(2))


@pytest.mark.parametrize("name", SMALL)
def test_twin_has_the_same_loss_gradients_and_held_out_figure(name):
    workload, twin = load(name), load(name, framework="torch")
    params, model = workload.init(0), twin.init(0)
    batch = first_batches(workload, 0)[0]
    loss, grads = jax.jit(jax.value_and_grad(workload.loss))(params, batch)
    twins = twin.loss(model, batch)
    twins.backward()
    assert twins.item() == pytest.approx(float(loss), rel=ROUNDINGS)
    named = named_arrays(grads)
    for key, parameter in model.named_parameters():
        error = np.linalg.norm(parameter.grad.cpu().numpy() - named.pop(key))
        assert error <= ROUNDINGS * parameter.grad.norm().item(), key
    assert not named
    figure = jax.jit(workload.held_out)(params)
    assert twin.held_out(model) == pytest.approx(float(figure), rel=ROUNDINGS)


@pytest.mark.parametrize(
    ("name", "optimizer", "steps"),
    [
        ("digits-conv", "meta3", 20),
        pytest.param("digits-vit", "adamw-cosine", 40, marks=pytest.mark.slow),
    ],
)
def test_runs_in_both_frameworks_learn_alike(name, optimizer, steps):
    run = task(name, optimizer, steps=steps)
    (ours,) = training_jax.train([run])
    (theirs,) = training_torch.train([run._replace(framework="torch")])
    # Guessing costs ln 10 = 2.30 nats.
    assert ours.start > 2.2
    assert ours.held_out[-1] < 1.5
    # Rounding alone separates them, which training amplifies; another decay or rate moves losses by
    # some thousandths.
    np.testing.assert_allclose(theirs.losses, ours.losses, rtol=1e-4)
    assert theirs.start == pytest.approx(ours.start, rel=ROUNDINGS)
    assert theirs.held_out == pytest.approx(ours.held_out, rel=1e-4)
    assert theirs.finite
    assert theirs.skipped == ours.skipped


@pytest.mark.slow
def test_fine_tuning_starts_from_a_model_that_reads_upright_digits_alone():
    workload = load("finetuning-vit")
    params = workload.init(0)
    upright = digits_jax.digits("vit").held_out(params)
    turned = workload.held_out(params)
    assert upright < 0.3 < 1.5 < turned
    (record,) = training_jax.train([task("finetuning-vit", "adamw", 1e-3, steps=60)])
    assert record.start == pytest.approx(float(turned), rel=1e-3)
    assert record.held_out[-1] < 0.5 * record.start


def test_fine_tuned_text_is_held_out_from_both_parts_and_shares_the_characters():
    plays, documentation = finetuning.corpora()
    assert (
        "optical recognition of handwritten digits"
        in documentation.decode(documentation.train).lower()
    )
    text = documentation.decode(documentation.validation)
    assert text[100:200] not in documentation.decode(documentation.train)
    assert text[100:200] not in documentation.decode(plays)
    assert plays.max() < len(documentation.characters)


@pytest.mark.slow
def test_language_model_is_fine_tuned_from_what_it_has_read(monkeypatch):
    monkeypatch.setitem(finetuning.PRETRAINING["gpt"], "steps", 60)
    workload = finetuning._gpt()
    params = workload.init(0)
    first = next(workload.batches(0))
    # Guessing costs ln 93 = 4.53 nats; the letters of the plays are most of those of any English.
    assert float(workload.loss(params, first)) < 4.1
    assert same(params, workload.init(0))
    grads = jax.jit(jax.grad(workload.loss))(params, first)
    nearer = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert float(workload.loss(nearer, first)) < float(workload.loss(params, first))


@pytest.mark.parametrize("name", [*NEW[:-1], pytest.param(NEW[-1], marks=pytest.mark.slow)])
def test_workload_is_learned_from_its_batches(name):
    (record,) = training_jax.train([task(name, "adamw", 1e-2, steps=40)])
    assert record.finite
    assert record.held_out[-1] < 0.8 * record.start


@pytest.mark.parametrize("name", ["table-mlp", "digits-diffusion"])
def test_figure_of_a_model_that_finds_nothing_is_one(name):
    workload = load(name)
    nothing = jax.tree.map(jnp.zeros_like, workload.init(0))
    # Means of a table's held-out part, and of a thousand draws of a noise, are not exactly 0 and 1.
    assert float(workload.held_out(nothing)) == pytest.approx(1.0, abs=0.02)


def test_held_out_images_are_normalized_by_the_statistics_of_all_training_images():
    workload = load("digits-resnet")
    params = workload.init(0)
    figure = jax.jit(workload.held_out)
    stem = params["stem"]["kernel"]
    stem.set_value(1000.0 * stem[...])
    larger = float(figure(params))
    stem.set_value(stem[...] / 1000.0)
    # Those of the start, or of another net, would be off by the factor; what is left is epsilon's.
    assert larger == pytest.approx(float(figure(params)), rel=1e-3)


def test_language_models_come_in_other_widths_and_with_other_batches():
    small, wide = load("shakespeare-small"), load("shakespeare-width-96")
    assert wide.settings == small.settings | {"width": 96, "batch": 8}
    assert next(load("shakespeare-batch-160").batches(0)).shape == (160, 65)
    assert next(load("shakespeare-batch-2").batches(0)).shape == (2, 65)


def test_text_is_refused_by_workloads_that_read_none():
    with pytest.raises(ValueError, match=r"--data is a text .*got finetuning-gpt"):
        load("finetuning-gpt", "speeches.txt")


def test_fine_tuning_sees_twenty_turned_training_images_of_every_digit():
    data = digits.split()
    kept = {np.rot90(image).tobytes() for image in data.train[0]}
    images, labels = finetuning.few()
    assert {image.tobytes() for image in images} < kept
    np.testing.assert_array_equal(np.bincount(labels), [finetuning.EACH] * digits.CLASSES)


@pytest.mark.parametrize("name", ["digits-conv", pytest.param("cartpole", marks=pytest.mark.slow)])
def test_two_at_once_are_as_each_alone(name):
    workload = load(name)
    params = [workload.init(seed) for seed in (0, 1)]
    batches = [first_batches(workload, seed)[0] for seed in (0, 1)]

    def figures(params, batch):
        return jnp.stack([workload.loss(params, batch), workload.held_out(params)])

    both = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair) for pair in (params, batches)]
    alone = list(map(jax.jit(figures), params, batches))
    np.testing.assert_allclose(jax.jit(jax.vmap(figures))(*both), alone, rtol=ROUNDINGS)


def test_held_out_digits_are_a_fifth_of_each_and_never_trained_on():
    data = digits.split()
    kept = {image.tobytes() for image in data.held_out[0]}
    assert len(kept) == len(data.held_out[1]) == 360
    workload = load("digits-conv")
    epoch = workload.steps // digits.EPOCHS
    drawn = [image.tobytes() for images, _ in first_batches(workload, 0, epoch) for image in images]
    assert len(set(drawn)) == len(drawn) == epoch * digits.BATCH
    assert kept.isdisjoint(drawn)
    counts, kept_counts = np.bincount(data.train[1]), np.bincount(data.held_out[1])
    np.testing.assert_allclose(kept_counts, (counts + kept_counts) / 5, atol=1)


def test_language_models_are_validated_on_text_they_do_not_train_on(tmp_path):
    rng = np.random.default_rng(0)
    train, other_train = (
        "abcd" + "".join(rng.permutation(list("abcd" * 450 + "ab" * 48))) for _ in range(2)
    )
    kept, other_kept = ("".join(rng.permutation(list("abcd" * 53))) for _ in range(2))
    texts = {
        "one": train + kept,
        "same training": train + other_kept,
        "same end": other_train + kept,
    }
    made = {}
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text)
        made[name] = load("shakespeare-small", str(path))
    cut = len(texts["one"]) * 9 // 10
    assert cut <= len(train), "all that training sees is the first part"
    one, same_training, same_end = made.values()
    assert same(first_batches(one, 0), first_batches(same_training, 0))
    assert not same(first_batches(one, 0), first_batches(same_end, 0))
    params = one.init(0)
    figures = [float(jax.jit(workload.held_out)(params)) for workload in made.values()]
    assert figures[0] == figures[2]
    assert figures[0] != figures[1]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_unknown_workload_is_refused_with_the_names(framework):
    with pytest.raises(ValueError, match=r"one of shakespeare-small, .*got 'digits'"):
        load("digits", framework=framework)


@pytest.mark.parametrize("name", ALONE)
def test_workloads_of_jax_alone_are_named(name):
    with pytest.raises(
        ValueError, match=rf"one of .*digits-vit to be trained in PyTorch, got '{name}'"
    ):
        load(name, framework="torch")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match=r"Prodigy needs the package prodigyopt.*\[bench\]"):
        OPTIMIZERS["prodigy"].make([{"params": [torch.nn.Parameter(torch.ones(1))]}], 1.0)
    monkeypatch.delitem(sys.modules, "benchmarks._torch.workloads.digits", raising=False)
    monkeypatch.delitem(sys.modules, "benchmarks.workloads.digits")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"digits-conv needs the package sklearn.*\[torch,bench\]"):
        load("digits-conv", framework="torch")


def test_every_name_can_be_loaded():
    assert [load(name).name for name in NAMES] == list(NAMES)
