"""What a run needs of a device, found by compiling its programs, against what its sizes say."""

import dataclasses
import re

import jax
import pytest
from rich.console import Console

from krl.base.sharding import make_mesh
from krl.configs import arithmetic
from krl.plan.command import advise, find_sizes, plan, show, step_work
from krl.plan.programs import _prompts, abstract_sampler
from krl.plan.roofline import Accelerator, decode_layouts, update_work
from krl.policy.experts import Experts
from krl.policy.model import abstract_params
from krl.rollout.sampler import PROGRAMS
from tests import tiny

GROUPS, SPLIT, SLOTS, PROMPTS, ROLLOUTS = 4, 2, 16, 8, 64
TOKENS = 5  # of every response; the longest has 7
COLUMNS, ROWS = 40, 2  # of an update's rows: a prompt of 12 tokens and four responses; a device's of a micro-batch
ACCELERATOR = Accelerator(memory_gb=1.0, flops=1e9, bandwidth=1e8, links=1e7)


def make_config(**changes):
    config = arithmetic.get_config()
    config.update_from_flattened_dict(
        {"prompts_per_step": PROMPTS, "alloc.budget": ROLLOUTS, "alloc.n_min": 2, "mesh.shape": (GROUPS, SPLIT), "policy.num_layers": 2,
         "mesh.axis_names": ("fsdp", "model"), "sample.slots": SLOTS, "loss.importance_cap": 2.0, "policy.unroll": 1}
        | changes
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def planned():
    return plan(make_config(), "", tokens=TOKENS, accelerator=ACCELERATOR)


def test_parts_are_what_the_sizes_say(planned):
    config = make_config()
    c, prompt = config.policy, config.data.max_prompt_tokens
    a_token = 2 * c.num_layers * c.num_kv_heads * c.head_size * 4 / SPLIT / 1e9
    positions = SLOTS / GROUPS * (prompt - 1 + config.sample.max_new_tokens) * 4 / 1e9
    slots = SLOTS / GROUPS * (prompt - 1 + config.sample.max_new_tokens) * a_token
    assert planned.parts["keys and values of slots"] == pytest.approx(slots + positions)
    assert planned.parts["keys and values of prompts"] == pytest.approx(PROMPTS * (prompt - 1) * (a_token + 4e-9))
    assert planned.parts["parameters"] < planned.parts["optimiser"] < 2.2 * planned.parts["parameters"]
    assert planned.slots == SLOTS


def test_a_program_holds_what_lives_beside_it(planned):
    kept = planned.parts["parameters"] + planned.parts["optimiser"]
    decoding = sum(planned.parts.values())
    prefill, decode, update = (planned.programs[name] for name in ("prefill", "decode", "update"))
    assert prefill.beside == pytest.approx(planned.parts["optimiser"], rel=0.05)
    assert prefill.held > kept + prefill.results > decoding
    assert decode.beside + decode.arguments > decoding
    assert decode.results < 0.1 * planned.parts["keys and values of slots"]  # the state is given away
    assert update.beside < 0.01 * update.arguments
    assert update.arguments > kept


def test_rules_in_rounds_hold_the_prompts_of_all_candidates():
    held = {}
    for rule in ("reinforce_ada", "reach"):
        config = make_config(**{"alloc.n_min": 0, "alloc.rule": rule, "alloc.candidates": 2 * ROLLOUTS})
        held[rule] = len(_prompts(config, make_mesh((1,), ("data",))).tokens)
    assert held == {"reinforce_ada": 2 * ROLLOUTS, "reach": ROLLOUTS // 4}


def test_products_are_those_counted_by_hand(planned):
    """On each of eight devices; of prompts and rows a token sees half of the others."""
    c, vocabulary = make_config().policy, make_config().tokenizer.vocab_size
    prompt, response = make_config().data.max_prompt_tokens, make_config().sample.max_new_tokens
    projections = 2 * c.embed_size * c.head_size * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = projections + 3 * 2 * c.embed_size * c.mlp_size
    a_pair = 2 * 2 * c.num_heads * c.head_size  # a query and a key
    logits = 2 * c.embed_size * vocabulary
    work = {name: 1e12 * one.tflop * GROUPS * SPLIT for name, one in step_work(planned).items()}

    steps = ROLLOUTS // SLOTS * TOKENS
    assert work["decode"] == pytest.approx(steps * SLOTS * (2 * (layer + (prompt - 1 + response) * a_pair) + logits))
    # Of the last layer a prompt needs only keys and values.
    assert work["prefill"] == pytest.approx(PROMPTS * (prompt - 1) * (layer + prompt / 2 * a_pair))
    # Four forward passes: log-probabilities for the ratios, the loss, and gradients, which count twice; logits again.
    forward = 2 * (layer + (prompt + TOKENS + 1) / 2 * a_pair)
    # Two updates of a micro-batch each, which holds 32 rollouts if each row's share a prompt.
    assert (planned.columns, planned.rows) == (COLUMNS, ROWS)
    assert work["update"] == pytest.approx(2 * ROWS * GROUPS * COLUMNS * (4 * forward + 5 * logits))


def test_what_is_read_and_sent_is_that_of_the_sharding(planned):
    c, parts, work = make_config().policy, planned.parts, step_work(planned)
    weights, steps = parts["parameters for decoding"], ROLLOUTS // SLOTS * TOKENS
    assert work["decode"].moved == pytest.approx(steps * (weights + parts["keys and values of slots"]))
    activations = SLOTS / GROUPS * c.embed_size * 4 / 1e9
    assert work["decode"].sent == pytest.approx(steps * (2 * c.num_layers + 1) * activations)  # twice the half
    read = weights + parts["keys and values of prompts"]
    assert work["prefill"][1:] == pytest.approx((read, read * (1 - 1 / GROUPS)))
    # Two micro-batches; three gathers and a sum of gradients along "fsdp", and along "model" two
    # sums a layer in a scoring, a forward and a backward pass.
    rows = 2 * ROWS * COLUMNS * c.embed_size * 4 / 1e9
    gathered = 2 * 4 * weights * (1 - 1 / GROUPS)
    assert work["update"].sent == pytest.approx(gathered + 3 * 2 * c.num_layers * rows, rel=0.01)


def test_layers_that_are_computed_again_cost_a_pass():
    sizes, mesh = find_sizes(make_config(), on_tpu=False), make_mesh((1,), ("data",))
    plain, again = (update_work(dataclasses.replace(sizes, remat=how), mesh, 3, 32, 8, 0) for how in ("none", "full"))
    assert again.moved == pytest.approx(4 / 3 * plain.moved)
    assert plain.tflop < again.tflop < 4 / 3 * plain.tflop  # logits are computed again in any case


def test_of_experts_those_count_that_a_token_goes_through():
    sizes, mesh = tiny.CONFIG, make_mesh((1,), ("data",))
    mixed = dataclasses.replace(sizes, experts=Experts(6, 2))
    plain, more = (update_work(each, mesh, 3, 32, 8, 0) for each in (sizes, mixed))
    units, router = sizes.num_layers * 3 * sizes.embed_size * sizes.mlp_size, sizes.num_layers * 6 * sizes.embed_size
    # Two units in the place of one, and the router, forward and twice backward; in memory lie all six.
    assert more.tflop - plain.tflop == pytest.approx(3 * 32 * 3 * 2 * (units + router) / 1e12)
    assert more.moved - plain.moved == pytest.approx(3 * 3 * 4 * (5 * units + router) / 1e9)


def test_the_sampler_lays_its_arrays_out_as_planned():
    config, mesh = make_config(), make_mesh((GROUPS, SPLIT), ("fsdp", "model"))
    sizes = find_sizes(config, on_tpu=False)
    with jax.set_mesh(mesh):
        sampler = abstract_sampler(config, sizes, abstract_params(sizes, mesh), mesh)
        compiled = PROGRAMS["begin"].lower(sizes, sampler.options, *sampler.inputs).compile()

    def same(planned, found):
        assert planned.sharding.is_equivalent_to(found, planned.ndim), (planned, found)

    jax.tree.map(
        same,
        (sampler.work.weights, sampler.state),
        (compiled.output_shardings[0].weights, compiled.output_shardings[1]),
    )
    jax.tree.map(same, sampler.work.prompts.cache, compiled.output_shardings[0].prompts.cache)


def test_time_is_that_of_the_slowest_part(planned):
    for name, work in step_work(planned).items():
        time = planned.seconds[name]
        assert time == pytest.approx((work.tflop * 1e12 / 1e9, work.moved * 1e9 / 1e8, work.sent * 1e9 / 1e7))
        assert time.least == max(time) == getattr(time, time.limit)


def test_layouts_of_decoding_by_hand():
    """Four devices of 10 GB: 2 are kept, the policy takes 6, prompts 1, a slot 1 and half of that again."""
    one, two, four = decode_layouts(
        devices=4, splits=[1, 2, 4], accelerator=Accelerator(10, 1e12, 1e9, 1e9), kept_gb=2, weights_gb=6, prompts_gb=1,
        slot_gb=1, room=1.5, num_rollouts=16, tokens=10,
    )  # fmt: skip
    assert (one.fixed_gb, one.slots) == (9, 0)
    assert one.seconds == float("inf")
    assert (two.fixed_gb, two.slots) == (5.5, 2 * 6)
    assert two.seconds == 2 * 10 * (6 + 6) / 2  # 8 rollouts a group in 2 waves, 12 GB a step at 2 GB/s
    assert (four.fixed_gb, four.slots) == (3.75, 16)
    assert four.seconds == 10 * (6 + 16) / 4


def advice(planned, memory_gb):
    return " | ".join(advise(planned._replace(accelerator=ACCELERATOR._replace(memory_gb=memory_gb))))


def test_what_does_not_fit_is_said_with_a_way_out(planned):
    assert "everything fits" in advise(planned)[0]
    assert "what limits its speed: prefill by " in advise(planned)[1]
    update = planned.programs["update"]
    a_half_less = advice(planned, update.held - 0.4 * update.temporaries)
    assert "update does not fit" in a_half_less
    assert f"--config.optim.micro_tokens={COLUMNS * GROUPS}" in a_half_less  # one row a device instead of two
    hopeless = advice(planned, 1e-6)
    assert "no layout of decoding fits" in hopeless
    assert "not even one row" in hopeless


def test_rows_that_an_update_would_not_take_are_not_advised(planned):
    """Of five rows a device three are computed at a time, and so they are where four fit."""
    config = planned.config.copy_and_resolve_references()
    config.unlock()
    config.optim.packed = False
    config.alloc.budget = 5 * GROUPS * config.optim.updates_per_step
    found, update = planned._replace(config=config, rows=3, columns=planned.longest), planned.programs["update"]
    four, five = (advice(found, update.held + more * update.temporaries) for more in (0.4, 0.7))
    assert "micro_tokens" not in four
    long = found.columns
    assert f"5 x {long} tokens a device instead of 3 x {long} in a micro-batch fit: " in five
    assert f"--config.optim.micro_tokens={5 * long * GROUPS}" in five


def test_more_room_may_be_for_wider_rows(planned):
    """Where a micro-batch is one row that room keeps narrow, more of it has more responses to the prompt in a row."""
    config = planned.config.copy_and_resolve_references()
    config.unlock()
    config.optim.packed, config.optim.micro_tokens = True, planned.longest * GROUPS
    config.sample.max_new_tokens = planned.longest - config.data.max_prompt_tokens
    found = planned._replace(config=config, rows=1, columns=planned.longest)
    assert found.shared
    assert found.rows_of(config.optim.micro_tokens) == (found.columns, 1)
    update = found.programs["update"]
    said = advice(found, update.held + 1.1 * update.temporaries)
    wide, asked = map(int, re.search(r"1 x (\d+) tokens a device .*micro_tokens=(\d+)", said).groups())
    assert found.columns < wide == asked // GROUPS
    assert found.rows_of(asked) == (wide, 1)


def test_the_way_out_for_decoding_is_the_fastest_layout_that_fits(planned):
    """Decoding needs half the policy on each device; with the other half there is no room."""
    kept = planned.parts["parameters"] + planned.parts["optimiser"]
    whole = 2 * (planned.parts["parameters for decoding"] + planned.parts["keys and values of prompts"])
    temporaries = max(planned.programs[name].temporaries for name in ("prefill", "decode"))
    said = advice(planned, kept + temporaries + 0.9 * whole)
    assert "split over 1: " in said
    assert "room for no slot" in said
    assert '--config.mesh.decode="(4, 2)"' in said


def test_of_unknown_devices_nothing_is_claimed(planned):
    found = planned._replace(accelerator=None)
    assert advise(found) == ["nothing is known of 'cpu': neither its memory nor its speed"]
    assert found.seconds == {}
    console = Console(record=True, width=200)
    show(found, console)
    text = console.export_text()
    assert "TFLOP of products" in text
    assert "seconds of network" not in text


def test_a_mesh_that_is_not_the_topologys_is_refused():
    with pytest.raises(ValueError, match="needs 999 devices"):
        plan(make_config(**{"mesh.shape": (1, 999)}), "")
