"""What the pages say, read as HTML: they are whole without a browser, and nothing that a file holds becomes markup."""

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import closing
from html import unescape
from pathlib import Path

import pytest
from tests.support.dashboards import CONFIG, RUN_ID, Dashboard, append, lines, started, write_data, write_run
from tests.support.projects import chats
from tests.support.tokenizers import save_tokenizer

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>"
TRAINED = "20261122-080000-rows"

ROWS = [f"chats.jsonl:{line}" for line in range(1, 13)]
SHOW = "llamahome data show chats.jsonl --config 'a b/config.yaml' --row 0,1"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pages")
    metrics = write_run(home)
    (metrics / "events.jsonl").write_text(
        lines(
            [
                {"t": 1.0, "kind": "started", "step": 0, "horizon": 40},
                {"t": 2.0, "kind": "alert", "alert": "spike", "step": 7, "text": MARKUP, "help": "--set training.learning_rate=0.0005"},
                {"event": "alert", "alert": "clipping", "step": 8, "text": "every step is clipped", "help": None},
                {"t": 3.0, "kind": "bad-step", "step": 9, "why": "the gradient is not finite", "rows": ["chats.jsonl:3", "chats.jsonl:4"]},
                {"kind": "alert", "alert": ["odd"], "step": "nine", "text": {"no": "text"}},
                {"t": 4.0, "kind": "rows", "step": 9, "rows": 12, "lost": 1},
                {"t": 4.0, "kind": "saved", "step": 10, "folder": "checkpoint-10"},
            ]
        )
    )
    answers = [{"t": 1.0, "step": step, "prompt": f"{MARKUP}?", "answer": f"answer {step}", "reference": "right"} for step in range(20)]
    (metrics / "samples.jsonl").write_text(lines([*answers, {"step": 1}, {"prompt": 3, "step": 1}]))
    write_run(home, "20261122-090000-other", config=CONFIG.replace("0.001", "0.002"), state="stopped")
    trained = write_run(home, TRAINED, state="stopped")
    spike = {"kind": "alert", "alert": "loss-spike", "step": 11, "text": "the loss jumped", "rows": ROWS, "show": SHOW}
    (trained / "events.jsonl").write_text(lines([spike]))
    write_data(home, TRAINED)
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Dashboard]:
    with started(home) as server:
        yield server


def text_of(page: str) -> str:
    """What a person reads."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_without_runs_the_page_says_what_to_type(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        assert "llamahome data sample data/training/raw && llamahome train data/training/raw" in text_of(server.page("/"))
        assert server.end() == 0


def test_runs_are_listed_newest_first_and_filtered_without_scripts(server: Dashboard) -> None:
    def listed(query: str) -> list[str]:
        return re.findall(r'<tr data-run="([^"]+)"', server.page(f"/{query}"))

    assert listed("") == ["20261122-090000-other", TRAINED, RUN_ID]
    assert listed("?q=OTTER") == [RUN_ID] and listed("?state=stopped") == ["20261122-090000-other", TRAINED]
    assert listed("?q=nothing") == [] and "No run matches" in server.page("/?q=nothing")


def test_alerts_of_any_shape_are_shown_with_what_to_do_and_a_way_to_the_rows(server: Dashboard) -> None:
    page = server.page(f"/run/{RUN_ID}")
    said = text_of(page)
    assert "spike at step 7" in said and "--set training.learning_rate=0.0005" in said
    assert "clipping at step 8: every step is clipped" in said and "bad-step at step 9: the gradient is not finite" in said
    assert f'href="/run/{RUN_ID}/data?at=chats.jsonl%3A3"' in page
    assert "rows 12" in said, "counts of streamed rows are no places of rows"


@pytest.mark.medium
def test_the_rows_of_a_refused_step_and_of_a_spike_are_one_click_from_their_event(server: Dashboard) -> None:
    alerts, events = server.page(f"/run/{TRAINED}").split('<h2 id="events-title">')
    for part in (alerts, events):
        links = dict(re.findall(r'<a href="(/run/[^"]+at=[^"]+)">([^<]+)</a>', part))
        assert list(links.values()) == ROWS[:8] and "and 4 more" in text_of(part) and SHOW in text_of(part)
        assert [re.findall(r'<span class="muted">(chats[^<]+)', server.page(path)) for path in links] == [[row] for row in ROWS[:8]]


@pytest.mark.parametrize("path", [f"/run/{RUN_ID}", f"/run/{RUN_ID}/samples", "/?q=%3Cscript%3E", "/compare?run=%3Cscript%3E"])
def test_what_files_and_addresses_hold_never_becomes_markup(server: Dashboard, path: str) -> None:
    page = server.page(path)
    assert "<script>" not in page and "<img src=x" not in page and "&lt;script&gt;" in page


def test_no_page_has_scripts_or_styles_of_its_own(server: Dashboard) -> None:
    for path in ("/", f"/run/{RUN_ID}", f"/run/{RUN_ID}/samples", f"/run/{TRAINED}/data", f"/run/{RUN_ID}/system", "/nothing"):
        page = server.get(path)[2]
        assert not re.search(r"<style|<[^>]*\s(style|on[a-z]+)=|javascript:|<script(?![^>]*\ssrc=)", page), path
        assert not re.search(r'(?:src|href)="(?:https?:)?//', page), path


def test_a_file_is_kept_by_browsers_only_under_the_hash_of_its_content(server: Dashboard) -> None:
    scripts = re.findall(r'(?:src|href)="(/static/[^"]+)"', server.page(f"/run/{RUN_ID}"))
    imported = re.findall(r'from "\./([^"]+)"', "".join(server.page(path) for path in scripts))
    assert {name.partition("?")[0] for name in imported} == {"charts.js", "format.js", "stack.js"}
    for path in [*scripts, *(f"/static/{name}" for name in imported)]:
        assert "immutable" in server.get(path)[1]["cache-control"]
        assert server.get(path.partition("?")[0])[1]["cache-control"] == server.get(path + "0")[1]["cache-control"] == "no-cache"


def test_samples_show_the_base_and_the_newest_answers(server: Dashboard) -> None:
    steps = re.findall(r'<th scope="row" class="number">(\d+)', server.page(f"/run/{RUN_ID}/samples"))
    assert steps == ["0", *map(str, range(9, 20))]
    assert "8 answers between the first and the newest are left out" in server.page(f"/run/{RUN_ID}/samples")
    assert "No samples yet" in server.page("/run/20261122-090000-other/samples")


def test_compared_runs_show_only_the_settings_that_differ(server: Dashboard) -> None:
    said = text_of(server.page(f"/compare?run={RUN_ID}&run=20261122-090000-other&run=gone"))
    assert "training.learning_rate 0.001 0.002" in said and "training.batch_size" not in said
    assert "There is no run gone" in said
    assert "Choose at least two runs" in text_of(server.page(f"/compare?run={RUN_ID}&run={RUN_ID}"))


def test_every_token_of_a_row_is_marked_as_training_uses_it(server: Dashboard, home: Path) -> None:
    page = server.page(f"/run/{TRAINED}/data?row=2")
    rows = re.findall(r'<div class="tokens">(.*?)</div>', page, flags=re.DOTALL)
    assert len(rows) == 3
    for row, chat in zip(rows, chats(9)[2:], strict=False):
        learned = "".join(re.findall(r'<span class="learned">(.*?)</span>', row, flags=re.DOTALL))
        assert chat["messages"][1]["content"] in unescape(re.sub(r"</?i>", "", learned))
        assert unescape(chat["messages"][0]["content"]) not in unescape(re.sub(r"</?i>", "", learned))
        counts = re.search(r"(\d+) tokens, (\d+) learned", page[: page.index(row)].rpartition("<h3")[2])
        assert (int(counts[1]), int(counts[2])) == (row.count("<i>"), learned.count("<i>"))


def test_a_row_is_found_by_its_place_in_the_file(server: Dashboard) -> None:
    page = server.page(f"/run/{TRAINED}/data?at=chats.jsonl%3A5")
    assert "Row 4" in text_of(page) and page.count('class="tokens"') == 1
    assert "There is no row chats.jsonl:99" in text_of(server.page(f"/run/{TRAINED}/data?at=chats.jsonl%3A99"))
    assert "There is no row /etc/passwd:1" in text_of(server.page(f"/run/{TRAINED}/data?at=/etc/passwd%3A1"))
    assert "once it has saved a checkpoint" in text_of(server.page(f"/run/{RUN_ID}/data"))


def test_data_that_has_gone_is_said_and_not_a_failure(server: Dashboard, home: Path) -> None:
    lost = write_run(home, "20261101-100000-lost").name
    checkpoint = home / "output/runs" / lost / "checkpoint-10"
    save_tokenizer(checkpoint / "model")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"extra": {"data_path": ["gone.jsonl"]}}))
    assert "gone.jsonl: there is no such file or folder" in text_of(server.page(f"/run/{lost}/data"))


def test_the_machine_and_the_command_are_shown_as_one_types_them(server: Dashboard) -> None:
    said = text_of(server.page(f"/run/{RUN_ID}/system"))
    assert "command llamahome train 'a b'" in said and "memory 16.0 GiB" in said


DAMAGE = {
    "config.yaml": "{",
    "environment.json": "[1",
    "metrics.jsonl": '\xff\x00\n[1]\n{"step": "x", "train/loss": "y"}\n{"step": 1, "train/loss": [1], "t": {}}\n{"t": null',
    "events.jsonl": "null\n{}\n3\n",
    "system.jsonl": '{"t": "x", "system/cpu": null}\n{"system/cpu": 1}\n',
    "samples.jsonl": '{"step": 1, "prompt": "p"}\n{"step": [], "prompt": {}}\n',
    "status.json": '{"state": ["odd"], "horizon": "many", "step": {}, "t": "now"}',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_with_a_damaged_file_still_has_its_pages(server: Dashboard, home: Path, name: str) -> None:
    run_id = f"20261101-000000-{name}"
    metrics = write_run(home, run_id)
    folder = metrics if name.endswith(".jsonl") or name == "status.json" else home / "output/runs" / run_id
    (folder / name).write_text(DAMAGE[name])
    query = "names=train/loss,time/data,plan/learning_rate,eval/loss"
    paths = [
        "/",
        *[f"/run/{run_id}{page}" for page in ("", "/samples", "/data", "/system")],
        "/api/runs",
        f"/compare?run={run_id}&run={RUN_ID}",
    ]
    paths += [f"/api/run/{run_id}/curves?{query}&x={x}&smooth=0.5&points=nan" for x in ("step", "tokens", "time", "odd")]
    paths += [f"/api/run/{run_id}/curves?{query},system/cpu&machine=1&x={x}" for x in ("step", "time")]
    paths += [f"/api/run/{run_id}/curves?{query}&stacked=1", f"/api/run/{run_id}/marks"]
    pages = "".join(server.page(path) for path in paths)
    assert name != "config.yaml" or "config.yaml cannot be read" in pages


def test_the_server_ends_at_once_while_a_page_follows_a_run(home: Path) -> None:
    with started(home) as server, closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        connection.request("GET", f"/api/run/{RUN_ID}/live?cursor=0-0")
        assert connection.getresponse().readline() == b"retry: 1000\n"
        assert server.end() == 0


def test_the_stream_goes_on_after_the_last_record_that_was_seen(server: Dashboard, home: Path) -> None:
    run_id = "20261101-000000-stream"
    metrics = write_run(home, run_id, state="running")
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        cursor = json.loads(server.page(f"/api/run/{run_id}/curves?names=train/loss"))["cursor"]
        append(metrics / "metrics.jsonl", [{"t": 1041.0, "step": 41, "train/loss": 0.5, "train/targets": 1}])
        connection.request("GET", f"/api/run/{run_id}/live?cursor={cursor}")
        stream = connection.getresponse()
        found = [stream.readline().decode() for _ in range(6)]
        assert found[3:5] == ["event: records\n", 'data: [{"t":1041.0,"step":41,"train/loss":0.5}]\n']
