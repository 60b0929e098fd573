"""What the arguments must be. Every refusal says what is wrong and what to pass instead."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_options(fkl_weight, temperature):
    if not 0 <= fkl_weight <= 1:
        raise ValueError(f"fkl_weight must lie in [0, 1], not {fkl_weight}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, not {temperature}")


def check_reduction(reduction):
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f'reduction must be "sum", "mean" or "none", not {reduction!r}')


def check_top_k(top_k, vocab_size):
    if not 0 <= top_k <= vocab_size:
        raise ValueError(f"top_k must lie between 0 and the vocabulary of {vocab_size}, not {top_k}")


def check_logits(student_logits, teacher_logits):
    _check_pair("logits", student_logits, teacher_logits)
    _check_tokens("logits", student_logits, teacher_logits)


def check_linear(student_hidden, student_head, teacher_hidden, teacher_head, autocast):
    """`autocast` is the dtype that hidden states and heads will be cast to, or None."""
    _check_pair("hidden", student_hidden, teacher_hidden)
    _check_pair("head", student_head, teacher_head)
    models = {"student": (student_hidden, student_head), "teacher": (teacher_hidden, teacher_head)}
    for name, (hidden, head) in models.items():
        same_dtype = hidden.dtype == head.dtype or autocast is not None
        if hidden.shape[1] != head.shape[1] or hidden.device != head.device or not same_dtype:
            raise ValueError(
                f"{name}_hidden {_describe(hidden)} does not go with {name}_head {_describe(head)}"
            )
    _check_tokens("hidden", student_hidden, teacher_hidden)


def check_chunking(chunk_tokens, logits_dtype):
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if logits_dtype is not None and logits_dtype not in DTYPES:
        raise ValueError(f"logits_dtype must be one of torch's floats, not {logits_dtype}")


def choose_impl(impl, student, teacher):
    """Returns "torch" or "triton". The kernels compute in float32, so float64 is for torch."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl must be "auto", "torch" or "triton", not {impl!r}')
    is_float64 = torch.float64 in (student.dtype, teacher.dtype)
    if impl == "triton" and is_float64:
        raise ValueError('the Triton kernels compute in float32: for float64 use impl="torch"')
    if impl == "auto":
        return "triton" if student.is_cuda and not is_float64 else "torch"
    return impl


def common_vocabulary(vocab_size, student_size, teacher_size):
    if vocab_size is None:
        if student_size != teacher_size:
            raise ValueError(
                f"vocabularies of {student_size} and {teacher_size}: if the rest is padding, pass vocab_size"
            )
        return student_size
    if not 1 <= vocab_size <= min(student_size, teacher_size):
        raise ValueError(
            f"vocab_size {vocab_size} does not fit vocabularies of {student_size} and {teacher_size}"
        )
    return vocab_size


def weight_per_token(weight, tokens):
    """(N,) contiguous, float32 or float64, on the device of `tokens` (N, ...); or None."""
    if weight is None:
        return None
    if weight.shape != tokens.shape[:1]:
        raise ValueError(f"weight must be one number per token, ({len(tokens)},), not {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight requires grad, but gets no gradient here: pass weight.detach()")
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return weight.to(device=tokens.device, dtype=dtype).contiguous()


def _check_pair(what, student, teacher):
    for name, x in ((f"student_{what}", student), (f"teacher_{what}", teacher)):
        if hasattr(x, "full_tensor"):
            raise TypeError(
                f"{name} is a sharded DTensor: compute the loss where FSDP has gathered it (inside the root "
                f'module\'s forward), or pass {name}.full_tensor(grad_placements=[Partial("avg")]), whose '
                "gradient is averaged over ranks as FSDP averages"
            )
        if x.dim() != 2 or x.dtype not in DTYPES:
            raise ValueError(f"{name} must be a matrix of floats, not {_describe(x)}")
    if teacher.requires_grad:
        raise ValueError(
            f"teacher_{what} requires grad, but the teacher is fixed: pass teacher_{what}.detach()"
        )
    if student.device != teacher.device:
        raise ValueError(f"student_{what} is on {student.device}, teacher_{what} on {teacher.device}")


def _check_tokens(what, student, teacher):
    if len(student) != len(teacher):
        raise ValueError(f"student_{what} has {len(student)} tokens, teacher_{what} {len(teacher)}")


def _describe(x):
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
