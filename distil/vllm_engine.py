"""vLLM as a sampling engine: loading, and requests step by step, so that nothing waits for ever."""

import os
import sys
import threading
import time

import torch

from distil import ranks
from distil.artifacts import refuse
from distil.models import context_of

STALLED_SECONDS = 600  # a vLLM step, a token for each running response, that takes longer never ends


def load_vllm(args, directory):
    """A vLLM engine in this process, on the GPU or, with the CPU build, on the CPU."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if (
        not torch.cuda.is_available()
    ):  # the CPU build refuses to start without a cache size; the rest is speed
        settings |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        refuse(
            f"--engine vllm: vLLM cannot be imported ({error}); install it as the README says, or use --engine hf"
        )
    more = (
        {}
        if torch.cuda.is_available()
        else {  # prompts in one piece: the CPU build cannot seed a request that begins in two
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, context_of(directory)),
        }
    )
    return vllm.LLM(
        directory,
        dtype=args.dtype,
        max_model_len=context_of(directory),
        generation_config="vllm",
        tensor_parallel_size=args.tensor_parallel,
        gpu_memory_utilization=args.gpu_memory_utilization,
        distributed_executor_backend="external_launcher"
        if ranks.world_size() > 1
        else None,  # an engine for each rank
        **more,
    )


def sample_vllm(llm, requests, sampling, seeds):
    import vllm
    from vllm.v1.engine.exceptions import EngineDeadError

    padded = range(sampling.vocab_size, llm.model_config.get_vocab_size())
    common = dict(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_response_tokens,
        stop_token_ids=sampling.stop_ids,
        ignore_eos=True,  # our stop ids alone
        logit_bias=dict.fromkeys(padded, -100.0) or None,  # the strongest that vLLM takes
        logprobs=0 if sampling.logprobs else None,
        detokenize=False,
    )
    params = [vllm.SamplingParams(seed=seed, **common) for seed in seeds]
    try:
        for outputs in run_vllm(llm, requests, params):
            for output in outputs.values():
                assert output.finish_reason in ("stop", "length"), (
                    f"vLLM gave up on a request: {output.finish_reason}"
                )
            yield {
                i: (
                    list(output.token_ids),
                    output.finish_reason,
                    output.logprobs
                    and [
                        candidates[token].logprob
                        for token, candidates in zip(output.token_ids, output.logprobs, strict=True)
                    ],
                )
                for i, output in outputs.items()
            }
    except (
        RuntimeError,
        TimeoutError,
        EngineDeadError,
    ) as error:  # a dead engine, out of memory, a worker that does not answer
        refuse(f"--engine vllm: the engine failed: {error}", code=1)


def run_vllm(llm, requests, params):
    """LLM.generate() step by step, until each request is done; yields {request: output} of those just done. Nothing waits for ever:
    a step that does not return ends the process, more steps than tokens to read and to write are a RuntimeError."""
    since, done = [None], threading.Event()  # since when a step is under way

    def watch():
        while not done.wait(STALLED_SECONDS / 60):
            if since[0] and time.monotonic() - since[0] > STALLED_SECONDS:
                print(
                    f"error: --engine vllm: the engine hangs, a step for {STALLED_SECONDS} seconds",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        names = llm.enqueue([{"prompt_token_ids": prompt} for prompt in requests], params, use_tqdm=False)
        waiting = {
            name.split("-")[0]: i for i, name in enumerate(names)
        }  # vLLM's own names end in a random mark
        steps = 2 * sum(len(prompt) + one.max_tokens for prompt, one in zip(requests, params, strict=True))
        while llm.llm_engine.has_unfinished_requests():
            since[0], steps = time.monotonic(), steps - 1
            outputs = {
                waiting.pop(request.request_id): request.outputs[0]
                for request in llm.llm_engine.step()
                if request.finished
            }
            since[0] = None
            if steps < 0:
                raise RuntimeError(f"{len(waiting)} of {len(requests)} requests do not end")
            yield outputs
    finally:
        done.set()
