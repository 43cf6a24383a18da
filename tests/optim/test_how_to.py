"""The set-ups that the page on them shows run as it shows them; what needs nothing else runs with all pages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.pages import HOW_TO, blocks, execute, run

PAGE = HOW_TO / "training-setups.md"


def test_the_page_finalizes_what_it_trained() -> None:
    names = run(PAGE)
    assert not names["ce"].relaxations(names["model"])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def needing(line: str, **names: Any) -> dict[str, Any]:
    """Run the block with this line."""
    for _, text in blocks(PAGE, "testcode")[:2]:
        execute(text, PAGE, names)
    (text,) = (text for _, text in blocks(PAGE, "python") if line in text)
    execute(text, PAGE, names)
    return names


def test_a_compiled_model() -> None:
    assert "compiled" in needing("torch.compile")


def test_fsdp(group: None) -> None:
    found = needing("fully_shard(model)")
    assert all(type(p).__name__ == "DTensor" for p in found["model"].parameters())


def test_a_distributed_checkpoint(group: None, tmp_path: Path) -> None:
    found = needing("dcp.save", folder=str(tmp_path / "checkpoint"))
    assert set(found["state"]) == {"model", "optimizer", "constraints"}


@pytest.mark.filterwarnings(
    "ignore:.*treespec.*:FutureWarning", "ignore:The '.*_dataloader' does not have many workers"
)
def test_lightning() -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, **dict.fromkeys(quiet, False))
    batches = torch.randn(6, 16, 4, 2)
    loader = DataLoader(TensorDataset(batches, batches.roll(1, 2)), batch_size=None)
    found = needing("LightningModule", trainer=trainer, loader=loader)
    assert trainer.optimizers[0].finished_steps == 6 and not found["ce"].relaxations(found["module"])


def test_accelerate() -> None:
    pytest.importorskip("accelerate")
    found = needing("Accelerator")
    assert found["optimizer"].optimizer.finished_steps == 6 and not found["ce"].relaxations(found["model"])
