"""What vLLM's own processes import from here, by its name in load_vllm(): nothing else imports this file."""

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as GpuLogitsProcessor


class PaddingMask(LogitsProcessor, GpuLogitsProcessor):
    """Token ids from the engine's vocab_size on are never sampled. For both of vLLM's model runners."""

    def __init__(self, vllm_config, *more):
        self.vocab_size = vllm_config.additional_config["vocab_size"]

    def apply(self, logits, *more):
        logits[:, self.vocab_size :] = -torch.inf
        return logits

    def is_argmax_invariant(self):
        return False  # greedy samples are masked too

    def update_state(self, batch_update):
        pass  # the mask is the same for every request
