"""The toy world: sums modulo 10 with many correct orders of reasoning, in which a whole experiment takes minutes on a CPU.

    python -m recipes.toy_world --out out/toy/world

writes problems (train, heldout and test .jsonl, without overlap), an untrained teacher and an untrained smaller student (Qwen3
architecture, random weights, their tokenizer with them), and two rollouts artifacts: gold solutions, and hasty ones that often stop
before the sum is complete. train.py makes the teacher out of the gold ones and the base student, which reasons but not to the end,
out of the hasty ones: --prefix teacher --kl forward --vocab sampled, which is supervised fine-tuning.

A problem gives digits by name. A solution adds them up modulo 10, one a line, each line with the name, the digit and the running
total, then boxes the last total. The order is free, so a perfect teacher has entropy wherever a name is chosen:

    a=3 b=7 c=2    ->    +b7=7              or    +c2=2              ...
                         +a3=0                    +b7=9
                         +c2=2                    +a3=2
                         \\boxed{2}                \\boxed{2}
"""
import argparse
import json
import os
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from artifacts import add_output_flags, finish_artifact, start_artifact
from inputs import load_problems, render_prompt, stop_ids
from rollout import Sample, finish_rollouts, write_rollouts

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["user", "assistant", "\\boxed{", "}", "\n", " ", "=", "+", *"0123456789", *"abcdefgh"]
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", type=int, default=8000, help="training problems")
    p.add_argument("--heldout", type=int, default=64, help="problems for evaluations in training")
    p.add_argument("--test", type=int, default=256, help="problems for the final evaluation")
    p.add_argument("--terms", type=int, nargs=2, default=[4, 8], help="fewest and most terms of a sum")
    p.add_argument("--haste", type=float, default=0.25, help="chance, after each line, that a hasty solution ends there")
    p.add_argument("--seed", type=int, default=42)
    add_output_flags(p, resume=False)
    return p.parse_args(argv)


def make_tokenizer():
    vocabulary = {token: index for index, token in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"user|assistant|\\boxed\{|[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=TEMPLATE, additional_special_tokens=SPECIAL, clean_up_tokenization_spaces=False)


def make_model(tokenizer, hidden, layers, heads):
    """An untrained Qwen3 with tied embeddings; head_dim 32, the least that vLLM's CPU build runs."""
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, head_dim=32, max_position_embeddings=512,
                         tie_word_embeddings=True, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, initializer_range=0.05)
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model


def solve(problem, rng, haste):
    """One solution, in a random order; with haste above 0 it ends too early, after any line with that probability."""
    terms, total, lines = problem.split(), 0, []
    for term in rng.sample(terms, len(terms)):
        name, digit = term.split("=")
        total = (total + int(digit)) % 10
        lines.append(f"+{name}{digit}={total}\n")
        if rng.random() < haste:
            break
    return "".join(lines) + f"\\boxed{{{total}}}<|im_end|>"


def main(args):
    start_artifact(args)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    sums = set()
    while len(sums) < args.train + args.heldout + args.test:  # a set: no problem is in two splits
        sums.add(tuple(rng.randrange(10) for _ in range(rng.randint(*args.terms))))
    sums, files = iter(rng.sample(sorted(sums), len(sums))), []
    for split in ("train", "heldout", "test"):
        files.append(f"{split}.jsonl")
        with open(os.path.join(args.out, files[-1]), "w", encoding="utf-8") as file:
            for index in range(getattr(args, split)):
                digits = next(sums)
                problem = " ".join(f"{name}={digit}" for name, digit in zip("abcdefgh", digits))
                file.write(json.dumps({"id": index, "problem": problem, "answer": str(sum(digits) % 10)}) + "\n")
    tokenizer = make_tokenizer()
    for name, shape in {"teacher_init": (128, 2, 4), "student_init": (64, 2, 2)}.items():
        model = make_model(tokenizer, *shape)
        model.save_pretrained(os.path.join(args.out, name))
        tokenizer.save_pretrained(os.path.join(args.out, name))
        files += [f"{name}/{file}" for file in sorted(os.listdir(os.path.join(args.out, name)))]
        print(f"{name}: {model.num_parameters() / 1e6:.2f} M parameters")

    problems = load_problems(os.path.join(args.out, "train.jsonl"))
    for name, haste in {"gold": 0.0, "hasty": args.haste}.items():
        rollouts = argparse.Namespace(**(vars(args) | {"out": os.path.join(args.out, name), "prompt_suffix": ""}))
        start_artifact(rollouts)
        prompts = [render_prompt(tokenizer, problem["problem"]) for problem in problems]
        with open(os.path.join(rollouts.out, "rollouts.jsonl.tmp"), "w", encoding="utf-8") as file:
            for problem, prompt in zip(problems, prompts):
                ids = tokenizer(solve(problem["problem"], rng, haste), add_special_tokens=False).input_ids
                write_rollouts(file, tokenizer, [problem], [prompt], [[Sample(ids, "stop")]])
        finish_rollouts(rollouts, tokenizer, model="recipes/toy_world.py", stop_ids=stop_ids(tokenizer))
    finish_artifact(args, "toy_world", files)


if __name__ == "__main__":
    main(get_args())
