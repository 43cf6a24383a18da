"""Deliberately wrong variants of the library, and the tests that have to notice each.

A mutant patches the library when a test session starts: `MUTANT=name python -m pytest -p tests.mutation.mutants ...`.
`python -m tests.mutation.run` does that for all of them.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch


class Mutant(NamedTuple):
    """One wrong variant.

    Attributes:
        topic: projection, parity, kernel fibres, schedule end, checker or term.
        apply: patches the library.
        tests: files of which at least one has to fail.
        needs: a framework without which those tests are skipped.
    """

    topic: str
    apply: Callable[[], None]
    tests: tuple[str, ...]
    needs: str | None = None


MATHEMATICS = ("tests/test_intertwiners.py", "tests/test_representations.py")
KERNELS = ("tests/test_kernels.py", "tests/adapters/test_escnn.py", "tests/traps/test_17_kernel_fibres.py")
SCHEDULES = ("tests/test_schedules.py", "tests/traps/test_08_schedule_end.py")
CHECKER = ("tests/test_verify.py", "tests/testing/test_zoo.py")
TERMS = ("tests/test_relax.py", "tests/test_finalize.py")


def half_projection():
    """P is applied by half: not idempotent."""
    from constrained_equiv.intertwiners import Intertwiners

    whole = Intertwiners.complement_
    Intertwiners.complement_ = lambda self, maps: maps.copy_((maps + whole(self, maps.clone())) / 2)


def trace_for_complex_types():
    """Only multiples of the identity count as equivariant: the quarter turn J of SO(2) and C_n is forgotten."""
    from constrained_equiv import intertwiners

    right = intertwiners._local_basis.__wrapped__

    def wrong(group, out, into, dtype=torch.float64, device=None):
        basis = right(group, out, into)
        if out.dim == into.dim == 2 and out.kind == "matrix" and len(basis) == 2:
            basis = torch.eye(2, dtype=torch.float64)[None] / math.sqrt(2)
        return basis.to(dtype=dtype, device=device)

    intertwiners._local_basis = wrong


def layout_ignored():
    """Component-first blocks are read copy by copy: axes are scrambled without a change of shape."""
    from dataclasses import replace

    from constrained_equiv import intertwiners

    right = intertwiners._copies
    intertwiners._copies = lambda block, b, a: right(block, replace(b, layout="mul_ir"), replace(a, layout="mul_ir"))


def sum_for_mean():
    """The trace is subtracted without dividing by 2 l + 1."""
    from constrained_equiv.intertwiners import Intertwiners

    whole = Intertwiners.complement_

    def wrong(self, maps):
        return maps.copy_(3 * whole(self, maps.clone()) - 2 * maps)

    Intertwiners.complement_ = wrong


def parity_in_no_matrix():
    """Odd and even irreps get the same matrices."""
    from constrained_equiv import representations
    from constrained_equiv.representations import Atom

    right = representations._rotation_atom

    def wrong(degree, parity):
        atom = right(degree, parity)
        return Atom(atom.name, atom.dim, right(degree, abs(parity)).matrix, atom.kind)

    representations._rotation_atom = wrong


def parity_in_no_projection():
    """Maps between 1o and 1e count as equivariant."""
    from constrained_equiv import intertwiners
    from constrained_equiv.representations import Atom

    right = intertwiners._local_basis.__wrapped__

    def even(atom):
        return Atom(atom.name.replace("o", "e"), atom.dim, atom.matrix, atom.kind)

    def wrong(group, out, into, dtype=torch.float64, device=None):
        if out.kind == into.kind == "irreducible":
            out, into = even(out), even(into)
        return right(group, out, into).to(dtype=dtype, device=device)

    intertwiners._local_basis = wrong


def inversion_of_no_generator():
    """O(3) forgets its discrete generator, so that nothing sees parity."""
    from constrained_equiv import groups

    right = groups.O3

    def wrong():
        group = right()
        object.__setattr__(group, "generators", group.generators[:0])
        return group

    groups.O3 = wrong


def fibres_stay():
    """The group moves the points of a kernel, not its channels."""
    from constrained_equiv import kernels

    right_average, right_orbits = kernels.averaged, kernels.orbits_of

    def still(matrices):
        return torch.eye(matrices.shape[-1], dtype=matrices.dtype).expand_as(matrices)

    kernels.orbits_of = lambda outputs, inputs, moves: right_orbits(still(outputs), still(inputs), moves)
    kernels.averaged = lambda outputs, inputs, moves, generators: right_average(
        still(outputs), still(inputs), moves, generators
    )


def points_stay():
    """The group moves the channels of a kernel, not its points."""
    from constrained_equiv import kernels

    right = kernels.averaged

    def wrong(outputs, inputs, moves, generators):
        return right(outputs, inputs, moves[:1].expand_as(moves), generators)

    kernels.averaged = wrong


def input_fibre_inverted():
    """rho_in(g) is replaced by its inverse."""
    from constrained_equiv import kernels

    right = kernels.averaged
    kernels.averaged = lambda outputs, inputs, moves, generators: right(outputs, inputs.mT, moves, generators)


def _change_ramp(value):
    from constrained_equiv.schedules import Ramp

    right = Ramp.__call__
    Ramp.__call__ = lambda self, step: value(self, step, lambda s: right(self, s))


def one_step_late():
    """The end value is taken one step after `steps`."""
    _change_ramp(lambda ramp, step, right: right(max(step - 1, 0)))


def one_step_short():
    """The last step of the way is never made: the published 2 / E instead of 0."""
    _change_ramp(lambda ramp, step, right: right(min(step, ramp.steps - 1)) if ramp.steps > 1 else right(step))


def almost_the_end():
    """The end value is missed by rounding."""
    _change_ramp(lambda ramp, step, right: right(step) + (1e-12 if step >= ramp.steps > 0 else 0.0))


def random_elements_only():
    """The checker forgets the discrete generators."""
    from constrained_equiv import _verify, groups

    right = _verify._elements

    def wrong(symmetry, samples, generator):
        drawn = right(symmetry, samples, generator)[len(symmetry.group.generators) :]
        turned = [e if torch.linalg.det(e) > 0 else groups.SO3().sample()[0] for e in drawn if len(e) == 3]
        return torch.stack(turned) if turned else drawn

    _verify._elements = wrong


def absolute_error():
    """The checker does not divide by the size of the output."""
    from constrained_equiv import _verify

    right = _verify.relative_gap
    _verify.relative_gap = lambda found, expected, reference: right(found, expected, torch.ones(1).to(reference))


def nan_passes():
    """A comparison that is true for NaN."""
    from constrained_equiv import _verify

    _verify.larger = lambda first, second: first > second


def always_on():
    """Switching terms off does nothing."""
    from constrained_equiv._terms import NonEquivariantTerm

    NonEquivariantTerm.active = property(lambda self: True)


def scale_forgotten():
    """theta is not applied."""
    from constrained_equiv._terms import NonEquivariantTerm

    NonEquivariantTerm.matrix = lambda self: self.weight * (1.0 if self.gate is None else self.gate)


def not_in_the_complement():
    """The term starts with an equivariant part."""
    from constrained_equiv._terms import NonEquivariantTerm

    right = NonEquivariantTerm.initialise

    def wrong(self, init, generator):
        kept, self.complement = self.complement, False
        right(self, init, generator)
        self.complement = kept

    NonEquivariantTerm.initialise = wrong


MUTANTS = {
    mutant.apply.__name__: mutant
    for mutant in (
        Mutant("projection", half_projection, MATHEMATICS[:1]),
        Mutant("projection", trace_for_complex_types, MATHEMATICS[:1]),
        Mutant("projection", layout_ignored, MATHEMATICS[:1]),
        Mutant("projection", sum_for_mean, MATHEMATICS[:1]),
        Mutant("parity", parity_in_no_matrix, MATHEMATICS),
        Mutant("parity", parity_in_no_projection, MATHEMATICS),
        Mutant("parity", inversion_of_no_generator, ("tests/test_groups.py", "tests/test_verify.py")),
        Mutant("kernel fibres", fibres_stay, KERNELS, "escnn"),
        Mutant("kernel fibres", points_stay, KERNELS, "escnn"),
        Mutant("kernel fibres", input_fibre_inverted, KERNELS, "escnn"),
        Mutant("schedule end", one_step_late, SCHEDULES),
        Mutant("schedule end", one_step_short, SCHEDULES),
        Mutant("schedule end", almost_the_end, SCHEDULES),
        Mutant("checker", random_elements_only, CHECKER),
        Mutant("checker", absolute_error, CHECKER),
        Mutant("checker", nan_passes, CHECKER),
        Mutant("term", always_on, TERMS),
        Mutant("term", scale_forgotten, TERMS),
        Mutant("term", not_in_the_complement, TERMS),
    )
}


def pytest_sessionstart():
    """Patch before any test file is imported."""
    if name := os.environ.get("MUTANT"):
        MUTANTS[name].apply()
