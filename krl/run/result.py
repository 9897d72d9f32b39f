"""What a finished run hands to the notebook that called it."""

import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from krl.base.sharding import batch_devices
from krl.base.types import Prompts, Tokenizer
from krl.policy import PolicyConfig
from krl.run.data import encode
from krl.run.processes import place_whole, to_host
from krl.run.scoring import decode_rollouts
from krl.run.setup import Setup
from krl.run.spend import generate
from krl.tasks import TaskSet


@dataclasses.dataclass(frozen=True)
class Result:
    """The policy that a run has trained, and what its last step showed."""

    params: dict = dataclasses.field(repr=False)  # of the policy, on the run's mesh
    metrics: dict[str, float]  # the last row of metrics.jsonl; {} without one
    config: ConfigDict = dataclasses.field(repr=False)  # of the run
    parts: Setup = dataclasses.field(repr=False)  # its mesh, tasks, tokenizer and sizes

    @property
    def policy(self) -> PolicyConfig:
        """The policy's sizes: `(result.policy, result.params)` is what `train` takes as `policy`."""
        return self.parts.policy_config

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's; its files are in the folder `policy` of the work directory."""
        return self.parts.tokenizer

    def generate(self, texts: Iterable[str], *, temperature: float | None = None, seed: int = 0) -> list[str]:
        """One response to each text, in the run's template; texts that are given twice are answered twice.

        Args:
            texts: questions, without the template.
            temperature: 0 for the most likely tokens; by default that of evaluations.
            seed: of the samples.

        Raises:
            ValueError: no text, or one that is longer than config.data.max_prompt_tokens.
        """
        kept = () if isinstance(texts, str) else tuple(texts)
        if not kept or not all(isinstance(text, str) for text in kept):
            raise ValueError(f"generate takes a list of texts, such as ['2+3='], got {texts!r}"[:300])
        asked = encode(self.config, self.tokenizer, TaskSet(prompts=kept, answers=("",) * len(kept)))
        if asked.dropped:
            most = f"config.data.max_prompt_tokens={self.config.data.max_prompt_tokens}"
            raise ValueError(f"{asked.dropped} of {len(kept)} texts have no token, or more than {most}")
        mesh, rows = self.parts.mesh, np.arange(len(kept), dtype=np.int32)
        prompts = place_whole(mesh, Prompts(asked.tokens, asked.mask, rows))
        evaluation, devices = self.config.eval, batch_devices(mesh)
        with jax.set_mesh(mesh):
            rollouts = generate(
                self.config, self.parts, self.params, prompts, place_whole(mesh, np.ones_like(rows)),
                jax.random.key(seed), num_rollouts=math.ceil(len(rows) / devices) * devices, top_p=evaluation.top_p,
                temperature=evaluation.temperature if temperature is None else temperature,
            )  # fmt: skip
        return decode_rollouts(self.parts.ends, to_host(rollouts))[: len(rows)]

    def __getitem__(self, name: str) -> Any:
        """A number of `metrics`, which `train` returned alone until version 0.4."""
        warnings.warn(f'train returns a Result: write .metrics["{name}"]', DeprecationWarning, stacklevel=2)
        return self.metrics[name]
