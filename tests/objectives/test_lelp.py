"""LELP against reference values, and what must hold for every teacher."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from llmdistill.objectives.lelp import (
    Moments,
    class_logits,
    directions_from,
    fit_directions,
    lelp_loss,
    random_rotation,
    subclass_logits,
    subclass_targets,
)

ARRAYS = {
    key.removeprefix("lelp_c3_"): torch.tensor(value)
    for key, value in np.load(GOLDEN / "mi_alpha_lelp.npz").items()
    if key.startswith("lelp_c3_")
}
FIGURES = json.loads((GOLDEN / "mi_alpha_lelp.json").read_text())["lelp"]
SETTINGS = {"b1.0_t1.0": (1.0, 1.0), "b0.5_t2.0": (0.5, 2.0)}


@pytest.fixture
def fitted():
    return fit_directions(ARRAYS["H"], ARRAYS["y"], ARRAYS["W"], 4, rotation=ARRAYS["R"])


def make_rows(rows: int = 60, classes: int = 3, width: int = 10, seed: int = 0):
    """Embeddings, labels, the weight of a linear head and its logits."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return embeddings, torch.arange(rows) % classes, weight, embeddings @ weight.T


def test_reference_directions(fitted):
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(fitted.mean, ARRAYS["nnsc_mean"], **close)
    torch.testing.assert_close(fitted.directions, ARRAYS["nnsc_U"], **close)
    torch.testing.assert_close(fitted.scale, ARRAYS["nnsc_sd"], **close)
    torch.testing.assert_close(subclass_logits(ARRAYS["H"], fitted), ARRAYS["nnsc_z"], **close)
    unrotated = fit_directions(ARRAYS["H"], ARRAYS["y"], ARRAYS["W"], 4, rotate=False)
    torch.testing.assert_close(unrotated.directions, ARRAYS["nnsc_V"], **close)
    torch.testing.assert_close(unrotated.scale**2, ARRAYS["nnsc_eig"].mean(-1), **close)


@pytest.mark.parametrize("setting", SETTINGS)
def test_reference_targets_loss_and_gradient(fitted, setting):
    subclass_temperature, temperature = SETTINGS[setting]
    projected = subclass_logits(ARRAYS["H"], fitted)
    targets = subclass_targets(ARRAYS["logits"], projected, temperature, subclass_temperature)
    torch.testing.assert_close(targets, ARRAYS[f"nnsc_{setting}_p"], rtol=0, atol=1e-9)
    for label_weight, suffix, key in ((0.0, "", "loss"), (0.3, "_a03", "loss_alpha0.3")):
        student = ARRAYS["t"].clone().requires_grad_()
        hard = torch.nn.functional.cross_entropy(class_logits(student, 3), ARRAYS["y"])
        loss = (1 - label_weight) * lelp_loss(student, targets, temperature).mean() + label_weight * hard
        loss.backward()
        assert loss.item() == pytest.approx(FIGURES[f"c3_nnsc_{setting}"][key], rel=1e-9)
        torch.testing.assert_close(student.grad, ARRAYS[f"nnsc_{setting}_dt{suffix}"], rtol=0, atol=1e-9)


def test_reference_class_logits():
    torch.testing.assert_close(class_logits(ARRAYS["t"], 3), ARRAYS["class_logits"], rtol=0, atol=1e-9)


def test_moments_of_parts_add_up(fitted):
    parts = []
    for rows in torch.arange(48).split(7):
        moments = Moments(3, 10)
        moments.add(ARRAYS["H"][rows], ARRAYS["y"][rows])
        parts.append(moments)
    for other in parts[1:]:
        for total, more in zip(parts[0].state(), other.state(), strict=True):
            total += more
    from_parts = directions_from(parts[0], ARRAYS["W"], 4, rotation=ARRAYS["R"])
    torch.testing.assert_close(from_parts.directions, fitted.directions, rtol=0, atol=1e-9)
    torch.testing.assert_close(from_parts.scale, fitted.scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_class_keeps_its_tempered_probability(fitted, temperature):
    targets = subclass_targets(ARRAYS["logits"], subclass_logits(ARRAYS["H"], fitted), temperature, 0.3)
    torch.testing.assert_close(targets.sum(-1), (ARRAYS["logits"] / temperature).softmax(-1))


def test_one_subclass_is_plain_distillation():
    embeddings, labels, weight, logits = make_rows()
    one = subclass_logits(embeddings, fit_directions(embeddings, labels, weight, 1))
    targets = subclass_targets(logits, one, temperature=2.0)
    student = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain = 4 * torch.nn.functional.cross_entropy(student / 2, (logits / 2).softmax(-1), reduction="none")
    torch.testing.assert_close(lelp_loss(student, targets, temperature=2.0), plain)


def test_infinite_subclass_temperature_splits_evenly(fitted):
    targets = subclass_targets(ARRAYS["logits"], subclass_logits(ARRAYS["H"], fitted), 1.0, 1e12)
    even = ARRAYS["logits"].softmax(-1)[..., None].expand(-1, -1, 4) / 4
    torch.testing.assert_close(targets, even)


def test_directions_change_no_logit_and_are_orthonormal(fitted):
    zero = torch.einsum("cd,edk->cek", ARRAYS["W"], fitted.directions)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-12)
    products = fitted.directions.transpose(1, 2) @ fitted.directions
    torch.testing.assert_close(products, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


def test_rows_of_a_class_have_unit_mean_square(fitted):
    own = subclass_logits(ARRAYS["H"], fitted)[torch.arange(48), ARRAYS["y"]]
    for label in range(3):
        assert own[ARRAYS["y"] == label].square().mean().item() == pytest.approx(1.0)
        torch.testing.assert_close(own[ARRAYS["y"] == label].mean(0), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("change", ["shift", "stretch"])
def test_shifting_or_stretching_embeddings_changes_nothing(change):
    embeddings, labels, weight, _ = make_rows()
    changed = embeddings + 5.0 if change == "shift" else embeddings * 7.0
    before, after = (subclass_logits(rows, fit_directions(rows, labels, weight, 4)) for rows in (embeddings, changed))
    torch.testing.assert_close(after, before)


def test_shifting_logits_changes_nothing(fitted):
    projected = subclass_logits(ARRAYS["H"], fitted)
    before, after = (subclass_targets(ARRAYS["logits"] + shift, projected, 2.0) for shift in (0.0, 9.0))
    torch.testing.assert_close(after, before)


def test_permuting_subclasses_in_both_changes_nothing(fitted):
    order = torch.tensor([2, 0, 3, 1])
    targets = subclass_targets(ARRAYS["logits"], subclass_logits(ARRAYS["H"], fitted))
    student = ARRAYS["t"].unflatten(-1, (3, 4))
    permuted = lelp_loss(student[..., order].flatten(1), targets[..., order])
    torch.testing.assert_close(permuted, lelp_loss(ARRAYS["t"], targets))


def test_a_head_of_one_logit_has_two_classes():
    embeddings, _, weight, logits = make_rows(classes=1)
    labels = (logits[:, 0] > 0).long()
    fitted = fit_directions(embeddings, labels, weight, 2)
    targets = subclass_targets(logits, subclass_logits(embeddings, fitted))
    assert targets.shape == (60, 2, 2)
    torch.testing.assert_close(targets[:, 1].sum(-1), logits[:, 0].sigmoid())


def test_float32_embeddings_agree_with_float64():
    embeddings, labels, weight, _ = make_rows(rows=300)
    double, single = (
        subclass_logits(rows, fit_directions(rows, labels, weight.to(rows.dtype), 3))
        for rows in (embeddings, embeddings.float())
    )
    torch.testing.assert_close(single, double, rtol=0, atol=1e-5)


def test_rotation_is_seeded_and_orthonormal():
    rotation = random_rotation(5, seed=1)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(5, dtype=torch.float64))
    assert torch.equal(rotation, random_rotation(5, seed=1))
    assert not torch.allclose(rotation, random_rotation(5, seed=2))


def test_a_class_with_too_few_rows_is_named():
    embeddings, _, weight, _ = make_rows()
    labels = torch.zeros(60, dtype=torch.long)
    labels[:56] = 1
    labels[56:] = 2
    with pytest.raises(ValueError, match=r"5 rows in every class; class 0 has 0, class 2 has 4"):
        fit_directions(embeddings, labels, weight, 4)


def test_a_class_of_equal_embeddings_is_named():
    embeddings, labels, weight, _ = make_rows()
    embeddings[labels == 1] = embeddings[1] * 100
    with pytest.raises(ValueError, match="class 1 vary along 0 directions only, 4 subclasses"):
        fit_directions(embeddings.float(), labels, weight, 4)


def test_more_subclasses_than_free_directions_are_refused():
    embeddings, labels, weight, _ = make_rows(width=6)
    with pytest.raises(ValueError, match="class 0 vary along 3 directions only"):
        fit_directions(embeddings, labels, weight, 4)


def test_half_precision_student_gets_a_float32_loss(fitted):
    targets = subclass_targets(ARRAYS["logits"], subclass_logits(ARRAYS["H"], fitted))
    loss = lelp_loss(ARRAYS["t"].bfloat16(), targets.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), lelp_loss(ARRAYS["t"], targets), rtol=0.01, atol=0.05)
