"""Learn energies and forces of a molecule with an interaction network, strictly and through relaxation.

    python -m examples.molecules                                # a simulated chain, a few minutes on two CPU cores
    python -m examples.molecules --data FOLDER --molecule ethanol    # with rmd17_ethanol.npz: revised MD17

The published setting: `--samples 950 --hidden 64x0e+64x1o+64x2e --lmax 2 --layers 5 --epochs 4000 --batch 5` (thousands
of epochs, on a GPU). Forces are gradients of the energy by autograd, through the relaxed layers as well.
"""

import argparse

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import command
from examples.data import rmd17
from examples.models.nequip_style import NequIP
from examples.task import Batch, Extra, Task


def main(arguments: list[str] | None = None) -> None:
    command.run(make_task, parse(arguments))


def make_task(options: argparse.Namespace) -> Task:
    """Predict energies (kcal/mol) and forces (kcal/mol/angstrom) from positions."""
    if options.data:
        splits = rmd17.load(options.data, molecule=options.molecule, train=options.samples)
    else:
        splits = rmd17.synthetic(options.samples, seed=options.data_seed)
    train = splits.train
    centre, atoms = train.energies.mean(), train.numbers.shape[1]
    unit = float(train.forces.std())

    def tensors(frames: rmd17.Frames) -> Batch:
        energies = (frames.energies - centre).float()  # before rounding: totals have no digits left for differences
        return frames.positions, frames.numbers, energies, frames.forces

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        positions, numbers, energies, forces = batch
        predicted_energies, predicted_forces = model(positions, numbers)
        per_atom = (predicted_energies - energies) / atoms
        return (predicted_forces - forces).square().mean() / unit**2 + per_atom.square().mean() / unit**2

    def force_error(model: nn.Module, batch: Batch) -> Tensor:
        positions, numbers, _, forces = batch
        return (model(positions, numbers)[1].detach() - forces).abs().mean()

    def energy_error(model: nn.Module, batch: Batch) -> Tensor:
        positions, numbers, energies, _ = batch
        return (model(positions, numbers)[0].detach() - energies).abs().mean()

    test = tensors(splits.test)
    return Task(
        name=f"molecule, {options.molecule if options.data else 'simulated chain'}",
        build=lambda width: NequIP(
            train.numbers.unique().tolist(),
            hidden=command.widened(options.hidden, width),
            layers=options.layers,
            lmax=options.lmax,
            scale=unit,
        ),
        train=tensors(train),
        val=tensors(splits.val),
        test=test,
        loss=loss,
        metric=force_error,
        inputs=lambda batch: batch[:2],
        symmetry=ce.Symmetry(ce.groups.E3(), inputs=(ce.actions.points, None), outputs=(None, ce.actions.vectors)),
        # the linear maps on atoms, whose terms can be folded; the maps on edges and those by species stay as they are
        where=lambda name, layer: name.endswith((".before", ".after")),
        augment=turn,
        metric_name="force MAE (kcal/mol/A)",
        extra={"energy MAE (kcal/mol)": Extra(test, energy_error)},
    )


def turn(batch: Batch, generator: torch.Generator) -> Batch:
    """Rotate or reflect every molecule at random."""
    positions, numbers, energies, forces = batch
    motions = ce.groups.O3().sample(len(positions), generator=generator).to(positions)
    return positions @ motions, numbers, energies, forces @ motions


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__, out="molecules", epochs=60, samples=200, batch=20, lr=5e-3)
    parser.add_argument("--molecule", choices=rmd17.MOLECULES, default="ethanol")
    parser.add_argument("--hidden", default="16x0e+16x1o", help="irreps of the features")
    parser.add_argument("--layers", type=command.whole(1), default=2)
    parser.add_argument("--lmax", type=command.whole(0), default=1, help="highest degree of the harmonics of an edge")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
