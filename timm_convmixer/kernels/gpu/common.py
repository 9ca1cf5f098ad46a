"""What the kernels share: the product on the tensor cores, the activation and its derivative, tiles of row groups."""
import triton
import triton.language as tl

# Triton's interpreter keeps bf16 as bare bits and would multiply those; a kernel must know that it is interpreted.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Row groups of a tile that is computed tap by tap: the fewest of any tile, because this rare way should hold few
# registers.
TAPS_M: tl.constexpr = tl.constexpr(16)

# Columns of ones that a matrix is multiplied by for the sums of its rows: the fewest that a product takes.
ONES = 16


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in fp32. ``PRECISION`` is as of ``tl.dot`` and matters for fp32 operands only."""
    if INTERPRETED:
        # Exact: every fp16 and bf16 number is an fp32 number.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def normal_cdf(x):
    """The standard normal distribution function, by the error function."""
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def normal_cdf_for_half(x):
    """The standard normal distribution function to within 3e-6, for results that are about to be rounded to 16 bits.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.28: erfc(z) = (1 + a1 z + ... + a6 z^6)^-16 for z >=
    0, with an error of at most 3e-7; the rest is rounding, and the whole under a hundredth of what rounding to fp16
    costs. It takes less than half the instructions of the exact error function, and the epilogue is not free: the
    tensor cores do the products of an output element in about the time its activation takes.
    """
    # The factor sqrt(1/2) of erf(x / sqrt(2)) is folded into the published coefficients, a_n * 2^(-n/2).
    z = tl.abs(x)
    poly = tl.fma(z, 5.382975e-06, 4.8890635e-05)
    poly = tl.fma(z, poly, 3.8003575e-05)
    poly = tl.fma(z, poly, 0.0032776264)
    poly = tl.fma(z, poly, 0.0211410061)
    poly = tl.fma(z, poly, 0.0498673470)
    poly = tl.fma(z, poly, 1.0)
    # By the reciprocal square root, one instruction, where a division takes seven (for operands of any size).
    tail = tl.math.rsqrt(poly)
    tail = tail * tail
    tail = tail * tail
    tail = tail * tail
    tail = tail * tail
    tail = 0.5 * tail * tail
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def activate(x, ACT: tl.constexpr, HALF: tl.constexpr):
    """The activation by name; ``HALF`` says that the result will be stored in 16 bits."""
    if ACT == 'gelu':
        # x * cdf(x), whichever way: an infinity must give what PyTorch gives, inf for +inf and NaN for -inf.
        if HALF:
            x = x * normal_cdf_for_half(x)
        else:
            x = x * normal_cdf(x)
    elif ACT == 'relu':
        # A comparison, and not tl.maximum, so that NaN passes as it does in torch.relu.
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def activate_backward(grad, x, ACT: tl.constexpr, HALF: tl.constexpr):
    """The gradient with respect to x of ``activate(x)``."""
    if ACT == 'gelu':
        if HALF:
            cdf = normal_cdf_for_half(x)
        else:
            cdf = normal_cdf(x)
        # x * density(x): exp(-x^2 / 2) as a power of two, over sqrt(2 pi).
        grad = grad * (cdf + x * (0.3989422804014327 * tl.math.exp2(x * x * -0.7213475204444817)))
    elif ACT == 'relu':
        # Where x is NaN the gradient passes, and where it is not positive an infinite gradient does not, as in PyTorch.
        grad = tl.where(x <= 0, 0.0, grad)
    return grad


@triton.jit
def locate(
        start,
        rows,
        x_batch_stride,
        out_batch_stride,
        H: tl.constexpr,
        W: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        COLUMNS: tl.constexpr,
):
    """Positions, a mask of those that exist, and offsets into x and out, for a tile of row groups from ``start`` on."""
    GROUPS: tl.constexpr = (H + GROUP_ROWS - 1) // GROUP_ROWS
    row = start + tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, COLUMNS)[None, :]
    image = (row // GROUPS).to(tl.int64)
    position = (row % GROUPS) * (GROUP_ROWS * W) + col
    inside = (row < rows) & (col < GROUP_ROWS * W)
    return position, inside, image * x_batch_stride + position, image * out_batch_stride + position
