"""Interpolation and the schedule of t, against the authors' sequences and their known traps."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.taid import MODES, TaidSchedule, interpolate_logits, taid_cross_entropy

REFERENCE = np.load(GOLDEN / "taid.npz")
SEQUENCES = json.loads((GOLDEN / "taid.json").read_text())["t_sequences"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("case", ["a", "b", "d"])
@pytest.mark.parametrize("t", [0.0, 0.2, 0.4, 0.7, 1.0])
def test_authors_objective(case, t):
    student = torch.tensor(REFERENCE[f"{case}|student_logits"], requires_grad=True)
    teacher = torch.tensor(REFERENCE[f"{case}|teacher_logits"])
    mask = torch.tensor(REFERENCE[f"{case}|mask"])
    loss = (taid_cross_entropy(student, teacher, t) * mask).sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(REFERENCE[f"taid|{case}|t={t}|loss"].item(), rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), REFERENCE[f"taid|{case}|t={t}|grad"], atol=1e-6)


@pytest.mark.parametrize("case", ["a", "b"])
def test_kl_form_in_float64(case):
    student = torch.tensor(REFERENCE[f"{case}|student_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(REFERENCE[f"{case}|teacher_logits"], dtype=torch.float64)
    mask = torch.tensor(REFERENCE[f"{case}|mask"])
    loss = (forward_kl(student, interpolate_logits(student, teacher, 0.4)) * mask).sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(REFERENCE[f"own|taid_kl_t0.4|{case}|loss"].item(), rel=1e-9)
    np.testing.assert_allclose(student.grad.numpy(), REFERENCE[f"own|taid_kl_t0.4|{case}|grad"], atol=1e-9)


def test_logits_are_mixed_not_probabilities():
    student, teacher = torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(interpolate_logits(student, teacher, 0.25), torch.tensor([0.5, 3.0]))


def test_the_target_has_no_gradient_and_is_float32():
    student = torch.randn(3, 5).bfloat16().requires_grad_()
    mixed = interpolate_logits(student, torch.randn(3, 5).bfloat16(), 0.5)
    assert not mixed.requires_grad
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_excluded_tokens_give_no_nan(t):
    student = torch.tensor([[0.0, 1.0, -INF, 2.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -INF, -INF, 1.0]])
    loss = taid_cross_entropy(student, teacher, t).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("t", [-0.1, 1.1, NAN])
def test_a_share_outside_its_range_is_refused(t):
    with pytest.raises(ValueError, match="`t`"):
        interpolate_logits(torch.zeros(2), torch.zeros(2), t)


@pytest.mark.parametrize("name", SEQUENCES)
def test_reference_mode_repeats_the_authors_bit_for_bit(name):
    facts = SEQUENCES[name]
    schedule = TaidSchedule(
        facts["num_train_steps"], facts["t_start"], facts["t_end"], facts["alpha"], facts["beta"], mode="reference"
    )
    used, after = [], []
    for loss, step in zip(REFERENCE[f"tseq|{name}|loss"], REFERENCE[f"tseq|{name}|global_step"], strict=True):
        used.append(schedule.t)
        after.append(schedule.step(loss.item(), step.item()))
    np.testing.assert_array_equal(used, REFERENCE[f"tseq|{name}|t_used"])
    np.testing.assert_array_equal(after, REFERENCE[f"tseq|{name}|t_after"])


def falling_losses(count: int) -> list[float]:
    generator = np.random.default_rng(0)
    return [3.0 * math.exp(-step / 50) + 0.3 * generator.random() for step in range(count)]


def test_adaptive_equals_the_authors_rule_on_finite_losses():
    settings = {"num_steps": 300, "t_start": 0.2, "alpha": 0.1, "beta": 0.9}
    ours, theirs = TaidSchedule(**settings, mode="adaptive"), TaidSchedule(**settings, mode="reference")
    for loss in falling_losses(300):
        assert ours.step(loss) == pytest.approx(theirs.step(loss), abs=1e-6)


@pytest.mark.parametrize("mode", ["adaptive", "linear", "exponential", "constant"])
def test_t_never_falls_and_non_finite_losses_are_skipped(mode):
    schedule = TaidSchedule(100, t_start=0.3, alpha=0.1, beta=0.9, mode=mode)
    before = schedule.t
    for step, loss in enumerate(falling_losses(100)):
        if step % 10 == 5:
            assert schedule.step(NAN) == before
            assert schedule.step(INF) == before
        now = schedule.step(loss, step)
        assert before <= now <= 1.0
        before = now


def test_a_skipped_loss_leaves_the_sequence_as_it_was():
    with_nan, without = (TaidSchedule(1000, t_start=0.2, alpha=0.1) for _ in range(2))
    for step, loss in enumerate(falling_losses(50)):
        with_nan.step(NAN, step)
        assert with_nan.step(loss, step) == without.step(loss, step)


def test_linear_is_the_straight_line_of_finished_steps():
    schedule = TaidSchedule(10, t_start=0.4, mode="linear")
    values = [schedule.step(1.0) for _ in range(10)]
    np.testing.assert_allclose(values, [0.4 + 0.6 * step / 10 for step in range(10)])


def test_constant_stays():
    schedule = TaidSchedule(10, t_start=1.0, mode="constant")
    assert [schedule.step(loss) for loss in (3.0, 2.0, NAN)] == [1.0, 1.0, 1.0]


def test_exponential_closes_half_alpha_of_the_gap_each_step():
    schedule = TaidSchedule(10**6, t_start=0.5, alpha=0.1, mode="exponential")
    values = [schedule.step(loss) for loss in (9.0, 1.0, 5.0)]
    np.testing.assert_allclose(values, [0.5, 1 - 0.5 * 0.95, 1 - 0.5 * 0.95**2], atol=1e-6)


def test_adaptive_over_few_steps_is_linear_and_says_so():
    with pytest.warns(UserWarning, match="equals the linear one"):
        TaidSchedule(4000, mode="adaptive")  # 2 / alpha: the last length for which it holds
    with pytest.warns(UserWarning, match="equals the linear one"):
        adaptive = TaidSchedule(3000, mode="adaptive")
    linear = TaidSchedule(3000, mode="linear")
    for loss in falling_losses(200):
        assert adaptive.step(loss) == pytest.approx(linear.step(loss), abs=1e-9)


def test_no_warning_where_adaptivity_shows(recwarn):
    TaidSchedule(4001, mode="adaptive")
    assert len(recwarn) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_state_goes_on_exactly(mode):
    settings = {"num_steps": 80, "t_start": 0.2, "alpha": 0.1, "beta": 0.9, "mode": mode}
    whole, first, second = (TaidSchedule(**settings) for _ in range(3))
    losses = falling_losses(80)
    expected = [whole.step(loss) for loss in losses]
    seen = [first.step(loss) for loss in losses[:33]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    seen += [second.step(loss) for loss in losses[33:]]
    assert seen == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "cosine"},
        {"num_steps": 0},
        {"t_start": 0.8, "t_end": 0.5},
        {"t_end": 1.5},
        {"alpha": 0.0},
        {"beta": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError):  # noqa: PT011
        TaidSchedule(**({"num_steps": 10} | settings))
