"""What `estimate_memory` says before a run is what the run then takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cruxy_optax
from cruxy_optax import estimate_memory
from memory_models import MODELS, train_step

TESTS = Path(__file__).parent


def held(tree):
    """Bytes of the buffers that a tree of arrays really has."""
    return sum(
        shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
    )


every_model = pytest.mark.parametrize(
    "name",
    [
        name if name in ("mlp", "llama") else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
"""Two of the five are run always."""


@every_model
def test_parameters_gradients_and_state_are_counted_to_the_byte(name):
    model, tx = MODELS[name](), cruxy_optax.meta3(1e-3)
    estimate = estimate_memory(tx, jax.eval_shape(lambda: model.params))
    grads = jax.grad(model.loss)(model.params, model.batch[:1])
    assert estimate.parameters == held(model.params)
    assert estimate.gradients == held(grads)
    assert estimate.state == held(tx.init(model.params))


@pytest.mark.slow
@every_model
def test_the_peak_is_what_the_kernel_sees_the_process_take(name):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says how much memory a process came to hold")
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, str(TESTS / "memory_models.py"), name],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    peaks = json.loads(process.stdout)
    assert peaks["estimated"] == pytest.approx(peaks["measured"], rel=0.1)


def small():
    """Shapes of a model, an optimizer, a step and a batch."""
    params = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    tx = optax.adamw(1e-3)
    step = train_step(optax.with_extra_args_support(tx), lambda p, x: jnp.mean((x @ p["w"]) ** 2))
    return params, tx, step, jax.ShapeDtypeStruct((8, 256), jnp.float32)


def test_nothing_is_allocated_for_parameters_that_fit_no_machine():
    params = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16)}
    estimate = estimate_memory(cruxy_optax.meta_lion(1e-4), params)
    assert estimate.parameters == estimate.gradients == 2 << 40
    assert 2 << 40 < estimate.state < (2 << 40) + 1024


def test_the_peak_is_arguments_outputs_and_temporaries_less_what_is_donated():
    params, tx, step, batch = small()
    donated = estimate_memory(tx, params, train_step=step, args=(batch,))
    matrix = 4 * 256 * 256
    assert donated.arguments == 3 * matrix + 4 + 4 * 8 * 256
    assert donated.reused >= 3 * matrix
    assert donated.peak == (
        donated.arguments + donated.outputs + donated.temporaries - donated.reused
    )
    plain = estimate_memory(tx, params, train_step=step.__wrapped__, args=(batch,))
    assert plain.reused == 0
    # Old and new parameters and moments at once.
    assert donated.peak < 6 * matrix <= plain.peak


def test_a_step_may_come_jitted_lowered_or_compiled():
    params, tx, step, batch = small()
    lowered = step.lower(params, jax.eval_shape(tx.init, params), batch)
    jitted = estimate_memory(tx, params, train_step=step, args=(batch,))
    assert estimate_memory(tx, params, train_step=lowered) == jitted
    assert estimate_memory(tx, params, train_step=lowered.compile()) == jitted


def test_of_sharded_parameters_the_step_is_counted_on_one_device():
    params, tx, step, batch = small()
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    params = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=split)}
    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=split if leaf.ndim else jax.NamedSharding(mesh, jax.P()),
        ),
        state,
    )
    estimate = estimate_memory(tx, params, train_step=step.lower(params, state, batch))
    matrix = 4 * 256 * 256
    assert estimate.parameters == matrix
    assert 3 * matrix / 8 <= estimate.arguments <= 3 * matrix / 8 + 4 + 4 * 8 * 256


def test_whole_numbers_have_no_gradient():
    params = {"w": jnp.ones(3), "steps": jnp.zeros((5,), jnp.int32)}
    estimate = estimate_memory(optax.sgd(0.1), params)
    assert (estimate.parameters, estimate.gradients, estimate.state) == (32, 12, 0)


def test_it_prints_a_table_with_a_line_for_each_figure():
    params, tx, step, batch = small()
    lines = str(estimate_memory(tx, params, train_step=step, args=(batch,))).splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "parameters",
        "gradients",
        "optimizer state",
    ]
    assert "524,292" in lines[3]
    assert "8.000" in lines[3]
    assert "= peak" in lines[-1]
    assert len({len(line) for line in lines}) == 1
    assert len(str(estimate_memory(tx, params)).splitlines()) == 4
    assert str(estimate_memory(tx, {})).count("-") == 3


def test_bad_arguments_say_what_to_do():
    params, tx, step, batch = small()
    with pytest.raises(TypeError, match=r"train_step must be a function .*, got 3"):
        estimate_memory(tx, params, train_step=3)
    lowered = step.lower(params, jax.eval_shape(tx.init, params), batch)
    with pytest.raises(TypeError, match=r"args must be left out .*, got Lowered"):
        estimate_memory(tx, params, train_step=lowered, args=(batch,))


def test_parameters_and_the_optimizer_may_stand_in_either_order():
    params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    tx = optax.adamw(1e-3)
    assert estimate_memory(params, tx) == estimate_memory(tx, params)
    assert estimate_memory(params).state == estimate_memory(params, cruxy_optax.axiom()).state
    with pytest.raises(TypeError, match="needs parameters or the name of a model"):
        estimate_memory(tx)
    with pytest.raises(TypeError, match="takes an optax transformation beside them"):
        estimate_memory(params, 3)


def saved_model(folder):
    """A layer and its embedding in safetensors, under the names that transformers gives them."""
    numpy = pytest.importorskip("safetensors.numpy")
    shapes = {
        "model.embed_tokens.weight": (50, 16),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.mlp.up_proj.weight": (32, 16),
        "model.norm.weight": (16,),
    }
    numpy.save_file(
        {n: np.zeros(s, np.float32) for n, s in shapes.items()}, folder / "a.safetensors"
    )
    return shapes


def test_a_folder_is_read_by_its_headers_and_counts_in_bfloat16(tmp_path):
    shapes = saved_model(tmp_path)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    estimate = estimate_memory(tmp_path, device_memory="1GB")
    assert (estimate.parameter_count, estimate.parameters) == (count, 2 * count)
    assert estimate["fp16_gb"] * 1e9 == 2 * count
    linear, rows = 16 * 16 + 32 * 16, 16 + 32
    assert estimate["int8_gb"] * 1e9 == pytest.approx(2 * (count - linear) + linear + 5 * rows)
    assert estimate["recommendation"].startswith("optax.adamw, float32")
    assert set(estimate.keys()) > {"int4_gb", "state", "peak"}


def test_a_name_on_the_hub_is_read_by_its_headers(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from types import SimpleNamespace

    def metadata(name):
        assert name == "someone/model"
        tensors = {"layer.weight": SimpleNamespace(dtype="BF16", shape=[8, 4])}
        return SimpleNamespace(files_metadata={"a": SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr(hub, "get_safetensors_metadata", metadata)
    assert estimate_memory("someone/model").parameters == 64


def test_a_model_that_is_nowhere_is_named(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(OSError, match="must be a folder with safetensors or a name on the hub"):
        estimate_memory(tmp_path)
    with pytest.raises(KeyError, match="the names of an estimate are"):
        estimate_memory({"w": jnp.ones(3)})["fp15_gb"]


def test_a_folder_is_what_its_index_or_its_whole_file_says(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    for name, size in (("model", 16), ("adapter_model", 400)):
        numpy.save_file({"w": np.zeros(size, np.float32)}, tmp_path / f"{name}.safetensors")
    assert estimate_memory(tmp_path).parameter_count == 16
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "adapter_model.safetensors"}}')
    assert estimate_memory(tmp_path).parameter_count == 400
    for text, said in (
        ('{"weight_map": {"w": "../model.safetensors"}}', "must name files of its own folder"),
        ("{}", "must be JSON with a weight_map"),
        ('{"weight_map": ', "must be JSON with a weight_map"),
        ('{"weight_map": {"w": 3}}', "must name files of its own folder, got '3'"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=said):
            estimate_memory(tmp_path)


def test_tensors_whose_names_make_no_tree_are_refused(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {name: np.zeros(2, np.float32) for name in ("a", "a.b")}
    numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="names that make a tree at their dots, got 'a"):
        estimate_memory(tmp_path)
