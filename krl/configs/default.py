"""Every key of a run, with its unit. Other configs start from this one and change values."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that every run has."""
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the data and the samples
    config.steps = 200  # training steps; a step samples, scores and learns from alloc.budget rollouts
    config.prompts_per_step = 64  # M
    config.max_bad_updates = 5  # non-finite updates in a row that stop the run
    config.stuck_seconds = 0.0  # a phase that takes longer, compilation included, ends the run with all stacks; 0 waits

    # How many rollouts each prompt gets.
    config.alloc = ConfigDict()
    config.alloc.rule = "knapsack"  # a key of krl.budget.RULES: "knapsack", or "uniform" for plain GRPO
    config.alloc.budget = 512  # R, rollouts per step
    config.alloc.n_min = 2  # fewest rollouts of a prompt
    config.alloc.n_max = 128  # most rollouts of a prompt
    # What a prompt's success rate is likely to be before it is sampled: "shared" (one prior for all prompts),
    # "groups" (by a field of the data), "features" (by pieces of its text and all of data.fields), or
    # "gaussian_process" (by the same features, as the rule "vip" was published).
    config.alloc.prior = "features"
    config.alloc.prior_field = ""  # the field of "groups", such as "subject"
    config.alloc.prior_width = 4096  # to how many features the pieces and fields are hashed
    config.alloc.discount = 0.9  # what is left of the evidence about a prompt after an even group, 0 to 1
    config.alloc.discount_mixed = 0.25  # and after a mixed group, which changes the policy on that prompt
    config.alloc.fit_discounts = False  # let both follow the likelihood of new outcomes
    # Rollouts of each prompt that are drawn first, from which alone the counts follow, and which are neither counted nor
    # learnt from: an upper bound on what a belief can be worth. 0 for none.
    config.alloc.scouts = 0

    _add_tasks(config)
    _add_policy(config)
    _add_log(config)

    # Accuracy on held-out prompts while training, and what eval.py measures.
    config.eval = ConfigDict()
    config.eval.every = 20  # steps; also before the first and after the last; 0 for never
    config.eval.prompts = 1024  # held-out prompts, 0 for all
    config.eval.samples = 16  # k, samples of each
    config.eval.temperature = 0.6  # 0 takes the most likely token
    config.eval.top_p = 1.0  # probability kept by nucleus sampling, 1 keeps all
    config.eval.sets = (
        ""  # benchmarks of eval.py, keys of krl.tasks.SOURCES: "aime,amc,math500"; "" for held-out prompts
    )
    config.eval.best = False  # eval.py measures the parameters of the highest held-out accuracy, not the newest
    config.eval.dir = ""  # directory with {set}.jsonl files to read instead of the hub

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 25  # steps
    config.checkpoint.dir = ""  # one for each run, such as "gs://bucket/run"; "" for the work directory
    config.checkpoint.keep = 2  # newest ones kept; best/ has the parameters of the highest held-out accuracy too

    # A step beyond one of these is undone: the run goes on from its last checkpoint, with other rollouts. 0 for no limit. What
    # is usual for a run stands in its metrics.jsonl; a limit some times above that catches spikes alone.
    config.guard = ConfigDict()
    config.guard.loss = 0.0  # largest size of the loss
    config.guard.ratio = 0.0  # largest ratio_max
    config.guard.kl = 0.0  # largest divergence from the first policy, where loss.kl_coefficient has it computed; nats
    config.guard.rollbacks = 3  # that a run may have; the next one ends it

    config.profile = ConfigDict()
    config.profile.steps = 0  # that JAX's profiler records, from the third of a start on

    # Processes that train together. With processes = -1 JAX asks the cluster for all three (TPU pod, SLURM, Open MPI), with 0
    # only where the environment is that of a SLURM step or a TPU slice of several hosts.
    config.distributed = ConfigDict()
    config.distributed.coordinator = ""  # "host:port" of process 0
    config.distributed.processes = 0
    config.distributed.process = 0  # this one's number, from 0

    # The device mesh; axis names are "data", "fsdp" and "model".
    config.mesh = ConfigDict()
    config.mesh.shape = (1,)  # devices along each axis
    config.mesh.axis_names = ("data",)
    # Rollouts are decoded in the same layout, or in another one of the same devices, with parameters resharded once a
    # step: with more of them along "model", a policy fits whose 16-bit parameters no device holds whole.
    config.mesh.decode = ()
    return config


def _add_tasks(config: ConfigDict) -> None:
    # Where prompts come from.
    config.data = ConfigDict()
    config.data.source = "arithmetic"  # "arithmetic" or "operators" (embedded), or "dataset"
    # "exact" (the response is the answer), "math" (marked final answer), "math_or_number" (or the last number), or
    # your own "package.module:function" of (prompt, response, answer).
    config.data.reward = "exact"
    config.data.name = ""  # a key of krl.tasks.SOURCES, which knows its splits and fields, or a hub data set
    config.data.subset = ""  # hub subset, "" for none
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.path = ""  # local .jsonl/.json/.parquet/.arrow file for training, instead of the hub
    config.data.test_path = ""  # the same for evaluation; "" with a local path: hold out its last rows
    config.data.prompt_field = ""  # of a data set that is no key of krl.tasks.SOURCES, such as "question"
    config.data.answer_field = ""  # the same; "" takes the worked solution for the answer
    config.data.completion_field = ""  # worked solutions for supervised fine-tuning, "" for none
    config.data.fields = ""  # further fields of the training data that say something of a task: "subject,level"
    config.data.template = "raw"  # a key of krl.tasks.TEMPLATES, or a text with {prompt} in it
    config.data.max_train = 0  # training prompts to read, 0 for all
    config.data.max_prompt_tokens = 12  # P; longer prompts are left out

    # The arithmetic ladder: most digits of an operand on each rung (0 leaves it out), and set sizes.
    config.arithmetic = ConfigDict()
    config.arithmetic.addition = 5
    config.arithmetic.subtraction = 0
    config.arithmetic.multiplication = 3
    config.arithmetic.two_step = 0
    config.arithmetic.num_warm = 20000  # expressions of the warm start
    config.arithmetic.num_train = 1024  # D
    config.arithmetic.num_test = 1024

    # The operators: how many there are, each meaning a string function, and set sizes.
    config.operators = ConfigDict()
    config.operators.num_operators = 52
    config.operators.num_warm = 30000  # demonstrations of the warm start
    config.operators.num_train = 4096  # D
    config.operators.num_test = 2048

    config.tokenizer = ConfigDict()
    config.tokenizer.path = ""  # a .model file or a directory; "" takes the policy's, or trains one on the texts
    config.tokenizer.vocab_size = 64  # most pieces of a trained one
    config.tokenizer.byte_fallback = False  # spell unknown characters as bytes (256 more pieces)


def _add_policy(config: ConfigDict) -> None:
    # The decoder: a Hugging Face checkpoint, or one from scratch of these sizes; see krl.policy.PolicyConfig.
    config.policy = ConfigDict()
    config.policy.path = (
        ""  # directory with config.json and safetensors, which then decide the sizes and tie_embeddings
    )
    config.policy.embed_size = 64
    config.policy.num_layers = 2
    config.policy.num_heads = 4
    config.policy.num_kv_heads = 2
    config.policy.head_size = 16
    config.policy.mlp_size = 256
    config.policy.tie_embeddings = True
    config.policy.dtype = "float32"  # of the computation: "float32" or "bfloat16"
    config.policy.unroll = 2  # layers compiled in a row; 1 compiles a deep decoder fastest
    config.policy.remat = "none"  # what the backward pass recomputes: "none", "full" layers, all but their "dots"
    config.policy.attention = "auto"  # kernel: "auto", "xla", "cudnn" (GPU) or "splash" (TPU)

    # Supervised fine-tuning before the first step, on worked solutions.
    config.sft = ConfigDict()
    config.sft.steps = 1500  # updates; 0 for none
    config.sft.path = ""  # file of prompts and completions; "" takes the training data's
    config.sft.prompt_field = "prompt"  # of that file
    config.sft.completion_field = "completion"  # of that file
    config.sft.batch_size = 64  # rows per update
    config.sft.row_tokens = 0  # columns of a row packed with several pairs; 0 gives each pair its own row
    config.sft.learning_rate = 2e-3
    config.sft.save_every = 500  # updates between checkpoints
    config.sft.dir = ""  # where results are cached, "" for the work directory

    # Worker processes that compute rewards. 0 workers compute them in this process, without limits.
    config.verify = ConfigDict()
    config.verify.workers = 0
    config.verify.item_seconds = 10.0  # for one response, then its reward is 0 and the worker is replaced
    config.verify.batch_seconds = 300.0  # for the rollouts of a step, then the rest get reward 0
    config.verify.items_per_worker = 10000  # responses after which a worker is replaced
    config.verify.memory_gb = 4.0  # address space of a worker
    # Further environment variables that workers see, by name with commas: few are passed on, and no credentials.
    config.verify.environment = ""

    config.sample = ConfigDict()
    config.sample.max_new_tokens = 7  # T
    config.sample.temperature = 1.0  # of training rollouts, > 0
    config.sample.top_k = 0  # training rollouts come from so many likeliest tokens; 0 for all
    config.sample.top_p = 1.0  # and from the fewest that hold so much of the probability; 1 for all
    config.sample.min_p = 0.0  # and from those so likely relative to the likeliest; 0 for all
    config.sample.slots = 0  # S, rollouts decoded at a time, whose caches take memory; 0 goes by memory_gb
    config.sample.memory_gb = 0.0  # of each device, for those caches; 0 decodes all rollouts at once, on a CPU a few

    config.loss = ConfigDict()
    config.loss.scale_by_std = True  # divide advantages by the group's standard deviation
    config.loss.leave_one_out = False  # compare a rollout with the mean of its prompt's others (RLOO)
    config.loss.advantage_clip = 0.0  # largest size of an advantage, 0 for no bound
    config.loss.overlong_tokens = 0  # before the limit, over which a response loses up to 1 of its reward; 0 for none
    config.loss.mask_truncated = False  # responses that were cut off have no gradient
    config.loss.average = "prompts"  # of the surrogate: "tokens", "sequences", "prompts" or "constant" (Dr. GRPO)
    config.loss.surrogate = "ppo"  # or "gspo", the ratio of whole responses, or "cispo", weights without gradient
    config.loss.clip_low = 0.2  # how far the probability ratio may fall below 1
    config.loss.clip_high = 0.28  # and rise above 1
    config.loss.dual_clip = 10.0  # bound on the ratio of rollouts with a negative advantage
    config.loss.importance_cap = 0.0  # largest weight of a token for what the sampler computed, 0 trusts the sampler
    config.loss.kl_coefficient = 0.0  # of the penalty for leaving the first policy, per nat; 0 computes none
    config.loss.kl_estimator = "k3"  # of that divergence: "k1", "k2" or "k3"
    config.loss.entropy_coefficient = 0.0  # of the bonus for entropy, per nat; 0 computes none

    config.optim = ConfigDict()
    config.optim.learning_rate = 4e-4
    config.optim.warmup_steps = 5  # updates over which the learning rate rises
    config.optim.decay_steps = 395  # updates over which it then falls to 0; 0 for never
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.98
    config.optim.weight_decay = 0.0
    config.optim.grad_clip = 1.0  # largest global gradient norm
    config.optim.updates_per_step = 2  # optimiser updates per step, on equal shares of the rollouts
    config.optim.micro_tokens = 1024  # tokens that go through the model at once, on all devices together
    config.optim.packed = True  # several rollouts to a row; False where the attention kernel has no segments (cuDNN)


def _add_log(config: ConfigDict) -> None:
    # What a run keeps and where else it can be watched; TensorBoard events are always in the work directory.
    config.log = ConfigDict()
    config.log.rollouts_gb = 1.0  # 10^9 bytes of every rollout's text and reward, thinned out when full; 0 keeps none
    config.log.texts_every = 20  # steps between the sample rollouts that TensorBoard and W&B show; 0 for never
    config.log.wandb = (
        ""  # project of Weights & Biases; "" for none; WANDB_MODE=offline writes to the work directory alone
    )
    config.log.mlflow = ""  # tracking URI of MLflow, such as "http://host:5000"; "" for none
