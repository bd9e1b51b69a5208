"""What is left out is counted, and an example shown is short; a name itself is never cut."""

from data_pipeline.left_out import MAX_EXAMPLE_CHARACTERS, LeftOut, printable


def test_a_long_name_is_whole_and_its_example_short():
    name = "a/" * 400 + "b.txt"
    left_out = LeftOut()
    left_out.add("empty", name)
    assert printable(name) == name
    assert left_out.examples == {"empty": name[:MAX_EXAMPLE_CHARACTERS] + "..."}


def test_the_most_frequent_reason_comes_first_and_remarks_apart():
    left_out = LeftOut()
    left_out.add("empty", "a")
    left_out.add("not JSON", "b", 3)
    left_out.note("twice", "c")
    left_out.damaged.append("d.tar is cut off")
    assert left_out.lines() == ["3: not JSON, first: b", "1: empty, first: a"]
    assert left_out.remarks() == ["kept 1: twice, first: c", "1 damaged tar, read as far as whole:", "d.tar is cut off"]


def test_escapes():
    assert printable("caf\udce9 \x1b[2J \u00e9") == "caf\\xe9 \\x1b[2J \u00e9"
