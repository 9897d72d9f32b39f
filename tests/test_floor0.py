"""Masked reductions, sharding rules, and the floors of the house."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from krl.base import sharding
from krl.base.masked import divide, masked_sum, segment_moments

ROOT = pathlib.Path(__file__).parent.parent
FLOOR = {"base": 0, "_moved": 0, "_version": 0, "configs": 0, "budget": 1, "learn": 1, "policy": 1, "tasks": 1, "rewards": 1, "hf": 2, "rollout": 2, "run": 3, "report": 4, "plan": 4, "eval": 4, "train": 5}  # fmt: skip


def test_masked_values_may_be_nan():
    total, count = masked_sum(jnp.array([1.0, jnp.nan, 2.0]), jnp.array([True, False, True]))
    assert (float(total), float(count)) == (3.0, 2.0)
    assert float(divide(jnp.float32(1), jnp.float32(0))) == 0.0


def test_division_has_a_finite_gradient_at_zero_count():
    assert np.isfinite(jax.grad(lambda x: divide(x, jnp.float32(0)))(1.0))


def test_segments_equal_loops():
    rng = np.random.default_rng(0)
    values, index = rng.normal(size=30).astype(np.float32), rng.integers(0, 6, 30)  # 5 is no segment
    count, mean, squares = segment_moments(jnp.array(values), jnp.array(index), 5)
    for segment in range(5):
        mine = values[index == segment]
        assert count[segment] == len(mine)
        np.testing.assert_allclose(mean[segment], mine.mean(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(squares[segment], ((mine - mine.mean()) ** 2).sum(), rtol=1e-4)
    assert [part.tolist() for part in segment_moments(jnp.ones(2), jnp.array([3, 3]), 3)] == [[0, 0, 0]] * 3


def test_rules_map_names_to_the_mesh():
    spec = sharding.partition_spec
    assert spec(("batch", "length"), ("data", "fsdp", "model")) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("embed", "heads", None), ("data", "fsdp", "model")) == PartitionSpec("fsdp", "model", None)
    assert spec(("embed", "heads"), ("data",)) == PartitionSpec(None, None)


def test_unmatched_and_colliding_names_are_refused():
    with pytest.raises(ValueError, match="'colour'"):
        sharding.partition_spec(("colour",), ("data",))
    with pytest.raises(ValueError, match="collide"):
        sharding.partition_spec(("heads", "mlp"), ("model",))


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [((2,), ("rows",), "axis names"), ((2, 2), ("data",), "as many numbers"), ((16,), ("data",), "needs 16 devices"),
     ((2, 2), ("data", "data"), "distinct")],
)  # fmt: skip
def test_impossible_meshes_are_refused(shape, names, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape, names)


def test_a_parameter_that_does_not_divide_is_named():
    mesh = sharding.make_mesh((8,), ("model",))
    with pytest.raises(ValueError, match=r"parameter block/key of shape \(4, 6\)"):
        sharding.tree_sharding(
            mesh,
            {"block": {"key": PartitionSpec("embed", "heads")}},
            {"block": {"key": jax.ShapeDtypeStruct((4, 6), "float32")}},
        )


def test_no_file_imports_from_its_own_floor_or_above():
    for path in (ROOT / "krl").rglob("*.py"):
        parts = path.relative_to(ROOT / "krl").with_suffix("").parts
        if parts == ("__init__",):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "krl":
                names = [node.module] if "." in node.module else [f"krl.{alias.name}" for alias in node.names]
                for room in (name.split(".")[1] for name in names):
                    assert room == parts[0] or FLOOR[room] < FLOOR[parts[0]], f"{path} imports {room}"
