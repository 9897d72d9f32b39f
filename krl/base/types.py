"""Records that cross rooms, and the axis letters that every docstring uses.

| letter  | axis                                                              |
|---------|-------------------------------------------------------------------|
| M       | prompts in a step; of budgets those that they are divided among   |
| C       | candidates of a step that chooses its prompts                     |
| D       | prompts in the whole data set                                     |
| R       | rollouts in a step: the budget, the sum of the counts             |
| P, T    | prompt tokens (padded on the left), response tokens (right)       |
| V, L, E | vocabulary, layers, embedding                                     |
| H, K, Q | query heads, key/value heads, head size                           |
| N       | rollouts given to one prompt                                      |
| S       | slots of the sampler                                              |
| B       | rows of a generic batch                                           |
| W, C    | rows and columns of a packed batch, or of a key/value cache       |
| F       | features of a prompt that a prior goes by, each one of W          |

Masks are bool and True means real. Rollouts are flat rows, never an [M, N] grid: counts are ragged
but their sum is constant, so `[R]` rows with a prompt index hold a step without padding.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

Array = jax.Array | np.ndarray  # on the devices, or on the host before it is placed on them


class Prompts(struct.PyTreeNode):
    """The prompts of one step, padded on the left so that every response starts in column P."""

    tokens: Array  # [M, P] int32
    mask: Array  # [M, P] bool
    task_ids: Array  # [M] int32, the row of each prompt in its data set


class Rollouts(struct.PyTreeNode):
    """The responses of one step, padded on the right; a prompt's rows need not lie together."""

    prompt_index: jax.Array  # [R] int32 in [0, M); M on padding rows
    sample_index: jax.Array  # [R] int32, 0 .. N-1 within the prompt
    mask: jax.Array  # [R] bool, False on padding rows
    tokens: jax.Array  # [R, T] int32
    logps: jax.Array  # [R, T] float32, nats, under the distribution sampled from; 0 on padding
    lengths: jax.Array  # [R] int32, response tokens with the end token counted
    finished: jax.Array  # [R] bool, False where the response was cut at T tokens
    # [R, T] float32, nats, like logps but without top_k, top_p and min_p, as a learner computes them; None for logps
    policy_logps: jax.Array | None = None


class Segments(struct.PyTreeNode):
    """Rows of prompts that each stand once before several responses, its branches.

    A token sees the prompt before it and its own branch, and its position is as if it were alone with these.
    """

    number: jax.Array  # [B, T] int32, the same for a prompt and its responses, another beside it; 0 on padding
    branch: jax.Array  # [B, T] int32, 0 on prompts, a number above 0 of each response's own
    position: jax.Array  # [B, T] int32, of the token in its prompt and response

    def previous(self) -> jax.Array:
        """The column of the token before each, [B, T] int32; any where there is none."""
        columns = jnp.broadcast_to(jnp.arange(self.branch.shape[1], dtype=jnp.int32), self.branch.shape)
        prompt_end = jax.lax.cummax(jnp.where(self.branch == 0, columns, 0), axis=1)
        begins = jnp.diff(self.branch, axis=1, prepend=0) != 0
        return jnp.where(begins & (self.branch > 0), prompt_end, jnp.maximum(columns - 1, 0))


Layout = jax.Array | Segments | None  # of packed rows: [B, T] int32, a number for each sequence, or with branches


class TrainState(struct.PyTreeNode):
    """What the optimiser changes."""

    params: dict[str, Any]  # the policy's parameters, or its adapters alone: `krl.policy.trained`; float32
    opt_state: optax.OptState


class Decoder(Protocol):
    """What turns responses into text: a tokenizer, or `krl.rollout.Ends`."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


class Tokenizer(Protocol):
    """What krl needs of a tokenizer.

    `pad_id` may be one of `eos_ids`, as in many published checkpoints: padding is told apart by masks
    and lengths, never by its id.
    """

    vocab_size: int  # the largest id that texts and chats need, plus 1; a model's V may be larger
    pad_id: int
    eos_ids: tuple[int, ...]  # any of them ends a response; the first is the one to train on
    files: tuple[pathlib.Path, ...]  # to copy into a checkpoint so that `krl.hf.load_tokenizer` reads it there

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that begins a sequence: what this tokenizer puts in front of it, then the text.

        A text that already begins with that gets no second one.
        """

    def encode_chat(self, messages: Sequence[Mapping[str, str]], /, **arguments: object) -> list[int]:
        """Token ids of {"role", "content"} messages in the chat template, up to where the reply begins.

        Args:
            messages: the chat.
            arguments: values of the template's variables, such as enable_thinking=False.

        Raises:
            ValueError: there is no chat template, it refuses these messages or leaves one out, or has no such variable.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens and ids that no token has add nothing."""

    def token(self, number: int) -> str:
        """What a token is called in the tokenizer's file; "" for an id that no token has."""

    def added_id(self, text: str) -> int | None:
        """The special or added token that a text is, None if it is none."""

    def turn_end(self) -> int | None:
        """The special or added token that the chat template puts behind a reply, None if there is none."""
