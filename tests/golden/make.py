"""Make the golden checkpoints of tests/test_hf.py with transformers and torch, which no test needs.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 && python tests/golden/make.py

Each family gets a directory with a tiny random checkpoint as transformers writes it and golden.npz:
logits of three sequences, and 64 greedy tokens after each, in float32. Weights are larger than a fresh
model's, so that every option of the family shows in the logits. config_v4.json is the same
configuration as transformers 4.57.1 writes it (run again with that version and --configs-only). Names of families after
the command make these alone.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 20, "tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "gemma2": ("Gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0} | GEMMA, torch.float32),
    "gemma3": (
        "Gemma3Text",
        {
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "sliding_window_pattern": 3,
        }
        | GEMMA,
        torch.float32,
    ),
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, torch.float16),
    "llama3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0, "tie_word_embeddings": True}, torch.float32),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False, "rope_theta": 1000.0}, torch.bfloat16),
    "qwen2_sliding": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        torch.float32,
    ),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope_theta": 1000.0}, torch.float32),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES |= {
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 5, "rope_theta": 1000.0}, torch.float32),
    "smollm3": (
        "SmolLM3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "rope_theta": 1000.0},
        torch.float32,
    ),
    "qwen2_yarn": (
        "Qwen2",
        {"rope_scaling": YARN | {"beta_fast": 4.0, "beta_slow": 0.5}, "rope_theta": 100.0, "tie_word_embeddings": True}
        | {"num_attention_heads": 2, "num_key_value_heads": 1},
        torch.float32,
    ),
    "olmo2": ("Olmo2", {"rope_theta": 1000.0, "rms_norm_eps": 1e-5}, torch.float32),
    "olmo3": (
        "Olmo3",
        {
            "rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 4.0},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 5,
        }
        | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0},
        torch.bfloat16,
    ),
    "phi3": ("Phi3", {"sliding_window": 6, "rope_theta": 1000.0, "num_key_value_heads": 4}, torch.float32),
    "phi4": (
        "Phi3",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.1, 2.5, 4.0], "long_factor": [1.0, 8.0, 9.0]},
            "partial_rotary_factor": 0.75, "num_attention_heads": 2, "original_max_position_embeddings": 100,
            "max_position_embeddings": 800, "tie_word_embeddings": True,
        },
        torch.bfloat16,
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.5, "attention_multiplier": 0.4},
        torch.float32,
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True},
        torch.bfloat16,
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8, "num_key_value_heads": 4},
        torch.float32,
    ),
    "gemma3_images": ("Gemma3", {"rope_theta": 1000.0, "sliding_window_pattern": 2} | GEMMA, torch.float32),
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 8,
    "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
SEQUENCES = (24, 17, 9)
ADAPTERS = {
    "qwen2": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "gemma2": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": True},
}


def config_of(name: str, options: dict, **others: Any) -> Any:
    """The config of a family, with a small part that sees images if it is of that kind."""
    text = SIZES | options
    if name != "Gemma3":
        return getattr(transformers, f"{name}Config")(**text, **others)
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=1, **others)


def make(family: str) -> None:
    """Write one family's directory."""
    name, options, dtype = FAMILIES[family]
    torch.manual_seed(list(FAMILIES).index(family))
    config = config_of(name, options, attn_implementation="eager")
    kind = "ForConditionalGeneration" if family == "gemma3_images" else "ForCausalLM"
    model = getattr(transformers, name.removesuffix("Text") + kind)(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            spread = 1.0 if "embed_tokens" in path else 0.3
            norm = path.endswith("norm.weight") or "layernorm" in path
            weight.copy_(torch.randn_like(weight) * spread + float(norm and "gemma" not in family))
    shards = {"max_shard_size": "8KB"} if family == "qwen2_sliding" else {}
    model.to(dtype).save_pretrained(HERE / family, **shards)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / family, dtype=torch.float32, attn_implementation="eager"
    ).eval()  # read again, because .to(dtype) also rounded the rotary frequencies

    rng = np.random.default_rng(0)
    golden = {}
    for number, length in enumerate(SEQUENCES):
        tokens = torch.tensor(rng.integers(3, SIZES["vocab_size"], (1, length)))
        with torch.no_grad():
            logits = model(tokens).logits[0]
            greedy = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=64, max_new_tokens=64,
                eos_token_id=None, pad_token_id=0, use_cache=True,
            )[0, length:]  # fmt: skip
        golden |= {f"tokens{number}": tokens[0], f"logits{number}": logits, f"greedy{number}": greedy}
    np.savez_compressed(HERE / family / "golden.npz", **{name: array.numpy() for name, array in golden.items()})
    (HERE / family / "generation_config.json").unlink(missing_ok=True)


def make_adapters(family: str) -> None:
    """Write a family's adapters, and the logits of its sequences with them."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / family, dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[family])).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path:
                weight.copy_(torch.randn_like(weight) * 0.3)
    model.peft_config["default"].base_model_name_or_path = family
    model.save_pretrained(HERE / family / "adapter")
    known = np.load(HERE / family / "golden.npz")
    with torch.no_grad():
        golden = {f"logits{i}": model(torch.tensor(known[f"tokens{i}"])[None]).logits[0].numpy() for i in range(3)}
    np.savez_compressed(HERE / family / "adapter" / "golden.npz", **golden)
    (HERE / family / "adapter" / "README.md").unlink(missing_ok=True)


def write_config(family: str) -> None:
    """Write config_v4.json."""
    name, options, dtype = FAMILIES[family]
    config = config_of(name, options, torch_dtype=dtype)
    config.architectures = [f"{name.removesuffix('Text')}ForCausalLM"]
    text = json.dumps(config.to_diff_dict() | {"transformers_version": "4.57.1"}, indent=2, sort_keys=True, default=str)
    (HERE / family / "config_v4.json").write_text(text.replace('"torch.', '"') + "\n")


if __name__ == "__main__":
    flags = {each for each in sys.argv[1:] if each.startswith("--")}
    for each in [name for name in sys.argv[1:] if name not in flags] or FAMILIES:
        if not flags:
            make(each)
        if "--configs-only" in flags:
            write_config(each)
        elif each in ADAPTERS:
            make_adapters(each)
