"""What a run needs of every device, before it costs anything: its real programs compiled ahead of time.

    python -m krl.plan --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --topology v5p:2x2x4

DIR needs no more than the checkpoint's config.json. A topology is one that `jax.experimental.topologies` knows for
TPUs, for which libtpu must be installed (`pip install "jax[tpu]"`) and no TPU be there; without it the programs are
compiled for the devices that are. Nothing is allocated. docs/performance.md says how to read the table.
"""

import dataclasses
import math
import sys
from typing import Any, NamedTuple

import jax
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from krl import hf, policy
from krl.base.sharding import batch_devices, make_mesh, reshape_mesh
from krl.configs.check import check
from krl.configs.flags import define_flags, one_line_errors, parse_flags
from krl.learn.pack import row_shape
from krl.plan.programs import Program, abstract_sampler, compile_rollout, compile_update, gigabytes
from krl.plan.roofline import (
    ACCELERATORS,
    Accelerator,
    Seconds,
    Work,
    decode_layouts,
    decode_work,
    prefill_work,
    update_work,
)
from krl.policy.attention import has_branches, why_not
from krl.policy.model import abstract_params
from krl.rollout.sampler import slot_bytes
from krl.rollout.serve import SHRINK
from krl.run.optimizer import abstract_state
from krl.run.setup import NAMES, find_optimizer
from krl.run.start import computed_by, sized_policy

KEPT = ("parameters", "optimiser", "parameters of the reference")  # all the time; the other parts while decoding


class Plan(NamedTuple):
    """What a step of a config takes of every device of a mesh."""

    config: ConfigDict
    sizes: policy.PolicyConfig
    mesh: Mesh  # of the update
    decoding: Mesh
    tokens: int  # of every response
    parts: dict[str, float]  # GB of what is there for long, from shapes alone
    programs: dict[str, Program]  # "prefill", "decode", "shrink", "update"
    accelerator: Accelerator | None  # None if nothing is known of these devices
    prompts: int  # M
    slots: int  # S
    rows: int  # of a micro-batch, on each device
    columns: int  # of such a row

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response."""
        return self.config.data.max_prompt_tokens + self.config.sample.max_new_tokens

    @property
    def shared(self) -> bool:
        """Whether the rollouts of an update share their prompts."""
        return self.config.optim.packed and has_branches(self.sizes.attention, self.longest, self.sizes.head_size)

    @property
    def update_rollouts(self) -> int:
        """Rollouts of an update."""
        return self.config.alloc.budget // self.config.optim.updates_per_step

    def rows_of(self, micro_tokens: int) -> tuple[int, int]:
        """(columns, rows on each device) of an update's micro-batches of so many tokens."""
        asked, answered = self.config.data.max_prompt_tokens, self.config.sample.max_new_tokens
        with jax.set_mesh(self.mesh):
            columns, _, rows = row_shape(asked, answered, micro_tokens, self.update_rollouts, shared=self.shared)
        return columns, rows // batch_devices(self.mesh)

    @property
    def seconds(self) -> dict[str, Seconds]:
        """How long a step's programs take at least; nothing of unknown devices, nor of "shrink", which is short."""
        return {n: one.seconds(self.accelerator) for n, one in step_work(self).items()} if self.accelerator else {}


def main(_):
    """The command line."""
    with one_line_errors("krl.plan"):
        show(plan(flags.FLAGS.config, flags.FLAGS.topology, flags.FLAGS.tokens), Console())


def plan(config: ConfigDict, topology: str, tokens: int = 0, accelerator: Accelerator | None = None) -> Plan:
    """Compile the programs of a config, and reckon how long they take in a step.

    Args:
        config: every key of configs/default.py; policy.path needs a config.json only.
        topology: for example "v5p:2x2x4"; "" for the devices that are here.
        tokens: length of every response to reckon with; 0 for the longest, sample.max_new_tokens.
        accelerator: what the devices can do; None looks their kind up.

    Raises:
        ValueError: the config cannot work, or the mesh does not fit the topology or the parameters.
    """
    check(config, NAMES)
    mesh, tokens = find_mesh(config, topology), tokens or config.sample.max_new_tokens
    sizes, decoding = find_sizes(config, on_tpu=bool(topology)), reshape_mesh(mesh, tuple(config.mesh.decode))
    optimizer = find_optimizer(config)
    params = abstract_params(sizes, mesh)
    learner = abstract_state(sizes, optimizer, policy.trained(sizes, params))
    # What the penalty holds a policy to is the one that it began with; adapters have it beside them.
    reference = policy.frozen(sizes, params) if sizes.lora else params if config.loss.kl_coefficient else {}
    parts = {"parameters": gigabytes(params), "optimiser": gigabytes(learner.opt_state)}
    if reference and not sizes.lora:
        parts["parameters of the reference"] = parts["parameters"]
    with jax.set_mesh(decoding):
        abstract_params(sizes, decoding)  # refuses a layout that does not divide them
        sampler = abstract_sampler(config, sizes, params, decoding)
        programs = compile_rollout(sizes, sampler, sum(parts.values()))
    with jax.set_mesh(mesh):
        programs["update"] = compile_update(
            config, sizes, optimizer, learner, reference or None, mesh, here=not topology
        )
    parts |= {
        "parameters for decoding": gigabytes(sampler.work.weights),
        "keys and values of prompts": gigabytes(sampler.work.prompts.cache),
        "keys and values of slots": gigabytes(sampler.state.slots.cache),
    }
    found = Plan(
        config=config, sizes=sizes, mesh=mesh, decoding=decoding, tokens=tokens, parts=parts, programs=programs,
        accelerator=accelerator or _look_up(mesh.devices.flat[0], here=not topology),
        prompts=len(sampler.work.prompts.last), slots=sampler.options.num_slots, rows=0, columns=0,
    )  # fmt: skip
    columns, rows = found.rows_of(config.optim.micro_tokens)
    return found._replace(rows=rows, columns=columns)


def step_work(found: Plan) -> dict[str, Work]:
    """What the programs "prefill", "decode" and "update" ask of each device in a step, by the sizes of a plan."""
    config, parts, queues = found.config, found.parts, batch_devices(found.decoding)
    weights, prompts = parts["parameters for decoding"], parts["keys and values of prompts"]
    steps = math.ceil(math.ceil(config.alloc.budget / queues) / math.ceil(found.slots / queues)) * found.tokens
    sequence = config.data.max_prompt_tokens + found.tokens
    # Rollouts in a row; all have a gradient, and at best they have the same prompt.
    packed = found.columns // sequence if config.optim.packed else 1
    if found.shared:
        packed = (found.columns - config.data.max_prompt_tokens) // found.tokens
    at_once = found.rows * batch_devices(found.mesh)
    batches = math.ceil(math.ceil(found.update_rollouts / packed) / at_once) * config.optim.updates_per_step
    return {
        "prefill": prefill_work(
            found.sizes, found.decoding, found.prompts, config.data.max_prompt_tokens - 1, weights, prompts
        ),
        "decode": decode_work(
            found.sizes, found.decoding, found.slots, steps, found.longest - 1,
            weights + parts["keys and values of slots"],
        ),
        "update": update_work(
            found.sizes, found.mesh, batches, at_once * found.columns, sequence,
            bool(config.loss.importance_cap) + bool(config.loss.kl_coefficient),
        ),
    }  # fmt: skip


# ---------------------------------------------------------------- what there is


def find_sizes(config: ConfigDict, *, on_tpu: bool) -> policy.PolicyConfig:
    """The policy of a config, with the attention that "auto" would choose on the devices it is planned for."""
    if config.policy.path:
        found = hf.read_config(config.policy.path, **computed_by(config))
    else:
        found = sized_policy(config, config.tokenizer.vocab_size)
    if not on_tpu or found.attention != "auto":
        return found
    length = config.data.max_prompt_tokens + config.sample.max_new_tokens
    query: Any = jax.ShapeDtypeStruct((1, length, found.num_heads, found.head_size), found.dtype)
    reason = why_not("splash", query, None, found.attention_softcap)
    return dataclasses.replace(found, attention="xla" if reason else "splash")


def find_mesh(config: ConfigDict, topology: str) -> Mesh:
    """The config's mesh over the devices of a topology, or those that are here."""
    shape, names = tuple(config.mesh.shape), tuple(config.mesh.axis_names)
    if not topology:
        return make_mesh(shape, names)
    host = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}  # else the least is a whole host
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **host)
    except RuntimeError as error:  # no libtpu, or one that knows no such topology
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot plan for --topology={topology} ({reason}); it needs libtpu: pip install 'jax[tpu]'"
        ) from None
    if math.prod(shape) != len(described.devices):
        devices = len(described.devices)
        raise ValueError(
            f"{topology} has {devices} devices and config.mesh.shape is {shape}; its product must be {devices}"
        )
    grid = topologies.make_mesh(described, shape, names).devices
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _look_up(device: jax.Device, *, here: bool) -> Accelerator | None:
    """What is known of a device; one that is here says itself how much memory it gives."""
    known = ACCELERATORS.get(device.device_kind)
    memory = device.memory_stats() if here else None
    return known._replace(memory_gb=memory["bytes_limit"] / 1e9) if known and memory else known


# ---------------------------------------------------------------- what to change


def advise(found: Plan) -> list[str]:
    """What fits, and which slots, layout of decoding and micro-batches would; nothing of unknown devices."""
    if not found.accelerator:
        return [f"nothing is known of {found.mesh.devices.flat[0].device_kind!r}: neither its memory nor its speed"]
    limit = found.accelerator.memory_gb
    held = {name: program.held for name, program in found.programs.items()}
    said = [f"{name} does not fit: it needs {gb:.3g} GB of {limit:.3g}" for name, gb in held.items() if gb > limit]
    said = said or [f"everything fits: at most {max(held.values()):.3g} GB of {limit:.3g}"]
    limits = [f"{name} by {one.limit}" for name, one in found.seconds.items()]
    return [
        *said, f"what limits its speed: {', '.join(limits)}", *_advise_decoding(found, found.accelerator),
        *_advise_update(found, limit),
    ]  # fmt: skip


def _advise_decoding(found: Plan, accelerator: Accelerator) -> list[str]:
    """Every layout of decoding and what it would take, and the fastest."""
    sizes, parts, split, devices = found.sizes, found.parts, found.decoding.shape.get("model", 1), found.decoding.size
    units = sizes.experts.count if sizes.experts else sizes.mlp_size
    divided = [devices, sizes.num_heads, sizes.num_kv_heads, units, sizes.vocab_size]
    slot_gb = slot_bytes(sizes, found.longest) / 1e9
    known = [found.programs[name] for name in ("prefill", "decode") if found.programs[name].compiles]
    layouts = decode_layouts(
        devices=devices, splits=[m for m in range(1, devices + 1) if all(size % m == 0 for size in divided)],
        accelerator=accelerator, tokens=found.tokens, num_rollouts=found.config.alloc.budget, slot_gb=slot_gb,
        kept_gb=sum(parts.get(name, 0.0) for name in KEPT) + max((one.temporaries for one in known), default=0.0),
        weights_gb=parts["parameters for decoding"] * split, prompts_gb=parts["keys and values of prompts"] * split,
        room=1 + 1 / SHRINK,
    )  # fmt: skip
    said = []
    for one in layouts:
        room = f"{one.slots} slots, {one.seconds:.3g} s of decoding" if one.slots else "no slot"
        said.append(f"decoding with the policy split over {one.split}: {one.fixed_gb:.3g} GB, and room for {room}")
    best = min(layouts, key=lambda one: one.seconds)
    if not best.slots:
        return [*said, "no layout of decoding fits: take fewer or shorter prompts, or more devices"]
    groups = devices // best.split
    return [
        *said,
        f"the fastest is {groups} groups of {best.split}: --config.mesh.axis_names=\"('fsdp', 'model')\" "
        f'--config.mesh.shape="({devices}, 1)" --config.mesh.decode="({groups}, {best.split})" '
        f"--config.sample.memory_gb={math.ceil(1e3 * best.slots / groups * slot_gb / best.split) / 1e3:g}",
    ]


def _advise_update(found: Plan, limit: float) -> list[str]:
    """Which micro-batches fit, if temporaries go by their rows."""
    update, devices = found.programs["update"], batch_devices(found.mesh)
    if not update.temporaries:
        return []
    room = limit - update.held + update.temporaries
    rows = min(int(found.rows * room / update.temporaries), math.ceil(found.update_rollouts / devices))
    if rows < 1:
        return ["not even one row a device fits the update: split the policy there too, or take more devices"]
    columns, rows = found.rows_of(rows * found.columns * devices)  # micro-batches are equally large
    if (columns, rows) == (found.columns, found.rows):
        return []
    return [
        f"{rows} x {columns} tokens a device instead of {found.rows} x {found.columns} in a micro-batch fit: "
        f"--config.optim.micro_tokens={rows * columns * devices}"
    ]


# ---------------------------------------------------------------- on the screen

_HELD = {
    "held beside the program, GB": "beside", "arguments, GB": "arguments", "results, GB": "results",
    "temporaries, GB": "temporaries", "code, GB": "code", "together, GB": "held",
    "seconds to compile": "compile_seconds",
}  # fmt: skip
_WORK = {"TFLOP of products": "tflop", "parameters and caches read, GB": "moved", "sent to other devices, GB": "sent"}
_SECONDS = {
    "seconds of computing": "computing", "seconds of memory": "memory", "seconds of network": "network",
    "seconds at least": "least",
}  # fmt: skip


def show(found: Plan, console: Console) -> None:
    """Print a plan: parts, programs and advice."""
    parts = Table("what a device holds for long", "GB")
    for name, gb in found.parts.items():
        parts.add_row(name, f"{gb:.3g}")
    parts.add_row("slots, a number", str(found.slots))
    console.print(parts)
    programs = Table("of each device, in a step", *found.programs)
    for titles, source in ((_HELD, found.programs), (_WORK, step_work(found)), (_SECONDS, found.seconds)):
        for title, field in titles.items() if source else ():
            values = [getattr(source.get(name), field, None) for name in found.programs]
            programs.add_row(title, *("" if value is None else f"{value:.4g}" for value in values))
    console.print(programs)
    if found.seconds:
        together = sum(one.least for one in found.seconds.values())
        console.print(f"a step takes at least {together:.3g} s", highlight=False)
    for line in advise(found):
        console.print(line, highlight=False, soft_wrap=True)


def run_command() -> None:
    """The command `python -m krl.plan`."""
    define_flags()
    flags.DEFINE_string("topology", "", "of TPUs to compile for, such as v5p:2x2x4; none for the devices that are here")
    flags.DEFINE_integer("tokens", 0, "length of every response to reckon with; 0 for sample.max_new_tokens")
    app.run(main, argv=["krl.plan", *sys.argv[1:]], flags_parser=parse_flags)
