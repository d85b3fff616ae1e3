"""The order of the rows once more, one position at a time in plain integers, to compare data/steps/order.py with."""

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def row_at(position: int, *, num_rows: int, seed: int) -> int:
    """The row at `position`: eight Feistel rounds over an even number of bits, again until the result is a row number."""
    epoch, value = divmod(position, num_rows)
    half = max(2, ((num_rows - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    state = mix(mix(seed + GOLDEN & MASK) + epoch & MASK)
    while True:
        left, right = value >> half, value & low
        for number in range(1, 9):
            left, right = right, left ^ (mix(right ^ mix(state + number * GOLDEN & MASK)) & low)
        value = left << half | right
        if value < num_rows:
            return value


def mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31
