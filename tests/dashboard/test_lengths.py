"""The lengths that the Data page shows are those of the rows themselves."""

import re
from pathlib import Path

import pytest
from tests.support.dashboards import RUN_ID, started, write_data, write_run
from tests.support.projects import chats, write_rows
from tests.support.tokenizers import save_tokenizer

from llamahome.config.schema import Config, DataConfig
from llamahome.dashboard.lengths import MOST_ROWS, Lengths, lengths_of
from llamahome.data.files.sources import open_source
from llamahome.data.text.tokenizer_files import tokenizer_source
from llamahome.data.text.tokens import open_tokenizer
from llamahome.data.view import ShownRow, view


def measured(folder: Path, data: DataConfig, **changes: int) -> tuple[Lengths, list[ShownRow]]:
    """The lengths of rows.jsonl, and the rows one by one."""
    tokenizer = open_tokenizer(tokenizer_source(save_tokenizer(folder / "model"), Config().model))
    source = open_source([str(folder / "rows.jsonl")])
    rows = [row for row in view(source, range(len(source)), data, tokenizer) if isinstance(row, ShownRow)]
    return lengths_of(source, data, tokenizer, **changes), rows


def test_lengths_and_the_share_learned_are_those_of_the_rows_one_by_one(tmp_path: Path) -> None:
    rows = chats(30)
    rows[7]["messages"][1]["content"] *= 30
    write_rows(tmp_path / "rows.jsonl", [*rows, {"messages": "none"}])
    found, shown = measured(tmp_path, data := DataConfig(max_length=100))
    kinds = [row.kinds for row in shown]
    assert (found.read, found.usable, found.tokens) == (31, 30, sum(map(len, kinds)))
    trained = sum(len(each) - each.count("cut") for each in kinds)
    assert found.learned_share == sum(each.count("learned") for each in kinds) / trained
    assert found.longer == sum(len(each) > data.max_length for each in kinds) >= 1
    for bar in found.bars:
        assert bar.rows == sum(bar.begin <= len(each) <= bar.last for each in kinds)
    assert sum(bar.rows for bar in found.bars) == 30 and found.bars[found.marked].begin > 100 >= found.bars[found.marked - 1].begin


@pytest.mark.medium
def test_of_many_rows_some_from_everywhere_are_read_and_of_long_ones_fewer(tmp_path: Path) -> None:
    rows = chats(1500)
    for row in rows[1400:]:
        row["messages"][1]["content"] *= 8
    write_rows(tmp_path / "rows.jsonl", rows)
    found, shown = measured(tmp_path, DataConfig(max_length=4096))
    assert found.read == MOST_ROWS and found.longer == 0 and found.marked == len(found.bars)
    assert abs(found.mean / (sum(len(row.kinds) for row in shown) / 1500) - 1) < 0.02, "the last rows count as much as the first"
    fewer, _ = measured(tmp_path, DataConfig(max_length=4096), most_tokens=5000)
    assert fewer.read < MOST_ROWS and 5000 <= fewer.tokens < found.tokens


@pytest.mark.medium
def test_the_page_of_the_data_shows_them_with_max_length_marked(tmp_path: Path) -> None:
    write_run(tmp_path, config="data:\n  max_length: 64\n")
    write_data(tmp_path, RUN_ID)
    with started(tmp_path) as server:
        page = server.page(f"/run/{RUN_ID}/data")
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "Of all 9 rows" in text and "of the tokens trained on are learned" in text and "data.max_length 64" in text
    table = re.search(r'<table class="lengths">(.*?)</table>', page, flags=re.DOTALL)[1]
    assert sum(int(rows) for rows in re.findall(r'<td class="number">(\d+)</td>', table)) == 9 and table.count('class="mark"') == 1
