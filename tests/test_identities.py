"""The paper's identities by enumeration: a vocabulary of 4 with an end token, all sequences of up to 3 tokens, float64."""

import itertools

import pytest
import torch

from streaming_kl import streaming_kl

END, V, T = 0, 4, 3


def prefixes():
    """Every unfinished prefix: no end token in it, shorter than T."""
    return [p for n in range(T) for p in itertools.product(range(1, V), repeat=n)]


def sequences():
    """Every finished sequence: it ends with END, or it has T tokens."""
    return [
        s
        for n in range(1, T + 1)
        for s in itertools.product(range(V), repeat=n)
        if END not in s[:-1] and (s[-1] == END or n == T)
    ]


@pytest.fixture
def tables():
    """(student, teacher) logits of the next token, one row a prefix."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        2 * torch.randn(len(prefixes()), V, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def sequence_log_prob(logits, sequence):
    row = {prefix: i for i, prefix in enumerate(prefixes())}
    logps = logits.log_softmax(-1)
    return sum(logps[row[sequence[:t]], token] for t, token in enumerate(sequence))


def prefix_distribution(logits):
    """d(s): the chance that a generated sequence passes through each prefix, as a tensor over prefixes()."""
    return torch.stack(
        [sequence_log_prob(logits, p).exp() if p else torch.ones((), dtype=torch.float64) for p in prefixes()]
    )


def sequence_kl(a, b):
    """sum over sequences of a (log a - log b)."""
    logps = [(sequence_log_prob(a, s), sequence_log_prob(b, s)) for s in sequences()]
    return sum(la.exp() * (la - lb) for la, lb in logps)


def cell_loss(student, teacher, prefix, fkl_weight):
    """The expected loss of a cell: the kernel's token-level KL, weighted with the prefix distribution, which gets no gradient."""
    d = prefix_distribution(teacher if prefix == "teacher" else student).detach()
    return streaming_kl(student, teacher, fkl_weight=fkl_weight, weight=d).loss


def gradient(loss, student):
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


def test_the_sequences_are_all_there(tables):
    for logits in tables:
        assert abs(sum(sequence_log_prob(logits, s).exp() for s in sequences()).item() - 1) < 1e-14


def test_sequence_forward_kl_is_the_sum_over_teacher_prefixes(tables):
    """Equation 2, with the end token counted."""
    student, teacher = tables
    assert abs(sequence_kl(teacher, student) - cell_loss(student, teacher, "teacher", 1.0)).item() < 1e-13


def test_sequence_reverse_kl_is_the_sum_over_student_prefixes(tables):
    """Equation 3."""
    student, teacher = tables
    assert abs(sequence_kl(student, teacher) - cell_loss(student, teacher, "student", 0.0)).item() < 1e-13


def test_proposition_1(tables):
    """(i) grad KL(p||q) = -E_p[grad log q];  (ii) grad KL(q||p) = E_q[(log q - log p) grad log q], at every prefix."""
    student, teacher = tables
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = -(log_p.exp() * log_q).sum()  # its gradient is that of -E_p[log q]
    reverse = (
        log_q.exp().detach() * (log_q - log_p).detach() * log_q
    ).sum()  # reward and distribution are constants
    for fkl_weight, right in ((1.0, forward), (0.0, reverse)):
        left = streaming_kl(student, teacher, fkl_weight=fkl_weight).loss
        torch.testing.assert_close(gradient(left, student), gradient(right, student), rtol=0, atol=1e-13)


def test_differentiating_the_log_ratio_at_a_sample_gives_nothing(tables):
    """E_q[grad (log q - log p)] = 0: why the sampled reverse KL is REINFORCE with a stopped log-ratio."""
    student, teacher = tables
    log_q = student.log_softmax(-1)
    naive = (log_q.exp().detach() * (log_q - teacher.log_softmax(-1))).sum()
    assert gradient(naive, student).abs().max() < 1e-14


def test_which_cells_follow_the_sequence_gradient(tables):
    """Teacher prefixes do not depend on the student, so off-policy SFT descends the sequence-level forward KL exactly; on-policy
    distillation leaves out how the student's prefixes move: E[sum_t grad log q(prefix_t) KL_t]."""
    student, teacher = tables
    off_policy = gradient(cell_loss(student, teacher, "teacher", 1.0), student)
    torch.testing.assert_close(
        off_policy, gradient(sequence_kl(teacher, student), student), rtol=0, atol=1e-13
    )
    on_policy = gradient(cell_loss(student, teacher, "student", 0.0), student)
    kl = streaming_kl(student, teacher, fkl_weight=0.0).rkl
    moving_prefixes = gradient((prefix_distribution(student) * kl).sum(), student)
    whole = gradient(sequence_kl(student, teacher), student)
    torch.testing.assert_close(on_policy + moving_prefixes, whole, rtol=0, atol=1e-13)
    assert (on_policy - whole).abs().max() > 1e-3


def test_the_cells_differ_in_prefix_weights_and_in_kl_only(tables):
    """Row by row, cells of one KL have gradients in the ratio of their prefix distributions; the two KLs differ."""
    student, teacher = tables
    ratio = (prefix_distribution(teacher) / prefix_distribution(student)).detach()[:, None]
    for fkl_weight in (1.0, 0.0, 0.8):
        by_teacher, by_student = (
            gradient(cell_loss(student, teacher, prefix, fkl_weight), student)
            for prefix in ("teacher", "student")
        )
        torch.testing.assert_close(by_teacher, by_student * ratio, rtol=1e-12, atol=1e-14)
    forward, reverse, mix = (
        gradient(cell_loss(student, teacher, "student", w), student) for w in (1.0, 0.0, 0.8)
    )
    assert (forward - reverse).abs().max() > 1e-2
    torch.testing.assert_close(mix, 0.8 * forward + 0.2 * reverse, rtol=0, atol=1e-13)
