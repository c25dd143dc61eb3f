"""BatchNorm: one sweep of means and sums of squares, merged in a fixed order, and the affine map that follows."""

import triton
import triton.language as tl

from .primitives import block_offsets, image_offset, load_vector, tile_at, unravel

# Sums of deviations are taken of numbers so much smaller, which costs nothing and no digit: so they are float32 numbers
# wherever x is, in parts of up to 2**15 pixels.
SHRINK = tl.constexpr(2.0**-16)


@triton.jit
def piece_of_sweep(index, first_image, last_image, columns, C, SPLITS, IMAGES, BLOCK_C: tl.constexpr):
    """What a piece of a sweep owns: IMAGES images from n to end, one part in SPLITS of each map, BLOCK_C channels."""
    images, split, block_c = unravel(index, columns, SPLITS)
    n = first_image + images * IMAGES
    offs_c, mask_c = block_offsets(block_c, BLOCK_C, C)
    return n, tl.minimum(n + IMAGES, last_image), split, block_c, offs_c, mask_c


@triton.jit
def bn_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps):
    """mean, rstd, scale, bias of BN(x) = (x - mean) * scale + bias; weight and bias may be absent.

    Not a x + b: that would lose the digits that mean / std has. Where the variance is beyond float32, BN(x) is bias
    whatever x is; without the mean, x - mean does not leave float32 either.
    """
    rstd = tl.rsqrt(load_vector(var_ptr, offs_c, mask_c) + eps)
    mean = tl.where(rstd == 0.0, 0.0, load_vector(mean_ptr, offs_c, mask_c))
    if weight_ptr is not None:
        return mean, rstd, rstd * load_vector(weight_ptr, offs_c, mask_c), load_vector(bias_ptr, offs_c, mask_c)
    else:
        return mean, rstd, rstd, tl.zeros_like(mean)


@triton.jit
def _image_moments(
    x_ptr, split, offs_c, mask_c, HW, tiles_per_split, stride_hw, stride_c,
    WIDE: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations (BLOCK_C) of one part of an image, and its number of pixels.

    Sums of x - shift, where shift is the mean of the first tile: |shift - mean| is at most sqrt(tiles) standard
    deviations, whatever the data (Cauchy-Schwarz), so the deviations keep all but log2(tiles) of their bits, where
    E[x^2] - E[x]^2 loses 2 log2(|mean| / std).
    """
    first = split * tiles_per_split
    pixels = pixels_of_part(split, HW, tiles_per_split, BLOCK_HW)
    offs, mask = tile_at(first, offs_c, mask_c, HW, stride_hw, stride_c, WIDE, BLOCK_HW)
    x = tl.load(x_ptr + offs, mask, 0.0).to(tl.float32) * SHRINK
    shift = tl.sum(x, axis=0) / tl.minimum(pixels, BLOCK_HW)
    deviation = tl.where(mask, x - shift[None, :], 0.0)
    total, squares = deviation, deviation * deviation
    for tile in range(first + 1, tl.minimum(first + tiles_per_split, tl.cdiv(HW, BLOCK_HW))):
        offs, mask = tile_at(tile, offs_c, mask_c, HW, stride_hw, stride_c, WIDE, BLOCK_HW)
        deviation = tl.where(mask, tl.load(x_ptr + offs, mask, 0.0).to(tl.float32) * SHRINK - shift[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    rest = tl.sum(total, axis=0) / pixels
    m2 = _squares_around_mean(tl.sum(squares, axis=0), pixels * rest * rest)
    return (shift + rest) / SHRINK, m2 / (SHRINK * SHRINK), pixels


@triton.jit
def pixels_of_part(split, HW, tiles_per_split, BLOCK_HW: tl.constexpr):
    """Pixels of one part of a map."""
    return tl.minimum(HW - split * tiles_per_split * BLOCK_HW, tiles_per_split * BLOCK_HW)


@triton.jit
def _squares_around_mean(squares, excess):
    """squares - excess, where rounding may leave a constant channel a hair below 0; infinity and NaN stay."""
    return tl.where(squares < float("inf"), tl.where(excess > squares, 0.0, squares - excess), squares)


@triton.jit
def statistics_sweep(
    index, x_ptr, part_ptr, moments_ptr,
    N, C, HW, columns, SPLITS, IMAGES, tiles_per_split, n_pieces, stride_hw, stride_c,
    WIDE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part (N, SPLITS, C): sums over a part of each map, over HW; moments (2, pieces, C): mean and M2 of the piece."""
    n, end, split, _, offs_c, mask_c = piece_of_sweep(index, 0, N, columns, C, SPLITS, IMAGES, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for image in range(n, end):
        image_mean, image_m2, pixels = _image_moments(
            x_ptr + image_offset(image, HW, C), split, offs_c, mask_c, HW, tiles_per_split, stride_hw, stride_c,
            WIDE, BLOCK_HW,
        )  # fmt: skip
        tl.store(part_ptr + tl.cast(image * SPLITS + split, tl.int64) * C + offs_c, image_mean * (pixels / HW), mask_c)
        # Chan, Golub, LeVeque (1983), eq. 1.5: moments of two samples together. Half the difference of two means is a
        # float32 number; its square may be none, where count is 0.
        half = 0.5 * image_mean - 0.5 * mean
        share = pixels / (count + pixels)
        mean += half * (2.0 * share)
        m2 += image_m2 + half * (half * (4.0 * count * share))
        count += pixels
    piece = (index // columns).to(tl.int64)
    tl.store(moments_ptr + piece * C + offs_c, mean, mask_c)
    tl.store(moments_ptr + (n_pieces + piece) * C + offs_c, m2, mask_c)


@triton.jit
def _piece_counts(offs_p, n_pieces, N, HW, SPLITS, IMAGES, tiles_per_split, BLOCK_HW: tl.constexpr):
    """Pixels behind each piece's moments, 0 beyond the last."""
    images = tl.minimum(N - (offs_p // SPLITS) * IMAGES, IMAGES)
    pixels = pixels_of_part(offs_p % SPLITS, HW, tiles_per_split, BLOCK_HW)
    return tl.where(offs_p < n_pieces, images.to(tl.float32) * pixels.to(tl.float32), 0.0)


@triton.jit
def finalize_statistics(
    index, moments_ptr, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, new_running_mean_ptr, new_running_var_ptr,
    N, C, HW, SPLITS, IMAGES, tiles_per_split, n_pieces, momentum,
    BLOCK_HW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of BLOCK_F channels over the batch, and the running statistics that follow."""
    offs_c, mask_c = block_offsets(index, BLOCK_F, C)
    count = tl.maximum(N.to(tl.float32) * HW, 1.0)
    # Differences from the first piece: where all means are equal so is theirs, and the variance is not its rounding.
    # Halves of them are float32 numbers.
    shift = 0.5 * load_vector(moments_ptr, offs_c, mask_c)
    acc = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    for block in range(0, tl.cdiv(n_pieces, BLOCK_P)):
        offs_p, mask_p = block_offsets(block, BLOCK_P, n_pieces)
        pixels = _piece_counts(offs_p, n_pieces, N, HW, SPLITS, IMAGES, tiles_per_split, BLOCK_HW)
        offs, mask = offs_p[:, None].to(tl.int64) * C + offs_c[None, :], mask_p[:, None] & mask_c[None, :]
        acc += (0.5 * load_vector(moments_ptr, offs, mask) - shift[None, :]) * (pixels / count)[:, None]
    mean = 2.0 * (shift + tl.sum(acc, axis=0))
    acc = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    for block in range(0, tl.cdiv(n_pieces, BLOCK_P)):
        offs_p, mask_p = block_offsets(block, BLOCK_P, n_pieces)
        pixels = _piece_counts(offs_p, n_pieces, N, HW, SPLITS, IMAGES, tiles_per_split, BLOCK_HW)
        offs, mask = offs_p[:, None].to(tl.int64) * C + offs_c[None, :], mask_p[:, None] & mask_c[None, :]
        deviation = load_vector(moments_ptr, offs, mask) - mean[None, :]
        m2 = load_vector(moments_ptr + n_pieces.to(tl.int64) * C, offs, mask)
        acc += m2 + deviation * (deviation * pixels[:, None])
    m2 = tl.sum(acc, axis=0)
    tl.store(mean_ptr + offs_c, mean, mask_c)
    tl.store(var_ptr + offs_c, m2 / count, mask_c)
    if running_mean_ptr is not None:
        unbiased = m2 / tl.maximum(count - 1.0, 1.0)
        _update(running_mean_ptr, new_running_mean_ptr, mean, momentum, offs_c, mask_c)
        _update(running_var_ptr, new_running_var_ptr, unbiased, momentum, offs_c, mask_c)


@triton.jit
def _update(running_ptr, new_ptr, batch, momentum, offs_c, mask_c):
    new = load_vector(running_ptr, offs_c, mask_c) * (1.0 - momentum) + batch * momentum
    tl.store(new_ptr + offs_c, new.to(new_ptr.dtype.element_ty), mask_c)
