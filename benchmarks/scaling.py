"""Weak scaling, computed and not measured: a step's work for 4 to 256 chips, from programs compiled for them and the roofline.

    python -m benchmarks.scaling --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --topologies v5p:2x2x1,v5p:2x2x4,v5p:4x4x4,v5p:4x8x8

Prompts, rollouts and micro-batches grow with the chips, 16 prompts and 128 rollouts each; the config's own numbers do not count. A decoder's
layers are alike, so two shallow ones are compiled and what a layer adds is multiplied out (--layers). DIR needs only a config.json.
"""

import copy
import json
import pathlib
import tempfile
from typing import NamedTuple

from absl import app, flags
from jax.experimental import topologies
from ml_collections import ConfigDict

from configs.flags import define_flags, one_line_errors, parse_flags
from krl.run.plan import plan

PROMPTS, ROLLOUTS = 16, 128  # of each chip


class Work(NamedTuple):
    """What a program asks of one chip in a step."""

    computing: float  # seconds by FLOPs
    memory: float  # seconds by bytes
    network: float  # seconds by bytes sent
    sent: float  # GB


def main(_):
    """The command line."""
    with one_line_errors("benchmarks.scaling"):
        shallow, deeper = (int(number) for number in flags.FLAGS.layers.split(","))
        print(
            "| chips | program | computing, s | memory, s | network, s | sent, GB |\n|---|---|---|---|---|---|",
            flush=True,
        )
        for topology in flags.FLAGS.topologies.split(","):
            chips = len(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
            for program, work in measure(flags.FLAGS.config, topology, chips, (shallow, deeper)).items():
                print(f"| {chips} | {program} |" + "".join(f" {number:.3g} |" for number in work), flush=True)


def measure(config: ConfigDict, topology: str, chips: int, depths: tuple[int, int]) -> dict[str, Work]:
    """The work of each program for a decoder of the checkpoint's depth.

    Args:
        config: with the policy's path.
        topology, chips: its name and how many chips it has.
        depths: layers of the two decoders that are compiled.
    """
    sizes = json.loads((pathlib.Path(config.policy.path) / "config.json").read_text())
    shallow, deeper = (at_depth(config, sizes | {"num_hidden_layers": depth}, topology, chips) for depth in depths)
    more = (sizes["num_hidden_layers"] - depths[0]) / (depths[1] - depths[0])
    return {name: extrapolate(shallow[name], deeper[name], more) for name in shallow}


def extrapolate(shallow: Work, deeper: Work, more: float) -> Work:
    """shallow and `more` times what deeper has beyond it.

    >>> extrapolate(Work(1, 1, 0, 5), Work(3, 1, 0, 6), 2.0)
    Work(computing=5.0, memory=1.0, network=0.0, sent=7.0)
    """
    return Work(*(few + more * (many - few) for few, many in zip(shallow, deeper, strict=True)))


def at_depth(config: ConfigDict, sizes: dict, topology: str, chips: int) -> dict[str, Work]:
    """The work of each program for a decoder of these sizes."""
    config = copy.deepcopy(config)
    row = config.data.max_prompt_tokens + config.sample.max_new_tokens
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / "config.json").write_text(json.dumps(sizes))
        config.policy.path = directory
        config.prompts_per_step, config.alloc.budget = PROMPTS * chips, ROLLOUTS * chips
        config.mesh.shape, config.mesh.axis_names, config.mesh.decode = (chips,), ("fsdp",), ()
        config.sample.slots, config.optim.micro_tokens = ROLLOUTS // 2 * chips, row * chips
        found = plan(config, topology)
    work = {}
    for name, program in found.programs.items():
        time = found.seconds(name)
        if time and program.cost:
            work[name] = Work(*time, program.cost.sent / 1e9)
    return work


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_string("topologies", "v5p:2x2x1,v5p:2x2x4,v5p:4x4x4,v5p:4x8x8", "their names, with commas")
    flags.DEFINE_string("layers", "2,4", "depths of the two decoders that are compiled")
    app.run(main, flags_parser=parse_flags)
