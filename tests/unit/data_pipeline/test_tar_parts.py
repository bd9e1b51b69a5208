"""Tars of others are read to their end: no cut, no flipped header and no filled-up download passes in silence."""

import bz2
import gzip
import io
import lzma
import random
import tarfile

import pytest

from common.errors import DataError, UserError
from data_pipeline.image_text.raw_pairs import raw_pairs
from data_pipeline.image_text.tar_parts import DamagedTar, opened_tar, tar_parts
from data_pipeline.left_out import LeftOut
from tests.unit.data_pipeline.test_images import encoded, picture

IMAGE = encoded(picture(), "JPEG")
NUM_PAIRS = 6


def tar_of(members, form=tarfile.GNU_FORMAT):
    """The bytes of a tar; a member is (name, content) or a TarInfo without content."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return written.getvalue()


WHOLE = tar_of([part for n in range(NUM_PAIRS) for part in ((f"{n}.jpg", IMAGE), (f"{n}.txt", b"words %d" % n))])
with tarfile.open(fileobj=io.BytesIO(WHOLE)) as _archive:
    MEMBERS = _archive.getmembers()
END = MEMBERS[-1].offset_data + 512


def pairs_of(path, **options):
    left_out = LeftOut()
    return [pair.caption for pair in raw_pairs([path], left_out, **options)], left_out


def cut_in_data(number):
    return WHOLE[: MEMBERS[number].offset_data + 3]


def flipped(offset):
    return WHOLE[:offset] + bytes([WHOLE[offset] ^ 1]) + WHOLE[offset + 1:]


@pytest.mark.parametrize(("content", "num_whole", "reason"), [
    (WHOLE[: MEMBERS[6].offset], 3, "two empty blocks"),  # a boundary, where tarfile and webdataset see a whole tar
    (WHOLE[: MEMBERS[6].offset + 100], 3, "two empty blocks"),
    (WHOLE[: END + 512], NUM_PAIRS, "two empty blocks"),
    (cut_in_data(6), 3, "cut off"),
    (cut_in_data(7), 3, "cut off"),
    (WHOLE[: MEMBERS[7].offset_data + 7], 4, "unexpected end"),  # the caption is there, what fills its block is not
    (flipped(MEMBERS[6].offset + 3), 3, "is not valid"),
    (flipped(MEMBERS[6].offset + 130), 3, "is not valid"),
    (WHOLE[: MEMBERS[6].offset] + bytes(512) + WHOLE[MEMBERS[6].offset + 512:], 3, "more follows"),
    (WHOLE + WHOLE, NUM_PAIRS, "joined with `cat`"),
    (WHOLE[: MEMBERS[6].offset] + bytes(2**21), 3, "only zeros follow"),
], ids=["at a header", "in a header", "before the end", "in an image", "in a caption", "in a block", "name", "size",
        "zero header", "cat", "zero tail"])  # fmt: skip
def test_damage_is_told_and_what_is_whole_can_be_used(tmp_path, content, num_whole, reason):
    path = tmp_path / "part-00001.tar"
    path.write_bytes(content)
    with pytest.raises(DamagedTar, match=rf"part-00001\.tar.*{reason}.*--skip-damaged"):
        pairs_of(path)
    captions, left_out = pairs_of(path, skip_damaged=True)
    assert captions == [f"words {n}" for n in range(num_whole)]
    assert len(left_out.damaged) == 1
    assert "part-00001.tar" in left_out.damaged[0]


def test_every_flip_in_a_header_is_found_or_harmless(tmp_path):
    """A header has a checksum, but for the zeros behind the last field and the bytes of the checksum's own padding."""
    path = tmp_path / "x.tar"
    chance = random.Random(0)
    for offset in [member.offset + chance.randrange(148) for member in MEMBERS for _ in range(3)]:
        path.write_bytes(flipped(offset))
        with pytest.raises(DataError):
            pairs_of(path)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars(tmp_path, pack):
    path = tmp_path / "x.tar.packed"
    path.write_bytes(pack(WHOLE))
    assert pairs_of(path)[0] == [f"words {n}" for n in range(NUM_PAIRS)]
    packed = pack(cut_in_data(6))
    for content in (pack(WHOLE)[:-4], pack(WHOLE)[: len(packed) // 2], packed):
        path.write_bytes(content)
        with pytest.raises(DamagedTar, match="cut off"):
            pairs_of(path)
    assert pairs_of(path, skip_damaged=True)[0] == ["words 0", "words 1", "words 2"]


def test_of_damaged_compressed_bytes_nothing_is_used(tmp_path):
    """Bytes before the place at which unpacking fails may have come out wrong already."""
    packed = gzip.compress(WHOLE)
    path = tmp_path / "x.tar.gz"
    for place in (-6, len(packed) // 2, len(packed) // 3):  # the first is the checksum at the end
        changed = bytearray(packed)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        with pytest.raises(DamagedTar):
            pairs_of(path)
        with pytest.raises(DataError, match="no pair"):
            pairs_of(path, skip_damaged=True)


def test_good_tars_beside_a_damaged_one(tmp_path):
    for number, content in enumerate((WHOLE, b"<html>not found</html>" * 99, bytes(10240), b"", WHOLE)):
        (tmp_path / f"{number}.tar").write_bytes(content)
    captions, left_out = pairs_of(tmp_path, skip_damaged=True)
    assert len(captions) == 2 * NUM_PAIRS
    assert [line.split(" as a tar")[0].rpartition("/")[2] for line in left_out.damaged] == ["1.tar", "3.tar"]
    assert left_out.counts == {"a tar without a member": 1}
    assert left_out.remarks()[-3].startswith("2 damaged tars")


def test_members_that_are_no_files_are_counted(tmp_path):
    members = []
    for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.FIFOTYPE),
                       ("d", tarfile.DIRTYPE)):
        members.append(tarfile.TarInfo(name))
        members[-1].type = kind
        members[-1].linkname = "0.jpg"
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of([*members, ("../../evil.jpg", IMAGE), ("../../evil.txt", b"words")]))
    captions, left_out = pairs_of(path)
    assert captions == ["words"]
    assert list(left_out.counts.values()) == [2, 1]


def test_long_names_of_both_formats(tmp_path):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "ünïcode/" * 30 + "picture"
        path = tmp_path / "x.tar"
        path.write_bytes(tar_of([(f"{name}.JPG", IMAGE), (f"{name}.txt", b"words")], form))
        assert pairs_of(path)[0] == ["words"]


def test_a_file_with_holes_is_left_out(tmp_path):
    """A sparse member of a few bytes may say that it has terabytes."""
    sparse = tarfile.TarInfo("0.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "0.jpg",
                          "GNU.sparse.size": str(2**40), "GNU.sparse.map": f"0,1,{2**40 - 1},0"}
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of([sparse, ("0.txt", b"x"), ("1.jpg", IMAGE), ("1.txt", b"words")], tarfile.PAX_FORMAT))
    captions, left_out = pairs_of(path)
    assert captions == ["words"]
    assert "a file with holes (sparse) inside a tar" in left_out.counts


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_huge_headers_are_not_read(tmp_path, kind):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 2**40
    content = WHOLE[:END] + header.tobuf(tarfile.USTAR_FORMAT if header.size < 2**33 else tarfile.GNU_FORMAT)
    path = tmp_path / "x.tar"
    path.write_bytes(content + bytes(2**17))
    with pytest.raises(DamagedTar, match="64 KiB"):
        pairs_of(path)


def test_endless_headers_are_not_read(tmp_path):
    """Each is small and stands before another one."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 512
    record = header.tobuf(tarfile.USTAR_FORMAT) + b"512 comment=" + b"x" * 499 + b"\n"
    path = tmp_path / "x.tar"
    path.write_bytes(WHOLE[:END] + record * 5000)
    with pytest.raises(DamagedTar):
        pairs_of(path)


def test_what_is_no_tar_is_named(tmp_path):
    for name, content, word in (("x.zip", b"PK\x03\x04\0\0", "zip"), ("x.zst", b"\x28\xb5\x2f\xfdab", "zst")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=word):
            pairs_of(tmp_path / name)


def test_a_tar_that_shrinks_is_told(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(WHOLE)
    with opened_tar(path) as file:
        found = tar_parts(file, path, LeftOut())
        path.write_bytes(WHOLE[:1000])
        with pytest.raises(DamagedTar, match="shrank"):
            found.parts[-2].read()
