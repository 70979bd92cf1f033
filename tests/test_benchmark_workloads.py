"""The workloads are what they say, and their PyTorch twins start and step as they do."""

import itertools
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from benchmarks._jax import training as training_jax
from benchmarks._jax.workloads import cartpole, digits, finetuning
from benchmarks._runs import Task
from benchmarks._torch import training as training_torch
from benchmarks._torch.optimizers import LOW_BIT
from benchmarks._torch.our_optimizers import COMPACT, OPTIMIZERS, OURS, SELF_DRIVING
from benchmarks._torch.workloads.weights import copy_weights, load_twin, named_arrays
from benchmarks.workloads import ALONE, NAMES, load

SMALL = ("shakespeare-small", "digits-conv", "digits-vit")
"""Every model that has a twin, in its smallest size."""

CHEAP = ("digits-conv", "digits-vit", "finetuning-vit", "cartpole")

# The longest sums, over 64 images of 8 x 8 positions, have 4,096 terms, and a sum's error grows as
# the root of their number.
ROUNDINGS = 64 * 2.0**-23


def task(workload, optimizer="adamw", rate=3e-3, seed=0, steps=20, **changes):
    return Task(workload, optimizer, rate, seed, steps, (steps,))._replace(**changes)


def first_batches(workload, seed, count=3):
    return list(itertools.islice(workload.batches(seed), count))


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def pair(name, seed=0):
    """A workload with its initial parameters, its twin, and the twin's model with the same."""
    workload, twin = load(name), load_twin(name)
    params, model = workload.init(seed), twin.make()
    copy_weights(params, model)
    return workload, params, twin, model


@pytest.mark.parametrize("name", ["shakespeare-small", *CHEAP])
def test_seed_decides_weights_and_batches(name):
    workload = load(name)
    assert workload.name == name
    assert same(first_batches(workload, 1), first_batches(workload, 1))
    assert not same(first_batches(workload, 1), first_batches(workload, 2))
    assert same(workload.init(1), workload.init(1))
    assert not same(workload.init(1), workload.init(2))


@pytest.mark.parametrize("name", SMALL)
def test_twin_has_the_same_loss_gradients_and_held_out_figure(name):
    workload, params, twin, model = pair(name)
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
    theirs = training_torch.train(run._replace(framework="torch"))
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
def test_adamw_learns_to_balance_the_pole():
    records = training_jax.train([task("cartpole", seed=seed, steps=100) for seed in range(3)])
    # An untrained policy falls within about 20 of the 500 steps.
    assert min(record.start for record in records) > 0.9
    assert np.mean([record.held_out[-1] for record in records]) < 0.5


def test_fine_tuning_starts_from_a_model_that_reads_upright_digits_alone():
    workload = load("finetuning-vit")
    params = workload.init(0)
    upright = digits.digits("vit").held_out(params)
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


def gymnasiums():
    return gymnasium.make("CartPole-v1").unwrapped


@jax.jit
@jax.vmap
def moved(state, action):
    """The state after, and whether it ends the episode."""
    after = cartpole.ENVIRONMENT.transition(state, action, None, cartpole.POLE)
    return after, cartpole.ENVIRONMENT.terminal(after, None, cartpole.POLE)


def test_the_cart_moves_as_gymnasiums():
    rng = np.random.default_rng(0)
    reach = np.array([2.5, 2.0, 0.22, 2.0])  # a little beyond where an episode ends
    states = rng.uniform(-reach, reach, (300, 4)).astype(np.float32)
    actions = rng.integers(2, size=300)
    environment = gymnasiums()
    environment.reset(seed=0)
    want, over = [], []
    for state, action in zip(states, actions, strict=True):
        environment.state = state.astype(np.float64)
        environment.steps_beyond_terminated = None
        observation, _, terminated, _, _ = environment.step(action)
        want.append(observation)
        over.append(terminated)
    got, fallen = moved(states, actions)
    # Some twenty roundings in a row, of numbers up to 4.
    np.testing.assert_allclose(got, want, rtol=0, atol=20 * 4 * 2.0**-23)
    assert 30 < sum(over) < 270
    np.testing.assert_array_equal(fallen, over)
    assert gymnasium.spec("CartPole-v1").max_episode_steps == cartpole.LIMIT


def test_carts_start_where_gymnasiums_do():
    starts = np.asarray(cartpole.start(jax.random.key(0), 1000))
    environment = gymnasiums()
    theirs = np.array([environment.reset(seed=seed)[0] for seed in range(1000)])
    assert np.abs(starts).max() <= 0.05
    np.testing.assert_allclose(starts.std(0), theirs.std(0), rtol=0.1)


def pushing_right(params):
    """Parameters of an agent that always pushes to the right."""
    params = jax.tree.map(jnp.zeros_like, params)
    params["policy"]["bias"] = params["policy"]["bias"].replace(jnp.array([-1e3, 1e3]))
    return params


def test_held_out_figure_of_cartpole_counts_the_steps_gymnasium_counts():
    workload = load("cartpole")
    figure = jax.jit(workload.held_out)(pushing_right(workload.init(0)))
    environment, lengths = gymnasiums(), []
    for seed in range(200):
        environment.reset(seed=seed)
        lengths.append(next(n for n in itertools.count(1) if environment.step(1)[2]))
    # The mean of 64 episodes: four standard errors.
    error = 4 * np.std(lengths) / 8
    assert (1 - figure) * cartpole.LIMIT == pytest.approx(np.mean(lengths), abs=error)


def test_carts_that_fall_start_anew_and_others_go_on():
    workload = load("cartpole")
    graph = nnx.graphdef(cartpole.Agent(rngs=nnx.Rngs(0)))
    attempt = jax.jit(lambda p: cartpole.attempt(nnx.merge(graph, p), jax.random.key(0)))
    states, actions, fallen = map(np.asarray, attempt(workload.init(0)))
    before, after = states[:-1].reshape(-1, 4), states[1:].reshape(-1, 4)
    expected, fallen = np.asarray(moved(before, actions.reshape(-1))[0]), fallen.reshape(-1)
    assert 10 < fallen.sum() < 100
    np.testing.assert_allclose(after[~fallen], expected[~fallen], rtol=0, atol=20 * 4 * 2.0**-23)
    assert np.abs(after[fallen]).max() <= 0.05
    assert np.abs(expected[fallen]).max(1).min() > 0.05


def test_returns_stop_at_the_end_of_an_episode():
    fallen = jnp.array([[False], [True], [False], [False]])
    got = cartpole.returns(fallen, jnp.array([0.5]))[:, 0]
    decay = cartpole.DISCOUNT
    want = np.array(
        [1 + decay, 1.0, 1 + decay + 0.5 * decay**2 / (1 - decay), 1 + 0.5 * decay / (1 - decay)]
    )
    np.testing.assert_allclose(got, (1 - decay) * want, rtol=8 * 2.0**-23)


# Of the parameters of digits-conv, 23,040 of 25,866 lie in tensors of 4,096 elements or more.
LARGE = 23_040 / 25_866


def coded(bits, moments):
    """Bytes a parameter: codes and a scale of two bytes for every 256, float32 where small."""
    return moments * (LARGE * (bits / 8 + 2 / 256) + (1 - LARGE) * 4)


# Bytes of state per parameter; Prodigy keeps two more copies of everything, self-driving one.
STATE = {
    "meta_lion": 4,
    "meta_lion-bfloat16": 2,
    "meta_lion-8bit": coded(8, 1),
    "meta_lion-4bit": coded(4, 1),
    "meta3-8bit": coded(8, 2),
    "meta3-4bit": coded(4, 2),
    "self_driving": 12,
    "cruxy-meta_lion": 4,
    "prodigy": 16,
    # Shapes decide what is factored; both are counted where AXIOM is tested.
    "axiom": 1.3,
    "axiom-momentum": 2.2,
}


LONG_IMPORTS = ("stable-adamw", "adagc")
"""Their package takes a quarter of a minute to import."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in (*COMPACT, *LONG_IMPORTS) else [])
        for name in OPTIMIZERS
        if name not in LOW_BIT
    ],
)
def test_every_torch_optimizer_trains(name):
    entry = OPTIMIZERS[name]
    rate = entry.rates()[2]
    assert rate == (1e-3 if name in SELF_DRIVING else pytest.approx(3e-3 * entry.scale))
    record = training_torch.train(
        task("digits-conv", name, rate, steps=12, evaluate_at=(6, 12), framework="torch")
    )
    assert record.finite
    assert record.start == pytest.approx(2.31, abs=0.1)
    assert len(record.losses) == 12
    assert record.held_out[1] < record.start
    assert record.held_out[0] != record.held_out[1]
    assert record.skipped == (0 if name in OURS else None)
    # A controller is 460 bytes, and clocks are 8 a tensor.
    want = pytest.approx(STATE.get(name, 8), rel=0.01, abs=0.03)
    assert record.state_bytes_per_parameter == want


@pytest.mark.slow  # torchao compiles its step
@pytest.mark.parametrize("name", LOW_BIT)
def test_low_bit_torch_optimizers_train(name):
    pytest.importorskip(name.partition("-")[0])
    entry = OPTIMIZERS[name]
    record = training_torch.train(
        task("digits-conv", name, entry.rates()[2], steps=12, framework="torch")
    )
    assert record.finite
    assert record.held_out[0] < record.start
    # Small tensors' states are float32; scales and tables of codes add a few bytes in a hundred.
    moments, bits = 1 if "lion" in name else 2, 4 if "4bit" in name else 8
    least = moments * (23_040 * bits / 8 + 2_826 * 4) / 25_866
    assert least < record.state_bytes_per_parameter < 1.2 * least


@pytest.mark.parametrize("name", ["schedule-free", "self_driving"])
def test_evaluation_is_at_the_average(name):
    """Evaluating in between moves weights to the average and back, and must not change training."""
    run = task("digits-conv", name, steps=12, framework="torch")
    once = training_torch.train(run)
    often = training_torch.train(run._replace(evaluate_at=(4, 8, 12)))
    np.testing.assert_allclose(often.losses, once.losses, rtol=1e-3)
    _, _, twin, model = pair("digits-conv")
    assert once.held_out[0] != twin.held_out(model)


@pytest.mark.parametrize("make", [load, load_twin])
def test_unknown_workload_is_refused_with_the_names(make):
    with pytest.raises(ValueError, match=r"one of shakespeare-small, .*got 'digits'"):
        make("digits")


@pytest.mark.parametrize("name", ALONE)
def test_workloads_without_a_twin_are_named(name):
    with pytest.raises(
        ValueError, match=rf"one of .*digits-vit to be trained in PyTorch, got '{name}'"
    ):
        load_twin(name)


def test_faults_are_refused_in_torch():
    with pytest.raises(ValueError, match="must be 'none' in PyTorch, got 'nan'"):
        training_torch.train(task("digits-conv", fault="nan", framework="torch"))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match=r"Prodigy needs the package prodigyopt.*\[bench\]"):
        OPTIMIZERS["prodigy"].make([{"params": [torch.nn.Parameter(torch.ones(1))]}], 1.0)
    monkeypatch.delitem(sys.modules, "benchmarks._jax.workloads.digits")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"digits-conv needs the package sklearn.*\[bench\]"):
        load("digits-conv")


def test_every_name_can_be_loaded():
    assert [load(name).name for name in NAMES] == list(NAMES)
