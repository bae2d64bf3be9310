"""Objectives on hidden representations against reference values, and what must hold for them."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from llmdistill.objectives.features import FEATURES, attention_maps, token_relations, variational

ARRAYS = np.load(GOLDEN / "mi_alpha_lelp.npz")
FIGURES = json.loads((GOLDEN / "mi_alpha_lelp.json").read_text())["inter"]
STUDENT, TEACHER = torch.tensor(ARRAYS["inter_S"]), torch.tensor(ARRAYS["inter_T"])  # [3, 4, 6]
COUNTED = torch.tensor(ARRAYS["inter_mask"]).bool()


@pytest.mark.parametrize(
    ("name", "key"),
    [("mse", "mse_masked"), ("l1", "l1_masked"), ("cosine", "cos_masked"), ("cross_entropy", "ce_masked")],
)
def test_reference_of_counted_tokens(name, key):
    assert FEATURES[name](STUDENT, TEACHER)[COUNTED].mean().item() == pytest.approx(FIGURES[key], rel=1e-9)


def test_reference_of_the_first_token():
    assert FEATURES["pkd"](STUDENT[:, 0], TEACHER[:, 0]).mean().item() == pytest.approx(FIGURES["pkd_cls"], rel=1e-9)


@pytest.mark.parametrize("name", FEATURES)
def test_one_value_per_vector_in_float32_with_gradient_to_the_student_only(name):
    student, teacher = (values.bfloat16().requires_grad_() for values in (STUDENT, TEACHER))
    loss = FEATURES[name](student, teacher)
    assert loss.shape == (3, 4)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", FEATURES)
def test_the_teacher_itself_is_the_minimum(name):
    student = TEACHER.clone().requires_grad_()
    loss = FEATURES[name](student, TEACHER)
    if name != "cross_entropy":
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    loss.sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


def test_variational_is_a_gaussian_likelihood():
    log_variance = torch.linspace(-1, 1, 6, dtype=torch.float64)
    gaussian = torch.distributions.Normal(STUDENT, (log_variance / 2).exp())
    expected = -gaussian.log_prob(TEACHER).mean(-1) - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(variational(STUDENT, TEACHER, log_variance), expected)


def test_reference_of_token_relations():
    arrays = np.load(GOLDEN / "seeds.npz")
    figures = json.loads((GOLDEN / "seeds.json").read_text())["token_relation_3"]
    student = torch.tensor(arrays["token_relation_3/in/s"], requires_grad=True)  # [3 kinds, B, S, H]
    teacher = torch.tensor(arrays["token_relation_3/in/t"])
    counted = torch.ones(student.shape[1:3], dtype=torch.bool)
    kinds = [token_relations(one, other, counted, 2).mean() for one, other in zip(student, teacher, strict=True)]
    loss = torch.stack(kinds).mean()
    loss.backward()
    assert loss.item() == pytest.approx(figures["loss"], rel=1e-9)
    np.testing.assert_allclose(student.grad, arrays["token_relation_3/grad/s"], rtol=0, atol=1e-9)


def test_padding_changes_no_relation():
    states, others = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.randn(2, 5, 12)
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[:, 3:] = False
    alone = token_relations(states[:, :3], others[:, :3], counted[:, :3], 4)
    padded = token_relations(states, others, counted, 4)
    torch.testing.assert_close(padded[:, :3], alone)
    torch.testing.assert_close(padded[:, 3:], torch.zeros(2, 2))
    nothing = token_relations(states, others, torch.zeros_like(counted), 4)
    torch.testing.assert_close(nothing, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="teacher's width of 12 cannot be cut into 8"):
        token_relations(states, others, counted, 8)


def test_attention_maps_by_hand():
    student, teacher = (torch.rand(2, heads, 4, 4, generator=torch.Generator().manual_seed(heads)) for heads in (2, 2))
    teacher = teacher + 0.1
    counted = torch.tensor([[True] * 4, [True, True, False, False]])
    found = attention_maps(student, teacher, counted)
    torch.testing.assert_close(found[0], torch.full((4,), 0.01))
    torch.testing.assert_close(found[1], torch.tensor([0.01, 0.01, 0.0, 0.0]))
    more_heads = teacher.repeat(1, 3, 1, 1)
    torch.testing.assert_close(attention_maps(student, more_heads, counted), found)
