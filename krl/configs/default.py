"""Every key of a run: its default, the values that it takes, whether it may change on the way, and what it is.

Other configs start from `get_config()` and change values. docs/configuration.md shows the table; krl/configs/check.py
refuses what it does not allow, and what does not go together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Range(NamedTuple):
    """The values that a key takes, beside those of its default's type."""

    must: str  # what they must be, for a message
    holds: Callable[[Any], bool]


class Key(NamedTuple):
    """A key of the configuration."""

    default: Any  # every value has its type
    range: Range
    free: bool  # whether it may change when a run continues from its checkpoint
    help: str  # what it is, its unit, what special values mean


FREE, FIXED = True, False
ANY = Range("anything", lambda value: True)
EMBEDDED = ("arithmetic", "operators", "maze", "reasoning_gym")  # tasks that are made and not read
COLDEST = 0.001  # temperature: below it, logits that are divided by it leave float32
FROM_0, FROM_1 = Range("at least 0", lambda value: value >= 0), Range("at least 1", lambda value: value >= 1)
ABOVE_0, SHARE = Range("above 0", lambda value: value > 0), Range("between 0 and 1", lambda value: 0 <= value <= 1)
ABOVE_1, PART = Range("above 1", lambda value: value > 1), Range("above 0 and at most 1", lambda value: 0 < value <= 1)
WARM = Range(f"at least {COLDEST}; sample.top_k=1 is coldest", lambda value: value >= COLDEST)
COOL = Range(f"0 or at least {COLDEST}", lambda value: value == 0 or value >= COLDEST)
DECAY = Range("below 1 and at least 0; at 1 a moment never moves", lambda value: 0 <= value < 1)
WIDTH = Range(f"at most {1 << 24} and at least 1: each is a parameter", lambda value: 1 <= value <= 1 << 24)
DEVICES = Range("whole numbers of at least 1", lambda value: all(type(size) is int and size >= 1 for size in value))
TEXTS = Range(
    "texts with something in them, such as ('<|im_end|>',)",
    lambda value: all(isinstance(text, str) and text for text in value),
)
PLACE = Range(
    "a directory, or one in gs://, s3:// or az://",
    lambda value: "://" not in value or value.startswith(("gs://", "s3://", "az://")),
)
LETTERS = Range("from 1 to 2704, the pairs of letters there are", lambda value: 1 <= value <= 2704)
SIDE = Range("at least 2: a maze of one cell has no path", lambda value: value >= 2)
MODULES = ("query", "key", "value", "output", "gate", "up", "down")  # of a layer
ADAPTED = Range(
    f"different ones of {', '.join(MODULES)}", lambda value: 0 < len(set(value) & set(MODULES)) == len(value)
)
DTYPE = Range("'float32' or 'bfloat16'", lambda value: value in ("float32", "bfloat16"))
SOURCE = Range(
    "'arithmetic', 'operators', 'maze', 'reasoning_gym' or 'dataset'", lambda value: value in (*EMBEDDED, "dataset")
)

SECTIONS = {  # what keys with the same beginning are about
    "alloc": "How many rollouts each prompt gets.",
    "eval": "Accuracy on held-out prompts during training, and what eval.py measures.",
    "checkpoint": "Checkpoints, from which the same command continues a run.",
    "guard": (
        "Limits on a step. One that exceeds a limit is undone: the run continues from its last checkpoint with "
        "other rollouts. The usual values of a run are in its metrics.jsonl; a limit several times as high catches "
        "only spikes."
    ),
    "profile": "Recording a profile.",
    "data": "Where prompts come from and how responses are rewarded.",
    "arithmetic": (
        "The arithmetic task: for each kind of expression the most digits of an operand (0 leaves the kind out), "
        "and set sizes."
    ),
    "operators": "The operators task: letters that each mean a string function, and set sizes.",
    "maze": "The maze task: the way through a maze that has one, and set sizes.",
    "reasoning_gym": "Tasks of the package reasoning-gym, drawn and scored by its generators, and set sizes.",
    "tokenizer": "The tokenizer.",
    "policy": (
        "The decoder: a Hugging Face checkpoint, or one with random weights of these sizes; see "
        "krl.policy.PolicyConfig."
    ),
    "sft": "Supervised fine-tuning on worked solutions, before the first step.",
    "verify": "Worker processes that compute rewards, with limits on time and memory.",
    "sample": "Sampling of training rollouts.",
    "loss": "Advantages and the loss.",
    "optim": "The optimiser of the policy, AdamW.",
    "distributed": (
        "Several processes that train one policy. With processes = -1 JAX asks the cluster for all three values "
        "(TPU pod, SLURM, Open MPI); with 0 it does so only inside a SLURM step or on a TPU slice of several hosts."
    ),
    "mesh": "The device mesh: how devices share the work.",
    "log": "What a run keeps and where else it can be watched; TensorBoard events are always in the work directory.",
}

# fmt: off
KEYS: dict[str, Key] = {
    # ---------------------------------------------------------------- the run
    "seed": Key(0, FROM_0, FIXED, "random seed of the parameters, the order of the data and the samples"),
    "steps": Key(200, FROM_0, FREE, "training steps; a step samples, scores and learns from alloc.budget rollouts"),
    "prompts_per_step": Key(64, FROM_1, FIXED,
        "M, prompts of a step where every one gets some, that is with alloc.n_min above 0"),
    "max_bad_updates": Key(5, FROM_1, FREE,
        "updates in a row with a loss or gradient that is not finite, after which the run ends"),
    "stuck_seconds": Key(0.0, FROM_0, FREE,
        "seconds that one phase of a step may take, compilation included; a longer one ends the run and prints the "
        "stacks of all threads. 0 for no limit"),
    # ---------------------------------------------------------------- alloc
    "alloc.rule": Key("reach", ANY, FIXED,
        "a key of krl.budget.RULES: \"reach\", \"knapsack\" for the paper's value, \"uniform\" for plain GRPO; or your "
        'own, "package.module:function"'),
    "alloc.budget": Key(512, FROM_1, FIXED, "R, rollouts per step, over all prompts"),
    "alloc.n_min": Key(0, FROM_0, FIXED,
        "fewest rollouts of a prompt in a step. 0: a step has alloc.candidates prompts, of which those that are "
        "worth it get whole groups of alloc.group rollouts, and the others nothing"),
    "alloc.candidates": Key(256, FROM_0, FIXED,
        "C, prompts that a step chooses from with n_min=0; all of the data if that is fewer, or for 0"),
    "alloc.group": Key(4, FROM_1, FIXED, "rollouts of a group with n_min=0"),
    "alloc.reach": Key(0.01, SHARE, FIXED,
        'the r of the rule "reach", a success rate: rarer ones are worth no more than about r'),
    "alloc.explored": Key(0.05, SHARE, FIXED,
        "share of the budget, with n_min=0, for the candidates that were not sampled for longest, a group at least "
        "unless it is 0: what is unlearnt is seen. Nothing where the data has fewer prompts than the budget has "
        "groups"),
    "alloc.n_max": Key(128, ANY, FIXED, "most rollouts of a prompt in a step"),
    "alloc.prior": Key("features", ANY, FIXED,
        "what a prompt's success rate is expected to be before it is sampled: \"shared\" (one prior for all "
        'prompts), "groups" (by a field of the data), "features" (by pieces of its text and all of data.fields), or '
        '"gaussian_process" (by the same features, as the rule "vip" was published); or your own, '
        '"package.module:name"'),
    "alloc.prior_field": Key("", ANY, FIXED,
        "field of the data that names a prompt's group, such as \"subject\"; for prior=\"groups\", and for your own "
        'prior to go by ("" for the features)'),
    "alloc.prior_width": Key(4096, WIDTH, FIXED, "number of features that pieces of text and fields are hashed to"),
    "alloc.discount": Key(0.5, SHARE, FIXED,
        "share of the evidence about a prompt that is kept after a group whose rewards were all equal, 0 to 1"),
    "alloc.discount_mixed": Key(0.25, SHARE, FIXED,
        "the same after a group whose rewards differ, which changes the policy on that prompt"),
    "alloc.fade": Key(0.95, SHARE, FIXED, "the same after each step in which the prompt was not sampled"),
    "alloc.fit_discounts": Key(True, ANY, FIXED, "fit all three to the likelihood of new outcomes during the run"),
    "alloc.scouts": Key(0, FROM_0, FIXED,
        "extra rollouts of each prompt, drawn first: the counts follow from these alone, and they are neither "
        "counted in the budget nor learned from. An upper bound on what a better belief could gain. 0 for none"),
    # ---------------------------------------------------------------- eval
    "eval.every": Key(20, FROM_0, FREE,
        "steps between evaluations; there is one before the first step and after the last; 0: none"),
    "eval.prompts": Key(1024, FROM_0, FIXED, "held-out prompts, 0 for all"),
    "eval.samples": Key(16, FROM_1, FIXED, "k, samples of each held-out prompt"),
    "eval.temperature": Key(0.6, COOL, FIXED, "sampling temperature of evaluations; 0 takes the most likely token"),
    "eval.top_p": Key(1.0, PART, FIXED, "probability kept by nucleus sampling in evaluations; 1 keeps all"),
    "eval.sets": Key("", ANY, FIXED,
        'benchmarks of eval.py, keys of krl.tasks.SOURCES: "aime,amc,math500"; "" for held-out prompts'),
    "eval.best": Key(False, ANY, FREE,
        "eval.py measures the parameters of the highest held-out accuracy after a step, not the newest"),
    "eval.dir": Key("", ANY, FIXED,
        "directory to read them from instead of the hub, with a data file {set}.jsonl, .json, .parquet or .arrow or "
        'a directory {set} for each; "" for the hub'),
    # ---------------------------------------------------------------- checkpoint
    "checkpoint.every": Key(25, FROM_1, FREE, "steps between checkpoints"),
    "checkpoint.dir": Key("", PLACE, FIXED,
        'directory of this run alone, such as "gs://bucket/run"; "" for the work directory'),
    "checkpoint.keep": Key(2, FROM_1, FREE,
        "newest checkpoints kept; best/ also has the parameters of the highest held-out accuracy after a step"),
    # ---------------------------------------------------------------- guard
    "guard.loss": Key(0.0, FROM_0, FREE, "largest absolute loss; 0 for no limit"),
    "guard.ratio": Key(0.0, FROM_0, FREE, "largest probability ratio, ratio_max in the metrics; 0 for no limit"),
    "guard.kl": Key(0.0, FROM_0, FREE,
        "largest KL divergence from the first policy, nats per token; needs loss.kl_coefficient above 0. 0 for no "
        "limit"),
    "guard.rollbacks": Key(3, FROM_0, FREE, "steps that a run may undo; the next one ends it"),
    # ---------------------------------------------------------------- profile
    "profile.steps": Key(0, FROM_0, FREE, "steps recorded by JAX's profiler, from the third after a start; 0 for none"),
    # ---------------------------------------------------------------- data
    "data.source": Key("arithmetic", SOURCE, FIXED,
        '"arithmetic", "operators" or "maze" (embedded), "reasoning_gym" (the package), or "dataset"'),
    "data.reward": Key("exact", ANY, FIXED,
        '"exact" (the whole response is the answer), "math" (the final answer that the response marks), '
        '"math_or_number" (or its last number where it marks none), "reasoning_gym" (the score of a task\'s own '
        'generator), or your own "package.module:function" of '
        "(prompt, response, answer) or (prompt, response, answer, row). Or a sum of several with weights, "
        '"math*1.0,mine:format*0.1"; accuracy is of the first'),
    "data.name": Key("", ANY, FIXED,
        'a key of krl.tasks.SOURCES, which knows its splits and fields, or a hub data set; "" for a file'),
    "data.subset": Key("", ANY, FIXED, 'hub subset, "" for none'),
    "data.train_split": Key("train", ANY, FIXED, "hub split of the training prompts"),
    "data.test_split": Key("test", ANY, FIXED, "hub split of the held-out prompts"),
    "data.path": Key("", ANY, FIXED,
        "local .jsonl, .json, .parquet or .arrow files for training, instead of the hub: a file, a directory, a "
        'pattern such as "data/part-*.jsonl", or several of these separated by commas; "" for the hub'),
    "data.test_path": Key("", ANY, FIXED,
        'the same for the held-out prompts; "" takes the test split of a directory in data.path that has one, or '
        "else holds out the last rows of data.path"),
    "data.prompt_field": Key("", ANY, FIXED,
        'field of a row with the question, such as "question", or "extra.question" for one inside another; "" for '
        "data sets of krl.tasks.SOURCES"),
    "data.answer_field": Key("", ANY, FIXED, 'field with the answer; "" uses the worked solution as the answer'),
    "data.completion_field": Key("", ANY, FIXED,
        'field with the worked solution for supervised fine-tuning; "" for none'),
    "data.fields": Key("", ANY, FIXED,
        'further fields of the training data, separated by commas, that the prior may use: "subject,level"; "" for '
        "none"),
    "data.template": Key("raw", ANY, FIXED, "a key of krl.tasks.TEMPLATES, or a text with {prompt} in it"),
    "data.template_arguments": Key("", ANY, FIXED,
        "what a chat template is given, as Python keyword arguments: \"enable_thinking=False, system_prompt='Reply "
        "in French.'\" sets the template's variable, and puts a system message in front of chats that have none; "
        '"" for nothing'),
    "data.max_train": Key(0, FROM_0, FIXED, "training prompts to read, 0 for all"),
    "data.max_prompt_tokens": Key(12, FROM_1, FIXED, "P, tokens of a prompt; longer prompts are left out"),
    # ---------------------------------------------------------------- arithmetic
    "arithmetic.addition": Key(5, FROM_0, FIXED, "most digits of an operand in additions; 0 for none"),
    "arithmetic.subtraction": Key(0, FROM_0, FIXED, "most digits of an operand in subtractions; 0 for none"),
    "arithmetic.multiplication": Key(3, FROM_0, FIXED, "most digits of an operand in multiplications; 0 for none"),
    "arithmetic.two_step": Key(0, FROM_0, FIXED,
        "most digits of an operand in expressions of two operations; 0 for none"),
    "arithmetic.num_warm": Key(20000, FROM_0, FIXED, "expressions for supervised fine-tuning"),
    "arithmetic.num_train": Key(1024, FROM_1, FIXED, "D, training prompts"),
    "arithmetic.num_test": Key(1024, FROM_1, FIXED, "held-out prompts"),
    # ---------------------------------------------------------------- operators
    "operators.num_operators": Key(52, LETTERS, FIXED, "operators, at most 2704"),
    "operators.shown_well": Key(0.5, SHARE, FIXED, "share of the operators that the demonstrations show rightly"),
    "operators.impossible": Key(0.0, SHARE, FIXED, "share of the operators for which no answer is ever right"),
    "operators.wrong": Key(0.0, SHARE, FIXED, "share of the training answers that are another function's"),
    "operators.num_warm": Key(30000, FROM_0, FIXED, "demonstrations for supervised fine-tuning"),
    "operators.num_train": Key(4096, FROM_1, FIXED, "D, training prompts"),
    "operators.num_test": Key(2048, FROM_1, FIXED, "held-out prompts"),
    # ---------------------------------------------------------------- maze
    "maze.side": Key(5, SIDE, FIXED, "cells along a side; a prompt has a token for each cell and one for its end"),
    "maze.num_warm": Key(30000, FROM_0, FIXED, "mazes for supervised fine-tuning"),
    "maze.num_train": Key(4096, FROM_1, FIXED, "D, training prompts"),
    "maze.num_test": Key(1024, FROM_1, FIXED, "held-out prompts"),
    # ---------------------------------------------------------------- reasoning_gym
    "reasoning_gym.tasks": Key("chain_sum(max_digits=2)*2, letter_counting", ANY, FIXED,
        "generators of the package reasoning-gym, each with options of its own, which decide how hard it is, and with "
        "a weight: \"chain_sum(max_digits=2)*2, letter_counting\" draws twice as many sums"),
    "reasoning_gym.num_warm": Key(1024, FROM_0, FIXED, "questions for supervised fine-tuning"),
    "reasoning_gym.num_train": Key(2048, FROM_1, FIXED, "D, training prompts"),
    "reasoning_gym.num_test": Key(256, FROM_1, FIXED, "held-out prompts"),
    # ---------------------------------------------------------------- tokenizer
    "tokenizer.path": Key("", ANY, FIXED,
        "a .model file or a directory; \"\" takes the policy's, or trains one on the data's texts"),
    "tokenizer.vocab_size": Key(64, FROM_1, FIXED, "most pieces of a tokenizer that is trained"),
    "tokenizer.byte_fallback": Key(False, ANY, FIXED,
        "a trained tokenizer spells unknown characters as bytes (256 more pieces)"),
    # ---------------------------------------------------------------- policy
    "policy.path": Key("", ANY, FIXED,
        'directory with config.json and safetensors, which then decide the sizes and tie_embeddings; "" for none'),
    "policy.lora_rank": Key(0, FROM_0, FIXED,
        "rank of low-rank adapters (LoRA), which are then all that is trained: the policy that the first step begins "
        "with is frozen, and kept in policy.dtype. 0 trains all parameters"),
    "policy.lora_alpha": Key(32.0, ABOVE_0, FIXED, "what adapters add counts lora_alpha / lora_rank times"),
    "policy.lora_modules": Key(MODULES, ADAPTED, FIXED, "weights of each layer that have an adapter"),
    "policy.adapter": Key("", ANY, FIXED,
        "directory of adapters of policy.path in the format of PEFT, to go on from; merged into it with lora_rank=0. "
        '"" for none'),
    "policy.embed_size": Key(64, FROM_1, FIXED, "E, size of an embedding"),
    "policy.num_layers": Key(2, FROM_1, FIXED, "L, layers"),
    "policy.num_heads": Key(4, FROM_1, FIXED, "H, query heads"),
    "policy.num_kv_heads": Key(2, FROM_1, FIXED, "K, key and value heads; divides num_heads"),
    "policy.head_size": Key(16, FROM_1, FIXED, "Q, size of a head"),
    "policy.mlp_size": Key(256, FROM_1, FIXED, "hidden size of the gated unit"),
    "policy.tie_embeddings": Key(True, ANY, FIXED, "input embeddings are the output layer too"),
    "policy.dtype": Key("float32", DTYPE, FIXED,
        'type of the computation: "float32" or "bfloat16"; parameters that are trained are always float32'),
    "policy.unroll": Key(2, FROM_1, FREE, "layers compiled in a row; 1 compiles a deep decoder fastest"),
    "policy.remat": Key("none", ANY, FREE,
        'what the backward pass computes again to save memory: "none", "full" (whole layers), or "dots" (all but '
        "products of matrices)"),
    "policy.attention": Key("auto", ANY, FREE, 'attention kernel: "auto", "xla", "cudnn" (GPU) or "splash" (TPU)'),
    "policy.balance": Key(0.0, SHARE, FIXED,
        "weight of an auxiliary loss that spreads tokens over the experts of a checkpoint; that loss is 1 where all "
        "are used alike; 0 computes none"),
    # ---------------------------------------------------------------- sft
    "sft.steps": Key(1500, FROM_0, FIXED, "updates; 0 for none"),
    "sft.path": Key("", ANY, FIXED,
        "files of prompts and completions, as in data.path; \"\" takes the training data's"),
    "sft.prompt_field": Key("prompt", ANY, FIXED, "field of sft.path with the prompt"),
    "sft.completion_field": Key("completion", ANY, FIXED, "field of sft.path with the completion"),
    "sft.batch_size": Key(64, FROM_1, FIXED, "rows per update"),
    "sft.row_tokens": Key(0, FROM_0, FIXED,
        "tokens of a row that several pairs are packed into; 0 gives each pair a row of its own"),
    "sft.learning_rate": Key(2e-3, ABOVE_0, FIXED,
        "of AdamW, constant after a warm-up of 20 updates, or of half of all where those are fewer"),
    "sft.save_every": Key(500, FROM_1, FREE, "updates between checkpoints of the fine-tuning"),
    "sft.dir": Key("", ANY, FREE,
        'directory where fine-tuned policies are cached for several runs, by what the data holds; "" for the work '
        "directory"),
    # ---------------------------------------------------------------- verify
    "verify.workers": Key(0, FROM_0, FREE,
        "worker processes; 0 computes rewards in the training process, without limits"),
    "verify.item_seconds": Key(10.0, ABOVE_0, FREE,
        "seconds for one response; beyond it there is no reward and the worker is replaced"),
    "verify.batch_seconds": Key(300.0, ABOVE_0, FREE,
        "seconds for the rollouts of a step after the last response has ended; those left then get no reward"),
    "verify.items_per_worker": Key(10000, FROM_1, FREE, "responses after which a worker is replaced"),
    "verify.memory_gb": Key(4.0, ABOVE_0, FREE, "address space of a worker, GiB"),
    "verify.environment": Key("", ANY, FREE,
        "further environment variables that workers see, names separated by commas; few are passed on, and no "
        "credentials"),
    "verify.may_fail": Key(False, ANY, FREE,
        "go on where no response of a step, or of an evaluation so far, has a reward; False ends the run with the "
        "reason"),
    # ---------------------------------------------------------------- sample
    "sample.max_new_tokens": Key(7, FROM_1, FIXED, "T, most tokens of a response"),
    "sample.temperature": Key(1.0, WARM, FIXED, "sampling temperature, above 0"),
    "sample.top_k": Key(0, FROM_0, FIXED, "sample from this many most likely tokens; 0 for all"),
    "sample.top_p": Key(1.0, PART, FIXED,
        "sample from the fewest tokens that hold this much of the probability; 1 for all"),
    "sample.min_p": Key(0.0, SHARE, FIXED,
        "sample from tokens at least this likely relative to the most likely one; 0 for all"),
    "sample.stop": Key((), TEXTS, FIXED,
        "further ends of a response, beside the end tokens of the tokenizer and the checkpoint: "
        "\"('<|im_end|>','</answer>')\". A text that is a special or added token is an end token; at any other a "
        "response ends with the token that completes it"),
    "sample.slots": Key(0, FROM_0, FREE,
        "S, rollouts decoded at a time; their caches take memory; 0 decides by sample.memory_gb"),
    "sample.memory_gb": Key(0.0, FROM_0, FREE,
        "GB of each device for the caches of these slots; 0 decodes all rollouts at once, or on a CPU as many as "
        "have their caches near its cores, or as much memory as a larger policy"),
    # ---------------------------------------------------------------- loss
    "loss.scale": Key("std", ANY, FIXED,
        "what advantages are divided by: \"std\", the standard deviation of the group's rewards (GRPO); \"none\" "
        '(Dr. GRPO); or "mean", their mean (MaxRL), with which rare successes count as much as common ones'),
    "loss.leave_one_out": Key(False, ANY, FIXED,
        "baseline of a rollout: the mean reward of the group's other rollouts (RLOO)"),
    "loss.advantage_clip": Key(0.0, FROM_0, FIXED, "largest absolute advantage, 0 for no bound"),
    "loss.overlong_tokens": Key(0, FROM_0, FIXED,
        "tokens before the limit T over which a response's reward falls by up to 1 (DAPO's soft penalty); 0 for no "
        "penalty"),
    "loss.mask_truncated": Key(False, ANY, FIXED, "leave responses without an end token out of the gradient"),
    "loss.average": Key("prompts", ANY, FIXED,
        'what the surrogate loss is a mean over: "tokens", "sequences", "prompts" (those that were sampled), '
        '"candidates" (all that the rule "reach" chose from, by the probability of its choice), or "constant" (Dr. '
        "GRPO)"),
    "loss.surrogate": Key("ppo", ANY, FIXED,
        'or "gspo", the ratio of whole responses, or "cispo", weights without gradient'),
    "loss.clip_low": Key(0.2, SHARE, FIXED, "how far the probability ratio may fall below 1"),
    "loss.clip_high": Key(0.28, FROM_0, FIXED, "how far the probability ratio may rise above 1"),
    "loss.dual_clip": Key(10.0, ABOVE_1, FIXED, "largest probability ratio of rollouts with a negative advantage"),
    "loss.importance_cap": Key(0.0, FROM_0, FIXED,
        "largest importance weight of a token for the difference between sampler and learner; 0 computes no such "
        "weights"),
    "loss.kl_coefficient": Key(0.0, FROM_0, FIXED,
        "weight of the KL penalty towards the first policy, per nat; 0 computes none"),
    "loss.kl_estimator": Key("k3", ANY, FIXED, 'estimator of that divergence: "k1", "k2" or "k3"'),
    "loss.entropy_coefficient": Key(0.0, FROM_0, FIXED, "weight of the entropy bonus, per nat; 0 computes none"),
    # ---------------------------------------------------------------- optim
    "optim.learning_rate": Key(4e-4, ABOVE_0, FIXED, "highest learning rate"),
    "optim.warmup_steps": Key(5, FROM_0, FIXED, "updates over which the learning rate rises linearly"),
    "optim.decay_steps": Key(395, FROM_0, FIXED, "updates over which it then falls linearly to 0; 0 keeps it constant"),
    "optim.beta1": Key(0.9, DECAY, FIXED, "decay of AdamW's first moment"),
    "optim.beta2": Key(0.98, DECAY, FIXED, "decay of AdamW's second moment"),
    "optim.moment_dtype": Key("float32", DTYPE, FIXED,
        "what AdamW's first moment is kept in; bfloat16 saves two bytes for each parameter that is trained"),
    "optim.weight_decay": Key(0.0, FROM_0, FIXED, "decoupled weight decay of AdamW"),
    "optim.grad_clip": Key(1.0, ABOVE_0, FIXED, "largest global norm of the gradient; larger ones are scaled down"),
    "optim.updates_per_step": Key(2, FROM_1, FIXED, "optimiser updates per step, on equal shares of the rollouts"),
    "optim.micro_tokens": Key(1024, FROM_1, FREE, "tokens of a micro-batch at most, or a row, on all devices together"),
    "optim.packed": Key(True, ANY, FREE,
        "several rollouts to a row; False where the attention kernel has no segments (cuDNN)"),
    # ---------------------------------------------------------------- distributed
    "distributed.coordinator": Key("", ANY, FREE, '"host:port" of process 0; "" where the cluster knows it'),
    "distributed.processes": Key(0, ANY, FREE,
        "number of processes; -1 asks the cluster, 0 is a single one unless a cluster is found"),
    "distributed.process": Key(0, ANY, FREE, "number of this process, from 0"),
    # ---------------------------------------------------------------- mesh
    "mesh.shape": Key((1,), DEVICES, FREE, "devices along each axis"),
    "mesh.axis_names": Key(("data",), ANY, FREE, 'name of each axis: "data", "fsdp" or "model"'),
    "mesh.decode": Key((), DEVICES, FREE,
        "mesh shape for decoding, of the same devices along the same axes; parameters are resharded once a step. "
        'With more devices along "model", a policy fits whose 16-bit parameters no device can hold whole. () '
        "decodes in mesh.shape"),
    # ---------------------------------------------------------------- log
    "log.rollouts_gb": Key(1.0, FROM_0, FREE,
        "10^9 bytes of every rollout's text and reward, thinned out when full; 0 keeps none"),
    "log.texts_every": Key(20, FROM_0, FREE,
        "steps between the sample rollouts that TensorBoard and W&B show; 0 for never"),
    "log.wandb": Key("", ANY, FREE,
        'project of Weights & Biases; "" for none; WANDB_MODE=offline writes to the work directory alone'),
    "log.mlflow": Key("", ANY, FREE, 'tracking URI of MLflow, such as "http://host:5000"; "" for none'),
}
# fmt: on

FREE_KEYS = tuple(name for name, key in KEYS.items() if key.free)


def get_config() -> ConfigDict:
    """The keys that every run has, with their defaults."""
    config = ConfigDict()
    for name, key in KEYS.items():
        section, _, last = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[last] = key.default
    return config
