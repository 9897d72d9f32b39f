#!/usr/bin/env bash
# Everything that is measured and checked on an accelerator, in under ten minutes, with nothing to download.
#   bash benchmarks/gpu.sh [OUT]        one machine with JAX for its accelerator, `pip install "jax[cuda13]"` for a GPU
#   TOY=1 bash benchmarks/gpu.sh        the same code anywhere, with sizes that say nothing about speed
# With CHECKPOINT=DIR and GSM8K=FILE.jsonl also a published model: its rollouts, and uniform and chosen prompts for
# EACH=100 seconds each.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/accelerator}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
$python -m benchmarks.accelerator ${TOY:+--toy} | tee "$out/accelerator.jsonl"
small=${TOY:+--config.sft.steps=3 --config.steps=2 --config.eval.prompts=16}
$python train.py --config configs/operators.py --config.eval.every=100 $small --workdir "$out/operators" | tail -n 3
if [ -n "${CHECKPOINT:-}" ]; then
  $python -m benchmarks.rollout --path "$CHECKPOINT" --questions "$GSM8K" --repeats ${TOY:-3} | tee "$out/real.jsonl"
  small=${TOY:+--config.alloc.budget=8 --config.alloc.candidates=4 --config.prompts_per_step=1 --config.sample.max_new_tokens=4 --config.steps=1 --config.eval.prompts=2}
  for budgets in "uniform --config.alloc.n_min=8 --config.prompts_per_step=64" reach; do
    # SIGTERM saves the run and ends it, so that it can be compared; 124 says that the time was over
    timeout -s TERM "${EACH:-100}" $python train.py --config configs/gsm8k.py --config.policy.path="$CHECKPOINT" \
      --config.data.path="$GSM8K" --config.data.template=chat_boxed --config.data.reward=math_or_number \
      --config.data.max_prompt_tokens=256 --config.sample.max_new_tokens=256 --config.policy.dtype=bfloat16 \
      --config.sft.steps=0 --config.steps=1000 --config.alloc.budget=512 --config.alloc.candidates=512 \
      --config.optim.learning_rate=5e-6 --config.optim.micro_tokens=32768 --config.eval.every=10 --config.eval.prompts=256 \
      --config.alloc.rule=$budgets $small --workdir "$out/gsm8k_${budgets%% *}" | tail -n 3 || [ $? = 124 ]
  done
  $python -m krl.report "$out/gsm8k_uniform" "$out/gsm8k_reach" --out "$out/gsm8k"
fi
