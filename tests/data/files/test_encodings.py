"""An encoding is named only if the file is in it, and then the hint's command makes a file that is read."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from llamahome.data.files.encoding import encoding_of
from llamahome.data.files.sources import open_source
from llamahome.errors import DataError, Problem

WEST = "Größe und Fuß: ein Café für Müller. À bientôt, ça va très bien, même à l’école. El niño comió piñas en España, ¿qué pasó?"
CENTRAL = "Zażółć gęślą jaźń. Chciałbym więcej wiedzieć, proszę państwa. Příliš žluťoučký kůň úpěl ďábelské ódy."
RUSSIAN = "Привет, как дела? Сегодня хорошая погода, и мы идём гулять в парк. Россия — большая страна."
GREEK = "Καλημέρα, τι κάνεις σήμερα; Η Αθήνα είναι η πρωτεύουσα της Ελλάδας και είναι πολύ μεγάλη πόλη."
HEBREW = "שלום, מה שלומך היום? ירושלים היא עיר גדולה ויפה מאוד."
ARABIC = "مرحبا، كيف حالك اليوم؟ القاهرة هي عاصمة مصر وهي مدينة كبيرة جدا."
THAI = "สวัสดีครับ วันนี้อากาศดีมาก กรุงเทพเป็นเมืองหลวงของประเทศไทย"
TURKISH = "Bugün hava çok güzel, değil mi? İstanbul büyük bir şehir ve ışıklar çok şık."
CHINESE = "这个问题是什么意思？它是一个普通的词，我们在家里用它来说话，也可以写在文章中。中国的首都是北京。"
TRADITIONAL = "這個問題是什麼意思？它是一個普通的詞，我們在家裡用它來說話，也可以寫在文章中。臺灣的首都是臺北。"
JAPANESE = "これはどういう意味ですか？今日はとても天気がいいので、公園へ散歩に行きます。東京は日本の首都です。"
KOREAN = "이것은 무슨 뜻입니까? 오늘은 날씨가 아주 좋아서 공원에 산책하러 갑니다. 서울은 한국의 수도입니다."
TEXTS = [
    ("cp1252", WEST),
    ("cp1252", "ein Satz mit nur einem einzigen ä darin"),
    ("cp1252", "heißt größer"),
    ("mac-roman", WEST),
    ("cp850", WEST.replace("’", "'")),
    ("iso8859-15", WEST.replace("’", "'") + " 5 €"),
    ("cp1250", CENTRAL),
    ("iso8859-2", CENTRAL),
    ("cp1251", RUSSIAN),
    ("koi8-r", RUSSIAN.replace("—", "-")),
    ("cp866", RUSSIAN.replace("—", "-")),
    ("iso8859-5", RUSSIAN.replace("—", "-")),
    ("mac-cyrillic", RUSSIAN),
    ("cp1253", GREEK),
    ("cp1255", HEBREW),
    ("cp1256", ARABIC),
    ("cp874", THAI),
    ("cp1254", TURKISH),
    ("gbk", CHINESE),
    ("gb18030", CHINESE),
    ("big5", TRADITIONAL),
    ("cp932", JAPANESE),
    ("euc-jp", JAPANESE),
    ("cp949", KOREAN),
    ("cp437", WEST.translate(str.maketrans("’Àôê", "'Aoe"))),
]
NAMED = {"cp1252", "mac-roman", "cp1250", "cp1251", "koi8-r", "cp866", "gbk", "gb18030", "big5", "cp932", "euc-jp", "cp949", "cp1253"}
"""Those that are certain; the rest may also be given no name, but never a wrong one."""


def rows(text: str) -> list[dict[str, object]]:
    return [{"prompt": f"{number} {text}", "completion": text} for number in range(4)]


def lines(text: str) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(text))


def mended(folder: Path, hint: str) -> list[dict[str, object]]:
    if not shutil.which("iconv"):
        pytest.skip("iconv is not installed")
    subprocess.run(hint, shell=True, cwd=folder, check=True)
    source = open_source(str(folder / "rows-utf8.jsonl"))
    return [source.row(number).value for number in range(len(source))]


@pytest.mark.parametrize(("codec", "text"), TEXTS, ids=[f"{codec}-{number}" for number, (codec, _) in enumerate(TEXTS)])
def test_an_encoding_is_named_only_if_it_decodes_to_the_text(tmp_path: Path, codec: str, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(text).encode(codec))
    problem = open_source(str(path)).parsed(0)
    assert isinstance(problem, Problem) and problem.code == "data.not-utf8" and "byte 0x" in problem.message
    assert problem.hint is not None or codec not in NAMED
    if problem.hint is not None:
        assert mended(tmp_path, problem.hint) == rows(text)


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["only ASCII", WEST, CHINESE, RUSSIAN])
def test_utf16_and_utf32_are_recognised(tmp_path: Path, codec: str, text: str, mark: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((("\ufeff" if mark else "") + lines(text)).encode(codec))
    with pytest.raises(DataError) as raised:
        open_source(str(path))
    (problem,) = raised.value.problems
    assert problem.code == "data.not-utf8" and codec[:6].upper() in problem.message
    assert mended(tmp_path, str(problem.hint)) == rows(text)


def test_a_file_that_is_partly_utf8_has_no_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(WEST).encode() + lines(WEST).encode("cp1252"))
    assert encoding_of(str(path)) is None


@pytest.mark.medium
def test_a_byte_far_below_that_the_encoding_lacks_excludes_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    content = lines(CHINESE).encode("gbk") * 2000
    path.write_bytes(content)
    assert encoding_of(str(path)) == "GBK"
    path.write_bytes(content + b'{"prompt": "\xff\xff"}\n')
    assert encoding_of(str(path)) is None


def test_a_stray_nul_byte_does_not_make_utf16(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ('{"a": "x\0y"}', '{"prompt": "größer\0 als", "completion": "b"}', '{"a": "\0\0\0\0"}'):
        path.write_text(text + "\n")
        problem = open_source(str(path)).parsed(0)
        assert isinstance(problem, Problem) and problem.code == "data.nul-byte"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_japanese_in_escape_sequences_is_recognised_although_every_byte_is_ascii(tmp_path: Path, ending: str) -> None:
    text = {"jsonl": '{"prompt": "春について", "completion": "春が来ました。"}\n', "csv": "prompt,completion\n春について,春が来ました。\n"}
    (tmp_path / f"rows.{ending}").write_bytes(text.get(ending, "春が来ました。\n").encode("iso2022_jp"))
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / f"rows.{ending}"))
    (problem,) = caught.value.problems
    assert problem.code == "data.not-utf8" and "iconv -f ISO-2022-JP" in str(problem.hint)


def test_an_escape_sequence_in_text_is_not_japanese(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("\x1b$B is how it begins, and \x1b[0m ends a colour\n")
    assert len(open_source(str(tmp_path / "rows.txt"))) == 1
