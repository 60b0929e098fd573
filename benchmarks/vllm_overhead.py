"""What this project's sampling takes with vLLM, compared with a plain LLM.generate().

    OMP_NUM_THREADS=1 python -m benchmarks.vllm_overhead [--prompts 64] [--n 4] [--rounds 5]

One engine with the untrained Qwen3 of the toy world, and 1,200 rows for its 29 token ids. sample_stream(), as
rollout.py uses it, and generate() take turns with the same prompts, seeds and parameters. Prints seconds of
each round, their medians, and the ratio of these.
"""

import argparse
import statistics
import tempfile
import time

import torch

from distil.sampling import SamplingConfig, derive_seed, sample_stream
from distil.vllm_engine import load_vllm
from recipes.toy_world import make_model, make_tokenizer

ROWS = 1200


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64, help="prompts of 4 to 35 tokens")
    parser.add_argument("--n", type=int, default=4, help="responses to each")
    parser.add_argument("--max_response_tokens", type=int, default=128, help="tokens of each response")
    parser.add_argument("--sample_batch", type=int, default=32, help="responses handed over together")
    parser.add_argument("--rounds", type=int, default=5, help="of each")
    return parser.parse_args(argv)


def engine_of(directory):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, 64, 2, 2)
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load_vllm(directory, len(tokenizer), "float32", 1, 0.3)


def ours(engine, prompts, config):
    """[[token ids of n responses] of each prompt]"""
    groups = {}
    for finished in sample_stream(engine, prompts, config, 7, range(len(prompts))):
        groups |= finished
    return [[response.response_ids for response in groups[i]] for i in range(len(prompts))]


def plain(engine, prompts, config):
    """The same with generate(), in the parameters' shortest form."""
    import vllm

    common = {"temperature": config.temperature, "max_tokens": config.max_response_tokens}
    common |= {"stop_token_ids": config.stop_ids, "ignore_eos": True, "detokenize": False}
    slots = [(i, j) for i in range(len(prompts)) for j in range(config.n)]
    params = [vllm.SamplingParams(seed=derive_seed(7, i, j), **common) for i, j in slots]
    outputs = engine.generate([{"prompt_token_ids": prompts[i]} for i, _ in slots], params, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    return [ids[i * config.n : (i + 1) * config.n] for i in range(len(prompts))]


def main(args):
    prompts = [[1, *(3 + (i + j) % 26 for j in range(3 + i % 32))] for i in range(args.prompts)]
    config = SamplingConfig(args.n, 1.0, 1.0, 0, args.max_response_tokens, [28], 29, args.sample_batch)
    seconds = {ours: [], plain: []}
    with tempfile.TemporaryDirectory() as directory:
        engine = engine_of(directory)
    found = {}
    for number in range(args.rounds + 1):  # the first warms up
        for run in (ours, plain) if number % 2 else (plain, ours):
            engine.reset_prefix_cache()
            started = time.perf_counter()
            found[run] = run(engine, prompts, config)
            if number:
                seconds[run].append(time.perf_counter() - started)
    assert found[ours] == found[plain], "the samples differ"
    for run, rounds in seconds.items():
        times = " ".join(f"{one:.2f}" for one in rounds)
        print(f"{run.__name__:5}  {times}  median {statistics.median(rounds):.3f} s")
    print(f"ratio {statistics.median(seconds[ours]) / statistics.median(seconds[plain]):.3f}")


if __name__ == "__main__":
    main(get_args())
