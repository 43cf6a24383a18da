"""Laws of the interaction network: energies are invariant, forces are their exact gradients and turn with the atoms."""

import pytest
import torch

pytest.importorskip("e3nn")

import constrained_equiv as ce
from examples.models.nequip_style import NequIP

SPECIES = torch.tensor([6, 1, 8, 1, 1])
SYMMETRY = ce.Symmetry(ce.groups.E3(), (ce.actions.points, None), (None, ce.actions.vectors))


def network(**options) -> NequIP:
    return NequIP([1, 6, 8], **{"hidden": "4x0e + 3x1o + 2x2e", "layers": 2, "radial_width": 8} | options)


def positions(count: int = 3) -> torch.Tensor:
    return 1.2 * torch.randn(count, 5, 3)


@pytest.mark.parametrize("options", [{}, {"hidden": "4x0e"}, {"layers": 1}, {"layers": 3, "lmax": 1}], ids=str)
@pytest.mark.usefixtures("float64_default")
def test_energies_are_invariant_and_forces_turn(options):
    ce.assert_equivariant(network(**options), (positions(), SPECIES), symmetry=SYMMETRY, tolerance=1e-11)


@pytest.mark.usefixtures("float64_default")
def test_atoms_may_be_renumbered():
    model, x, order = network(), positions(), torch.randperm(5)
    (energies, forces), (again, moved) = model(x, SPECIES), model(x[:, order], SPECIES[order])
    torch.testing.assert_close(again, energies, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved, forces[:, order], rtol=0, atol=1e-12)
    batched = model(x, SPECIES.expand(3, -1))
    torch.testing.assert_close(batched[0], energies, rtol=0, atol=0)


@pytest.mark.usefixtures("float64_default")
def test_forces_are_minus_the_slope_and_sum_to_zero():
    model, x = network(), positions(1)
    _, forces = model(x, SPECIES)
    step = 1e-5 * torch.randn(5, 3)
    slope = (model.energy(x + step, SPECIES) - model.energy(x - step, SPECIES)) / 2
    torch.testing.assert_close(slope[0], -(forces[0] * step).sum(), rtol=1e-6, atol=0)
    assert forces.sum(1).abs().max() < 1e-12


@pytest.mark.usefixtures("float64_default")
def test_atoms_beyond_the_cutoff_do_not_feel_each_other():
    model = network(cutoff=2.0)
    near = positions(1)
    near = near / near.norm(dim=-1, keepdim=True) * 0.9
    far = near + torch.tensor([100.0, 0.0, 0.0])
    alone = model.energy(near, SPECIES)
    both = model.energy(torch.cat([near, far], 1), SPECIES.repeat(2))
    # the mean over neighbours counts all atoms of the complete graph, so compare two far copies with two farther ones
    farther = model.energy(torch.cat([near, far + 50], 1), SPECIES.repeat(2))
    torch.testing.assert_close(both, farther, rtol=0, atol=1e-12)
    assert not torch.equal(both, 2 * alone)


@pytest.mark.usefixtures("float64_default")
def test_energies_are_smooth_at_the_cutoff():
    model = network(cutoff=2.0, scale=10.0)
    pair = torch.zeros(3, 2, 3)
    pair[:, 1, 0] = torch.tensor([2.0 - 1e-4, 2.0, 2.0 + 1e-4])
    energies, forces = model(pair, SPECIES[:2])
    assert (energies - energies[1]).abs().max() < 1e-10 and forces.abs().max() < 1e-5


def test_scale_and_shift_are_units_of_the_energy():
    torch.manual_seed(3)
    plain = network()
    torch.manual_seed(3)
    scaled = network(scale=3.0, shift=-7.0)
    x = positions()
    torch.testing.assert_close(scaled(x, SPECIES)[0], 3 * plain(x, SPECIES)[0] - 7 * 5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled(x, SPECIES)[1], 3 * plain(x, SPECIES)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("float64_default")
def test_forces_train_through_the_relaxed_model():
    """Forces of the relaxed model are exact gradients of its energy, with the terms on and after they are gone."""
    model, x = network(), positions()
    ce.relax(model, init=0.1)
    energies, forces = model(x, SPECIES)
    (energies.square().sum() + forces.square().sum()).backward()
    assert all(r.term.weight.grad is not None and r.term.weight.grad.norm() > 0 for r in ce.relaxations(model))
    step = 1e-5 * torch.randn(5, 3)
    slope = (model.energy(x + step, SPECIES) - model.energy(x - step, SPECIES)) / 2
    torch.testing.assert_close(slope, -(forces * step).sum((1, 2)), rtol=1e-5, atol=1e-12)
    assert ce.equivariance_error(model, (x, SPECIES), symmetry=SYMMETRY) > 1e-2
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, SPECIES)[1], forces, rtol=0, atol=1e-12)
    ce.finalize(model, on_violation="drop")
    ce.assert_equivariant(model, (x, SPECIES), symmetry=SYMMETRY, tolerance=1e-11)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: network(hidden="4x1o"), "hidden='4x1o'"),
        (lambda: network(hidden="4x0e + 2x0o"), "no odd ones"),
        (lambda: network(layers=0), "layers=0"),
        (lambda: NequIP([]), r"species=\[\]"),
        (lambda: network()(torch.zeros(5, 3), SPECIES), r"\(batch, n, 3\)"),
        (lambda: network()(torch.zeros(2, 4, 3), SPECIES), r"species \(5,\)"),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
