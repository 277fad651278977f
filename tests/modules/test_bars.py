"""Progress bars read what they are given once, and say nothing of what is done in a moment."""

from __future__ import annotations

from kvb import bars


class Counted(list):
    begun = 0

    def __iter__(self):
        self.begun += 1
        return super().__iter__()


def test_items_are_read_once(capsys):
    items = Counted([1, 2, 3])
    assert list(bars.of(items, "three")) == [1, 2, 3]
    assert items.begun == 1
    assert capsys.readouterr().err == ""


def test_a_bar_tells_of_its_items_and_vanishes(capsys, monkeypatch):
    monkeypatch.setattr(bars, "PATIENCE", 0.0)
    for shown in (False, True):
        assert list(bars.of(iter("abc"), "letters", 3, shown=shown)) == ["a", "b", "c"]
        found = capsys.readouterr().err
        assert ("letters:   0%" in found) == ("/3 [" in found) == shown
    assert found.endswith("\r")
