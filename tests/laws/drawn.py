"""What the laws draw: a case of the table, how it is relaxed, its data and its terms.

A law is one Hypothesis test that draws the case too, so that `thorough` tries it 10,000 times in all. Examples take
milliseconds, because models are kept between examples; each example puts back what it finds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv import testing
from tests.cases import AVAILABLE, Case, default_dtype, tensors

EXAMPLES = {"quick": 5, "ci": 25, "thorough": 10_000}

law = hypothesis.settings(
    max_examples=EXAMPLES.get(hypothesis.settings.get_current_profile_name(), EXAMPLES["ci"]),
    suppress_health_check=[  # nested: the laws that the library ships are tests, of which one example is run
        *hypothesis.settings.default.suppress_health_check,
        hypothesis.HealthCheck.nested_given,
    ],
)

seeds = st.integers(0, 2**31 - 1)
sizes = st.sampled_from([1.0, 1e-3, 1e-6, 30.0])
cases = st.sampled_from(AVAILABLE)


class Relaxed(NamedTuple):
    """A relaxed model with terms, and the same model without.

    Attributes:
        case: of the table.
        plain: the model that was not relaxed; laws leave it as it is.
        model: the relaxed one, with the weights of `plain`, in the same mode.
        data: the model's arguments.
    """

    case: Case
    plain: nn.Module
    model: nn.Module
    data: tuple[Any, ...]

    def __repr__(self) -> str:
        form = terms(self.model)[0].extra_repr()
        return f"{self.case}, {form}, {'training' if self.plain.training else 'evaluation'}, data {self.data}"

    @property
    def inputs(self) -> Any:
        """The data as the checks take them."""
        return self.data if len(self.data) > 1 else self.data[0]


@st.composite
def relaxed(
    draw: st.DrawFn,
    *,
    complement: bool | None = None,
    gate: bool | None = None,
    modes: tuple[bool, ...] = (True, False),
    sizes: st.SearchStrategy[float] = sizes,
) -> Relaxed:
    """Draw a case, the form of its terms, their weights, the mode (training or not) and the data."""
    case = draw(cases)
    form = [draw(st.booleans()) if given is None else given for given in (complement, gate)]
    plain, model = _plain(case), _relaxed(case, *form)
    mode, seed, size = draw(st.sampled_from(modes)), draw(seeds), draw(sizes)
    for part in (plain, model):
        part.train()  # escnn keeps the kernel of evaluation
    put_back(case, model)
    put_back(case, plain)
    put_terms(model, seed, size)
    for part in (plain, model):
        part.train(mode)
    return Relaxed(case, plain, model, draw(data_of(case)))


@st.composite
def data_of(draw: st.DrawFn, case: Case, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Draw the arguments of a case's model: of usual size, small or large, all samples different or all equal."""
    data = case.data(draw(seeds), dtype)
    factor, equal = draw(st.sampled_from([1.0, 1e-2, 1e2])), draw(st.booleans())
    parts = [part * factor if isinstance(part, Tensor) and part.is_floating_point() else part for part in data]
    if equal:
        parts = [part[:1].expand_as(part).clone() if part.ndim > 1 else part for part in parts]
    return tuple(parts)


@contextmanager
def spare(case: Case) -> Iterator[nn.Module]:
    """Lend a plain model in training mode, to be given back plain; where a law fails it is not kept."""
    model = _spares.pop(case.name, None) or case.model()
    put_back(case, model.train())
    yield model
    _spares[case.name] = model


_spares: dict[str, nn.Module] = {}


def relax(case: Case, model: nn.Module, **options: Any) -> nn.Module:
    """Relax as the case says, with one adapter for all examples: each adapter makes classes of its own."""
    return ce.relax(model, where=case.where, adapter=_adapter(case), **options)


@torch.no_grad()
def put_back(case: Case, model: nn.Module) -> None:
    """Give a model, relaxed or not, the weights and buffers it was built with."""
    own = model.state_dict()
    for key, value in _start(case).items():
        own[key].copy_(value)


@torch.no_grad()
def put_terms(model: nn.Module, seed: int, size: float) -> None:
    """Fill the terms; scales and gates become 1."""
    generator = torch.Generator().manual_seed(seed)
    for term in terms(model):
        term.initialise(size, generator)
        term.scale.fill_(1.0)
        if term.gate is not None:
            term.gate.fill_(1.0)


def terms(model: nn.Module) -> list[Any]:
    """The terms of a relaxed model, in its order."""
    return [module for module in model.modules() if type(module).__name__ == "NonEquivariantTerm"]


@torch.no_grad()
def outputs(model: nn.Module, data: tuple[Any, ...]) -> list[Tensor]:
    """Copies of what a model returns."""
    return [part.detach().clone() for part in tensors(model(*data))]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two outputs agree bit for bit; what is not a number equals itself."""
    return len(first) == len(second) and all(
        torch.equal(a, b) or torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
        for a, b in zip(first, second, strict=True)
    )


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative distance of two outputs."""
    gaps = [
        float(torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double()).clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
    ]
    return max(gaps)


def elements_of(case: Case) -> st.SearchStrategy[Tensor]:
    """Elements of the case's group."""
    return testing.elements(case.symmetry().group)


@cache
def _plain(case: Case) -> nn.Module:
    return case.model()


@cache
def _relaxed(case: Case, complement: bool, gate: bool) -> nn.Module:
    return relax(case, case.model(), complement=complement, gate=gate)


@cache
def _adapter(case: Case) -> ce.adapters.Adapter | None:
    return case.adapter and case.adapter()


@cache
def _start(case: Case) -> dict[str, Tensor]:
    with default_dtype(case.dtype):
        state = case.model().state_dict()
    return {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
