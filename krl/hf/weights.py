"""Hugging Face checkpoints in and out: sharded safetensors beside a config.json."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from krl.base.digest import digest
from krl.hf.config import STORED_TYPES, config_json, read_config, sees_images, what_else
from krl.hf.tensors import EMBEDDING, HEAD, Part, part_shape, parts_of, tensor_shape
from krl.policy import lora
from krl.policy.config import Lora, PolicyConfig
from krl.policy.model import abstract_params

INDEX = "model.safetensors.index.json"
_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def first_device() -> Mesh:
    """The mesh of what goes to no mesh in particular."""
    return Mesh(np.array(jax.devices()[:1]), ("data",))


def load_hf(path: str | pathlib.Path, mesh: Mesh | None = None, **options: Any) -> tuple[PolicyConfig, dict[str, Any]]:
    """Read a checkpoint directory into float32 parameters on the devices.

    One file is open at a time and one tensor at a time is on the host: each process reads of it what
    its own devices need.

    Args:
        path: a directory with config.json and model.safetensors, or its shards and their index.
        mesh: where the parameters go, by the sharding rules; None for the default device.
        options: fields of PolicyConfig that no checkpoint decides, such as dtype, remat and attention.

    Returns:
        (config, params), as `krl.policy.init` lays them out.

    Raises:
        ValueError: an unsupported architecture or field, a file that is missing or cut off, tensors
            that are missing, unexpected or of another shape; the message names them.
    """
    config, files = check_hf(path, **options)
    tensors, like = parts_of(config), flatten_dict(abstract_params(config, mesh or first_device()))
    (embedding,) = tensors[EMBEDDING]
    leaves: dict[tuple[str, ...], jax.Array] = {}
    spare = None
    for file, names in files.items():
        with safetensors.safe_open(file, framework="np") as opened:
            for name, stored in names.items():
                begin = 0
                for part in tensors.get(name, ()):
                    at = part.path
                    leaves[at] = read_part(opened.get_slice(stored), part, like[at], leaves.get(at), begin)
                    begin += part_shape(part, like[at].shape)[0]
                if name == HEAD and config.tie_embeddings:
                    spare = file, stored
    if spare is not None:  # beside an embedding it should equal: one of the two was trained
        file, stored = spare
        with safetensors.safe_open(file, framework="np") as opened:
            head = read_part(opened.get_slice(stored), embedding, like[embedding.path], None)
        if not bool((head == leaves[embedding.path]).all()):
            raise ValueError(
                f"{file} stores a {HEAD} that is not the embedding, and config.json says tie_word_embeddings; "
                "set it to false to keep both"
            )
    return config, unflatten_dict(leaves)


def read_part(
    stored: Any, part: Part, like: jax.ShapeDtypeStruct, whole: jax.Array | None, begin: int = 0
) -> jax.Array:
    """Put a part of a tensor of an open file, from row `begin` on, into its parameter, shard by shard.

    Nothing of the parameter has been read before if `whole` is None.
    """
    if whole is None:
        whole = jax.jit(jnp.zeros, static_argnums=0, out_shardings=like.sharding)(like.shape)
    shape, sharding = like.shape, like.sharding
    if part.at:
        inside = len(part.at)
        shape, sharding = shape[inside:], NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[inside:]))
    order = [axis for group in part.groups for axis in group]

    def shard(index: Any) -> np.ndarray:
        bounds = [each.indices(size)[:2] for each, size in zip(index, shape, strict=True)]
        cut: list[slice] = []
        for group in part.groups:
            # Only the first of merged axes is ever split, so a shard is one run of the tensor's axis.
            inner = math.prod(shape[axis] for axis in group[1:])
            above = 0 if cut else begin
            cut.append(slice(above + bounds[group[0]][0] * inner, above + bounds[group[0]][1] * inner))
        sizes = [bounds[axis][1] - bounds[axis][0] for axis in order]
        return stored[tuple(cut)].reshape(sizes).transpose(np.argsort(order))

    piece = jax.make_array_from_callback(shape, sharding, shard)
    return _place(whole, piece, part.at)


@functools.partial(jax.jit, donate_argnums=0)
def _place(whole: jax.Array, piece: jax.Array, at: tuple[int, ...]) -> jax.Array:
    """The parameter with one layer, one expert of it, or all of it, replaced."""
    piece = piece.astype(whole.dtype).reshape((1,) * len(at) + piece.shape)
    return jax.lax.dynamic_update_slice(whole, piece, (*at, *(0,) * (whole.ndim - len(at)))) if at else piece


def check_hf(path: str | pathlib.Path, **options: Any) -> tuple[PolicyConfig, dict[pathlib.Path, dict[str, str]]]:
    """Check every tensor's name, shape and type by the headers of the files, before anything is read.

    Args:
        path, options: as for `load_hf`.

    Returns:
        (config, the tensors in each file: by its name in a text model, the name that it has there).

    Raises:
        ValueError: as `load_hf`.
    """
    config, path = read_config(path, **options), pathlib.Path(path)
    tensors = parts_of(config)
    like = flatten_dict(abstract_params(config, first_device()))
    files: dict[pathlib.Path, dict[str, str]] = {}
    found, kinds, images = {}, {}, sees_images(path)
    for file in _weight_files(path):
        try:
            with safetensors.safe_open(file, framework="np") as opened:
                names = {stored if not images else _without_images(stored): stored for stored in list(opened.keys())}
                files[file] = {name: stored for name, stored in names.items() if name}
                for name, stored in files[file].items():
                    view = opened.get_slice(stored)
                    found[name], kinds[name] = tuple(view.get_shape()), view.get_dtype()
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {file}: {error}; it may be cut off or a pointer, fetch it again") from None
    wanted = {name: tensor_shape(parts, like) for name, parts in tensors.items()}
    spare = {HEAD} if config.tie_embeddings else set()
    unexpected = [n for n in found if n not in wanted and n not in spare and not n.endswith("rotary_emb.inv_freq")]
    missing = [n for n in wanted if n not in found]
    problems = [
        f"{len(names)} {what} ({few(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(f"{path}: the tensors are not those of its config.json: {' and '.join(problems)}")
    if spare & found.keys():
        wanted[HEAD] = wanted[EMBEDDING]
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{path}: {name} has shape {found[name]} and its config.json asks for {shape}")
        if kinds[name] not in STORED_TYPES:
            raise ValueError(
                f"{path}: {name} is {kinds[name]}; tensors must be {', '.join(STORED_TYPES)}, not quantised"
            )
    types = {STORED_TYPES[kinds[name]] for name in tensors}
    if len(types) > 1:  # float32 holds them all, and config.json has to say so when they are written
        return dataclasses.replace(config, stored_dtype="float32", source=config_json(config, "float32")), files
    return dataclasses.replace(config, stored_dtype=types.pop()), files


def _without_images(name: str) -> str:
    """The name that a tensor of a model that sees images has in its language model; "" if it is no part of that."""
    if _IMAGES.match(name):
        return ""
    return re.sub(r"^(language_model\.model\.|model\.language_model\.)", "model.", name).removeprefix("language_model.")


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a checkpoint's tensors, all there."""
    index = path / INDEX
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
            any((path / name).is_file() for name in names)  # may be no name of a file
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index} is not an index of safetensors: {str(error)[:200]!r}") from None
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        parts = sorted(file.name for file in path.glob("model*.safetensors"))
        told = "fetch it, too" if parts or index.exists() else what_else(path)
        if parts and not index.exists():
            told = f"what is in {few(parts)} is told by {INDEX}, which is not there; fetch that, too"
        told = f"; {told}" if told else ""
        raise ValueError(f"{path / missing[0]} is missing; the checkpoint needs {few(names)}{told}")
    return [path / name for name in names]


def few(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def save_hf(
    path: str | pathlib.Path,
    config: PolicyConfig,
    params: dict[str, Any],
    *,
    dtype: str | None = None,
    files: Sequence[pathlib.Path] = (),
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that transformers.AutoModelForCausalLM.from_pretrained opens.

    The host holds one shard at a time. The directory appears whole or not at all.

    Args:
        path: a new or empty directory.
        config: of the policy; one from `load_hf` is written back as it was read.
        params: of `krl.policy.init` or `load_hf`, on any devices; adapters are merged.
        dtype: of the tensors: "float32", "bfloat16" or "float16"; None for that of the checkpoint the
            policy came from. 16 bits round parameters that were trained in between.
        files: more files to copy, such as the tokenizer's.
        shard_bytes: the largest size of a safetensors file, bytes.

    Raises:
        ValueError: the directory holds something or cannot be written, a dtype that is not stored, params
            that are not of this config, or a config that describes no family of checkpoints.
    """
    stored = dtype or config.stored_dtype
    if stored not in STORED_TYPES.values():
        raise ValueError(f"dtype {stored!r} must be one of {', '.join(STORED_TYPES.values())}")
    path = check_new(path)
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, abstract_params(config, first_device())):
        raise ValueError("the parameters are not of this config: their names or shapes differ")
    if config.lora:
        params, config = jax.jit(lora.merge, static_argnums=0)(config, params), dataclasses.replace(config, lora=None)
    text, itemsize = config_json(config, dtype), np.dtype(stored).itemsize
    leaves = flatten_dict(params)
    tensors = parts_of(config)
    sizes = {name: math.prod(tensor_shape(parts, leaves)) * itemsize for name, parts in tensors.items()}
    shards = plan_files(sizes, shard_bytes)
    try:
        with appearing_whole(path) as partial:
            for name, shard in shards.items():
                arrays = {
                    n: np.concatenate([write_part(leaves[part.path], part) for part in tensors[n]]).astype(stored)
                    for n in shard
                }
                if partial is not None:
                    safetensors.numpy.save_file(arrays, partial / name, metadata={"format": "pt"})
                    (partial / name).chmod(0o644)  # else only its owner may read it
            if partial is not None:
                (partial / "config.json").write_text(text)
                for file in files:
                    shutil.copy(file, partial / file.name)
                write_index(partial, shards, sum(sizes.values()))
    except OSError as error:
        raise ValueError(f"cannot write the checkpoint {path}: {error}") from None


def check_new(path: str | pathlib.Path) -> pathlib.Path:
    """The whole path of a directory to be made; refuses one that holds something."""
    path = pathlib.Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is not empty; choose another directory for the checkpoint")
    return path


@contextlib.contextmanager
def appearing_whole(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A new directory that takes its name when the block ends well and is removed when it does not.

    None on every process but the first of several, which all compute what the first writes.
    """
    if jax.process_index():
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=path.parent))
    try:
        partial.chmod(0o755)
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def export(
    workdir: str | pathlib.Path, path: str | pathlib.Path, *, dtype: str | None = None, adapters: bool = False
) -> int:
    """Write the newest checkpoint of a training run as a Hugging Face directory.

    Args:
        workdir: of train.py; its folder policy holds config.json and the tokenizer's files.
        path, dtype: as for `save_hf`.
        adapters: write the adapters of the run alone, in PEFT's format; by default they are merged. What they stand on
            goes beside them, to the directory base in path, unless it is the checkpoint in config.policy.path.

    Returns:
        The step of the checkpoint.

    Raises:
        ValueError: there is no checkpoint that can be read, the run has no adapters, or `save_hf` refuses.
    """
    from krl.hf.adapters import save_adapters  # which stands on this module

    workdir = pathlib.Path(workdir)
    if not (workdir / "policy").is_dir():
        raise ValueError(f"{workdir} holds no run; give the --workdir of a train.py run")
    run = workdir / "config.json"
    keys = json.loads(run.read_text()) if run.exists() else {}
    config = read_config(workdir / "policy", **adapters_of(keys))
    if adapters and (dtype or not config.lora):
        why = "are written in float32: leave dtype out" if config.lora else "are not there (config.policy.lora_rank=0)"
        raise ValueError(f"the adapters of {workdir} {why}")
    path, like = check_new(path), abstract_params(config, first_device())
    place = epath.Path(keys.get("checkpoint.dir") or workdir.absolute())
    files = [file for file in sorted((workdir / "policy").iterdir()) if file.name != "config.json"]
    step, params, about = _newest(place / "checkpoints", lora.trained(config, like))
    if not config.lora:
        save_hf(path, config, params, dtype=dtype, files=files)
        return step
    if not (place / "frozen").is_dir():
        raise ValueError(f"{place / 'frozen'} is missing; a run's adapters stand on what is there: bring it back")
    _, frozen, _ = _newest(place / "frozen", lora.frozen(config, like))
    if digest(frozen) != about.get("reference"):
        raise ValueError(f"{place / 'frozen'} does not hold what the adapters of this run stand on; bring it back")
    if not adapters:
        save_hf(path, config, lora.join(frozen, params), dtype=dtype, files=files)
        return step
    known = pathlib.Path(keys["policy.path"]).is_dir() and not keys["sft.steps"]  # nobody else has a fine-tuned one
    save_adapters(path, config, params, base=keys["policy.path"] if known else str(path / "base"))
    if not known:
        save_hf(path / "base", dataclasses.replace(config, lora=None), frozen, files=files)
    return step


def adapters_of(keys: Mapping[str, Any]) -> dict[str, Lora | None]:
    """The adapters that the flat keys of a run's config ask for, as an option of `read_config`."""
    rank, alpha, modules = (keys.get(f"policy.lora_{name}") for name in ("rank", "alpha", "modules"))
    return {"lora": Lora(rank, alpha, tuple(modules)) if rank and alpha and modules else None}


def _newest(directory: epath.Path, like: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The step, the parameters, and what is said about them, of the newest checkpoint in a directory."""
    import orbax.checkpoint as ocp  # slow to import, and only an export needs it

    if not directory.is_dir():
        raise ValueError(f"{directory.parent} holds no checkpoint yet; let train.py take a few steps")
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"{directory.parent} holds no checkpoint yet; let train.py take a few steps")
        try:
            told = {"about": ocp.args.JsonRestore()} if (directory / str(step) / "about").exists() else {}
            asked = ocp.args.Composite(params=ocp.args.StandardRestore(like), **told)
            found = manager.restore(step, args=asked)
        except Exception as error:  # Orbax raises a plain one for damaged arrays
            reason = str(error).splitlines()[0][:200]
            raise ValueError(f"cannot read checkpoint {directory / str(step)}: {reason}; it may be damaged") from None
    return step, found["params"], found["about"] if told else {}


def plan_files(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """The files of a checkpoint and the tensors of each: all in their order, cut into runs of at most so many bytes."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards, held = [*shards, []], 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_index(directory: pathlib.Path, files: Mapping[str, Iterable[str]], size: int) -> None:
    """Say which of several files from `plan_files` holds which tensor; nothing for a single one."""
    if len(files) > 1:
        weight_map = {name: file for file, shard in files.items() for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_part(leaf: Any, part: Part) -> np.ndarray:
    """A part of a checkpoint's tensor on the host, contiguous, of its parameter's type."""
    leaf = leaf[part.at] if part.at else leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    order = [axis for group in part.groups for axis in group]
    sizes = [math.prod(leaf.shape[axis] for axis in group) for group in part.groups]
    return np.ascontiguousarray(np.asarray(leaf).transpose(order).reshape(sizes))
