"""What a run needs of a device, found by compiling its programs."""

import pytest

from configs import arithmetic
from krl.run.plan import plan, show


def make_config(**changes):
    config = arithmetic.get_config()
    config.update_from_flattened_dict(
        {"prompts_per_step": 8, "alloc.budget": 64, "policy.num_layers": 2, "mesh.shape": (4, 2), "mesh.axis_names": ("fsdp", "model")}
        | changes
    )  # fmt: skip
    return config


def test_a_plan_counts_what_a_device_holds():
    config = make_config(**{"sample.slots": 16})
    held = plan(config, "")
    c, tokens = config.policy, config.data.max_prompt_tokens + config.sample.max_new_tokens
    a_slot = 2 * c.num_layers * c.num_kv_heads * c.head_size * tokens * 4
    rollout, update = held["rollout"], held["update"]
    assert rollout["keys and values of slots"] == pytest.approx(16 / 4 * a_slot / 2 / 1e9)
    assert rollout["temporaries"] > rollout["keys and values of slots"] + rollout["keys and values of prompts"]
    assert update["parameters"] < update["optimizer"] < 2.2 * update["parameters"]
    assert update["arguments"] > update["parameters"] + update["optimizer"]
    more = plan(make_config(**{"sample.memory_gb": 2 * 4 * a_slot / 2 / 1e9}), "")
    assert more["rollout"]["slots"] == 32  # eight on each of four groups
    assert show(held).row_count > 8


def test_a_mesh_that_is_not_the_topologys_is_refused():
    with pytest.raises(ValueError, match="needs 999 devices"):
        plan(make_config(**{"mesh.shape": (1, 999)}), "")
