"""Numbers, times and tables as a person reads them."""

from __future__ import annotations

import pytest

from stitchcache.cli import output
from stitchcache.cli.output import age_text, count_text, print_table, seconds_text, short_length, size_text
from stitchcache.errors import printable


def test_words():
    assert [size_text(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
    assert [seconds_text(s) for s in (0.00025, 0.0123, 4.21, 185.4)] == [
        "250 us",
        "12 ms",
        "4.2 s",
        "3 min 5 s",
    ]
    assert [age_text(t, now=1e9) for t in (0, 1e9 - 5, 1e9 - 300, 1e9 - 7300, 1e9 - 1e6, 1e9 + 5)] == [
        "unknown",
        "just now",
        "5 min ago",
        "2 h ago",
        "11 d ago",
        "just now",
    ]
    assert [count_text(n, "entry") for n in (1, 2)] == ["1 entry", "2 entries"]
    assert count_text(2, "file") == "2 files"
    assert printable("a\tb\x1b\u200eü") == "a\\tb\\x1b\\u200eü"
    assert short_length([]) == 12
    assert short_length(["a" * 64, "a" * 20 + "b" * 44]) == 21
    assert short_length(["a" * 64, "a" * 64]) == 12


FIELDS = {"KEY": "key", "LABEL": "label", "SIZE": "size"}
RECORD = {"key": "a" * 10, "label": "some words that a narrow terminal has to fold", "size": "12 B"}


def test_a_table_in_a_pipe_is_not_cut(capsys):
    print_table(FIELDS, [RECORD, {"key": "b", "label": "x", "size": "1.5 MiB"}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{RECORD['key']}  {RECORD['label']}     12 B"
    assert lines[2].split() == ["b", "x", "1.5", "MiB"]
    assert (
        len({line.rindex(end) + len(end) for line, end in zip(lines, ("SIZE", "B", "MiB"), strict=True)}) == 1
    )


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_a_table_fits_its_terminal_and_loses_no_word(width, capsys, monkeypatch):
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(FIELDS, [RECORD])
    said = capsys.readouterr().out
    assert max(len(line) for line in said.splitlines()) <= width
    assert set(RECORD["label"].split()) <= set(said.split())
    assert RECORD["key"] in said


def test_text_from_outside_is_shown_and_not_obeyed(capsys):
    print_table(FIELDS, [{"key": "k", "label": "\x1b[31mred[bold]", "size": "1"}])
    assert "\\x1b[31mred[bold]" in capsys.readouterr().out


def test_a_fields_name_says_how_it_is_written():
    record = {"blob_bytes": 2048, "seconds": 0.012, "created": 0, "key": "ab" * 32, "repaired": True}
    record |= {
        "backends": ["aoti", "eager"],
        "label": "",
        "refused": None,
        "pieces": 0,
        "compile_seconds": 0.0,
    }
    cells = [output.column(name, [record], 12)[0] for name in record]
    assert cells[:5] == ["2.0 KiB", "12 ms", "unknown", "ab" * 6, "yes"]
    assert cells[5:] == ["aoti, eager", "-", "-", "0", "-"]
    assert output.column(lambda found: found["pieces"] + 1, [record], 12) == ["1"]
