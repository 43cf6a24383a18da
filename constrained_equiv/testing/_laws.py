"""Laws: functions that return property tests, so that a test of yours is one line.

    test_my_group = group_laws(my_group)
    test_my_model = equivariance_laws(my_model, inputs, symmetry=my_symmetry)

What enters: what is to be tested. What leaves: a test function without arguments, for pytest or to be called.
Law: each returned test can fail; it raises AssertionError with the smallest case that Hypothesis finds.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, target
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from constrained_equiv._finalize import finalize
from constrained_equiv._relax import disabled, relax, relaxations
from constrained_equiv._symmetry import Symmetry
from constrained_equiv._verify import assert_equivariant_at, call, equivariance_error, leaves, relative_gap
from constrained_equiv.actions import Action
from constrained_equiv.adapters import Adapter
from constrained_equiv.groups import Group, close_under_products
from constrained_equiv.representations import Representation
from constrained_equiv.schedules import Schedule, value_at
from constrained_equiv.testing._strategies import elements

Test = Callable[[], None]


def group_laws(group: Group) -> Test:
    """Test a group: inverses, sampling, and that generators, algebra and order belong together.

    For finite groups every product is in the list of elements, which has the stated order. For Lie groups the algebra
    is closed under brackets, and elements move it into itself: g A g^-1 is in its span.
    """
    found = None if group.order is None or group.order > 2_000 else group.elements()
    span = group.algebra.flatten(1).mT

    @given(elements(group), elements(group), st.integers(0, 2**31 - 1))
    def test(first: Tensor, second: Tensor, seed: int) -> None:
        drawn = group.sample(2, generator=torch.Generator().manual_seed(seed))
        again = group.sample(2, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, again), "sample(generator=) has to repeat"
        assert drawn.shape == (2, group.degree, group.degree) and drawn.dtype == torch.float64
        for element in (first, second, first @ second, *drawn):
            inverse = torch.linalg.inv(element)
            _close(element @ inverse, group.identity, "g g^-1 = 1")
            if found is not None:
                for member in (element, inverse):
                    distance = (found - member).flatten(1).abs().amax(1).min()
                    assert distance < 1e-6, f"not in the list of {group.order} elements of {group}:\n{member}"
            for direction in group.algebra:
                _in_span(element @ direction @ inverse, span, f"g A g^-1 is in the algebra of {group}")
        if found is not None:
            assert len(found) == group.order, f"{group} states order {group.order} and has {len(found)} elements"
            generated = close_under_products(group.generators, group.identity)
            assert len(generated) == group.order, f"the generators of {group} generate {len(generated)} elements"
        for a in group.algebra:
            for b in group.algebra:
                _in_span(a @ b - b @ a, span, f"[A, B] is in the algebra of {group}")

    return test


def representation_laws(representation: Representation) -> Test:
    """Test a representation: rho(1) = 1, rho(g h) = rho(g) rho(h), rho(exp A) = exp(d rho(A)), and `act` uses rho."""
    group = representation.group

    @given(elements(group), elements(group))
    def test(first: Tensor, second: Tensor) -> None:
        rho = representation.matrix
        _close(rho(group.identity), torch.eye(representation.dim, dtype=torch.float64), "rho(1) = 1")
        _close(rho(first @ second), rho(first) @ rho(second), "rho(g h) = rho(g) rho(h)")
        features = torch.linspace(-1, 1, 2 * representation.dim, dtype=torch.float64).view(2, -1)
        _close(representation.act(first, features), features @ rho(first).mT, "act(g, x) = rho(g) x")
        for direction in group.algebra:
            moved = torch.linalg.matrix_exp(representation.derivative(direction))
            _close(rho(torch.linalg.matrix_exp(direction)), moved, "rho(exp A) = exp(d rho(A))")

    return test


def action_laws(
    action: Action | Representation, values: SearchStrategy[Any], *, group: Group, tolerance: float = 1e-9
) -> Test:
    """Test an action: act(1, x) = x and act(g, act(h, x)) = act(g h, x), with shapes kept.

    Args:
        action: `(element, tensor) -> tensor`, or a representation on the last axis.
        values: strategy of what it acts on, for example `point_clouds()`.
        group: whose elements act.
        tolerance: relative; actions that interpolate keep the law only roughly.
    """
    act = action.act if isinstance(action, Representation) else action

    @given(elements(group), elements(group), values)
    def test(first: Tensor, second: Tensor, value: Tensor) -> None:
        _close(act(group.identity, value), value, "act(1, x) = x", tolerance)
        _close(act(first, act(second, value)), act(first @ second, value), "act(g, act(h, x)) = act(g h, x)", tolerance)

    return test


def schedule_laws(schedule: Schedule, *, steps: int, end: float) -> Test:
    """Test a schedule: a finite number at every step, always the same, and exactly `end` from `steps` on."""

    @given(st.integers(0, 3 * steps + 10), st.integers(0, 10**9))
    def drawn(step: int, later: int) -> None:
        value = value_at(schedule, step)
        assert value == value_at(schedule, step), f"{schedule} changed its value at step {step}"
        last = value_at(schedule, steps + later)
        assert last == end, f"{schedule} is {last} at step {steps + later}: expected exactly {end} from {steps} on"

    def test() -> None:
        for step in range(min(steps, 10_000)):
            value_at(schedule, step)
        drawn()

    return test


def equivariance_laws(
    model: Callable[..., Any],
    inputs: Any,
    *,
    symmetry: Symmetry,
    tolerance: float | None = None,
) -> Test:
    """Test that a model is equivariant at drawn group elements, the identity and special angles included.

    Args:
        model: as for `assert_equivariant`; put it in evaluation mode first.
        inputs: an input, or a strategy of inputs.
        symmetry: the group and its actions.
        tolerance: as for `assert_equivariant`.

    Example:
        >>> from constrained_equiv import groups
        >>> from constrained_equiv.testing import point_clouds
        >>> vectors = Symmetry(groups.O3(), "1x1o", "1x1o")
        >>> equivariance_laws(lambda x: x * x.norm(), point_clouds(min_points=1), symmetry=vectors)()
    """
    drawn = inputs if isinstance(inputs, SearchStrategy) else st.just(inputs)

    @given(elements(symmetry.group), drawn)
    def test(element: Tensor, value: Any) -> None:
        assert_equivariant_at(model, value, element, symmetry=symmetry, tolerance=tolerance)

    return test


def adapter_laws(
    build: Callable[[], nn.Module], inputs: Any, *, symmetry: Symmetry, adapter: Adapter | None = None
) -> Test:
    """Test the adapter of one layer: its projection, and how the term enters the forward pass.

    P P = P and the complement is orthogonal to P; the layer is equivariant with the term at zero and, if P W = W, with
    the term on; with W in the complement it is not, the output is affine in W, and the term off gives the layer's own
    output bit for bit.

    Args:
        build: makes the layer, or a module that holds it and no other layer with a built-in adapter.
        inputs: as for `assert_equivariant`.
        symmetry: of the layer.
        adapter: how the module itself is relaxed; by default the layer's built-in one.
    """

    @given(st.integers(0, 2**31 - 1))
    def test(seed: int) -> None:
        plain = build().eval()
        layer = copy.deepcopy(plain)
        itself = None if adapter is None else lambda name, module: module is layer
        relax(layer, where=itself, adapter=adapter, complement=False)
        (found,) = relaxations(layer)
        term, projection = found.term, found.site.projection
        drawn = torch.randn(term.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        free = drawn.to(term.weight)
        broken = projection.complement_(free.clone())
        kept = free - broken
        allowed = 1e-9 if free.dtype == torch.float64 else 1e-4
        _close(projection.complement_(broken.clone()), broken, "(1 - P)(1 - P) W = (1 - P) W", allowed)
        assert abs(float((broken * kept).sum())) <= allowed * float(free.square().sum()), (
            "(1 - P) W is orthogonal to P W"
        )
        outputs = [_with_weight(layer, weight, inputs) for weight in (0 * free, kept, broken, free)]
        _same(outputs[0], leaves(call(plain, inputs)), "a zero term changes nothing", allowed)
        for place, base in outputs[0].items():
            parts = outputs[1][place] + outputs[2][place] - base
            _close(outputs[3][place], parts, "the output is affine in W", 100 * allowed)
        with torch.no_grad():
            term.weight.copy_(kept)
        assert equivariance_error(layer, inputs, symmetry=symmetry) <= 100 * allowed, "P W is equivariant"
        if float(torch.linalg.vector_norm(broken)) > 1e-3:
            with torch.no_grad():
                term.weight.copy_(broken)
            error = equivariance_error(layer, inputs, symmetry=symmetry)
            assert error > 1e-3, f"W - P W breaks the symmetry: found an error of {error:.2g}"
        with disabled(layer):
            for place, value in leaves(call(layer, inputs)).items():
                assert torch.equal(value, leaves(call(plain, inputs))[place]), "disabled is the layer's own forward"

    return test


def relaxation_laws(
    build: Callable[[], nn.Module],
    inputs: Any,
    *,
    symmetry: Symmetry,
    where: Callable[[str, nn.Module], bool] | None = None,
    adapter: Adapter | None = None,
) -> Test:
    """Test the way there and back on a model: relax, switch off, copy, finalize.

    Keys, values, classes and outputs return bit for bit; the terms break the symmetry while they are on, and each of
    them gets a gradient.

    Args:
        build: makes the model, in evaluation mode or without randomness.
        inputs: as for `assert_equivariant`.
        symmetry: of the model.
        where: as for `ce.relax`.
        adapter: as for `ce.relax`.
    """

    @given(st.integers(0, 2**31 - 1), st.booleans())
    def test(seed: int, complement: bool) -> None:
        plain = build().eval()
        before = leaves(call(plain, inputs))
        error = equivariance_error(plain, inputs, symmetry=symmetry)
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(plain)
        classes = [type(module) for module in model.modules()]
        relax(model, where=where, adapter=adapter, complement=complement, init=0.5, generator=generator)
        target(_log(equivariance_error(model, inputs, symmetry=symmetry)), label="error while relaxed")
        assert equivariance_error(model, inputs, symmetry=symmetry) > max(1e-3, 10 * error), "terms break the symmetry"
        with disabled(model):
            _equal(leaves(call(model, inputs)), before, "disabled")
        _equal(leaves(call(copy.deepcopy(model), inputs)), leaves(call(model, inputs)), "a deep copy")
        total = [value.square().sum() for value in _outputs(call(model, inputs))]
        if any(value.requires_grad for value in total):
            weights = [r.term.weight for r in relaxations(model)]
            slopes = torch.autograd.grad(torch.stack([v.double() for v in total]).sum(), weights, allow_unused=True)
            missing = [r.name for r, slope in zip(relaxations(model), slopes, strict=True) if slope is None]
            assert not missing, f"no gradient reaches the terms of {missing}"
        finalize(model, on_violation="drop")
        _equal(leaves(call(model, inputs)), before, "finalized")
        kept, found = plain.state_dict(), model.state_dict()
        assert list(kept) == list(found), f"keys changed: {sorted(set(kept) ^ set(found))}"
        changed = [key for key in kept if isinstance(kept[key], Tensor) and not torch.equal(kept[key], found[key])]
        assert not changed, f"values changed: {changed}"
        assert [type(module) for module in model.modules()] == classes, f"classes changed in\n{model}"

    return test


def _with_weight(layer: nn.Module, weight: Tensor, inputs: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        relaxations(layer)[0].term.weight.copy_(weight)
        return {place: value.clone() for place, value in leaves(call(layer, inputs)).items()}


def _outputs(value: Any) -> list[Tensor]:
    """The tensors of an output, with their graph."""
    parts = torch.utils._pytree.tree_leaves(value)
    tensors = [part if isinstance(part, Tensor) else getattr(part, "tensor", None) for part in parts]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def _close(found: Tensor, expected: Tensor, law: str, tolerance: float = 1e-9) -> None:
    assert found.shape == expected.shape, f"{law}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    gap = float((found - expected).abs().max()) if found.numel() else 0.0
    assert gap <= tolerance * largest, f"{law} fails by {gap:.2g}, of entries up to {largest:.2g}"


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], law: str, tolerance: float) -> None:
    for place, value in expected.items():
        gap = relative_gap(found[place], value, value)
        assert gap <= tolerance, f"{law}: output {place or 'tensor'} differs by {gap:.2g}"


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for place, value in expected.items():
        assert torch.equal(found[place], value), f"{what}: output {place or 'tensor'} is not the same bit for bit"


def _in_span(matrix: Tensor, span: Tensor, law: str) -> None:
    flat = matrix.flatten()
    rest = flat - span @ torch.linalg.lstsq(span, flat[:, None]).solution[:, 0]
    assert float(rest.abs().max()) <= 1e-8 * max(1.0, float(flat.abs().max())), f"{law}: found\n{matrix}"


def _log(error: float) -> float:
    return float(torch.tensor(error).clamp(1e-12, 1e12).log10())
