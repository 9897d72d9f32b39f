"""What other systems take for the work of `benchmarks.rollout` and `benchmarks.step`.

    PYTHON benchmarks/peers.py generate [--ragged]    Hugging Face's generate
    PYTHON benchmarks/peers.py generate --path DIR --questions FILE    the same of a checkpoint
    PYTHON benchmarks/peers.py step [--ragged]        a GRPO step of TRL, and its loss's passes alone
    PYTHON benchmarks/peers.py step --path DIR --questions FILE        the same of a checkpoint

PYTHON has torch, transformers and trl installed, which krl does not need. The same sizes, prompts' lengths, ends and
rewards; float32, no gradient checkpointing, one update a batch. Every measurement is one line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
import transformers

PROMPTS, EACH, PROMPT_TOKENS, NEW_TOKENS, ENDS = 16, 8, 32, 128, tuple(range(2, 17))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generate", "step"))
    parser.add_argument("--ragged", action="store_true", help="15 of the 512 tokens end a response")
    parser.add_argument("--path", help="a checkpoint's directory")
    parser.add_argument("--questions", help="a JSON Lines file with a field question, for --path")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    {"generate": measure_generate, "step": measure_step}[options.what](options)


def show(key, system, unit, samples):
    samples = [float(f"{sample:.4g}") for sample in samples]
    line = {"key": key, "system": system, "unit": unit, "median": statistics.median(samples), "samples": samples}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print("\n" + json.dumps(line | versions), flush=True)


def make_model():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).float()


def make_tokenizer():
    """Token n is the word "tn"; the end token lies beyond the model's vocabulary, so that it is never drawn."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{token}": token for token in range(2, 512)} | {"<pad>": 0, "<unk>": 1, "<end>": 512}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", padding_side="left"
    )


def make_prompts(number):
    return np.random.default_rng(0).integers(32, 512, (number, PROMPT_TOKENS))


def read(options):
    """The model and tokenizer of a checkpoint, and the first questions of a file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(options.path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(options.questions) as file:
        return model, tokenizer, [json.loads(line)["question"] for line, _ in zip(file, range(PROMPTS), strict=False)]


def measure_generate(options):
    if options.path:
        model, tokenizer, questions = read(options)
        model, given = model.eval(), tokenizer(questions, return_tensors="pt", padding=True)
        tokens, mask, each, length, name = given.input_ids, given.attention_mask, 4, 64, "real"
    else:
        model, tokens, each, length = make_model().eval(), torch.tensor(make_prompts(PROMPTS)), EACH, NEW_TOKENS
        mask, name = torch.ones_like(tokens), "ragged" if options.ragged else "full"
    tokens, mask, ends = tokens.repeat_interleave(each, 0), mask.repeat_interleave(each, 0), list(ENDS)
    for cache in ("dynamic", "static"):
        rates = []
        for _ in range(options.repeats + 1):
            began = time.perf_counter()
            with torch.no_grad():
                rows = model.generate(
                    tokens, attention_mask=mask, max_new_tokens=length, do_sample=True, top_k=0, top_p=1.0,
                    temperature=1.0, eos_token_id=ends if name == "ragged" else -1, pad_token_id=0,
                    cache_implementation=None if cache == "dynamic" else cache,
                )  # fmt: skip
            seconds = time.perf_counter() - began
            answers = rows[:, tokens.shape[1] :].numpy()
            ended = np.isin(answers, ENDS) if name == "ragged" else np.zeros(answers.shape, bool)
            useful = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, answers.shape[1]).sum()
            rates.append(useful / seconds)
        show(f"rollout/{name}", f"generate, {cache} cache", "tok/s", rates[1:])


def measure_step(options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    warm, each, new_tokens, parts = 2, EACH, NEW_TOKENS, 1
    model, tokenizer, name = None, None, "ragged" if options.ragged else "full"
    if options.path:
        each, new_tokens, parts, name = 4, 64, 4, "real"  # what the backward pass keeps of all rows is beyond 20 GB
        model, tokenizer, questions = read(options)
        texts = questions * (warm + options.repeats)
    else:
        texts = [" ".join(f"t{token}" for token in row) for row in make_prompts(PROMPTS * (warm + options.repeats))]
    marks, kept = [], {}

    def parity(completion_ids, **_):
        """0 for every second prompt of the ragged work, so that half of the groups have no gradient."""
        numbers = [float(sum(ids) % 2) for ids in completion_ids]
        return [n * (not options.ragged or row // each % 2) for row, n in enumerate(numbers)]

    class Marks(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            marks.append(time.perf_counter())

        on_step_end = on_train_begin

    class Kept(GRPOTrainer):
        def compute_loss(self, model, inputs, *more, **named):
            kept["inputs"] = inputs
            return super().compute_loss(model, inputs, *more, **named)

    ends = {"ragged": {"eos_token_id": list(ENDS)}, "real": {"min_new_tokens": new_tokens}, "full": None}
    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(
            output_dir=directory, use_cpu=True, bf16=False, gradient_checkpointing=False, num_iterations=1, beta=0.0,
            per_device_train_batch_size=PROMPTS * each // parts, gradient_accumulation_steps=parts,
            num_generations=each, max_completion_length=new_tokens, temperature=1.0, top_p=1.0, top_k=0,
            learning_rate=1e-6, max_steps=warm + options.repeats, save_strategy="no", report_to="none",
            disable_tqdm=True, shuffle_dataset=not options.path, generation_kwargs=ends[name],
        )  # fmt: skip
        trainer = Kept(
            model=model or make_model(), reward_funcs=parity, args=config, callbacks=[Marks()],
            train_dataset=Dataset.from_dict({"prompt": texts}), processing_class=tokenizer or make_tokenizer(),
        )  # fmt: skip
        trainer.train()
    show(f"grpo_step/{name}{'/half' if options.ragged else ''}", "TRL", "s", np.diff(marks)[warm:])

    inputs, rates = kept["inputs"], []
    answers = inputs["completion_ids"].numpy()
    ended = np.isin(answers, ENDS) if options.ragged else np.zeros(answers.shape, bool)
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, answers.shape[1])
    useful = int(inputs["prompt_mask"].sum()) + lengths.sum()
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        trainer.model.zero_grad(set_to_none=True)
        GRPOTrainer.compute_loss(trainer, trainer.model, inputs).backward()
        rates.append(useful / (time.perf_counter() - began))
    show(f"update/{name}", "TRL, forward and backward", "useful tok/s", rates[1:])


if __name__ == "__main__":
    main()
