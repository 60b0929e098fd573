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


def load_vllm(
    directory, vocab_size, dtype, tensor_parallel, memory, head_dtype="model", sleep=False, logprobs="raw"
):
    """A vLLM engine in this process, on the GPU or, with the CPU build, on the CPU.

    Ids from vocab_size on are never sampled. sleep: it sleeps from the start, until update_engine().
    logprobs: as in SamplingConfig."""
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
    if sleep and not vllm.platforms.current_platform.is_sleep_mode_available():
        refuse("--engine_sleep: vLLM cannot sleep on this machine, only on a GPU; leave it out")
    check_finite(stored_weights(directory), f"--engine vllm: {directory}")
    context = None if context_of(directory) == math.inf else context_of(directory)
    options = {"dtype": dtype, "max_model_len": context, "generation_config": "vllm"}
    options |= {"tensor_parallel_size": tensor_parallel, "gpu_memory_utilization": memory}
    options |= {"hf_overrides": {"head_dtype": head_dtype}, "scheduling_policy": "priority"}
    options |= {"logits_processors": ["distil.vllm_mask:PaddingMask"], "enable_sleep_mode": sleep}
    options["additional_config"] = {"vocab_size": vocab_size}  # for the mask
    options["logprobs_mode"] = f"{logprobs or 'raw'}_logprobs"
    if on_cpu:  # the CPU build cannot seed a request whose prompt is read in two pieces
        options |= {"enforce_eager": True, "enable_chunked_prefill": False}
        options["max_num_batched_tokens"] = max(4096, context or 0)
    if ranks.world_size() > 1:  # each rank has its own engine
        options["distributed_executor_backend"] = "external_launcher"
    try:
        with refusing(f"--engine vllm: {directory} cannot be loaded"):
            llm = vllm.LLM(directory, **options)
    except Exception as error:  # that very class if a worker dies
        refuse(f"--engine vllm: the engine does not start: {error!r}", code=1)
    if sleep:
        llm.sleep(level=2)
    return llm


def stored_weights(directory):
    """(name, tensor) of every weight in a local directory."""
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "model*.safetensors"))):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())


def sample_vllm(llm, config, queue):
    """LLM.generate() step by step: yields (Request, Response) of what each step finishes, until the queue is
    empty. What is added to it is taken before the next step, ahead of requests of later places.

    A step that never returns ends the process. More steps than all tokens need are an error."""
    import vllm
    from vllm.v1.engine.exceptions import EngineDeadError

    common = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k")}
    common |= {"max_tokens": config.max_response_tokens, "detokenize": False}
    common |= {"stop_token_ids": config.stop_ids, "ignore_eos": True}  # our stop ids alone
    common |= {"logprobs": 0 if config.logprobs else None, "flat_logprobs": True}
    watchdog, waiting, steps_left = Watchdog(), {}, 0
    try:
        while queue or waiting:
            if queue:
                prompts = [{"prompt_token_ids": request.prompt} for request in queue]
                params = [vllm.SamplingParams(seed=request.seed, **common) for request in queue]
                priority = [request.place for request in queue]
                names = llm.enqueue(prompts, params, priority=priority, use_tqdm=False)
                names = [name.split("-")[0] for name in names]  # vLLM adds "-" and a random mark
                waiting |= zip(names, queue, strict=True)
                steps_left += 2 * sum(len(r.prompt) + config.max_response_tokens for r in queue)
                queue.clear()
            watchdog.step_started = time.monotonic()
            outputs = [output for output in llm.llm_engine.step() if output.finished]
            watchdog.step_started = None
            steps_left -= 1
            if steps_left < 0:
                raise RuntimeError(f"{len(waiting)} requests do not end")
            for output in outputs:
                request = waiting.pop(output.request_id)
                yield request, response_of(request.prompt, output.outputs[0])
        if llm.model_config.enable_sleep_mode:
            llm.sleep(level=2)  # update_engine() wakes it, and gives it weights again
    except (RuntimeError, TimeoutError, EngineDeadError) as error:  # dead, out of memory, no answer
        raise ChildProcessError(f"--engine vllm: the engine failed: {error!r}") from error
    finally:
        watchdog.done.set()


def response_of(prompt, output):
    """The Response in one of vLLM's CompletionOutputs."""
    assert output.finish_reason in ("stop", "length"), f"vLLM gave up on a request: {output.finish_reason}"
    tokens, found = list(output.token_ids), output.logprobs
    assert not found or found.token_ids == tokens, "vLLM gave log-probabilities of other tokens"
    return Response(prompt, tokens, output.finish_reason == "length", sampler_logps=found and found.logprobs)


class Watchdog:
    """A thread that ends the process if a step takes STALLED_SECONDS: no exception interrupts a hang in C."""

    def __init__(self):
        self.step_started = None  # by time.monotonic(); None: no step is running
        self.done = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.done.wait(STALLED_SECONDS / 60):
            if time.monotonic() - (self.step_started or math.inf) > STALLED_SECONDS:
                message = f"error: --engine vllm: the engine hangs, a step for {STALLED_SECONDS} seconds"
                print(message, file=sys.stderr, flush=True)
                os._exit(1)
