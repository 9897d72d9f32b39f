"""Sharding is data: one table from the names of array axes to the axes of the device mesh."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# Mesh axes a run may use: "data" splits rows, "fsdp" splits rows and parameters, "model" splits
# heads, hidden units or whole experts, and the vocabulary. An axis that the mesh lacks splits nothing.
MESH_AXES = ("data", "fsdp", "model")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("model",),
    "embed": ("fsdp",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "mlp": ("model",),
    "expert": ("model",),
    "layers": (),
    "head": (),
    "rank": (),
    "length": (),
}


def make_mesh(shape: tuple[int, ...], axis_names: tuple[str, ...]) -> Mesh:
    """A mesh over the first prod(shape) devices.

    Args:
        shape: devices along each axis, for example (4, 2).
        axis_names: as many names from MESH_AXES, for example ("data", "model").

    Raises:
        ValueError: unknown or repeated names, lengths that differ, or too few devices.
    """
    unknown = [name for name in axis_names if name not in MESH_AXES]
    if unknown or len(set(axis_names)) != len(axis_names):
        raise ValueError(
            f"mesh axis names {axis_names} (config.mesh.axis_names) must be distinct names from {MESH_AXES}"
        )
    if len(shape) != len(axis_names):
        raise ValueError(f"mesh shape {shape} needs as many numbers as axis names {axis_names}")
    size, devices = math.prod(shape), jax.devices()
    if size < 1 or size > len(devices):
        few = f"mesh shape {shape} needs {size} devices and {len(devices)} are here"
        raise ValueError(f"{few}; give config.mesh.shape no more than there are")
    grid = np.array(devices[:size]).reshape(shape)
    return Mesh(grid, axis_names, axis_types=(AxisType.Auto,) * len(axis_names))


def reshape_mesh(mesh: Mesh, shape: tuple[int, ...]) -> Mesh:
    """The same devices in the same order along the same axes of other lengths; () leaves the mesh as it is.

    Raises:
        ValueError: the shape is not of as many devices.
    """
    return Mesh(mesh.devices.reshape(shape or mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def partition_spec(logical_axes: tuple[str | None, ...], mesh_axes: tuple[str, ...]) -> PartitionSpec:
    """The mesh axes that split each axis of an array.

    Args:
        logical_axes: a name from RULES, or None, for each axis of the array.
        mesh_axes: the axis names of the mesh.

    Raises:
        ValueError: a name without a rule, or two axes of one array on the same mesh axis.

    >>> tuple(partition_spec(("batch", "length"), ("data", "model")))
    ('data', None)
    """
    unmatched = [axis for axis in logical_axes if axis is not None and axis not in RULES]
    if unmatched:
        raise ValueError(f"no sharding rule for the axis names {unmatched}; add them to RULES")
    split = [tuple(a for a in RULES.get(axis or "length", ()) if a in mesh_axes) for axis in logical_axes]
    used = [name for names in split for name in names]
    if len(set(used)) != len(used):
        raise ValueError(f"axes {logical_axes} collide: two of them want one mesh axis of {used}")
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))


def named_sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    """The sharding on a mesh of an array with these axes; no axes means replicated."""
    return NamedSharding(mesh, partition_spec(logical_axes, mesh.axis_names))


def tree_sharding(mesh: Mesh, axes: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """Shardings of a parameter tree.

    Args:
        mesh: the device mesh.
        axes: a tree whose leaves are PartitionSpecs of logical names.
        shapes: the same tree with jax.ShapeDtypeStruct leaves.

    Raises:
        ValueError: an axis whose length its mesh axes do not divide; the message names the parameter.
    """

    def one(path: tuple[Any, ...], logical: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        sharding = named_sharding(mesh, *logical)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name} of shape {leaf.shape} with axes {tuple(logical)} does not divide over "
                f"the mesh {dict(mesh.shape)}; change the mesh or the policy's sizes"
            ) from None
        return sharding

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the "batch" axis is split into."""
    return math.prod(mesh.shape[name] for name in RULES["batch"] if name in mesh.axis_names)


def open_axes() -> tuple[str, ...]:
    """The axes of the mesh of `jax.set_mesh`, if one is set, that no `jax.shard_map` around this takes."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)


def open_batch() -> int:
    """How many parts the open axes split the "batch" axis into."""
    mesh, axes = jax.sharding.get_abstract_mesh(), open_axes()
    return math.prod(mesh.shape[name] for name in RULES["batch"] if name in axes)


def constrain(array: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Ask the compiler to lay an array out by the rules on the open axes of the mesh.

    Rows that are too few for all devices stay whole: XLA would fill them up, and gradients of experts became NaN there.
    """
    axes = open_axes()
    if not axes:
        return array
    if "batch" in logical_axes and array.shape[logical_axes.index("batch")] % open_batch():
        logical_axes = tuple(None if name == "batch" else name for name in logical_axes)
    return jax.lax.with_sharding_constraint(array, partition_spec(logical_axes, axes))


def readable(*arrays: Any) -> bool:
    """Whether this process can look at the values of arrays: none is traced or lies on devices of others too."""
    return not any(
        isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True) for array in arrays
    )
