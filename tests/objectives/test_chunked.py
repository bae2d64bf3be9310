"""The chunked loss against the dense one: values, gradients, and that full logits never exist."""

import pytest
import torch
from watch import LargestTensor

from llmdistill.objectives.chunked import Head, chunked_divergence, chunked_terms, divergence_term, label_term
from llmdistill.objectives.divergences import DIVERGENCES, cross_entropy, forward_kl
from llmdistill.objectives.taid import interpolate_logits

B, S, V, HS, HT = 2, 9, 53, 8, 12
HEADS = {"plain": {}, "bias": {"bias": True}, "scaled": {"scale": 0.3}, "capped": {"soft_cap": 2.0}}


def make_inputs(bias: bool = False, dtype=torch.float32, **head_options):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    student = {"hidden": normal(B, S, HS), "weight": normal(V, HS)} | ({"bias": normal(V)} if bias else {})
    for tensor in student.values():
        tensor.requires_grad_()
    student_head = Head(student["weight"], student.get("bias"), **head_options)
    teacher_head = Head(normal(V, HT), normal(V) if bias else None, **head_options)
    counted = torch.rand(B, S, generator=generator) > 0.4
    return student, student_head, normal(B, S, HT), teacher_head, counted


def dense(student_hidden, student_head, teacher_hidden, teacher_head, counted, function, t):
    student_logits, teacher_logits = student_head.logits(student_hidden), teacher_head.logits(teacher_hidden)
    target = teacher_logits if t is None else interpolate_logits(student_logits, teacher_logits, t)
    return function(student_logits, target) * counted


@pytest.mark.parametrize("weights", ["equal", "different"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("t", [None, 0.4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_the_dense_loss_and_its_gradients(name, t, head, weights):
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs(**HEADS[head])
    token_weights = torch.full((B, S), 0.7) if weights == "equal" else torch.linspace(-1, 2, B * S).view(B, S)
    ours = chunked_divergence(
        student["hidden"], student_head, teacher_hidden, teacher_head, counted, name, t, chunk_bytes=4 * V * 3
    )
    theirs = dense(student["hidden"], student_head, teacher_hidden, teacher_head, counted, DIVERGENCES[name], t)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours[~counted] == 0).all()

    our_gradients = torch.autograd.grad((ours * token_weights).sum(), student.values())
    their_gradients = torch.autograd.grad((theirs * token_weights).sum(), student.values())
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        error = (our_gradient - their_gradient).abs().max() / their_gradient.abs().max()
        assert error < 1e-5


def test_options_reach_the_divergence():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    inputs = (student["hidden"], student_head, teacher_hidden, teacher_head, counted)
    ours = chunked_divergence(*inputs, "jensen_shannon", teacher_weight=0.9)
    theirs = dense(*inputs, lambda s, t: DIVERGENCES["jensen_shannon"](s, t, teacher_weight=0.9), None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_float64_is_exact():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs(dtype=torch.float64)
    inputs = (student["hidden"], student_head, teacher_hidden, teacher_head, counted)
    ours, theirs = chunked_divergence(*inputs, t=0.4), dense(*inputs, forward_kl, 0.4)
    assert (ours - theirs).abs().max() < 1e-12


def test_flat_tokens_linear_layers_and_weights_are_taken_too():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    expected = chunked_divergence(student["hidden"], student_head, teacher_hidden, teacher_head, counted)
    linear = torch.nn.Linear(HS, V, bias=False)
    linear.weight = torch.nn.Parameter(student["weight"].detach())
    flat = chunked_divergence(
        student["hidden"].flatten(0, 1), linear, teacher_hidden.flatten(0, 1), teacher_head.weight, counted.flatten()
    )
    torch.testing.assert_close(flat.view(B, S), expected)


def test_nothing_counted_gives_zeros_with_zero_gradients():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs(bias=True)
    inputs = (student["hidden"], student_head, teacher_hidden, teacher_head, torch.zeros_like(counted))
    loss = chunked_divergence(*inputs, t=0.4).sum()
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, student.values()):
        assert (gradient == 0).all()


def test_uncounted_tokens_may_hold_anything():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    spoiled = torch.where(counted[..., None], student["hidden"], torch.nan)
    ours = chunked_divergence(spoiled, student_head, teacher_hidden, teacher_head, counted)
    assert ours.isfinite().all()


def test_full_logits_never_exist():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    counted = torch.ones_like(counted)
    with LargestTensor() as watch:
        chunked_divergence(
            student["hidden"], student_head, teacher_hidden, teacher_head, counted, t=0.4, chunk_bytes=4 * V * 3
        ).sum().backward()
    assert V * max(HS, HT) <= watch.largest < B * S * V


def test_a_frozen_head_gets_no_gradient_work(monkeypatch):
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    frozen = Head(student_head.weight.detach())
    loss = chunked_divergence(student["hidden"], frozen, teacher_hidden, teacher_head, counted).sum()
    with LargestTensor() as watch:
        loss.backward()
    assert watch.largest < V * HS  # the head's gradient would have as many elements
    assert frozen.weight.grad is None


def test_without_gradients_no_gradient_work_is_done():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    calls = []

    def watched(student_logits, target_logits):
        calls.append(student_logits.requires_grad)
        return forward_kl(student_logits, target_logits)

    with torch.no_grad():
        chunked_divergence(student["hidden"], student_head, teacher_hidden, teacher_head, counted, watched)
    assert calls == [False]


def test_terms_share_one_pass_and_are_weighted():
    student, student_head, teacher_hidden, teacher_head, _ = make_inputs()
    labels = torch.randint(0, V, (B * S,), generator=torch.Generator().manual_seed(1))
    hidden, teacher_hidden = student["hidden"].flatten(0, 1), teacher_hidden.flatten(0, 1)
    terms = [divergence_term(teacher_hidden, teacher_head), label_term(labels)]
    total, values = chunked_terms(hidden, student_head, terms, [0.7, 0.3], chunk_bytes=4 * V * 4)

    logits = student_head.logits(hidden)
    divergence = forward_kl(logits, teacher_head.logits(teacher_hidden))
    label_loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(values, torch.stack([divergence, label_loss]).detach())
    assert not values.requires_grad
    torch.testing.assert_close(total, 0.7 * divergence + 0.3 * label_loss)
    ours = torch.autograd.grad(total.mean(), student.values())
    theirs = torch.autograd.grad((0.7 * divergence + 0.3 * label_loss).mean(), student.values())
    torch.testing.assert_close(ours, theirs)


def test_backward_twice_gives_the_same_gradient():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    loss = chunked_divergence(student["hidden"], student_head, teacher_hidden, teacher_head, counted).sum()
    first = torch.autograd.grad(loss, student.values(), retain_graph=True)
    second = torch.autograd.grad(2 * loss, student.values())
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_stays_within_one_percent(how):
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    inputs = (student["hidden"], student_head, teacher_hidden, teacher_head, counted)
    exact = torch.autograd.grad(dense(*inputs, cross_entropy, 0.4).sum(), student.values())
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            value = chunked_divergence(*inputs, cross_entropy, 0.4)
    else:
        low = Head(student_head.weight.bfloat16()), Head(teacher_head.weight.bfloat16())
        value = chunked_divergence(
            student["hidden"].bfloat16(), low[0], teacher_hidden.bfloat16(), low[1], counted, cross_entropy, 0.4
        )
    assert value.dtype == torch.float32
    ours = torch.autograd.grad(value.sum(), student.values())
    for our_gradient, exact_gradient in zip(ours, exact, strict=True):
        assert our_gradient.dtype == torch.float32
        assert (our_gradient - exact_gradient).norm() < 0.01 * exact_gradient.norm()


def test_a_cropped_head_sends_zero_gradient_to_the_padding():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    loss = chunked_divergence(
        student["hidden"], student_head.cropped(40), teacher_hidden, teacher_head.cropped(40), counted
    ).sum()
    (gradient,) = torch.autograd.grad(loss, [student["weight"]])
    assert gradient[:40].abs().sum() > 0
    assert (gradient[40:] == 0).all()


def test_different_vocabularies_and_unknown_divergences_are_refused():
    student, student_head, teacher_hidden, teacher_head, counted = make_inputs()
    with pytest.raises(ValueError, match="53 rows, the teacher's 40"):
        chunked_divergence(student["hidden"], student_head, teacher_hidden, teacher_head.cropped(40), counted)
    with pytest.raises(ValueError, match="Unknown divergence `kl`"):
        chunked_divergence(student["hidden"], student_head, teacher_hidden, teacher_head, counted, "kl")
