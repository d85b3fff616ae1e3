"""One launcher at a time holds a run: it is taken over only when its holder gives no sign, and by one machine only."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamahome.distributed import holder
from llamahome.distributed.holder import FILE, Holder, take_over
from llamahome.errors import MachineError

SILENT = 3.0


@pytest.fixture(autouse=True)
def every_renewal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "RENEW_EVERY_S", 0.0)


def no_time(_: float) -> None:
    """Waiting in which nothing happens."""


def test_a_run_whose_holder_gives_no_sign_is_taken_over_and_the_old_holder_ends(tmp_path: Path) -> None:
    first = Holder(tmp_path, "machine 0")
    first.renew()
    second = take_over(tmp_path, "machine 1", silent_s=SILENT, sleep=no_time)
    assert second is not None
    second.renew()
    with pytest.raises(MachineError) as caught:
        first.renew()
    assert caught.value.problems[0].code == "distributed.overtaken"
    second.renew()


def test_a_run_whose_holder_gives_a_sign_is_not_taken_over(tmp_path: Path) -> None:
    first = Holder(tmp_path, "machine 0")
    first.renew()
    assert take_over(tmp_path, "machine 1", silent_s=SILENT, sleep=lambda _: first.renew()) is None
    first.renew()


def test_without_a_sign_in_the_folder_nothing_is_taken_over(tmp_path: Path) -> None:
    assert take_over(tmp_path, "machine 1", silent_s=SILENT, sleep=no_time) is None
    (tmp_path / FILE).write_text("{")
    assert take_over(tmp_path, "machine 1", silent_s=SILENT, sleep=no_time) is None


def test_of_several_machines_that_want_the_run_one_gets_it(tmp_path: Path) -> None:
    Holder(tmp_path, "machine 0").renew()
    with ThreadPoolExecutor(8) as pool:
        holders = list(pool.map(lambda number: take_over(tmp_path, f"machine {number}", silent_s=SILENT, sleep=no_time), range(8)))
    assert len([each for each in holders if each is not None]) == 1


def test_the_run_belongs_to_the_newest_launch(tmp_path: Path) -> None:
    """Machine 0 is started again while machine 1 goes on alone."""
    Holder(tmp_path, "machine 0").renew()
    alone = take_over(tmp_path, "machine 1", silent_s=SILENT, sleep=no_time)
    assert alone is not None
    alone.renew()
    later = Holder(tmp_path, "machine 0 again")
    later.renew()
    with pytest.raises(MachineError):
        alone.renew()
    later.renew()
    assert len(list(tmp_path.glob("holder-*"))) == 1


def test_a_full_disk_does_not_end_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    first = Holder(tmp_path, "machine 0")
    monkeypatch.setattr("llamahome.durable.observer", full)
    first.renew()
    assert not (tmp_path / FILE).exists()
