"""`bench.py step`: its rows and figures, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from langcell.bench import step
from langcell.bench.step_work import gradient_difference


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--repeats", "0"], "--repeats is 0"),
        (["--micro_batch", "1"], "--micro_batch is 1"),
        (["--cells", "20", "--micro_batch", "16"], "--cells is 20; the steps take 32"),
        (["--device", "tpu"], "device"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    argv: list[str], told: str, refused: Callable[[list[str]], str]
) -> None:
    assert told in refused(["step", *argv])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(refused: Callable[[list[str]], str]) -> None:
    assert "PyTorch sees no GPU" in refused(["step", "--device", "cuda"])


def test_gradients_that_are_rounding_do_not_count() -> None:
    theirs = {"weight": torch.tensor([3.0, 4.0]), "key.bias": torch.tensor([1e-9])}
    ours = {"weight": torch.tensor([3.0, 4.01]), "key.bias": torch.tensor([-1e-9])}
    found = gradient_difference(ours, theirs)
    assert found["gradient_difference"] == pytest.approx(0.002, rel=1e-3)
    assert found["worst_gradient_difference"] == pytest.approx(0.002, rel=1e-3)


@pytest.mark.slow
def test_a_small_benchmark(
    measured: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["step", "--cells", "300", "--micro_batch", "2", "--repeats", "1", "--compared_cells", "2"]
    summary = measured(argv, ["stage1", "stage2"])
    details = summary["details"]
    assert details["gpu"] == "not measured"
    first, second = (details["sizes"]["6x256"][stage] for stage in ("1", "2"))
    assert set(first["alone"]) == {"packing", "masked_projection", "shared_view"}
    assert set(second["alone"]) == {"packing", "shared_keys", "distinct_texts"}
    assert first["alone"]["shared_view"]["allowed"] > 1.2
    for found in (first, second):
        assert found["ours"]["allowed"] > found["alone"]["packing"]["allowed"] > 1
        assert found["equal"]["loss_difference"] < 1e-4
        assert found["lengths"]["cells"]["n"] == 300
    assert "shared_keys" in capsys.readouterr().out
    assert step.table(summary).count("\n") > 12
