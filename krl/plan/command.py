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
from krl.base.sharding import RULES, make_mesh, reshape_mesh
from krl.configs.check import check
from krl.configs.flags import define_flags, one_line_errors, parse_flags
from krl.plan.hlo import Collective
from krl.plan.programs import Program, abstract_sampler, compile_rollout, compile_update, gigabytes
from krl.plan.roofline import ACCELERATORS, Accelerator, Seconds, decode_layouts, seconds
from krl.policy.attention import why_not
from krl.rollout.sampler import slot_bytes
from krl.rollout.serve import SHRINK
from krl.run.optimizer import abstract_state
from krl.run.setup import NAMES, find_optimizer
from krl.run.start import abstract_params, computed_by, sized_policy

KEPT = ("parameters", "optimiser", "parameters of the reference")  # all the time; the other parts while decoding


class Plan(NamedTuple):
    """What a step of a config takes of every device of a mesh."""

    parts: dict[str, float]  # GB of what is there for long, from shapes alone
    programs: dict[str, Program]  # "prefill", "decode", "shrink", "update", and its "log-probs" if it has any
    kind: str  # of the devices
    accelerator: Accelerator | None  # None if nothing is known of that kind
    slots: int  # S
    advice: tuple[str, ...] = ()  # what fits and what to change

    def seconds(self, name: str) -> Seconds | None:
        """How long a program takes in a step, at least; None if that is not known."""
        cost = self.programs[name].cost
        return seconds(cost, self.accelerator) if cost and self.accelerator else None

    @property
    def step_seconds(self) -> float | None:
        """How long its programs take together, at least; log-probabilities are a part of the update."""
        times = [self.seconds(name) for name in self.programs if name != "log-probs"]
        return sum(time.least for time in times if time) if all(times) else None


def main(_):
    """The command line."""
    with one_line_errors("krl.plan"):
        show(plan(flags.FLAGS.config, flags.FLAGS.topology, flags.FLAGS.tokens), Console())


def plan(config: ConfigDict, topology: str, tokens: int = 0, accelerator: Accelerator | None = None) -> Plan:
    """Compile the programs of a config, and count what they do in a step.

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
    policy_config, layout = find_sizes(config, on_tpu=bool(topology)), reshape_mesh(mesh, tuple(config.mesh.decode))
    optimizer = find_optimizer(config)
    with jax.set_mesh(mesh):
        learner = abstract_state(policy_config, optimizer, abstract_params(policy_config, mesh))
    parts = {"parameters": gigabytes(learner.params), "optimiser": gigabytes(learner.opt_state)}
    if config.loss.kl_coefficient:
        parts["parameters of the reference"] = parts["parameters"]
    with jax.set_mesh(layout):
        abstract_params(policy_config, layout)  # refuses a layout that does not divide them
        sampler = abstract_sampler(config, policy_config, learner.params, layout)
        programs = compile_rollout(policy_config, sampler, sum(parts.values()), tokens)
    with jax.set_mesh(mesh):
        programs |= compile_update(config, policy_config, optimizer, learner, mesh, tokens, here=not topology)
    parts |= {
        "parameters for decoding": gigabytes(sampler.work.layers),
        "keys and values of prompts": gigabytes(sampler.work.prompts.cache),
        "keys and values of slots": gigabytes(sampler.state.slots.cache),
    }
    device = mesh.devices.flat[0]
    accelerator = accelerator or _look_up(device, here=not topology)
    found = Plan(parts, programs, device.device_kind, accelerator, sampler.options.num_slots)
    return found._replace(advice=advise(config, policy_config, layout, found, tokens))


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
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
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


def advise(
    config: ConfigDict, policy_config: policy.PolicyConfig, mesh: Mesh, found: Plan, tokens: int
) -> tuple[str, ...]:
    """What fits, and which slots, layout of decoding and micro-batches would; nothing of unknown devices.

    Args:
        config, policy_config: of the run; the policy's sizes.
        mesh: of decoding.
        found: the plan, without advice.
        tokens: of every response.
    """
    if not found.accelerator:
        return (f"nothing is known of {found.kind!r}: neither its memory nor its speed",)
    limit = found.accelerator.memory_gb
    said = []
    for name in found.programs:
        held = found.programs[name].held
        if held > limit:
            said.append(f"{name} does not fit: it needs {held:.3g} GB of {limit:.3g}")
    if not said:
        said.append(
            f"everything fits: at most {max(one.held for one in found.programs.values()):.3g} GB of {limit:.3g}"
        )
    return (
        *said,
        *_advise_decoding(config, policy_config, mesh, found, found.accelerator, tokens),
        *_advise_update(config, found.programs["update"], limit),
    )


def _advise_decoding(config, policy_config, mesh, found: Plan, accelerator: Accelerator, tokens: int) -> list[str]:
    """Every layout of decoding and what it would take, and the fastest."""
    split, devices = mesh.shape.get("model", 1), mesh.size
    sizes = [policy_config.num_heads, policy_config.num_kv_heads, policy_config.mlp_size, policy_config.vocab_size]
    parts, length = found.parts, config.data.max_prompt_tokens + config.sample.max_new_tokens
    slot_gb = slot_bytes(policy_config, length) / 1e9
    known = [found.programs[name] for name in ("prefill", "decode") if found.programs[name].cost]
    layouts = decode_layouts(
        devices=devices, splits=[m for m in range(1, devices + 1) if all(size % m == 0 for size in (devices, *sizes))],
        accelerator=accelerator, tokens=tokens, num_rollouts=config.alloc.budget, slot_gb=slot_gb, room=1 + 1 / SHRINK,
        kept_gb=sum(parts.get(name, 0.0) for name in KEPT) + max((one.temporaries for one in known), default=0.0),
        weights_gb=parts["parameters for decoding"] * split, prompts_gb=parts["keys and values of prompts"] * split,
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


def _advise_update(config: ConfigDict, update: Program, limit: float) -> list[str]:
    """Which micro-batches fit, if temporaries go by their rows."""
    row = config.data.max_prompt_tokens + config.sample.max_new_tokens
    axes = zip(config.mesh.axis_names, config.mesh.shape, strict=True)
    devices = math.prod(size for name, size in axes if name in RULES["batch"])
    share = math.ceil(config.alloc.budget / config.optim.updates_per_step / devices)
    now = min(max(config.optim.micro_tokens // (row * devices), 1), share)
    if not update.temporaries:
        return []
    rows = min(int(now * (limit - update.held + update.temporaries) / update.temporaries), share)
    if rows < 1:
        return ["not even one row a device fits the update: split the policy there too, or take more devices"]
    if rows == now:
        return []
    return [
        f"{rows} rows a device instead of {now} in a micro-batch fit: "
        f"--config.optim.micro_tokens={rows * row * devices}"
    ]


# ---------------------------------------------------------------- on the screen


def show(found: Plan, console: Console) -> None:
    """Print a plan: parts, programs, collectives and advice."""
    parts = Table("what a device holds for long", "GB")
    for name, gb in found.parts.items():
        parts.add_row(name, f"{gb:.3g}")
    parts.add_row("slots, a number", str(found.slots))
    console.print(parts)
    console.print(_programs(found))
    console.print(_collectives(found))
    if found.step_seconds is not None:
        console.print(f"a step takes at least {found.step_seconds:.3g} s", highlight=False)
    for line in found.advice:
        console.print(line, highlight=False, soft_wrap=True)


def _programs(found: Plan) -> Table:
    table = Table("of each device, in a step", *found.programs)
    times = {name: found.seconds(name) for name in found.programs}
    rows: dict[str, list[float | None]] = {
        "held beside the program, GB": [one.beside for one in found.programs.values()],
        "arguments, GB": [one.arguments for one in found.programs.values()],
        "results, GB": [one.results for one in found.programs.values()],
        "temporaries, GB": [one.temporaries for one in found.programs.values()],
        "code, GB": [one.code for one in found.programs.values()],
        "together, GB": [one.held for one in found.programs.values()],
        "TFLOP of products": [one.cost and one.cost.flops / 1e12 for one in found.programs.values()],
        "calls of kernels that are not in it": [
            one.cost and sum(n for _, n in one.cost.kernels) for one in found.programs.values()
        ],
        "to and from memory, GB": [one.cost and one.cost.bytes / 1e9 for one in found.programs.values()],
        "sent to other devices, GB": [one.cost and one.cost.sent / 1e9 for one in found.programs.values()],
        "seconds of computing": [time and time.computing for time in times.values()],
        "seconds of memory": [time and time.memory for time in times.values()],
        "seconds of network": [time and time.network for time in times.values()],
        "seconds at least": [time and time.least for time in times.values()],
        "seconds to compile": [one.compile_seconds for one in found.programs.values()],
    }
    for title, values in rows.items():
        if any(value is not None for value in values):
            table.add_row(title, *("" if value is None else f"{value:.4g}" for value in values))
    return table


def _collectives(found: Plan) -> Table:
    table = Table("collectives, in a step", "devices", "times", "largest, GB", "sent, GB")
    for name, program in found.programs.items():
        together: dict[tuple[str, int], list[Collective]] = {}
        for one in program.cost.collectives if program.cost else ():
            together.setdefault((one.kind, one.group), []).append(one)
        for (kind, group), ones in together.items():
            numbers = (
                sum(one.times for one in ones),
                max(one.size for one in ones) / 1e9,
                sum(one.sent for one in ones) / 1e9,
            )
            table.add_row(f"{name}: {kind}", str(group), *(f"{number:.4g}" for number in numbers))
    return table


def run_command() -> None:
    """The command `python -m krl.plan`."""
    define_flags()
    flags.DEFINE_string("topology", "", "of TPUs to compile for, such as v5p:2x2x4; none for the devices that are here")
    flags.DEFINE_integer("tokens", 0, "length of every response to reckon with; 0 for sample.max_new_tokens")
    app.run(main, argv=["krl.plan", *sys.argv[1:]], flags_parser=parse_flags)
