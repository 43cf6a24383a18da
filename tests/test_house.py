"""The house rules: rooms import upwards only, the front door loads nothing optional, and the public surface is pinned.

After a wanted change of the public surface: `python -m tests.test_house` rewrites `SURFACE`; read the difference.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import constrained_equiv as ce

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "constrained_equiv"

# Every file of the package, in the order in which it may be imported: a file imports only files above it.
ORDER = """
    errors _table _constants _tensors schedules groups representations intertwiners kernels actions _symmetry
    _verify _lie _trace _inner _findings _audit _certificate
    _terms _stacks
    adapters._base adapters._linear adapters._vector_neurons adapters._e3nn adapters._escnn adapters
    _relax constraints _dual _options _levels _engine _optim _finalize presets monitor
    testing
"""
ROOMS = ORDER.split()

OPTIONAL = ("e3nn", "escnn", "hypothesis", "matplotlib", "pytest", "lightning", "accelerate", "tensorboard", "scipy")

SURFACE = """
constrained_equiv.ConstrainedOptimizer(base, *constraints, formulation='augmented_lagrangian', penalty=1.0,
    penalty_growth=1.0, dual='sgd', dual_lr=None, multiplier=None, order='dual-primal', enforce='multipliers',
    at_zero='clear', on_nonfinite='ignore')
constrained_equiv.Report(layers, output_change, error_before, error_after, certificate, recalibrated, notes)
constrained_equiv.Symmetry(group, inputs, outputs)
constrained_equiv.actions
constrained_equiv.adapters
constrained_equiv.assert_equivariant(model, inputs, *, symmetry, tolerance=None, samples=8, generator=None)
constrained_equiv.assert_equivariant_at(model, inputs, element, *, symmetry, tolerance=None)
constrained_equiv.attach(optimizer, *constraints, formulation='augmented_lagrangian', penalty=1.0, penalty_growth=1.0,
    dual='sgd', dual_lr=None, multiplier=None, order='dual-primal', enforce='multipliers', at_zero='clear',
    on_nonfinite='ignore')
constrained_equiv.audit(model, inputs, *, symmetry, pipeline=(), layers=None, tolerance=None, samples=2,
    generator=None)
constrained_equiv.constraints
constrained_equiv.disabled(model)
constrained_equiv.equivariance_error(model, inputs, *, symmetry, samples=8, generator=None)
constrained_equiv.equivariance_report(model, inputs, *, symmetry, tolerance=None, samples=8, generator=None)
constrained_equiv.errors
constrained_equiv.finalize(model, *, optimizer=None, batches=None, forward=None, symmetry=None, fold=False,
    atol=0.001, lipschitz=None, on_violation='raise')
constrained_equiv.groups
constrained_equiv.intertwiners
constrained_equiv.lie_derivative(model, inputs, *, symmetry, name='')
constrained_equiv.lie_derivatives(model, inputs, *, symmetry, layers=None)
constrained_equiv.monitor
constrained_equiv.parameter_groups(model, *, lr, term_lr=None, term_weight_decay=0.0)
constrained_equiv.presets
constrained_equiv.recalibrate(model, batches, *, forward=None)
constrained_equiv.relax(model, *, where=None, adapter=None, complement=True, gate=False, init=0.0,
    evaluate_with_terms=True, generator=None)
constrained_equiv.relaxations(model)
constrained_equiv.representations
constrained_equiv.schedules
constrained_equiv.errors.CheckpointError: ConstrainedEquivError ValueError
constrained_equiv.errors.ConstrainedEquivError: Exception
constrained_equiv.errors.ConstraintError: ConstrainedEquivError ValueError
constrained_equiv.errors.EquivarianceError: ConstrainedEquivError AssertionError
constrained_equiv.errors.NonFiniteError: ConstrainedEquivError FloatingPointError
constrained_equiv.errors.RelaxationError: ConstrainedEquivError ValueError
constrained_equiv.errors.RepresentationError: ConstrainedEquivError ValueError
constrained_equiv.errors.ScheduleError: ConstrainedEquivError ValueError
constrained_equiv.errors.SerializationError: ConstrainedEquivError TypeError
constrained_equiv.errors.ViolationError: ConstrainedEquivError RuntimeError
constrained_equiv.schedules.Joined(schedules, boundaries)
constrained_equiv.schedules.Ramp(start, end, steps, shape='linear', rate=1.0)
constrained_equiv.schedules.as_schedule(level)
constrained_equiv.schedules.constant(value)
constrained_equiv.schedules.cosine(start, end, steps, *, steps_per_epoch=1)
constrained_equiv.schedules.exponential(start, end, steps, *, rate=5.0, steps_per_epoch=1)
constrained_equiv.schedules.final_value(schedule, step)
constrained_equiv.schedules.join(schedules, boundaries)
constrained_equiv.schedules.linear(start, end, steps, *, steps_per_epoch=1)
constrained_equiv.schedules.triangle(steps, *, peak=1.0, steps_per_epoch=1)
constrained_equiv.schedules.value_at(schedule, step)
constrained_equiv.groups.E3()
constrained_equiv.groups.Group(name, degree, algebra, generators, draw, order=None, factors=(), fingerprint=0)
constrained_equiv.groups.O13()
constrained_equiv.groups.O2()
constrained_equiv.groups.O3()
constrained_equiv.groups.SO13()
constrained_equiv.groups.SO2()
constrained_equiv.groups.SO3()
constrained_equiv.groups.close_under_products(generators, identity, *, most=10000)
constrained_equiv.groups.cyclic(order)
constrained_equiv.groups.dihedral(order)
constrained_equiv.groups.factor_of(group, element, index)
constrained_equiv.groups.fingerprint(matrices)
constrained_equiv.groups.matrix_group(name, *, algebra=None, generators=None, draw=None)
constrained_equiv.groups.product(*factors)
constrained_equiv.groups.require_subgroup(subgroup, group)
constrained_equiv.groups.symmetric(points)
constrained_equiv.groups.translations(dimension)
constrained_equiv.representations.Atom(name, dim, matrix, kind='matrix', fingerprint=0)
constrained_equiv.representations.Block(multiplicity, atom, layout='mul_ir')
constrained_equiv.representations.Representation(group, blocks)
constrained_equiv.representations.as_representation(value, *, group)
constrained_equiv.representations.defining(group, *, channels=1, layout='mul_ir')
constrained_equiv.representations.every_pair(outputs, inputs)
constrained_equiv.representations.frequency(k, *, group, channels=1, layout='mul_ir')
constrained_equiv.representations.from_function(group, name, dim, matrix, *, channels=1, layout='mul_ir')
constrained_equiv.representations.from_matrices(group, name, generators, *, channels=1, layout='mul_ir')
constrained_equiv.representations.irreps(text, *, group=None, layout='mul_ir')
constrained_equiv.representations.lift(representation, group, index)
constrained_equiv.representations.permutation(points, *, channels=1, order=1, layout='ir_mul')
constrained_equiv.representations.regular(group, *, channels=1, layout='mul_ir')
constrained_equiv.representations.restrict(representation, subgroup)
constrained_equiv.representations.rotation_generators(degree)
constrained_equiv.representations.trivial(dim, *, group)
constrained_equiv.representations.vectors(channels, *, layout='mul_ir', group=None)
constrained_equiv.representations.wigner_matrix(degree, rotations)
constrained_equiv.intertwiners.Intertwiners(inputs, outputs)
constrained_equiv.intertwiners.MapBlock(name, places, equivariant)
constrained_equiv.intertwiners.Projection
constrained_equiv.intertwiners.intertwiners(inputs, outputs, *, group=None)
constrained_equiv.kernels.Kernels(shape, outputs, inputs, local, transposed=False)
constrained_equiv.kernels.LocalKernels(digest, dims, rank, orbits, basis, generators, parts=())
constrained_equiv.kernels.averaged(outputs, inputs, moves, generators)
constrained_equiv.kernels.orbits_of(outputs, inputs, moves)
constrained_equiv.kernels.permuted(points, matrices)
constrained_equiv.kernels.spanned(samples, orbits=())
constrained_equiv.actions.along(representation, axis)
constrained_equiv.actions.chain(*actions)
constrained_equiv.actions.disc(images)
constrained_equiv.actions.feature_maps(representation)
constrained_equiv.actions.interpolation_error(images, elements)
constrained_equiv.actions.permute(*axes)
constrained_equiv.actions.pixels(element, tensor)
constrained_equiv.actions.points(element, tensor)
constrained_equiv.actions.relabel(element, tensor)
constrained_equiv.actions.through(group, index, action)
constrained_equiv.actions.vectors(element, tensor)
constrained_equiv.adapters.Adapter(name, matches, site, methods, fold=None, refresh=None)
constrained_equiv.adapters.Methods
constrained_equiv.adapters.Site(projection, shape, rows, inputs, outputs, like, plan=None)
constrained_equiv.adapters.find(layer)
constrained_equiv.adapters.linear(inputs, outputs, *, axes=(-1,), group=None)
constrained_equiv.adapters.vector_neurons(axis=1)
constrained_equiv.constraints.Constraint(measure, terms, level, type='inequality', slack=None)
constrained_equiv.constraints.Measure(name, values, pull, target='weight', part='whole', per='layer', slope=None,
    synchronise=None, homogeneous=True)
constrained_equiv.constraints.Penalty(measure, terms, coefficient)
constrained_equiv.constraints.ScaleSchedule(terms, schedule)
constrained_equiv.constraints.Slack(cost, price)
constrained_equiv.constraints.activation(model, *, level, where=None, type='inequality')
constrained_equiv.constraints.custom(model, function, *, name, level, where=None, type='inequality')
constrained_equiv.constraints.gate(model, *, level=0.0, where=None, type='equality')
constrained_equiv.constraints.lie(model, *, level, per='layer', where=None, type='inequality')
constrained_equiv.constraints.lie_measure(per='layer')
constrained_equiv.constraints.norm_shares(coefficients, slopes, values)
constrained_equiv.constraints.penalty(constraint, *, coefficient)
constrained_equiv.constraints.relative(model, *, level, part='whole', per='layer', where=None, type='inequality')
constrained_equiv.constraints.resilient(constraint, *, price, cost='linear')
constrained_equiv.constraints.scale(model, *, schedule, where=None)
constrained_equiv.constraints.subgroup(model, group, *, level, where=None, type='inequality')
constrained_equiv.constraints.weight(model, *, level, part='whole', per='layer', where=None, type='inequality')
constrained_equiv.constraints.weight_measure(part, per='layer')
constrained_equiv.presets.Preset(constraints, options=<_HAS_DEFAULT_FACTORY_CLASS>)
constrained_equiv.presets.gate(model, *, dual_lr=0.001, init=<function>, where=None, adapter=None)
constrained_equiv.presets.ours(model, *, steps, start=0.5, tail=0.2, where=None, adapter=None)
constrained_equiv.presets.ridge(model, *, weight=1.0, where=None, adapter=None)
constrained_equiv.presets.triangle(model, *, steps, coefficient=0.01, norm='activation', init=<function>, where=None,
    adapter=None)
constrained_equiv.monitor.BestModel(model, optimizer, *, higher_is_better=False, device='cpu')
constrained_equiv.monitor.EarlyStopping(optimizer, *, patience, higher_is_better=False)
constrained_equiv.monitor.History(steps, names, values, levels, multipliers, slacks)
constrained_equiv.monitor.Monitor(optimizer, *, every=1)
constrained_equiv.testing.Network(name, model, inputs, symmetry)
constrained_equiv.testing.action_laws(action, values, *, group, tolerance=1e-09)
constrained_equiv.testing.adapter_laws(build, inputs, *, symmetry, adapter=None)
constrained_equiv.testing.assert_equivariant(model, inputs, *, symmetry, tolerance=None, samples=8, generator=None)
constrained_equiv.testing.assert_equivariant_at(model, inputs, element, *, symmetry, tolerance=None)
constrained_equiv.testing.audit(model, inputs, *, symmetry, pipeline=(), layers=None, tolerance=None, samples=2,
    generator=None)
constrained_equiv.testing.elements(group)
constrained_equiv.testing.equivariance_error(model, inputs, *, symmetry, samples=8, generator=None)
constrained_equiv.testing.equivariance_laws(model, inputs, *, symmetry, tolerance=None)
constrained_equiv.testing.equivariance_report(model, inputs, *, symmetry, tolerance=None, samples=8, generator=None)
constrained_equiv.testing.features(representation, *, shape=(4,), dtype=<dtype>)
constrained_equiv.testing.field_types(gspace, *, max_fields=3)
constrained_equiv.testing.group_laws(group)
constrained_equiv.testing.groups()
constrained_equiv.testing.irreps(*, max_blocks=3, max_multiplicity=3, max_degree=3, parities='eo')
constrained_equiv.testing.load_profile(name)
constrained_equiv.testing.networks(*, dtype=<dtype>)
constrained_equiv.testing.point_clouds(*, min_points=0, max_points=8, dimension=3, dtype=<dtype>)
constrained_equiv.testing.register_profiles()
constrained_equiv.testing.relaxation_laws(build, inputs, *, symmetry, where=None, adapter=None)
constrained_equiv.testing.representation_laws(representation)
constrained_equiv.testing.representations(group, *, max_blocks=3, max_multiplicity=3, max_degree=3)
constrained_equiv.testing.schedule_laws(schedule, *, steps, end)
constrained_equiv.testing.tensors(shape, *, dtype=<dtype>)
"""


def rooms() -> Iterator[tuple[str, Path]]:
    """Every file of the package but the front door, by its dotted name below the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if name := ".".join(parts[:-1] if parts[-1] == "__init__" else parts):
            yield name, path


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports, wherever it does so; names imported from the package count as its modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {name for name, _ in ROOM_PATHS}
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("constrained_equiv.")
                yield f"constrained_equiv.{inner}" if inner in names else str(node.module)


ROOM_PATHS = list(rooms())


def public_modules() -> list[str]:
    there = {name for name, _ in ROOM_PATHS}
    public = [name for name in ROOMS if name in there and not re.search(r"(^|\.)_", name)]
    return ["constrained_equiv", *(f"constrained_equiv.{name}" for name in public)]


room_files = pytest.mark.parametrize(("name", "path"), ROOM_PATHS, ids=[name for name, _ in ROOM_PATHS])


def place(name: str) -> int:
    """Position of a room; the private files of `testing` share its place."""
    return ROOMS.index("testing" if name.startswith("testing.") else name)


def test_every_file_has_its_place():
    strangers = [name for name, _ in ROOM_PATHS if name not in ROOMS and not name.startswith("testing.")]
    assert not strangers, "put these files into ROOMS, where their imports allow"


@room_files
def test_a_file_imports_only_files_above_it(name, path):
    for imported in imports(parsed(path)):
        if imported.split(".")[0] != "constrained_equiv":
            continue
        assert imported != "constrained_equiv", "the front door only leads in"
        other = imported.removeprefix("constrained_equiv.")
        siblings = name.split(".")[0] == "testing" == other.split(".")[0]
        assert place(other) < place(name) or siblings, f"{name} imports {other}"


@room_files
def test_cooper_is_imported_in_one_place(name, path):
    assert name == "_dual" or not any(imported.split(".")[0] == "cooper" for imported in imports(parsed(path)))


@pytest.mark.parametrize("modules", [["constrained_equiv"], public_modules()], ids=["front door", "every public room"])
def test_importing_loads_no_optional_framework(modules):
    loaded = [module for module in modules if not re.search(r"\.(testing|pytest_plugin)$", module)]
    code = f"import sys, {', '.join(loaded)}; print(*(m for m in {OPTIONAL!r} if m in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_the_front_door_only_re_exports():
    tree = parsed(PACKAGE / "__init__.py")
    allowed = (ast.ImportFrom, ast.Assign, ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert all(hasattr(ce, name) for name in ce.__all__) and len(set(ce.__all__)) == len(ce.__all__)


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_states_its_law(path):
    assert re.search(r"^Laws?:", ast.get_docstring(parsed(path)) or "", re.MULTILINE), "say which law the file keeps"


@room_files
def test_everything_public_is_documented(name, path):
    def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                if ast.get_docstring(node) is None and not re.search(r"overload|\.setter|override", decorators):
                    yield f"{prefix}.{node.name}"
                if isinstance(node, ast.ClassDef):
                    yield from undocumented(node.body, f"{prefix}.{node.name}")

    assert list(undocumented(parsed(path).body, name)) == []


@room_files
def test_assert_narrows_types_and_checks_nothing(name, path):
    if name == "testing._laws":  # laws are tests
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Assert):
            text = ast.unparse(node.test)
            assert re.fullmatch(r"isinstance\([\w.]+, [\w.]+\)|[\w.]+ is not None", text), f"raise an error: {text}"


@room_files
def test_keyword_arguments_are_never_swallowed(name, path):
    """Trap 4: whoever takes **kwargs passes them on."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and node.args.kwarg:
            passed = [k for c in ast.walk(node) if isinstance(c, ast.Call) for k in c.keywords if k.arg is None]
            assert any(ast.unparse(k.value) == node.args.kwarg.arg for k in passed), f"{name}.{node.name}"


def tracked() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git working tree")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_an_absolute_path():
    pattern = re.compile(r"(?:^|[^\w.}/])/(?:work|tmp|home|opt|root|Users|mnt)/|\b[A-Z]:\\\\?\w", re.MULTILINE)
    for path in tracked():
        if path.suffix in (".png", ".npz", ".pt", ".gif", ".pdf"):
            continue
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)} holds {found.group()!r}"


def plain_signature(value: object) -> str:
    """A signature without annotations, so that it reads alike in every version of Python."""
    signature = inspect.signature(value)  # type: ignore[arg-type]

    def plain(parameter: inspect.Parameter) -> inspect.Parameter:
        default = parameter.default
        if default is not parameter.empty and not isinstance(default, int | float | str | tuple | None):
            default = _Named(type(default).__name__)
        return parameter.replace(annotation=parameter.empty, default=default)

    parameters = [plain(parameter) for parameter in signature.parameters.values()]
    return str(inspect.Signature(parameters))


class _Named:
    """Stands for a default that has no short literal."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


def surface() -> Iterator[str]:
    """One line per public name: the functions and classes that a public module defines, or lists in `__all__`."""
    for dotted in public_modules():
        module = importlib.import_module(dotted)
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == dotted and callable(value)
        ]
        for name in sorted(names):
            value = getattr(module, name)
            if inspect.ismodule(value):
                yield f"{dotted}.{name}"
            elif inspect.isclass(value) and issubclass(value, BaseException):
                yield f"{dotted}.{name}: {' '.join(base.__name__ for base in value.__bases__)}"
            elif callable(value) and not (hasattr(value, "__origin__") or getattr(value, "_is_protocol", False)):
                yield f"{dotted}.{name}{plain_signature(value)}"
            else:
                yield f"{dotted}.{name}"


def test_the_public_surface_is_pinned():
    pytest.importorskip("hypothesis")
    found, pinned = set(surface()), set(re.sub(r"\n +", " ", SURFACE).split("\n")[1:-1])
    assert sorted(found - pinned) == [], "new or changed; if wanted: python -m tests.test_house"
    assert sorted(pinned - found) == [], "gone or changed; if wanted: python -m tests.test_house"


if __name__ == "__main__":
    wrap = textwrap.TextWrapper(118, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    here, table = Path(__file__), "".join(wrap.fill(line) + "\n" for line in surface())
    before, after = re.split(
        r'(?<=^SURFACE = """\n)[^"]*(?="""$)', here.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    here.write_text(before + table + after, encoding="utf-8")
