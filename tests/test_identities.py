"""The paper's identities by enumeration: a vocabulary of 4 with an end token, sequences of up to 3 tokens.

In float64, to a relative 1e-12: thousands of roundings, where a sequence's number has about a hundred.
"""

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
    found = []
    for n in range(1, T + 1):
        for tokens in itertools.product(range(V), repeat=n):
            if END not in tokens[:-1] and (tokens[-1] == END or n == T):
                found.append(tokens)
    return found


@pytest.fixture
def tables():
    """(student, teacher) logits of the next token, one row a prefix."""
    generator = torch.Generator().manual_seed(0)
    shape = 2, len(prefixes()), V
    student, teacher = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def sequence_log_prob(logits, sequence):
    row = {prefix: i for i, prefix in enumerate(prefixes())}
    logps = logits.log_softmax(-1)
    return sum(logps[row[sequence[:t]], token] for t, token in enumerate(sequence))


def prefix_distribution(logits):
    """d(s): the chance that a generated sequence passes through each prefix, as a tensor over prefixes()."""
    one = logits.new_ones(())
    return torch.stack([sequence_log_prob(logits, p).exp() if p else one for p in prefixes()])


def sequence_kl(a, b):
    """sum over sequences of a (log a - log b)."""
    logps = [(sequence_log_prob(a, s), sequence_log_prob(b, s)) for s in sequences()]
    return sum(la.exp() * (la - lb) for la, lb in logps)


def cell_loss(student, teacher, prefix, fkl_weight):
    """The expected loss of a cell: the token-level KL, weighted with the constant prefix distribution."""
    d = prefix_distribution(teacher if prefix == "teacher" else student).detach()
    return streaming_kl(student, teacher, fkl_weight=fkl_weight, weight=d).loss


def gradient(loss, student):
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


def assert_close(actual, expected, size=None):
    """Relative to the size of what is summed."""
    size = expected.norm() if size is None else size
    assert (actual - expected).norm() <= 1e-12 * size


def test_the_sequences_are_all_there(tables):
    for logits in tables:
        total = sum(sequence_log_prob(logits, s).exp() for s in sequences())
        assert_close(total, torch.ones_like(total))


def test_sequence_forward_kl_is_the_sum_over_teacher_prefixes(tables):
    """Equation 2, with the end token counted."""
    student, teacher = tables
    assert_close(cell_loss(student, teacher, "teacher", 1.0), sequence_kl(teacher, student))


def test_sequence_reverse_kl_is_the_sum_over_student_prefixes(tables):
    """Equation 3."""
    student, teacher = tables
    assert_close(cell_loss(student, teacher, "student", 0.0), sequence_kl(student, teacher))


def test_proposition_1(tables):
    """(i) grad KL(p||q) = -E_p[grad log q];  (ii) grad KL(q||p) = E_q[(log q - log p) grad log q]."""
    student, teacher = tables
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = -(log_p.exp() * log_q).sum()
    reverse = (log_q.exp() * (log_q - log_p)).detach() * log_q  # reward and distribution are constants
    reverse = reverse.sum()
    for fkl_weight, right in ((1.0, forward), (0.0, reverse)):
        left = streaming_kl(student, teacher, fkl_weight=fkl_weight).loss
        assert_close(gradient(left, student), gradient(right, student))


def test_differentiating_the_log_ratio_at_a_sample_gives_nothing(tables):
    """E_q[grad (log q - log p)] = 0: why the sampled reverse KL is REINFORCE with a stopped log-ratio."""
    student, teacher = tables
    log_q = student.log_softmax(-1)
    naive = (log_q.exp().detach() * (log_q - teacher.log_softmax(-1))).sum()
    assert_close(gradient(naive, student), torch.zeros_like(student), size=log_q.exp().norm())


def test_which_cells_follow_the_sequence_gradient(tables):
    """Teacher prefixes do not depend on the student: off-policy SFT descends the sequence's forward KL.

    On-policy distillation leaves out how the student's prefixes move: E[sum_t grad log q(prefix_t) KL_t].
    """
    student, teacher = tables
    off_policy = gradient(cell_loss(student, teacher, "teacher", 1.0), student)
    assert_close(off_policy, gradient(sequence_kl(teacher, student), student))
    on_policy = gradient(cell_loss(student, teacher, "student", 0.0), student)
    kl = streaming_kl(student, teacher, fkl_weight=0.0).rkl
    moving_prefixes = gradient((prefix_distribution(student) * kl).sum(), student)
    whole = gradient(sequence_kl(student, teacher), student)
    assert_close(on_policy + moving_prefixes, whole)
    assert (on_policy - whole).abs().max() > 1e-3


def test_the_cells_differ_in_prefix_weights_and_in_kl_only(tables):
    """Gradients of cells of one KL are in the ratio of their prefix distributions; the two KLs differ."""
    student, teacher = tables
    ratio = (prefix_distribution(teacher) / prefix_distribution(student)).detach()[:, None]
    for fkl_weight in (1.0, 0.0, 0.8):
        by_teacher = gradient(cell_loss(student, teacher, "teacher", fkl_weight), student)
        by_student = gradient(cell_loss(student, teacher, "student", fkl_weight), student)
        assert_close(by_teacher, by_student * ratio)
    losses = (cell_loss(student, teacher, "student", fkl_weight) for fkl_weight in (1.0, 0.0, 0.8))
    forward, reverse, mix = (gradient(loss, student) for loss in losses)
    assert (forward - reverse).abs().max() > 1e-2
    assert_close(mix, 0.8 * forward + 0.2 * reverse)
