"""The keep mask of mask-free dropout, computed from element indices and never stored.

The format is fixed by the package's design and shared by every backend: Philox4x32 with 7 rounds,
key = the two halves of the seed, counter = (k // 8, row low, row high, branch). One counter gives
four 32-bit words, that is eight 16-bit lanes, for the eight consecutive elements k .. k + 7 of a
row: element k takes word (k % 8) // 2, its low half if k is even and its high half if k is odd.

Cost: 7 rounds are 28 multiplications (two of them high halves per round) and 28 exclusive-ors for
eight elements, about 7 integer operations per element, plus 3 to cut out and compare a lane. One
generator call per element would cost eight times the rounds.
"""

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def load_philox_key(seed_ptr):
    """seed_ptr: 0-d int64 -> the key (low word, high word), both uint32."""
    seed = tl.load(seed_ptr)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def philox_words(c0, c1, c2, c3, key0, key1):
    """Counter words (uint32 blocks of one shape) and key (uint32 scalars) -> four uint32 blocks."""
    multiplier0: tl.constexpr = 0xD2511F53
    multiplier1: tl.constexpr = 0xCD9E8D57
    weyl0: tl.constexpr = 0x9E3779B9
    weyl1: tl.constexpr = 0xBB67AE85
    for _ in tl.static_range(PHILOX_ROUNDS):
        high0 = tl.umulhi(c0, multiplier0)
        high1 = tl.umulhi(c2, multiplier1)
        low0 = c0 * multiplier0
        low1 = c2 * multiplier1
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = key0 + weyl0
        key1 = key1 + weyl1
    return c0, c1, c2, c3


@triton.jit
def random_lanes(
    start,  # first element, a multiple of 8
    c1,
    c2,
    c3,
    key0,
    key1,
    BLOCK: tl.constexpr,  # a multiple of 8
):
    """-> [BLOCK] uint32, 16 random bits an element, of the counter (element // 8, c1 .. c3)."""
    octets: tl.constexpr = BLOCK // 8
    zero = tl.zeros((octets,), dtype=tl.uint32)
    octet = (start // 8 + tl.arange(0, octets)).to(tl.uint32)
    c1 = c1.to(tl.uint32) + zero
    c2 = c2.to(tl.uint32) + zero
    w0, w1, w2, w3 = philox_words(octet, c1, c2, c3 + zero, key0, key1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # see keep_mask
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))


@triton.jit
def keep_mask(
    rows,  # [BLOCK_M] int64, absolute row numbers
    k_start,  # first column, a multiple of 8
    key0,
    key1,
    branch,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 8
):
    """-> [BLOCK_M, BLOCK_K] int1, true where the element is kept."""
    octets: tl.constexpr = BLOCK_K // 8
    zero = tl.zeros((BLOCK_M, octets), dtype=tl.uint32)
    octet = (k_start // 8 + tl.arange(0, octets)).to(tl.uint32)
    c0 = octet[None, :] + zero
    c1 = rows.to(tl.uint32)[:, None] + zero
    c2 = (rows >> 32).to(tl.uint32)[:, None] + zero
    c3 = branch.to(tl.uint32) + zero
    w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, key0, key1)
    # join() appends an axis, so the innermost axis is joined first: [.., i, j] is word 2 i + j and
    # [.., i, j, half] is lane 4 i + 2 j + half. The reshape is then free: a thread that computed a
    # counter holds the eight neighbouring elements of its row.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    limit = threshold.to(tl.uint32)
    keep = tl.join((words & 0xFFFF) >= limit, (words >> 16) >= limit)
    return tl.reshape(keep, (BLOCK_M, BLOCK_K))
