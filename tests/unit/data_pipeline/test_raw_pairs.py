"""Folders, tars and lists become pairs: every file is a pair, part of one, or counted under its reason."""

import json
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from common.errors import DataError, StorageError, UserError
from data_pipeline.image_text.image_lists import Columns
from data_pipeline.image_text.raw_pairs import expand_inputs, inputs_of, raw_pairs
from data_pipeline.left_out import LeftOut
from tests.unit.data_pipeline.test_images import bomb_header, encoded
from tests.unit.data_pipeline.test_tar_parts import tar_of


def image(number=0, kind="JPEG"):
    return encoded(Image.new("RGB", (20, 24), (number * 9 % 256, 100, 200)), kind)


def read(*inputs, **options):
    left_out = LeftOut()
    return list(raw_pairs([Path(path) for path in inputs], left_out, **options)), left_out


def folder_of(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def tar_with(path, members):
    path.write_bytes(tar_of(members))
    return path


def captions(found):
    return [pair.caption for pair in found[0]]


def counts(found):
    return dict(found[1].counts)


def both(tmp_path, files):
    """The same files as a folder and as a tar."""
    yield read(folder_of(tmp_path / "folder", files))
    yield read(tar_with(tmp_path / "x.tar", files.items()))


def test_names_are_joined_up_to_the_last_dot(tmp_path):
    files = {"a.jpg": image(1), "a.k.jpg": image(2), "a.k.txt": b"second", "a.txt": b"first",
             "B.JPG": image(3, "PNG"), "B.TxT": b"third"}
    for found in both(tmp_path, files):
        pairs = {pair.caption: pair for pair in found[0]}
        assert {caption: pair.image for caption, pair in pairs.items()} == {
            "first": image(1), "second": image(2), "third": image(3, "PNG")}
        assert pairs["third"].suffix == ".png"  # by its content
        assert counts(found) == {}


def test_a_caption_named_after_the_whole_image(tmp_path):
    files = {"a.jpg": image(1), "a.jpg.txt": b"of the jpg", "a.png": image(2, "PNG"), "a.png.txt": b"of the png"}
    for found in both(tmp_path, files):
        assert {pair.caption: pair.image for pair in found[0]} == {
            "of the jpg": image(1), "of the png": image(2, "PNG")}


def test_the_first_dot_ends_a_key_in_a_tar(tmp_path):
    found = read(tar_with(tmp_path / "x.tar", [("1.caption.txt", b"words"), ("1.resized.jpg", image())]))
    assert captions(found) == ["words"]
    assert counts(found) == {}


def test_a_folder_joins_nothing_by_the_first_dot(tmp_path):
    folder = folder_of(tmp_path, {"IMG.1.jpg": image(), "IMG.2.txt": b"of another", "x.jpg": image(), "x.txt": b"x"})
    found = read(folder)
    assert captions(found) == ["x"]
    assert counts(found) == {"an image without a caption": 1, "a caption without an image": 1}


def test_several_images_of_one_key(tmp_path):
    members = [("0.left.jpg", image(1)), ("0.right.jpg", image(2)), ("0.txt", b"both"),
               ("1.jpg", image(3)), ("1.png", image(4, "PNG")), ("1.txt", b"one"), ("1.json", b"{}"),
               ("2.a.txt", b"first"), ("2.b.txt", b"second"), ("2.jpg", image(5))]
    found = read(tar_with(tmp_path / "x.tar", members))
    assert captions(found) == ["one", "first"]
    assert sorted(counts(found).values()) == [1, 1, 1, 2]
    told = " ".join(found[1].lines() + found[1].remarks())
    assert all(word in told for word in ("several images", "another image", "another caption", "without an image"))


@pytest.mark.parametrize("members", [
    [("0.jpg", 1), ("0.txt", "one"), ("0.jpg", 2), ("0.txt", "two"), ("1.jpg", 3), ("1.txt", "three")],
    [("0.jpg", 1), ("0.txt", "one"), ("1.jpg", 3), ("1.txt", "three"), ("0.jpg", 2), ("0.txt", "two")],
    [("0.jpg", 1), ("1.jpg", 3), ("./0.jpg", 2), ("0.txt", "one"), ("1.txt", "three"), ("0.txt", "two")],
])  # fmt: skip
def test_a_name_that_occurs_twice(tmp_path, members):
    found = read(tar_with(tmp_path / "x.tar", [
        (name, image(content) if isinstance(content, int) else content.encode()) for name, content in members]))
    assert {pair.caption: pair.image for pair in found[0]} == {"one": image(1), "two": image(2), "three": image(3)}
    assert dict(found[1].kept) == {"pairs of a name that occurs twice": 2}


def test_half_of_a_name_that_occurs_twice(tmp_path):
    found = read(tar_with(tmp_path / "x.tar", [("0.jpg", image()), ("0.jpg", image(1)), ("0.txt", b"words"),
                                               ("1.jpg", image()), ("1.txt", b"x"), ("1.txt", b"y")]))
    assert captions(found) == ["words", "x"]
    assert len(found[1].counts) == 2
    assert all("occurs twice" in reason for reason in found[1].counts)


def test_an_unsorted_tar(tmp_path):
    names = (3, 1, 2, 0)
    members = [(f"{n}.jpg", image(n)) for n in names] + [(f"{n}.txt", b"words %d" % n) for n in sorted(names)]
    found = read(tar_with(tmp_path / "x.tar", members))
    assert captions(found) == [f"words {n}" for n in names]
    assert [pair.image for pair in found[0]] == [image(n) for n in names]


def test_each_unusable_caption_has_its_reason(tmp_path):
    texts = {"empty.txt": b" \n", "bytes.txt": b"\xff\x00", "json.json": b"{", "none.json": b"{}",
             "type.json": b'{"caption": 3}', "deep.json": b"[" * 99_999}
    files = {f"{name.partition('.')[0]}.jpg": image() for name in texts} | texts
    files |= {"good.jpg": image(), "good.txt": b"words", "bare.jpg": image(), "alone.txt": b"x",
              "fallback.jpg": image(), "fallback.txt": b"", "fallback.json": b'{"caption": "from json"}'}
    for found in both(tmp_path, files):
        assert sorted(captions(found)) == ["from json", "words"]
        assert counts(found) == {
            "the caption is empty": 1, "the caption is no UTF-8": 1, "the JSON beside the image is not valid": 2,
            'the JSON beside the image has no "caption" or "text"': 1,
            '"caption" or "text" of the JSON beside the image is no text': 1,
            "an image without a caption": 1, "a caption without an image": 1}


def test_images_that_their_header_refuses(tmp_path):
    bad = {"html": b"<html>", "empty": b"", "zeros": bytes(9999), "bomb": bomb_header(60_000, 60_000)}
    files = {f"{name}.jpg": content for name, content in bad.items()} | {f"{name}.txt": b"x" for name in bad}
    files |= {"good.jpg": image(kind="GIF"), "good.txt": b"words"}
    for found in both(tmp_path, files):
        assert [(pair.caption, pair.suffix) for pair in found[0]] == [("words", ".gif")]
        assert sorted(counts(found).values()) == [1, 3]
        assert "0x" not in " ".join(found[1].lines() + found[1].remarks())


def test_what_is_neither_image_nor_caption(tmp_path):
    files = {"a.jpg": image(), "a.txt": b"words", "._a.jpg": b"\0\5\26\7", "._a.txt": b"\0\5\26\7", ".DS_Store": b"x",
             "__MACOSX/._a.jpg": b"x", "a.tiff": b"II", "a.cls": b"3", "README": b"x", "b.\x1b[2Jx": b"x"}
    for found in both(tmp_path, files):
        assert captions(found) == ["words"]
        assert sorted(counts(found).values()) == [1, 1, 1, 1, 4]
        assert "\x1b" not in "".join(found[1].lines() + found[1].remarks())
        assert any(".tiff" in reason and "convert" in reason for reason in found[1].counts)


def test_accents_that_macos_writes_apart(tmp_path):
    for found in both(tmp_path, {"caf\u00e9 {1}.jpg": image(), "cafe\u0301 {1}.txt": b"words"}):
        assert captions(found) == ["words"]


def test_a_name_that_is_no_utf8(tmp_path):
    folder = folder_of(tmp_path, {"a.jpg": image(), "a.txt": b"words"})
    for suffix, content in ((b".jpg", image()), (b".txt", b"odd"), (b"2.jpg", image())):
        with open(os.path.join(os.fsencode(folder), b"\xff" + suffix), "wb") as file:
            file.write(content)
    found = read(folder)
    assert captions(found) == ["words", "odd"]
    " ".join(found[1].lines() + found[1].remarks()).encode()


def test_only_regular_files_are_read(tmp_path):
    folder = folder_of(tmp_path / "photos", {f"{n}.txt": b"words" for n in ("gone", "dir", "pipe", "socket", "loop")})
    folder_of(tmp_path, {"photos/a.jpg": image(), "photos/a.txt": b"words", "elsewhere/b.jpg": image()})
    os.symlink("../nothing", folder / "gone.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    os.symlink("../elsewhere", folder / "linked")
    os.symlink("../elsewhere/b.jpg", folder / "b.jpg")
    (folder / "b.txt").write_text("a link to a file")
    (folder / "dir.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(folder / "socket.jpg"))
        found = read(folder)
    assert captions(found) == ["words", "a link to a file"]
    assert counts(found) == {
        "a link to nothing, or a file that vanished": 1, "a link that goes in a circle": 1,
        "a folder (or a link to one) where a file is expected": 1,
        "a folder with the name of an image; the files in it are looked at": 1,
        "neither a file nor a folder (a pipe, socket or device)": 2, "a caption without an image": 5}
    with pytest.raises(UserError, match="neither a regular file nor a folder"):
        read(folder / "pipe.jpg")


def test_a_disk_that_fails_is_not_left_out(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, {"a.jpg": image(), "a.txt": b"words"})

    def fails(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(StorageError, match="Input/output"):
        read(folder)


def test_output_of_img2dataset(tmp_path):
    for n in range(2):
        members = [(f"{n}.jpg", image()), (f"{n}.json", b'{"caption": "j"}'), (f"{n}.txt", b"t")]
        tar_with(tmp_path / f"0000{n}.tar", members)
        folder_of(tmp_path, {f"0000{n}_stats.json": b"{}", f"0000{n}.parquet": b"PAR1"})
    folder_of(tmp_path, {"files/00000/1.jpg": image(), "files/00000/1.txt": b"loose", "files/00000/1.json": b"{}"})
    found = read(tmp_path)
    assert captions(found) == ["loose", "t", "t"]
    assert counts(found) == {"a table or statistics of img2dataset beside its tar": 4}


def test_names_with_braces_and_wildcards(tmp_path):
    for name in ("x-00.tar", "x-01.tar", "x-02.tar", "{0..9}.tar"):
        (tmp_path / name).touch()
    names = [path.name for path in expand_inputs([tmp_path / "x-{00..01}.tar", tmp_path / "{0..9}.tar"])]
    assert names == ["x-00.tar", "x-01.tar", "{0..9}.tar"]
    assert len(expand_inputs([tmp_path / "x-*.tar"])) == 3
    for missing in ("x-{00..99}.tar", "x-{00..02.tar", "y-*.tar", "y.tar", "y-{0..999999999}.tar"):
        with pytest.raises(UserError, match="cannot read"):
            expand_inputs([tmp_path / missing])


def table(suffix, rows):
    if suffix == ".jsonl":
        return "\n".join(json.dumps(row) for row in rows) + "\n\n"
    return "".join(("\t" if suffix == ".tsv" else ",").join(row) + "\n" for row in (rows[0], *map(dict.values, rows)))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_lists(tmp_path, suffix):
    folder_of(tmp_path, {"a.jpg": image(1), "b/c.jpg": image(2), "bad.jpg": b"x"})
    rows = [{"filepath": path, "title": title} for path, title in (
        ("a.jpg", "first"), (str(tmp_path / "b/c.jpg"), "second"), ("a.jpg", "again"), ("gone.jpg", "x"),
        ("https://x.org/a.jpg", "x"), ("bad.jpg", "x"), ("a.jpg", " "), ("", "x"))]
    path = tmp_path / f"list{suffix}"
    path.write_text("\ufeff" + table(suffix, rows), encoding="utf-8")
    found = read(path)
    assert [(pair.caption, pair.image) for pair in found[0]] == [
        ("first", image(1)), ("second", image(2)), ("again", image(1))]
    assert len(found[1].counts) == sum(found[1].counts.values()) == 5
    path.write_text(table(suffix, [{"url": "a.jpg", "what": "words"}]))
    assert captions(read(path, columns=Columns("url", "what"))) == ["words"]
    with pytest.raises(UserError, match="column" if suffix != ".jsonl" else "no pair"):
        read(path)


def test_a_list_that_is_no_table(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"filepath,title\na.jpg," + b"x" * 200_000)
    with pytest.raises(DataError, match="table"):
        read(path)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"[1]\n{\n" + b"[" * 99_999 + b"\n")
    with pytest.raises(UserError, match="left out 3: a line of a list that is no JSON object"):
        read(path)


def test_no_pair_says_why(tmp_path):
    with pytest.raises(UserError, match="it is empty"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"left out 1: an image without a caption, first: .*a\.jpg"):
        read(folder_of(tmp_path, {"a.jpg": image()}))


def test_the_choices_tell_one_input_from_another(tmp_path):
    path = folder_of(tmp_path, {"a.jpg": image()})
    assert len({inputs_of([path]), inputs_of([path], skip_damaged=True), inputs_of([path], Columns("x"))}) == 3
    assert inputs_of([path]) == inputs_of([path], Columns())


def test_the_command_says_what_it_left_out(tmp_path, tokenizer, capsys):
    from tests.unit.data_pipeline.test_command import trainyard

    model = tmp_path / "words.model"
    model.write_bytes(tokenizer.model)
    whole = tar_of([("[red].jpg", image()), ("[red].txt", b"words"), ("[bold]x.jpg", image())])
    (tmp_path / "0.tar").write_bytes(whole)
    (tmp_path / "1.tar").write_bytes(whole[:2000])
    asked = ("images", "--input", tmp_path / "{0..1}.tar", "--tokenizer", model, "--to", tmp_path / "pairs")
    with pytest.raises(DataError, match=r"1\.tar"):
        trainyard(*asked)
    assert not (tmp_path / "pairs").exists()
    assert trainyard(*asked, "--skip-damaged") == 0
    told = capsys.readouterr().out
    assert "1 pairs, " in told
    assert "left out 2: an image without a caption" in told or "left out 1: an image without a caption" in told
    assert "[bold]x.jpg" in told
    assert "1 damaged tar" in told
