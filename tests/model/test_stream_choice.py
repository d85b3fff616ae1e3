"""The passes of a run whose base is streamed: those that fit, and of them the fastest by the rates of the machine."""

import pytest

from llamahome.model.stream_choice import Passes, Rates, StreamedBase, choose_passes, must_stream

GB = 10**9
FAST_DISK, SLOW_DISK = Rates(1e-10, 0.01), Rates(1e-7, 0.01)


def base_of(free: int) -> StreamedBase:
    """6 GB in 30 layers; a token keeps 1 MB, or a tenth of it if activations are computed again."""
    layer = GB // 5
    return StreamedBase(
        nbytes=30 * layer,
        room_bytes=3 * layer,
        kept_with=lambda room: min(30, room // layer) * layer,
        free_bytes=free,
        needs=lambda tokens, recomputes: tokens * 10**5 * (1 if recomputes else 10),
    )


def chosen(free: int, rates: Rates, *, tokens: int | None = None, recomputes: bool | None = None, longest: int = 300) -> Passes:
    return choose_passes(base_of(free), rates, step_tokens=4000, longest=longest, tokens=tokens, recomputes=recomputes)


def test_a_base_is_streamed_if_it_leaves_too_little_for_activations() -> None:
    assert must_stream(8 * GB, free_bytes=10 * GB) and not must_stream(6 * GB, free_bytes=10 * GB)


def test_a_slow_disk_gets_one_large_pass_whose_activations_are_computed_again() -> None:
    passes = chosen(3 * GB, SLOW_DISK)
    assert passes.fits and passes.recomputes and passes.per_step == 1 and passes.tokens >= 4000


def test_a_fast_disk_gets_smaller_passes_without_arithmetic_twice() -> None:
    passes = chosen(3 * GB, FAST_DISK)
    assert passes.fits and not passes.recomputes and passes.per_step > 1


def test_memory_that_activations_leave_keeps_layers() -> None:
    few, many = chosen(3 * GB, SLOW_DISK), chosen(5 * GB, SLOW_DISK)
    assert many.read_bytes < few.read_bytes and many.keep_bytes > few.keep_bytes


@pytest.mark.parametrize("rates", [FAST_DISK, SLOW_DISK])
@pytest.mark.parametrize("free", [GB, 2 * GB, 4 * GB, 8 * GB])
def test_what_was_set_stays_and_the_longest_row_fits_into_a_pass(rates: Rates, free: int) -> None:
    fixed = chosen(free, rates, tokens=700, recomputes=True)
    assert (fixed.tokens, fixed.recomputes) == (700, True)
    assert chosen(free, rates, longest=2500).tokens >= 2500


def test_without_room_the_smallest_pass_is_taken_and_does_not_fit() -> None:
    passes = chosen(GB // 2, FAST_DISK)
    assert not passes.fits and passes.recomputes and passes.keep_bytes == 0 and passes.tokens < 600
