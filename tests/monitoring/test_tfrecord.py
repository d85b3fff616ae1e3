"""Records are framed as TensorBoard's own writer frames them."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.monitoring.tfrecord import crc32c, framed, scalars


def test_the_check_values_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert (crc32c(bytes(32)), crc32c(b"\xff" * 32), crc32c(bytes(range(32)))) == (0x8A9136AA, 0x62A8AB43, 0x46DD794E)
    assert crc32c(b"") == 0


@given(st.binary(max_size=40) | st.integers(1000, 5000).map(lambda size: bytes(at * at % 251 for at in range(size))))
def test_a_record_is_the_one_that_tensorboard_writes(record: bytes) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    written = io.BytesIO()
    RecordWriter(written).write(record)
    assert framed(record) == written.getvalue()


@given(
    step=st.integers(0, 2**40),
    t=st.floats(0, 4e9),
    metrics=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=200), st.floats(), max_size=8),
)
def test_an_event_is_what_tensorboards_own_classes_read(step: int, t: float, metrics: dict[str, float]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
    written, expected = Event.FromString(scalars(step, t, metrics)), Event(wall_time=t, step=step, summary=Summary(value=values))
    assert written.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@pytest.mark.parametrize("size", [511, 512, 513, 515, 1024, 1025])
def test_a_record_may_end_anywhere_in_a_block(size: int) -> None:
    data = bytes(at % 253 for at in range(size))
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 * (register & 1))
    assert crc32c(data) == register ^ 0xFFFFFFFF
