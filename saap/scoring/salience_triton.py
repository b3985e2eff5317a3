"""`saap.scoring.salience.channel_sums` as one kernel for a GPU: a tile of ∂L/∂W lives in registers and nowhere else."""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 128, 128  # a program's tile of W


@triton.jit
def _tile_sums(  # type: ignore[no-untyped-def]
    weight, delta, x, signed, element, out_features, in_features, tokens, unscale,
    weight_row, weight_column, delta_sample, delta_token, x_sample, x_token,
    AXIS: tl.constexpr, FISHER: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of one sample: its sums go to signed and element, (samples, tiles across, channels)."""
    sample, block_row, block_column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = block_row * BM + tl.arange(0, BM)
    column = block_column * BN + tl.arange(0, BN)
    gradient = tl.zeros((BM, BN), tl.float32)
    for start in range(0, tokens, BK):
        token = start + tl.arange(0, BK)
        d = tl.load(
            delta + sample * delta_sample + token[None, :] * delta_token + row[:, None],
            mask=(row[:, None] < out_features) & (token[None, :] < tokens),
            other=0.0,
        )
        a = tl.load(
            x + sample * x_sample + token[:, None] * x_token + column[None, :],
            mask=(token[:, None] < tokens) & (column[None, :] < in_features),
            other=0.0,
        )
        gradient = tl.dot(d, a, gradient, input_precision=PRECISION)
    w = tl.load(
        weight + row[:, None].to(tl.int64) * weight_row + column[None, :] * weight_column,
        mask=(row[:, None] < out_features) & (column[None, :] < in_features),
        other=0.0,
    )
    s = gradient * unscale * w.to(tl.float32)
    second = s - 0.5 * s * s
    if AXIS == 0:
        channel, channels, tile, count = row, out_features, block_column, tl.num_programs(2)
    else:
        channel, channels, tile, count = column, in_features, block_row, tl.num_programs(1)
    place = (sample * count + tile) * channels + channel
    tl.store(signed + place, tl.sum(second if FISHER else s, 1 - AXIS), mask=channel < channels)
    tl.store(element + place, tl.sum(tl.abs(second), 1 - AXIS), mask=channel < channels)


def channel_sums(
    weight: torch.Tensor, delta: torch.Tensor, x: torch.Tensor, axis: int, fisher: bool, scale: float
) -> torch.Tensor:
    """As `salience.channel_sums`, which is its oracle; tiles across a channel are added up in a fixed order."""
    if delta.stride(-1) != 1:
        delta = delta.contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    (out_features, in_features), samples = weight.shape, len(delta)
    # samples first: those of a tile run together and find its weights in the cache
    grid = (samples, triton.cdiv(out_features, ROWS), triton.cdiv(in_features, COLUMNS))
    across, channels = (grid[2], out_features) if axis == 0 else (grid[1], in_features)
    whole = x.dtype == torch.float32
    sums = torch.empty(2, samples, across, channels, device=weight.device)
    with torch.cuda.device_of(weight):
        _tile_sums[grid](
            weight, delta, x, sums[0], sums[1], out_features, in_features, x.shape[1], 1.0 / scale,
            *weight.stride(), *delta.stride()[:2], *x.stride()[:2],
            AXIS=axis, FISHER=fisher, PRECISION="ieee" if whole else "tf32",
            BM=ROWS, BN=COLUMNS, BK=32 if whole else 64, num_warps=4 if axis else 8,
        )  # fmt: skip
    return sums.sum(2)
