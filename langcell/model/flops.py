"""What a training step has to compute, and how much of the hardware that is (MFU).

Only matrix products count, at two operations a multiply-add: at 6 layers of 256 with a 25k vocabulary they
are all but a few percent of the work. Nothing that is computed twice counts twice (activation checkpointing,
the pass without gradient of cached gradients, the scores that flash attention computes again), so that MFU
says how fast the *necessary* work goes. The contrastive logits are left out: at 128 x 4,096 rows 1e-4 of it.

Forward, of a step with `Work` as below, an encoder being N layers of width W with F in the feed-forward:

    encoder(T, Q)   N (2 T (4 W^2 + 2 W F) + 4 W Q)                      T tokens, Q sum of squared lengths
    f               encoder(tokens, squares) + 2 views W Z
    MGM             2 genes (W^2 + W V)
    g1              encoder(text_tokens, text_squares) + 2 texts H Z     at the text encoder's N, W = H, F
    g2              encoder(pair_tokens, pair_squares) + 2 pairs H 2
                      + N (2 pair_tokens 2 H^2 + 2 keys 2 W H + 4 H products)

Backward: twice the forward (a product for the gradient of each factor). Where the text layers are locked,
the states of g1 are computed once for the whole table and cost nothing, and in g2 only gradients of
activations flow through them, once the forward, and none below the first cross-attention.

Shape suffixes: B cells, K encoded texts, P pairs, N the counts of `Work`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BertConfig

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s by what a device's name holds, from NVIDIA's data sheets; the first that fits counts."""


@dataclass(frozen=True)
class Work:
    """Counts of one step, over all passes and all lanes; the work of two lanes is their sum.

    tokens, squares: cell tokens, sum of squared lengths; views: cells projected into the joint space; genes:
    positions whose gene is predicted; texts, text_tokens, text_squares: of g1; pairs, pair_tokens,
    pair_squares: of g2's texts; keys: cell states projected to keys and values; products: sum over pairs of
    text tokens x cell tokens.
    """

    tokens: float = 0
    squares: float = 0
    views: float = 0
    genes: float = 0
    texts: float = 0
    text_tokens: float = 0
    text_squares: float = 0
    pairs: float = 0
    pair_tokens: float = 0
    pair_squares: float = 0
    keys: float = 0
    products: float = 0


@dataclass(frozen=True)
class Flops:
    """Operations of a step."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def count_work(
    lengths_B: Tensor,
    genes: int,
    passes: int,
    text_lengths_K: Tensor | None = None,
    pair_lengths_P: Tensor | None = None,
    cell_of_pair_P: Tensor | None = None,
) -> Tensor:
    """The counts of a packed step in the order of `Work`'s fields: float64 [N], on the lengths' device.

    Not yet read, so that ranks can add theirs along with their losses; `Work(*counts_N.tolist())` reads them.
    lengths_B: tokens of each cell; genes: masked positions; passes: through the cell encoder; text_lengths_K:
    of the distinct texts of g1; pair_lengths_P, cell_of_pair_P: text tokens and cell of each pair.
    """
    none = lengths_B.new_zeros(0, dtype=torch.int64)
    cell_B = lengths_B.long()
    text_K = none if text_lengths_K is None else text_lengths_K.long()
    pair_P = none if pair_lengths_P is None else pair_lengths_P.long()
    cell_P = none if cell_of_pair_P is None else cell_of_pair_P
    has_pair_B = torch.zeros_like(cell_B).index_fill(0, cell_P, 1)
    counts = [
        passes * cell_B.sum(),
        passes * (cell_B**2).sum(),
        cell_B.new_tensor(2 * len(cell_B)),
        cell_B.new_tensor(genes),
        cell_B.new_tensor(len(text_K)),
        text_K.sum(),
        (text_K**2).sum(),
        cell_B.new_tensor(len(pair_P)),
        pair_P.sum(),
        (pair_P**2).sum(),
        (cell_B * has_pair_B).sum(),
        (pair_P * cell_B[cell_P]).sum(),
    ]
    return torch.stack(counts).double()


def step_flops(
    work: Work, cell: BertConfig, text: BertConfig, projection: int, *, locked: bool = False
) -> Flops:
    """Operations of forward and backward, by the formula above.

    projection: width Z of the joint space; locked: whether only the projection and the cross-attention of
    the text side train.
    """
    width, hidden, layers = cell.hidden_size, text.hidden_size, text.num_hidden_layers
    cells = sum(_encoder(cell, work.tokens, work.squares)) + 2 * work.views * width * projection
    genes = 2 * work.genes * (width**2 + width * cell.vocab_size)
    z_texts = 2 * work.texts * hidden * projection
    texts = sum(_encoder(text, work.text_tokens, work.text_squares))
    linear, attention = _encoder(text, work.pair_tokens, work.pair_squares)
    maps = 2 * work.pair_tokens * hidden**2  # the query or the output map of one cross-attention
    across = layers * (2 * maps + 4 * work.keys * width * hidden + 4 * hidden * work.products)
    across += 4 * work.pairs * hidden
    if not locked:
        forward = cells + genes + texts + z_texts + linear + attention + across
        return Flops(forward, 2 * forward)
    # The first layer's self-attention stands below all that trains, and so does the input of its queries.
    below = 8 * work.pair_tokens * hidden**2
    through = linear - below + 2 * attention * (layers - 1) / layers
    return Flops(
        forward=cells + genes + z_texts + linear + attention + across,
        backward=2 * (cells + genes) + z_texts + through + 2 * across - maps,
    )


def _encoder(config: BertConfig, tokens: float, squares: float) -> tuple[float, float]:
    """Operations of an encoder's maps, and of its attention."""
    width = config.hidden_size
    maps = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    return config.num_hidden_layers * maps, config.num_hidden_layers * 4 * width * squares


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name (as `torch.cuda.get_device_name` says it), if known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: `flops` in `seconds`, as a share of what devices of `peak` FLOP/s could do."""
    return flops / (seconds * peak)
