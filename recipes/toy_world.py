"""The toy world: sums modulo 10 with many correct orders of reasoning; an experiment takes minutes on a CPU.

    python -m recipes.toy_world --out out/toy/world

writes problems (train, heldout and test .jsonl, which do not overlap), an untrained teacher and a smaller
untrained student (Qwen3 architecture, random weights, with their tokenizer), and two rollouts artifacts:
gold solutions, and hasty ones, which often stop before the sum is complete. Supervised fine-tuning
(train.py --prefix teacher --kl forward --vocab sampled) makes the teacher from the gold ones, and the base
student, which reasons but stops too early, from the hasty ones.

A problem gives digits by name. A solution adds them up modulo 10, one a line, each line with the name, the
digit and the running total, then boxes the last total. The order is free, so even a perfect teacher has
entropy wherever a name is chosen:

    a=3 b=7 c=2    ->    +b7=7              or    +c2=2              ...
                         +a3=0                    +b7=9
                         +c2=2                    +a3=2
                         \\boxed{2}                \\boxed{2}

Flags make the world harder; the defaults are those of recipes/toy.sh. --student_width 32 makes a student
that cannot become as good as the teacher. --slips lets hasty solutions add one too much where a total
passes 9. --orders two makes solutions take the terms as given or backwards. --restate repeats a total
(+b7=7=7), each time more likely, so that lengths have entropy and a long tail. --student_end endoftext
makes the student a base model beside a chat teacher: its solutions end with another token, except for
--chat_share of them, and only that token stops its samples.
"""

import argparse
import json
import os
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distil.artifacts import add_output_flags, finish_artifact, start_artifact
from distil.models import Response
from distil.problems import load_problems
from distil.prompts import render_prompt
from distil.rollouts import finish_rollouts, write_rollouts

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["user", "assistant", "\\boxed{", "}", "\n", " ", "=", "+", *"0123456789", *"abcdefgh"]
TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", type=int, default=8000, help="training problems")
    p.add_argument("--heldout", type=int, default=64, help="problems for evaluations in training")
    p.add_argument("--test", type=int, default=256, help="problems for the final evaluation")
    p.add_argument("--terms", type=int, nargs=2, default=[4, 8], help="fewest and most terms of a sum")
    p.add_argument("--haste", type=float, default=0.25, help="chance that a hasty solution ends after a line")
    p.add_argument("--slips", type=float, default=0.0, help="chance that it adds one too much past 9")
    p.add_argument(
        "--restate", type=float, default=0.0, help="chance to repeat a total; twice that for again"
    )
    p.add_argument("--orders", choices=["any", "two"], default="any", help="two: as given, and backwards")
    p.add_argument("--student_width", type=int, default=64, help="hidden size of the student")
    p.add_argument(
        "--student_end",
        choices=["im_end", "endoftext"],
        default="im_end",
        help="last token of hasty solutions",
    )
    p.add_argument("--chat_share", type=float, default=0.0, help="share of them that ends with im_end anyway")
    p.add_argument("--seed", type=int, default=42)
    add_output_flags(p, resume=False)
    return p.parse_args(argv)


def make_tokenizer(end="<|im_end|>"):
    vocabulary = {token: index for index, token in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"user|assistant|\\boxed\{|[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=end,
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer, hidden, layers, heads):
    """An untrained Qwen3 with tied embeddings; head_dim 32 is the smallest that vLLM's CPU build runs."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model


def solve(problem, rng, haste=0.0, slips=0.0, restate=0.0, end="<|im_end|>", orders="any"):
    """One solution, in a random order; with orders="two" as given or backwards. Chances: haste, to end too
    early after a line; slips, to add one too much where the total passes 9; restate, to repeat a total (each
    time adds as much again, up to 0.95)."""
    terms, total, lines = problem.split(), 0, []
    order = rng.sample(terms, len(terms)) if orders == "any" else terms[:: rng.choice([1, -1])]
    for term in order:
        name, digit = term.split("=")
        total += int(digit)
        if slips and total > 9 and rng.random() < slips:
            total += 1
        total %= 10
        lines.append(f"+{name}{digit}={total}")
        chance = restate
        while restate and rng.random() < chance:
            lines[-1] += f"={total}"
            chance = min(chance + restate, 0.95)
        if rng.random() < haste:
            break
    return "".join(line + "\n" for line in lines) + f"\\boxed{{{total}}}{end}"


def write_problems(args, rng):
    """Writes train.jsonl, heldout.jsonl and test.jsonl; returns their names."""
    sums = set()
    while len(sums) < args.train + args.heldout + args.test:  # a set: no problem is in two splits
        sums.add(tuple(rng.randrange(10) for _ in range(rng.randint(*args.terms))))
    shuffled = iter(rng.sample(sorted(sums), len(sums)))
    files = ["train.jsonl", "heldout.jsonl", "test.jsonl"]
    for name, count in zip(files, (args.train, args.heldout, args.test)):
        with open(os.path.join(args.out, name), "w", encoding="utf-8") as file:
            for index in range(count):
                digits = next(shuffled)
                problem = " ".join(f"{name}={digit}" for name, digit in zip("abcdefgh", digits))
                row = {"id": index, "problem": problem, "answer": str(sum(digits) % 10)}
                file.write(json.dumps(row) + "\n")
    return files


def write_model(args, name, tokenizer, shape):
    """Writes an untrained model and its tokenizer; returns the names of their files."""
    model = make_model(tokenizer, *shape)
    if tokenizer.eos_token == "<|endoftext|>":  # a base model: nothing else stops it
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    directory = os.path.join(args.out, name)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"{name}: {model.num_parameters() / 1e6:.2f} M parameters")
    return [f"{name}/{file}" for file in sorted(os.listdir(directory))]


def write_solutions(args, name, solutions, tokenizer, stops):
    """A rollouts artifact of texts. solutions: [(problem, text)]."""
    rollouts = argparse.Namespace(**vars(args))
    rollouts.out = os.path.join(args.out, name)
    start_artifact(rollouts)
    with open(os.path.join(rollouts.out, "rollouts.jsonl.tmp"), "w", encoding="utf-8") as file:
        for problem, text in solutions:
            prompt = render_prompt(tokenizer, problem["problem"])
            ids = tokenizer(text, add_special_tokens=False).input_ids
            write_rollouts(file, tokenizer, problem, [Response(prompt, ids, False)])
    finish_rollouts(rollouts, tokenizer, model="recipes/toy_world.py", stop_ids=stops)


def main(args):
    start_artifact(args)
    rng, endings = random.Random(args.seed), random.Random(args.seed)
    torch.manual_seed(args.seed)
    files = write_problems(args, rng)
    tokenizer = make_tokenizer()
    student = make_tokenizer("<|endoftext|>") if args.student_end == "endoftext" else tokenizer
    files += write_model(args, "teacher_init", tokenizer, (128, 2, 4))
    files += write_model(args, "student_init", student, (args.student_width, 2, 2))

    problems = load_problems(os.path.join(args.out, "train.jsonl"))
    common = {"restate": args.restate, "orders": args.orders}
    hasty = {"haste": args.haste, "slips": args.slips}
    for name, chances, owner in (("gold", {}, tokenizer), ("hasty", hasty, student)):
        solutions = []
        for problem in problems:
            end = (tokenizer if endings.random() < args.chat_share else owner).eos_token
            text = solve(problem["problem"], rng, end=end, **common, **chances)
            solutions.append((problem, text))
        write_solutions(args, name, solutions, tokenizer, [owner.eos_token_id])
    finish_artifact(args, "toy_world", files)


if __name__ == "__main__":
    main(get_args())
