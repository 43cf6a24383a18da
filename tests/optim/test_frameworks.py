"""Lightning and Accelerate drive the wrapped optimizer as they drive its base, and save all of it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import constrained_equiv as ce
from tests.optim.test_setups import LEVEL, Net, data, loss, same

FALLING = ce.schedules.linear(0.2, 0.02, 6)
ROWS, BATCH = 32, 8


def loader() -> DataLoader[Any]:
    torch.manual_seed(5)
    return DataLoader(TensorDataset(*data(ROWS)), batch_size=BATCH)


def wrapped(model: nn.Module, level: Any = FALLING) -> ce.ConstrainedOptimizer:
    base = torch.optim.Adam(ce.parameter_groups(model, lr=0.02))
    return ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=level))


def by_hand(
    model: nn.Module, epochs: int, *, accumulate: int = 1, clip: float | None = None, gamma: float = 1.0
) -> Any:
    """The loop that the frameworks run for us; the rate falls by `gamma` after every epoch."""
    optimizer = wrapped(model)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            (loss(model, x, y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= gamma
    return optimizer


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.readings()[2:], other.readings()[2:], strict=True))


# --- Lightning ---


def lightning_module(lightning: Any, *, manual: bool = False, gamma: float = 1.0, attach: bool = False) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.net = Net()
            self.automatic_optimization = not manual
            self.handle: Any = None

        def training_step(self, batch: Any, _: int) -> Any:
            value = loss(self.net, *batch)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(value)
                optimizer.step()
                return None
            return value

        def validation_step(self, batch: Any, _: int) -> None:
            with ce.disabled(self):
                self.log("validation", loss(self.net, *batch))
                assert not any(r.term.active for r in ce.relaxations(self))

        def configure_optimizers(self) -> Any:
            if attach:
                optimizer = torch.optim.Adam(ce.parameter_groups(self.net, lr=0.02))
                self.handle = ce.attach(optimizer, ce.constraints.weight(self.net, level=FALLING))
            else:
                self.handle = optimizer = wrapped(self.net)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)]

    return Module()


def trainer(lightning: Any, folder: Path, **options: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0, **quiet, **options)


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("pytorch_lightning")


quiet = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.*treespec.*:FutureWarning",
)


@quiet
@pytest.mark.parametrize("route", ["automatic", "manual", "attached"])
def test_lightning_takes_the_same_steps(lightning: Any, route: str, tmp_path: Path) -> None:
    """Manual optimization leaves schedulers to the user; automatic optimization steps them after every epoch."""
    gamma = 1.0 if route == "manual" else 0.5
    module = lightning_module(lightning, manual=route == "manual", gamma=gamma, attach=route == "attached")
    other = copy.deepcopy(module.net)
    run = trainer(lightning, tmp_path, max_epochs=2)
    run.fit(module, loader(), loader())
    expected = by_hand(other, 2, gamma=gamma)
    assert module.handle.finished_steps == expected.finished_steps == 2 * ROWS // BATCH
    assert same(module.net, other) and equal(module.handle, expected)


@quiet
def test_lightning_accumulates_and_clips_the_task(lightning: Any, tmp_path: Path) -> None:
    module = lightning_module(lightning)
    other = copy.deepcopy(module.net)
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    trainer(lightning, tmp_path, **options).fit(module, loader())
    expected = by_hand(other, 2, accumulate=2, clip=0.05)
    assert module.handle.finished_steps == ROWS // BATCH
    assert same(module.net, other, 1e-12)
    assert torch.allclose(module.handle.readings().multipliers, expected.readings().multipliers, rtol=0, atol=1e-12)


@quiet
@pytest.mark.parametrize("attach", [False, True])
def test_a_lightning_checkpoint_resumes(lightning: Any, attach: bool, tmp_path: Path) -> None:
    """Saved by the trainer after one epoch, restored by another trainer: as if never stopped."""
    whole, first, second = (lightning_module(lightning, gamma=0.5, attach=attach) for _ in range(3))
    trainer(lightning, tmp_path, max_epochs=2).fit(whole, loader())
    run = trainer(lightning, tmp_path, max_epochs=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = trainer(lightning, tmp_path, max_epochs=2)
    again.fit(second, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert second.handle.finished_steps == whole.handle.finished_steps
    assert same(second.net, whole.net) and equal(second.handle, whole.handle)
    assert (whole.handle.readings().multipliers > 0).any()
    if not attach:
        report = ce.finalize(second, optimizer=again.optimizers[0], on_violation="drop")
        assert len(report.layers) == 2 and not ce.relaxations(second)


@quiet
def test_lightning_in_bfloat16(lightning: Any, tmp_path: Path) -> None:
    module = lightning_module(lightning)
    module.net.float()
    batches = DataLoader(TensorDataset(*data(ROWS, torch.float32)), batch_size=BATCH)
    trainer(lightning, tmp_path, max_epochs=3, precision="bf16-mixed").fit(module, batches)
    now = module.handle.readings()
    assert now.multipliers.dtype == torch.float32 and (now.multipliers > 0).any()
    assert not torch.equal(now.multipliers.bfloat16().float(), now.multipliers)


# --- Accelerate ---


@pytest.fixture
def accelerate() -> Iterator[Any]:
    framework = pytest.importorskip("accelerate")
    yield framework
    framework.state.AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(accelerate: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(3)
    model = Net()
    run = accelerate.Accelerator(cpu=True, **options)
    return run, *run.prepare(model, wrapped(model), loader())


def one_epoch(run: Any, model: Any, optimizer: Any, batches: Any, clip: float | None = None) -> None:
    for x, y in batches:
        with run.accumulate(model):
            run.backward(loss(model, x, y))
            if clip is not None and run.sync_gradients:
                run.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_takes_the_same_steps(accelerate: Any, accumulate: int) -> None:
    run, model, optimizer, batches = accelerated(accelerate, gradient_accumulation_steps=accumulate)
    other = copy.deepcopy(run.unwrap_model(model))
    for _ in range(2):
        one_epoch(run, model, optimizer, batches, clip=0.05)
    expected = by_hand(other, 2, accumulate=accumulate, clip=0.05)
    own = optimizer.optimizer
    assert isinstance(own, ce.ConstrainedOptimizer) and own.finished_steps == expected.finished_steps
    assert same(run.unwrap_model(model), other, 1e-12)
    assert torch.allclose(own.readings().multipliers, expected.readings().multipliers, rtol=0, atol=1e-12)


def test_accelerate_saves_and_loads(accelerate: Any, tmp_path: Path) -> None:
    run, model, optimizer, batches = accelerated(accelerate)
    one_epoch(run, model, optimizer, batches)
    run.save_state(str(tmp_path))
    one_epoch(run, model, optimizer, batches)
    again, other, resumed, batches = accelerated(accelerate)
    again.load_state(str(tmp_path))
    assert resumed.optimizer.finished_steps == ROWS // BATCH
    one_epoch(again, other, resumed, batches)
    assert same(run.unwrap_model(model), again.unwrap_model(other))
    assert equal(optimizer.optimizer, resumed.optimizer)
    assert (optimizer.optimizer.readings().multipliers > 0).any()


def test_accelerate_in_bfloat16(accelerate: Any) -> None:
    run = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = Net(torch.float32)
    model, optimizer = run.prepare(model, wrapped(model, LEVEL))
    x, y = data(dtype=torch.float32)
    for _ in range(4):
        run.backward(loss(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    found: Tensor = optimizer.optimizer.readings().multipliers
    assert found.dtype == torch.float32 and (found > 0).all()
    assert not torch.equal(found.bfloat16().float(), found)
