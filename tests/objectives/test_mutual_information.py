"""Bounds on mutual information against reference values, a known truth, and what must hold for all scores."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from llmdistill.objectives.mutual_information import info_nce, mi_alpha, mi_alpha_parts, nwj

ARRAYS = {key: torch.tensor(value) for key, value in np.load(GOLDEN / "mi_alpha_lelp.npz").items()}
FIGURES = json.loads((GOLDEN / "mi_alpha_lelp.json").read_text())
ALPHAS = ARRAYS["mi_alpha"].tolist()


def random_scores(batch: int = 8, seed: int = 0, size: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    scores = size * torch.randn(batch, batch, generator=generator, dtype=torch.float64)
    return scores, torch.randn(batch, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("case", ["small", "b16", "const"])
@pytest.mark.parametrize("number", range(len(ALPHAS)))
def test_reference(case, number):
    scores, baseline = (ARRAYS[f"mi_{case}_{name}"].clone().requires_grad_() for name in ("F", "b"))
    bound = mi_alpha_parts(scores, baseline, ALPHAS[number])
    gradients = torch.autograd.grad(bound.value, (scores, baseline), allow_unused=True, materialize_grads=True)
    for ours, name in zip((*bound, *gradients), ("I", "joint", "marg", "dF", "db"), strict=True):
        torch.testing.assert_close(ours, ARRAYS[f"mi_{case}_{name}"][number], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["small", "b16", "const"])
def test_reference_of_the_named_bounds(case):
    scores, figures = ARRAYS[f"mi_{case}_F"], FIGURES["mi"][case]
    assert info_nce(scores).item() == pytest.approx(figures["infonce"], rel=1e-9, abs=1e-12)
    assert nwj(scores).item() == pytest.approx(figures["nwj"], rel=1e-9)
    assert mi_alpha(scores, ARRAYS[f"mi_{case}_b"], 0.0).item() == pytest.approx(figures["tuba"], rel=1e-9, abs=1e-12)


def gaussian_scores(information: float, batch: int, generator: torch.Generator, width: int = 20) -> torch.Tensor:
    """Scores of the best critic, log p(y | x) / p(y), for correlated Gaussian pairs of known mutual information."""
    rho = math.sqrt(1 - math.exp(-2 * information / width))
    x = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    density = -((y[:, None] - rho * x[None]) ** 2 / (1 - rho**2) - y[:, None] ** 2).sum(-1) / 2
    return density - width / 2 * math.log(1 - rho**2)


@pytest.mark.parametrize("information", [2, 6, 10])
def test_known_truth_of_gaussians(information):
    generator = torch.Generator().manual_seed(0)
    batches = [gaussian_scores(information, 64, generator) for _ in range(300)]
    table = FIGURES["gaussian_table"][f"d20_B64_MI{information}"]
    means = {}
    for alpha in ("0.1", "0.5", "0.9", "1.0"):
        values = torch.stack([mi_alpha(scores, None, float(alpha)) for scores in batches])
        mean, deviation, _ = table[alpha]
        error = deviation * math.sqrt(1 / 300 + 1 / table["R"])
        assert values.mean().item() == pytest.approx(mean, abs=4 * error)
        assert values.std().item() == pytest.approx(deviation, rel=0.25)
        means[alpha] = values.mean().item()
    assert information > means["0.1"] > means["0.5"] > means["0.9"] > means["1.0"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_positives_that_lead_by_far_are_exact_and_differentiable(alpha):
    scores = (1000.0 * torch.eye(16)).requires_grad_()
    bound = mi_alpha(scores, None, alpha)
    bound.backward()
    assert bound.item() == pytest.approx(math.log(15 / alpha) if alpha else 1000.0, rel=1e-4)
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 1.0])
def test_float32_agrees_with_float64_whatever_the_lead(alpha):
    for lead in (1.0, 8.0, 16.0, 17.0, 30.0, 200.0):
        scores, baseline = random_scores(16)
        scores = scores + lead * torch.eye(16)
        single = mi_alpha(scores.float(), baseline.float(), alpha)
        torch.testing.assert_close(single.double(), mi_alpha(scores, baseline, alpha), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_raising_a_row_and_its_baseline_changes_nothing(alpha):
    scores, baseline = random_scores()
    shift = torch.linspace(-3, 3, 8, dtype=torch.float64)
    before = mi_alpha(scores, baseline, alpha)
    torch.testing.assert_close(mi_alpha(scores + shift[:, None], baseline + shift, alpha), before)


@pytest.mark.parametrize("bound", [lambda s, b: mi_alpha(s, b, 0.7), lambda s, b: info_nce(s), lambda s, b: nwj(s)])
def test_permuting_the_pairs_changes_nothing(bound):
    scores, baseline = random_scores()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bound(scores[order][:, order], baseline[order]), bound(scores, baseline))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_constant_scores_say_nothing(alpha):
    assert mi_alpha(torch.full((8, 8), 3.0), torch.full((8,), 3.0), alpha).item() == pytest.approx(0.0, abs=1e-6)


def test_alpha_1_is_not_info_nce_of_the_whole_batch():
    scores, _ = random_scores()
    assert abs(mi_alpha(scores, None, 1.0) - info_nce(scores)) > 0.01


def test_half_precision_scores_give_float32():
    scores, baseline = random_scores(16)
    bound = mi_alpha(scores.bfloat16(), baseline.bfloat16(), 0.9)
    assert bound.dtype == torch.float32
    torch.testing.assert_close(bound.double(), mi_alpha(scores, baseline, 0.9), rtol=0.02, atol=0.02)


def test_the_gradient_is_that_of_finite_differences():
    scores, baseline = (values.requires_grad_() for values in random_scores(5))
    for alpha in (0.0, 0.4, 1.0):
        assert torch.autograd.gradcheck(lambda s, b, a=alpha: mi_alpha(s, b, a), (scores, baseline))


@pytest.mark.parametrize("bound", [mi_alpha, info_nce, nwj])
def test_bad_shapes_are_refused(bound):
    with pytest.raises(ValueError, match="batch of one"):
        bound(torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"got \[3, 4\]"):
        bound(torch.zeros(3, 4))


def test_alpha_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        mi_alpha(torch.zeros(2, 2), None, 1.5)
