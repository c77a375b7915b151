"""The planted defects: all can be planted, two of them are, and one without effect survives."""

import pytest

import planted


def test_every_defect_can_be_planted_and_is_explained():
    defects = planted.DEFECTS
    for defect in defects:
        assert planted.changed(defect) != (planted.ROOT / defect.file).read_text(encoding="utf-8")
    assert len({defect[:3] for defect in defects}) == len(defects)
    assert len({defect.breaks for defect in defects}) == len(defects)
    product = [defect for defect in defects if defect.file != "lodisc.py"]
    assert len(product) >= 40 and len(defects) - len(product) >= 20
    assert set(planted.EXPLAINED) <= {defect.breaks for defect in defects}


@pytest.mark.parametrize("old, count", [("no such text", 0), ("import", "[0-9]+")])
def test_old_text_must_occur_once(old, count):
    defect = planted.Defect("train.py", old, "", "nothing")
    with pytest.raises(ValueError, match=f"occurs {count} times, not once"):
        planted.changed(defect)


def test_tests_that_compare_text_are_left_out():
    paths = planted.order_of_tests("train.py", planted.ROOT)
    assert paths[0] == "tests/test_loop.py" and len(set(paths)) == len(paths)
    assert len(paths) == len(list(planted.ROOT.glob("tests/test_*.py"))) - 2


@pytest.mark.slow
def test_defects_are_killed_and_a_comment_survives():
    ema, = [defect for defect in planted.DEFECTS if defect.breaks == "EMA momentum constant"]
    least, = [defect for defect in planted.DEFECTS if defect.breaks ==
              "the least important patches kept"]
    assert planted.plant(ema, ["tests/test_loop.py"]).startswith("tests/test_loop.py::test_train")
    assert planted.plant(least, ["tests/test_mask.py"]).startswith("tests/test_mask.py::")
    harmless = planted.Defect("train.py", "in a method of one's own", "in one's own", "a comment")
    assert planted.plant(harmless, ["tests/test_data.py"]) == ""
