"""Learn one property of small molecules with an interaction network, strictly and through relaxation.

    python -m examples.qm9                                      # simulated chains, a few minutes on two CPU cores
    python -m examples.qm9 --data FOLDER --target alpha         # with qm9_{train,val,test}.npz: a part of QM9

The usual setting: `--samples 110000 --hidden 18x0e+18x1o+18x2e --lmax 3 --layers 5 --epochs 600 --batch 1024` (a GPU
and the whole of QM9). What a sum over atoms by element explains is fitted and taken off first, as usual.
"""

import argparse

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import command
from examples.data import qm9
from examples.models.nequip_style import NequIP
from examples.task import Batch, Task


class Property(nn.Module):
    """Molecules of different sizes: rows without an atom, of species 0, are put beyond the cutoff of everything."""

    def __init__(self, network: NequIP, atoms: int) -> None:
        super().__init__()
        self.network = network
        places = 100 + 10 * network.cutoff * torch.arange(atoms).unsqueeze(1) * torch.tensor([1.0, 0.0, 0.0])
        self.register_buffer("away", places, persistent=False)

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        """Map positions (batch, atoms, 3) and species (batch, atoms) to properties (batch,)."""
        return self.network.energy(torch.where(species.unsqueeze(-1) > 0, positions, self.away), species)


def main(arguments: list[str] | None = None) -> None:
    command.run(make_task, parse(arguments))


def make_task(options: argparse.Namespace) -> Task:
    """Predict a property from positions and species."""
    if options.data:
        splits, unit = qm9.load(options.data, target=options.target), qm9.PROPERTIES[options.target]
    else:
        splits, unit = qm9.synthetic(options.samples, seed=options.data_seed), "simulated units"

    def composition(molecules: qm9.Molecules) -> Tensor:
        return (molecules.numbers.unsqueeze(-1) == torch.tensor(qm9.ELEMENTS)).sum(1).double()

    def small(molecules: qm9.Molecules, most: int) -> qm9.Molecules:
        found = molecules.select(molecules.numbers.count_nonzero(1) <= options.atoms).select(slice(0, most))
        if not len(found):
            raise ValueError(f"found no molecule of at most {options.atoms} atoms, expected some; raise --atoms")
        numbers, positions, charges = (t[:, : options.atoms] for t in found.tensors[:3])  # atoms come first in a row
        return qm9.Molecules(numbers, positions, charges, found.targets)

    train = small(splits.train, options.samples)
    references = torch.linalg.lstsq(composition(train), train.targets.unsqueeze(1), driver="gelsd").solution
    residual = train.targets - (composition(train) @ references).squeeze(1)
    scale = float(residual.std())

    def tensors(molecules: qm9.Molecules) -> Batch:
        targets = (molecules.targets - (composition(molecules) @ references).squeeze(1)) / scale
        return molecules.positions, molecules.numbers, targets.float()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        positions, numbers, targets = batch
        return nn.functional.smooth_l1_loss(model(positions, numbers), targets, beta=0.1)

    @torch.no_grad()
    def error(model: nn.Module, batch: Batch) -> Tensor:
        positions, numbers, targets = batch
        return scale * (model(positions, numbers) - targets).abs().mean()

    def build(width: float) -> nn.Module:
        hidden = command.widened(options.hidden, width)
        network = NequIP(qm9.ELEMENTS, hidden=hidden, layers=options.layers, lmax=options.lmax, cutoff=options.cutoff)
        return Property(network, train.numbers.shape[1])

    return Task(
        name=f"molecules, {options.target if options.data else 'screened repulsion'}",
        build=build,
        train=tensors(train),
        val=tensors(small(splits.val, options.held_out)),
        test=tensors(small(splits.test, options.held_out)),
        loss=loss,
        metric=error,
        inputs=lambda batch: batch[:2],
        symmetry=ce.Symmetry(ce.groups.E3(), inputs=(ce.actions.points, None), outputs=None),
        # the linear maps on atoms, whose terms can be folded; the maps on edges and those by species stay as they are
        where=lambda name, layer: name.endswith((".before", ".after")),
        augment=turn,
        metric_name=f"MAE ({unit})",
    )


def turn(batch: Batch, generator: torch.Generator) -> Batch:
    """Rotate or reflect every molecule at random."""
    positions, *rest = batch
    return positions @ ce.groups.O3().sample(len(positions), generator=generator).to(positions), *rest


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__, out="qm9", epochs=40, samples=300, batch=20, lr=5e-3)
    parser.add_argument("--target", choices=list(qm9.PROPERTIES), default="alpha", help="an extensive one fits the sum")
    parser.add_argument("--hidden", default="16x0e+16x1o", help="irreps of the features")
    parser.add_argument("--layers", type=command.whole(1), default=2)
    parser.add_argument("--lmax", type=command.whole(0), default=1)
    parser.add_argument("--cutoff", type=command.positive, default=5.0, help="angstrom")
    parser.add_argument("--atoms", type=command.whole(1), default=qm9.ATOMS, help="leave out molecules of more atoms")
    parser.add_argument(
        "--held-out", type=command.whole(1), default=1_000, help="molecules to validate and to test, at most"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
