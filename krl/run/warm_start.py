"""The supervised start of a policy that has no pretrained checkpoint."""

import pathlib
import threading
from collections.abc import Callable

import jax
import numpy as np

from krl import policy
from krl.policy.tokenizer import Tokenizer
from krl.run.checkpoint import Checkpoints
from krl.run.update import init_state, make_optimizer, skipped_updates, supervised_update
from krl.tasks import EncodedTasks, step_task_ids


def encode_pairs(
    encoded: EncodedTasks, tokenizer: Tokenizer, max_completion_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts and worked solutions as training sequences, in the layout of rollouts.

    Args:
        encoded: D tasks with completions.
        tokenizer: ends every completion with its first end token.
        max_completion_tokens: T; pairs with a longer completion are left out.

    Returns:
        (tokens [W, P + T] int32, mask [W, P + T] bool, target_mask [W, P + T] bool), W <= D.

    Raises:
        ValueError: the tasks have no completions, or none fits.
    """
    if not encoded.tasks.completions:
        raise ValueError("a warm start needs worked solutions; name config.data.completion_field or a checkpoint")
    targets = [[*tokenizer.encode(text), tokenizer.eos_ids[0]] for text in encoded.tasks.completions]
    kept = [i for i, ids in enumerate(targets) if len(ids) <= max_completion_tokens]
    if not kept:
        raise ValueError(
            f"no worked solution has at most {max_completion_tokens} tokens; raise config.sample.max_new_tokens"
        )
    tokens = np.full((len(kept), max_completion_tokens), tokenizer.pad_id, np.int32)
    real = np.zeros((len(kept), max_completion_tokens), bool)
    for row, i in enumerate(kept):
        tokens[row, : len(targets[i])] = targets[i]
        real[row, : len(targets[i])] = True
    prompt_tokens, prompt_mask = encoded.tokens[kept], encoded.mask[kept]
    return (
        np.concatenate([prompt_tokens, tokens], axis=1),
        np.concatenate([prompt_mask, real], axis=1),
        np.concatenate([np.zeros_like(prompt_mask), real], axis=1),
    )


def warm_start(
    config: policy.PolicyConfig,
    params: dict,
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
    directory: pathlib.Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    max_bad_updates: int,
    stop: threading.Event,
    place: Callable[[np.ndarray], jax.Array],
    report: Callable[[int, float], None],
) -> tuple[dict, bool]:
    """Train params on worked solutions, or read the result from an earlier run.

    Args:
        config: the policy's sizes.
        params: freshly initialised and placed on the mesh; their buffers are reused.
        pairs: from `encode_pairs`.
        directory: keeps the checkpoint; an interrupted warm start continues from it.
        steps, batch_size, learning_rate: of AdamW at a constant rate; the batch in sequences.
        seed: order of the sequences.
        max_bad_updates: non-finite updates in a row that end the run.
        stop: set when the run should save and leave.
        place: puts a host batch on the mesh.
        report: called with (step, loss in nats per token) every few steps.

    Returns:
        (params, whether they are finished; False only if `stop` was set).

    Raises:
        FloatingPointError: too many updates in a row were not finite.
    """
    optimizer = make_optimizer(
        learning_rate=learning_rate,
        warmup_steps=20,
        decay_steps=0,
        beta1=0.9,
        beta2=0.98,
        weight_decay=0.01,
        grad_clip=1.0,
    )
    state = init_state(config, optimizer, params)
    with Checkpoints(directory, keep=1) as checkpoints:
        restored = checkpoints.restore({"state": state})
        first, state = (0, state) if restored is None else (restored[0], restored[1]["state"])
        batch_size = min(batch_size, len(pairs[0]))
        done = first
        while done < steps and not stop.is_set():
            rows = step_task_ids(len(pairs[0]), batch_size, done, seed=seed)
            batch = [place(part[rows]) for part in pairs]
            state, metrics = supervised_update(config, optimizer, state, *batch)
            loss = float(metrics["loss"])  # waits, so that a signal is not answered many queued steps later
            done += 1
            if done % 20 == 0 or done == steps:
                if skipped_updates(state)[0] >= max_bad_updates:
                    raise FloatingPointError(
                        f"warm start: {max_bad_updates} updates in a row were not finite; lower config.warm_start.learning_rate"
                    )
                report(done, loss)
        if done > first:
            checkpoints.save(done, {"state": state})
    return state.params, done >= steps
