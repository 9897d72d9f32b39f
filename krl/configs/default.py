"""Every key of a run, with its unit. Other configs start from this one and change values."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that every run has."""
    config = ConfigDict()
    config.seed = 0  # random seed of the parameters, the order of the data and the samples
    config.steps = 200  # training steps; a step samples, scores and learns from alloc.budget rollouts
    config.prompts_per_step = 64  # M, prompts of a step where every one gets some, that is with alloc.n_min above 0
    config.max_bad_updates = 5  # updates in a row with a loss or gradient that is not finite, after which the run ends
    # Seconds that one phase of a step may take, compilation included; a longer one ends the run and prints the stacks
    # of all threads. 0 for no limit.
    config.stuck_seconds = 0.0

    # How many rollouts each prompt gets.
    config.alloc = ConfigDict()
    # A key of krl.budget.RULES: "reach", "knapsack" for the paper's value, "uniform" for plain GRPO.
    config.alloc.rule = "reach"
    config.alloc.budget = 512  # R, rollouts per step, over all prompts
    # Fewest rollouts of a prompt in a step. 0: a step has alloc.candidates prompts, of which those that are worth it
    # get whole groups of alloc.group rollouts, and the others nothing.
    config.alloc.n_min = 0
    # C, prompts that a step chooses from with n_min=0; all of the data if that is fewer, or for 0.
    config.alloc.candidates = 256
    config.alloc.group = 4  # rollouts of a group with n_min=0
    config.alloc.reach = 0.01  # r of the rule "reach", a success rate: rarer ones are worth no more than about r
    # Share of the budget, with n_min=0, for the candidates that were not sampled for longest, a group at least unless it
    # is 0: what is unlearnt is seen. Nothing where the data has fewer prompts than the budget has groups.
    config.alloc.explored = 0.05
    config.alloc.n_max = 128  # most rollouts of a prompt in a step
    # What a prompt's success rate is expected to be before it is sampled: "shared" (one prior for all prompts),
    # "groups" (by a field of the data), "features" (by pieces of its text and all of data.fields), or
    # "gaussian_process" (by the same features, as the rule "vip" was published); or your own, by its name in
    # krl.budget.PRIORS.
    config.alloc.prior = "features"
    # Field of the data that names a prompt's group, such as "subject"; for prior="groups", and for your own prior to go
    # by ("" for the features).
    config.alloc.prior_field = ""
    config.alloc.prior_width = 4096  # number of features that pieces of text and fields are hashed to
    # Share of the evidence about a prompt that is kept after a group whose rewards were all equal, 0 to 1.
    config.alloc.discount = 0.5
    # The same after a group whose rewards differ, which changes the policy on that prompt.
    config.alloc.discount_mixed = 0.25
    config.alloc.fade = 0.95  # the same after each step in which the prompt was not sampled
    config.alloc.fit_discounts = True  # fit all three to the likelihood of new outcomes during the run
    # Extra rollouts of each prompt, drawn first: the counts follow from these alone, and they are neither counted in
    # the budget nor learned from. An upper bound on what a better belief could gain. 0 for none.
    config.alloc.scouts = 0

    _add_tasks(config)
    _add_policy(config)
    _add_learning(config)
    _add_log(config)

    # Accuracy on held-out prompts during training, and what eval.py measures.
    config.eval = ConfigDict()
    config.eval.every = 20  # steps between evaluations; there is one before the first step and after the last; 0: none
    config.eval.prompts = 1024  # held-out prompts, 0 for all
    config.eval.samples = 16  # k, samples of each held-out prompt
    config.eval.temperature = 0.6  # sampling temperature of evaluations; 0 takes the most likely token
    config.eval.top_p = 1.0  # probability kept by nucleus sampling in evaluations; 1 keeps all
    # Benchmarks of eval.py, keys of krl.tasks.SOURCES: "aime,amc,math500"; "" for held-out prompts.
    config.eval.sets = ""
    config.eval.best = False  # eval.py measures the parameters of the highest held-out accuracy, not the newest
    # Directory to read them from instead of the hub, with a data file {set}.jsonl, .json, .parquet or .arrow or a
    # directory {set} for each; "" for the hub.
    config.eval.dir = ""

    # Checkpoints, from which the same command continues a run.
    config.checkpoint = ConfigDict()
    config.checkpoint.every = 25  # steps between checkpoints
    config.checkpoint.dir = ""  # directory of this run alone, such as "gs://bucket/run"; "" for the work directory
    # Newest checkpoints kept; best/ also has the parameters of the highest held-out accuracy.
    config.checkpoint.keep = 2

    # Limits on a step. One that exceeds a limit is undone: the run continues from its last checkpoint with other
    # rollouts. The usual values of a run are in its metrics.jsonl; a limit several times as high catches only spikes.
    config.guard = ConfigDict()
    config.guard.loss = 0.0  # largest absolute loss; 0 for no limit
    config.guard.ratio = 0.0  # largest probability ratio, ratio_max in the metrics; 0 for no limit
    # Largest KL divergence from the first policy, nats per token; needs loss.kl_coefficient above 0. 0 for no limit.
    config.guard.kl = 0.0
    config.guard.rollbacks = 3  # steps that a run may undo; the next one ends it

    # Recording a profile.
    config.profile = ConfigDict()
    config.profile.steps = 0  # steps recorded by JAX's profiler, from the third after a start; 0 for none

    _add_devices(config)
    return config


def _add_tasks(config: ConfigDict) -> None:
    # Where prompts come from and how responses are rewarded.
    config.data = ConfigDict()
    config.data.source = "arithmetic"  # "arithmetic", "operators" or "maze" (embedded), or "dataset"
    # "exact" (the whole response is the answer), "math" (the final answer that the response marks), "math_or_number"
    # (or its last number where it marks none), or your own "package.module:function" of (prompt, response, answer) or
    # (prompt, response, answer, row). Or a sum of several with weights, "math*1.0,mine:format*0.1"; accuracy is of the
    # first.
    config.data.reward = "exact"
    # A key of krl.tasks.SOURCES, which knows its splits and fields, or a hub data set; "" for a file.
    config.data.name = ""
    config.data.subset = ""  # hub subset, "" for none
    config.data.train_split = "train"  # hub split of the training prompts
    config.data.test_split = "test"  # hub split of the held-out prompts
    # Local .jsonl, .json, .parquet or .arrow files for training, instead of the hub: a file, a directory, a pattern such
    # as "data/part-*.jsonl", or several of these separated by commas; "" for the hub.
    config.data.path = ""
    # The same for the held-out prompts; "" takes the test split of a directory in data.path that has one, or else holds
    # out the last rows of data.path.
    config.data.test_path = ""
    # Field of a row with the question, such as "question", or "extra.question" for one inside another; "" for data sets
    # of krl.tasks.SOURCES.
    config.data.prompt_field = ""
    config.data.answer_field = ""  # field with the answer; "" uses the worked solution as the answer
    config.data.completion_field = ""  # field with the worked solution for supervised fine-tuning; "" for none
    # Further fields of the training data, separated by commas, that the prior may use: "subject,level"; "" for none.
    config.data.fields = ""
    config.data.template = "raw"  # a key of krl.tasks.TEMPLATES, or a text with {prompt} in it
    # What a chat template is given, as Python keyword arguments: "enable_thinking=False, system_prompt='Reply in French.'"
    # sets the template's variable, and puts a system message in front of chats that have none; "" for nothing.
    config.data.template_arguments = ""
    config.data.max_train = 0  # training prompts to read, 0 for all
    config.data.max_prompt_tokens = 12  # P, tokens of a prompt; longer prompts are left out

    # The arithmetic task: for each kind of expression the most digits of an operand (0 leaves the kind out), and set
    # sizes.
    config.arithmetic = ConfigDict()
    config.arithmetic.addition = 5  # most digits of an operand in additions; 0 for none
    config.arithmetic.subtraction = 0  # most digits of an operand in subtractions; 0 for none
    config.arithmetic.multiplication = 3  # most digits of an operand in multiplications; 0 for none
    config.arithmetic.two_step = 0  # most digits of an operand in expressions of two operations; 0 for none
    config.arithmetic.num_warm = 20000  # expressions for supervised fine-tuning
    config.arithmetic.num_train = 1024  # D, training prompts
    config.arithmetic.num_test = 1024  # held-out prompts

    # The operators task: letters that each mean a string function, and set sizes.
    config.operators = ConfigDict()
    config.operators.num_operators = 52  # operators, at most 2704
    config.operators.shown_well = 0.5  # share of the operators that the demonstrations show rightly
    config.operators.impossible = 0.0  # share of the operators for which no answer is ever right
    config.operators.wrong = 0.0  # share of the training answers that are another operator's
    config.operators.num_warm = 30000  # demonstrations for supervised fine-tuning
    config.operators.num_train = 4096  # D, training prompts
    config.operators.num_test = 2048  # held-out prompts

    # The maze task: the way through a maze that has one, and set sizes.
    config.maze = ConfigDict()
    config.maze.side = 5  # cells along a side; a prompt has a token for each cell and one for its end
    config.maze.num_warm = 30000  # mazes for supervised fine-tuning
    config.maze.num_train = 4096  # D, training prompts
    config.maze.num_test = 1024  # held-out prompts

    # The tokenizer.
    config.tokenizer = ConfigDict()
    config.tokenizer.path = ""  # a .model file or a directory; "" takes the policy's, or trains one on the data's texts
    config.tokenizer.vocab_size = 64  # most pieces of a tokenizer that is trained
    config.tokenizer.byte_fallback = False  # a trained tokenizer spells unknown characters as bytes (256 more pieces)


def _add_policy(config: ConfigDict) -> None:
    # The decoder: a Hugging Face checkpoint, or one with random weights of these sizes; see krl.policy.PolicyConfig.
    config.policy = ConfigDict()
    # Directory with config.json and safetensors, which then decide the sizes and tie_embeddings; "" for none.
    config.policy.path = ""
    config.policy.embed_size = 64  # E, size of an embedding
    config.policy.num_layers = 2  # L, layers
    config.policy.num_heads = 4  # H, query heads
    config.policy.num_kv_heads = 2  # K, key and value heads; divides num_heads
    config.policy.head_size = 16  # Q, size of a head
    config.policy.mlp_size = 256  # hidden size of the gated unit
    config.policy.tie_embeddings = True  # input embeddings are the output layer too
    config.policy.dtype = "float32"  # type of the computation: "float32" or "bfloat16"; parameters are always float32
    config.policy.unroll = 2  # layers compiled in a row; 1 compiles a deep decoder fastest
    # What the backward pass computes again to save memory: "none", "full" (whole layers), or "dots" (all but products
    # of matrices).
    config.policy.remat = "none"
    config.policy.attention = "auto"  # attention kernel: "auto", "xla", "cudnn" (GPU) or "splash" (TPU)

    # Supervised fine-tuning on worked solutions, before the first step.
    config.sft = ConfigDict()
    config.sft.steps = 1500  # updates; 0 for none
    config.sft.path = ""  # files of prompts and completions, as in data.path; "" takes the training data's
    config.sft.prompt_field = "prompt"  # field of sft.path with the prompt
    config.sft.completion_field = "completion"  # field of sft.path with the completion
    config.sft.batch_size = 64  # rows per update
    config.sft.row_tokens = 0  # tokens of a row that several pairs are packed into; 0 gives each pair a row of its own
    config.sft.learning_rate = 2e-3  # of AdamW, constant after a warm-up of 20 updates
    config.sft.save_every = 500  # updates between checkpoints of the fine-tuning
    # Directory where fine-tuned policies are cached for several runs, by what the data holds; "" for the work directory.
    config.sft.dir = ""

    # Worker processes that compute rewards, with limits on time and memory.
    config.verify = ConfigDict()
    config.verify.workers = 0  # worker processes; 0 computes rewards in the training process, without limits
    config.verify.item_seconds = (
        10.0  # seconds for one response; beyond it there is no reward and the worker is replaced
    )
    # Seconds for the rollouts of a step after the last response has ended; those left then get no reward.
    config.verify.batch_seconds = 300.0
    config.verify.items_per_worker = 10000  # responses after which a worker is replaced
    config.verify.memory_gb = 4.0  # address space of a worker, GB
    # Further environment variables that workers see, names separated by commas; few are passed on, and no credentials.
    config.verify.environment = ""
    # Go on where no response of a step, or of an evaluation so far, has a reward; False ends the run with the reason.
    config.verify.may_fail = False

    # Sampling of training rollouts.
    config.sample = ConfigDict()
    config.sample.max_new_tokens = 7  # T, most tokens of a response
    config.sample.temperature = 1.0  # sampling temperature, above 0
    config.sample.top_k = 0  # sample from this many most likely tokens; 0 for all
    config.sample.top_p = 1.0  # sample from the fewest tokens that hold this much of the probability; 1 for all
    config.sample.min_p = 0.0  # sample from tokens at least this likely relative to the most likely one; 0 for all
    # Further ends of a response, beside the end tokens of the tokenizer and the checkpoint: "('<|im_end|>','</answer>')". A
    # text that is a special or added token is an end token; at any other a response ends with the token that completes it.
    config.sample.stop = ()
    config.sample.slots = 0  # S, rollouts decoded at a time; their caches take memory; 0 decides by sample.memory_gb
    # GB of each device for the caches of these slots; 0 decodes all rollouts at once, or a few at a time on a CPU.
    config.sample.memory_gb = 0.0


def _add_learning(config: ConfigDict) -> None:
    # Advantages and the loss.
    config.loss = ConfigDict()
    # What advantages are divided by: "std", the standard deviation of the group's rewards (GRPO); "none" (Dr. GRPO); or
    # "mean", their mean (MaxRL), with which rare successes count as much as common ones.
    config.loss.scale = "std"
    config.loss.leave_one_out = False  # baseline of a rollout: the mean reward of the group's other rollouts (RLOO)
    config.loss.advantage_clip = 0.0  # largest absolute advantage, 0 for no bound
    # Tokens before the limit T over which a response's reward falls by up to 1 (DAPO's soft penalty); 0 for no penalty.
    config.loss.overlong_tokens = 0
    config.loss.mask_truncated = False  # leave responses without an end token out of the gradient
    # What the surrogate loss is a mean over: "tokens", "sequences", "prompts" (those that were sampled), "candidates" (all
    # that the rule "reach" chose from, by the probability of its choice), or "constant" (Dr. GRPO).
    config.loss.average = "prompts"
    config.loss.surrogate = "ppo"  # or "gspo", the ratio of whole responses, or "cispo", weights without gradient
    config.loss.clip_low = 0.2  # how far the probability ratio may fall below 1
    config.loss.clip_high = 0.28  # how far the probability ratio may rise above 1
    config.loss.dual_clip = 10.0  # largest probability ratio of rollouts with a negative advantage
    # Largest importance weight of a token for the difference between sampler and learner; 0 computes no such weights.
    config.loss.importance_cap = 0.0
    config.loss.kl_coefficient = 0.0  # weight of the KL penalty towards the first policy, per nat; 0 computes none
    config.loss.kl_estimator = "k3"  # estimator of that divergence: "k1", "k2" or "k3"
    config.loss.entropy_coefficient = 0.0  # weight of the entropy bonus, per nat; 0 computes none

    # The optimiser of the policy, AdamW.
    config.optim = ConfigDict()
    config.optim.learning_rate = 4e-4  # highest learning rate
    config.optim.warmup_steps = 5  # updates over which the learning rate rises linearly
    config.optim.decay_steps = 395  # updates over which it then falls linearly to 0; 0 keeps it constant
    config.optim.beta1 = 0.9  # decay of AdamW's first moment
    config.optim.beta2 = 0.98  # decay of AdamW's second moment
    config.optim.weight_decay = 0.0  # decoupled weight decay of AdamW
    config.optim.grad_clip = 1.0  # largest global norm of the gradient; larger ones are scaled down
    config.optim.updates_per_step = 2  # optimiser updates per step, on equal shares of the rollouts
    config.optim.micro_tokens = 1024  # tokens of a micro-batch, on all devices together
    config.optim.packed = True  # several rollouts to a row; False where the attention kernel has no segments (cuDNN)


def _add_devices(config: ConfigDict) -> None:
    # Several processes that train one policy. With processes = -1 JAX asks the cluster for all three values (TPU pod,
    # SLURM, Open MPI); with 0 it does so only inside a SLURM step or on a TPU slice of several hosts.
    config.distributed = ConfigDict()
    config.distributed.coordinator = ""  # "host:port" of process 0; "" where the cluster knows it
    # Number of processes; -1 asks the cluster, 0 is a single one unless a cluster is found.
    config.distributed.processes = 0
    config.distributed.process = 0  # number of this process, from 0

    # The device mesh: how devices share the work.
    config.mesh = ConfigDict()
    config.mesh.shape = (1,)  # devices along each axis
    config.mesh.axis_names = ("data",)  # name of each axis: "data", "fsdp" or "model"
    # Mesh shape for decoding, of the same devices along the same axes; parameters are resharded once a step. With more
    # devices along "model", a policy fits whose 16-bit parameters no device can hold whole. () decodes in mesh.shape.
    config.mesh.decode = ()


def _add_log(config: ConfigDict) -> None:
    # What a run keeps and where else it can be watched; TensorBoard events are always in the work directory.
    config.log = ConfigDict()
    config.log.rollouts_gb = 1.0  # 10^9 bytes of every rollout's text and reward, thinned out when full; 0 keeps none
    config.log.texts_every = 20  # steps between the sample rollouts that TensorBoard and W&B show; 0 for never
    # Project of Weights & Biases; "" for none; WANDB_MODE=offline writes to the work directory alone.
    config.log.wandb = ""
    config.log.mlflow = ""  # tracking URI of MLflow, such as "http://host:5000"; "" for none
