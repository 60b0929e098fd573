"""vLLM as a sampling engine: loading it, and running it step by step, so that nothing waits for ever."""

import glob
import math
import os
import sys
import threading
import time

import torch
from safetensors import safe_open

from distil import ranks
from distil.artifacts import refuse
from distil.models import Response, check_finite, context_of, refusing

STALLED_SECONDS = 600  # a step yields a token for each running response; one that takes longer never ends


def load_vllm(directory, dtype, tensor_parallel, gpu_memory_utilization):
    """A vLLM engine in this process, on the GPU or, with the CPU build, on the CPU."""
    on_cpu = not torch.cuda.is_available()
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:  # the CPU build refuses to start without a cache size; the rest is speed
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        env["TORCHDYNAMO_DISABLE"] = "1"
    env["PYTHONWARNINGS"] = "ignore:resource_tracker"  # at exit it cleans up after a worker that was killed
    for name, value in env.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        refuse(f"--engine vllm: vLLM cannot be imported ({error}); install it, or use --engine hf")
    check_finite(stored_weights(directory), f"--engine vllm: {directory}")
    context = None if context_of(directory) == math.inf else context_of(directory)
    options = {"dtype": dtype, "max_model_len": context, "generation_config": "vllm"}
    options |= {"tensor_parallel_size": tensor_parallel, "gpu_memory_utilization": gpu_memory_utilization}
    if on_cpu:  # the CPU build cannot seed a request whose prompt is read in two pieces
        options |= {"enforce_eager": True, "enable_chunked_prefill": False}
        options["max_num_batched_tokens"] = max(4096, context or 0)
    if ranks.world_size() > 1:  # each rank has its own engine
        options["distributed_executor_backend"] = "external_launcher"
    try:
        with refusing(f"--engine vllm: {directory} cannot be loaded"):
            return vllm.LLM(directory, **options)
    except Exception as error:  # that very class if a worker dies
        refuse(f"--engine vllm: the engine does not start: {error!r}", code=1)


def stored_weights(directory):
    """(name, tensor) of every weight in a local directory."""
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "model*.safetensors"))):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())


def sample_vllm(llm, prompts, config, seeds):
    """Yields {index of a prompt: its Response}, one for each prompt and seed, as they finish."""
    import vllm
    from vllm.v1.engine.exceptions import EngineDeadError

    padding = range(config.vocab_size, llm.model_config.get_vocab_size())
    common = dict(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_response_tokens,
        stop_token_ids=config.stop_ids,
        ignore_eos=True,  # our stop ids alone
        logit_bias=dict.fromkeys(padding, -100.0) or None,  # the strongest that vLLM takes
        logprobs=0 if config.logprobs else None,
        detokenize=False,
    )
    params = [vllm.SamplingParams(seed=seed, **common) for seed in seeds]
    try:
        for outputs in run_vllm(llm, prompts, params):
            yield {i: response_of(prompts[i], output) for i, output in outputs.items()}
    except (RuntimeError, TimeoutError, EngineDeadError) as error:  # dead, out of memory, no answer
        raise ChildProcessError(f"--engine vllm: the engine failed: {error!r}") from error


def response_of(prompt, output):
    """The Response in one of vLLM's CompletionOutputs."""
    assert output.finish_reason in ("stop", "length"), f"vLLM gave up on a request: {output.finish_reason}"
    tokens, logps = list(output.token_ids), None
    if output.logprobs:
        logps = [found[token].logprob for token, found in zip(tokens, output.logprobs, strict=True)]
    return Response(prompt, tokens, output.finish_reason == "length", sampler_logps=logps)


def run_vllm(llm, prompts, params):
    """LLM.generate() step by step: yields {index of a prompt: output} of the requests each step finishes.

    A step that never returns ends the process. More steps than all tokens need raise a RuntimeError."""
    watchdog = Watchdog()
    try:
        names = llm.enqueue([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        waiting = {name.split("-")[0]: i for i, name in enumerate(names)}  # vLLM adds "-" and a random mark
        tokens = [len(prompt) + one.max_tokens for prompt, one in zip(prompts, params, strict=True)]
        steps_left = 2 * sum(tokens)
        while llm.llm_engine.has_unfinished_requests():
            watchdog.step_started = time.monotonic()
            outputs = [output for output in llm.llm_engine.step() if output.finished]
            watchdog.step_started = None
            steps_left -= 1
            if steps_left < 0:
                raise RuntimeError(f"{len(waiting)} of {len(prompts)} requests do not end")
            yield {waiting.pop(output.request_id): output.outputs[0] for output in outputs}
    finally:
        watchdog.done.set()


class Watchdog:
    """A thread that ends the process if a step takes STALLED_SECONDS: no exception interrupts a hang in C."""

    def __init__(self):
        self.step_started = None  # by time.monotonic(); None: no step is running
        self.done = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.done.wait(STALLED_SECONDS / 60):
            started = self.step_started
            if started is not None and time.monotonic() - started > STALLED_SECONDS:
                message = f"error: --engine vllm: the engine hangs, a step for {STALLED_SECONDS} seconds"
                print(message, file=sys.stderr, flush=True)
                os._exit(1)
