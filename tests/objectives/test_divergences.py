"""Divergences against reference values, and what must hold for all of them."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from llmdistill.objectives.divergences import (
    DIVERGENCES,
    adaptive_kl,
    alpha_beta,
    balanced_kl,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)

REFERENCE = np.load(GOLDEN / "taid.npz")
SEEDS = np.load(GOLDEN / "seeds.npz")


def check_reference(key: str, case: str, function, dtype=torch.float32, gradient_only: bool = False) -> None:
    student = torch.tensor(REFERENCE[f"{case}|student_logits"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(REFERENCE[f"{case}|teacher_logits"], dtype=dtype)
    mask = torch.tensor(REFERENCE[f"{case}|mask"], dtype=dtype)
    loss = (function(student, teacher) * mask).sum() / mask.sum()
    loss.backward()
    tolerance = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-9, 1e-9)}[dtype]
    if not gradient_only:
        assert loss.item() == pytest.approx(REFERENCE[f"{key}|loss"].item(), rel=tolerance[0], abs=1e-12)
    np.testing.assert_allclose(student.grad.numpy(), REFERENCE[f"{key}|grad"], rtol=0, atol=tolerance[1])


@pytest.mark.parametrize("case", ["a", "b", "d"])
def test_authors_code(case):
    check_reference(f"fkl|{case}", case, cross_entropy)
    check_reference(f"rkl|{case}", case, reverse_kl)
    check_reference(f"tvd|{case}", case, total_variation)
    for weight in (0.1, 0.5, 0.9):
        check_reference(f"js_{weight}|{case}", case, lambda s, t, w=weight: jensen_shannon(s, t, teacher_weight=w))
    for skew in (0.1, 0.5):
        check_reference(f"srkl_{skew}|{case}", case, lambda s, t, a=skew: skewed_reverse_kl(s, t, skew=a))
        # The authors take the cross-entropy here: same gradient, another value.
        check_reference(
            f"sfkl_{skew}|{case}", case, lambda s, t, a=skew: skewed_forward_kl(s, t, a), gradient_only=True
        )


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize(
    ("key", "function"),
    [
        ("fkl_true", forward_kl),
        ("skl_0.1_true", skewed_forward_kl),
        ("srkl_0.1_true", skewed_reverse_kl),
        ("akl_authors_0.5", adaptive_kl),
        ("ab_0.2_0.7", alpha_beta),
    ],
)
def test_published_formulas_in_float64(key, function, case):
    check_reference(f"own|{key}|{case}", case, function, torch.float64)


def test_balanced_kl_reference():
    student = torch.tensor(SEEDS["balanced_kl_nu2/in/s"], requires_grad=True)
    loss = balanced_kl(student, torch.tensor(SEEDS["balanced_kl_nu2/in/t"]), weight=2.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx(SEEDS["balanced_kl_nu2/loss"].item(), rel=1e-9)
    np.testing.assert_allclose(student.grad.numpy(), SEEDS["balanced_kl_nu2/grad/s"], atol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_between_equals_and_positive_otherwise(name):
    logits = torch.randn(2, 64, 17, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(DIVERGENCES[name](logits[0], logits[0]), torch.zeros(64))
    assert (DIVERGENCES[name](logits[0], logits[1]) > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_is_the_derivative_and_the_teacher_has_none(name):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    if name not in ("adaptive_kl", "balanced_kl"):  # their weights are constants by definition
        assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name](s, teacher.detach()), (student,))
    DIVERGENCES[name](student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", DIVERGENCES)
def test_shifting_logits_changes_nothing(name):
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 9, 11, generator=generator, dtype=torch.float64)
    moved = DIVERGENCES[name](student + 5.0, teacher - 3.0)
    torch.testing.assert_close(moved, DIVERGENCES[name](student, teacher))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("excluded_by", ["student", "teacher", "both"])
def test_excluded_tokens_contribute_nothing(name, excluded_by):
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 4, 6, generator=generator)
    if excluded_by in ("student", "both"):
        student[:, 2] = -torch.inf
    if excluded_by in ("teacher", "both"):
        teacher[:, 2] = -torch.inf
    student.requires_grad_()
    value = DIVERGENCES[name](student, teacher)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    if excluded_by == "both":  # the vocabulary without that token
        rest = [0, 1, 3, 4, 5]
        torch.testing.assert_close(value, DIVERGENCES[name](student[:, rest], teacher[:, rest]))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bfloat16_logits_are_computed_in_float32(name):
    generator = torch.Generator().manual_seed(4)
    student, teacher = 3 * torch.randn(2, 128, 64, generator=generator)
    exact = DIVERGENCES[name](student.bfloat16().float(), teacher.bfloat16().float())
    ours = DIVERGENCES[name](student.bfloat16(), teacher.bfloat16())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact)
    nearly_equal = DIVERGENCES[name](student.bfloat16(), (student + 1e-3).bfloat16())
    assert (nearly_equal > -1e-6).all()


@pytest.mark.parametrize("teacher_weight", [0.0, 0.3, 0.5, 1.0])
def test_jensen_shannon_is_the_one_of_trl(teacher_weight):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="this TRL no longer has GKD")
    student, teacher = torch.randn(2, 3, 5, 23, generator=torch.Generator().manual_seed(5))
    labels = torch.zeros(3, 5, dtype=torch.long)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=teacher_weight)
    ours = jensen_shannon(student, teacher, teacher_weight=teacher_weight).mean()
    torch.testing.assert_close(ours, theirs)


def test_limits_of_the_skewed_forms():
    student, teacher = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    torch.testing.assert_close(skewed_forward_kl(student, teacher, 1e-9), forward_kl(student, teacher))
    torch.testing.assert_close(skewed_reverse_kl(student, teacher, 1e-9), reverse_kl(student, teacher))
    limits = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(alpha_beta(student, teacher, 1.0, 1e-6), forward_kl(student, teacher), **limits)
    torch.testing.assert_close(alpha_beta(student, teacher, 1e-6, 1.0), reverse_kl(student, teacher), **limits)
    both = forward_kl(student, teacher) + reverse_kl(student, teacher)
    torch.testing.assert_close(balanced_kl(student, teacher, weight=1.0), both)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jensen_shannon", {"teacher_weight": 1.5}),
        ("skewed_forward_kl", {"skew": 0.0}),
        ("skewed_reverse_kl", {"skew": 1.0}),
        ("adaptive_kl", {"head_mass": -0.1}),
        ("alpha_beta", {"alpha": 0.0}),
        ("balanced_kl", {"weight": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        DIVERGENCES[name](torch.zeros(3), torch.zeros(3), **options)
