"""What runs on a GPU alone: flash attention in bf16, fused AdamW, a whole step. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from langcell.model.packed import Spans, attend
from langcell.objective.stages import LOSSES
from tests.objective import toy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with bf16 (CUDA)")

HEADS, WIDTH = 4, 32
LR = 1e-3


def spans(queries: list[int], keys: list[int]) -> Spans:
    def offsets(lengths: list[int]) -> Tensor:
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()

    return Spans(offsets(queries), offsets(keys), max(queries), max(keys))


def cuda_spans(spans: Spans) -> Spans:
    return Spans(spans.cu_q_B1.cuda(), spans.cu_k_B1.cuda(), spans.max_q, spans.max_k)


def attended(spans: Spans, tensors: list[Tensor], weight_THD: Tensor) -> tuple[Tensor, ...]:
    """Output and the gradients of queries, keys and values, in float32 on the CPU."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out_THD = attend(*leaves, spans)
    (out_THD.float() * weight_THD.to(out_THD.device)).sum().backward()
    return tuple(x.detach().float().cpu() for x in (out_THD, *(leaf.grad for leaf in leaves)))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([1, 7, 300, 2048, 64, 64], [1, 7, 300, 2048, 64, 64]),  # within: cells
        ([20, 0, 513, 1, 64], [900, 12, 2048, 3, 1]),  # across: texts of a cell over its states; one has none
    ],
)
def test_flash_attention_is_the_reference(queries: list[int], keys: list[int]) -> None:
    """To bf16's 8 bits, forward and backward, against the CPU's path in float32 on the same numbers."""
    torch.manual_seed(0)
    shapes = [(sum(queries), HEADS, WIDTH), (sum(keys), HEADS, WIDTH), (sum(keys), HEADS, WIDTH)]
    rounded = [torch.randn(shape).bfloat16() for shape in shapes]
    weight_THD = torch.randn(shapes[0])
    where = spans(queries, keys)
    reference = attended(where, [x.float() for x in rounded], weight_THD)
    ours = attended(cuda_spans(where), [x.cuda() for x in rounded], weight_THD)
    for name, one, other in zip(("out", "q", "k", "v"), ours, reference, strict=True):
        error = float((one - other).norm() / other.norm())
        assert error < 0.01, (name, error)


def on_cpu() -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of the toy model's second stage in float32, without an engine."""
    stage = toy.stage(2, tau=0.2)
    shares = stage(toy.batch(), 3)
    shares["total"].backward()
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return {name: float(shares[name].detach()) for name in LOSSES[2]}, gradients


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone; one for all tests, since DeepSpeed keeps the first."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def on_gpu(
    precision: str, dropout: float = 0.0, **changed: Any
) -> tuple[dict[str, float], dict[str, Tensor], float]:
    """The same through an engine, and the largest move of a weight."""
    from deepspeed.utils import safe_get_full_grad

    from langcell.train.checkpoint import whole_weights
    from langcell.train.engine import build_engine
    from langcell.train.options import TrainOptions

    train = TrainOptions(micro_batch=8, global_batch=8, text_lr=LR, precision=precision, **changed)  # type: ignore[arg-type]
    stage = toy.stage(2, dropout=dropout, tau=0.2)
    stage.texts = stage.texts.to("cuda")
    engine = build_engine(stage, train, lr=LR, steps=10, device=torch.device("cuda"))
    before = whole_weights(engine)
    shares = engine(toy.batch().to("cuda"), 3)
    engine.backward(shares["total"])
    gradients = {
        name: safe_get_full_grad(p).float().cpu()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }
    engine.step()
    after = whole_weights(engine)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    engine.destroy()
    return {name: float(shares[name].detach()) for name in LOSSES[2]}, gradients, moved


def direction(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    flat, other_flat = (torch.cat([g[name].flatten() for name in sorted(one)]) for g in (one, other))
    return float(torch.cosine_similarity(flat, other_flat, dim=0))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_step_in_bf16_is_the_float32_step(zero: int) -> None:
    """Stage, engine, fused AdamW: losses within 3%, gradients in the same direction, weights moved once."""
    losses, gradients = on_cpu()
    rough, rough_gradients, moved = on_gpu("bf16", zero=zero)
    assert rough == pytest.approx(losses, rel=0.03)
    assert direction(gradients, rough_gradients) > 0.98
    assert 0.5 * LR < moved < 2 * LR


@pytest.mark.usefixtures("group")
def test_a_step_in_float32_is_the_cpu_step() -> None:
    losses, gradients = on_cpu()
    others, other_gradients, _ = on_gpu("fp32")
    assert others == pytest.approx(losses, rel=1e-4)
    assert direction(gradients, other_gradients) > 0.9999


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("option", ["activation_checkpointing", "offload", "compile"])
def test_options_of_the_engine_keep_the_numbers(option: str) -> None:
    """Dropout included."""
    losses, gradients, moved = on_gpu("bf16", 0.1)
    others, other_gradients, other_moved = on_gpu("bf16", 0.1, **{option: True})
    assert others == pytest.approx(losses, rel=0.01)
    assert direction(gradients, other_gradients) > 0.999
    assert other_moved == pytest.approx(moved, rel=0.05)


@pytest.mark.usefixtures("group")
def test_recomputation_saves_memory() -> None:
    def peak(**changed: Any) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        on_gpu("bf16", 0.1, **changed)
        return torch.cuda.max_memory_allocated()

    assert peak(activation_checkpointing=True) < peak()
