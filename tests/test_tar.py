"""The tar reader against Python's own tarfile, and what it says of damage."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowscale.data.tar import ShardError, read_members, read_samples

NAMES = st.lists(
    st.from_regex(r"[a-z]{1,8}(/[a-zß]{1,60}){0,4}\.(png|cls)", fullmatch=True),
    min_size=1,
    max_size=6,
    unique=True,
)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def make_tar(members: dict[str, bytes], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@given(names=NAMES, sizes=st.lists(st.integers(0, 1500), min_size=6, max_size=6))
@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_are_those_that_tarfile_wrote(
    tar_format: int, names: list[str], sizes: list[int]
) -> None:
    members = {name: bytes([i]) * sizes[i] for i, name in enumerate(names)}
    try:
        data = make_tar(members, tar_format)
    except ValueError:  # ustar has no place for so long a name
        return
    found = {m.name: m.data for m in read_members(io.BytesIO(data), "x.tar")}
    assert found == members


def test_folders_and_links_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder, link = tarfile.TarInfo("a"), tarfile.TarInfo("a/l.png")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "b.png"
        archive.addfile(folder)
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("a/b.png"), io.BytesIO())
    buffer.seek(0)
    assert [m.name for m in read_members(buffer, "x.tar")] == ["a/b.png"]


def test_reading_can_begin_at_any_samples_offset() -> None:
    long = "deep/" * 40
    data = make_tar({f"{long}{i}.{e}": bytes(i) for i in range(9) for e in ("cls", "png")})
    samples = list(read_samples(io.BytesIO(data), "x.tar"))
    assert [s.key for s in samples] == [f"{long}{i}" for i in range(9)]
    assert all(sorted(s.files) == ["cls", "png"] for s in samples)
    for index, sample in enumerate(samples):
        file = io.BytesIO(data)
        file.seek(sample.offset)
        assert list(read_samples(file, "x.tar", sample.offset)) == samples[index:]


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 2500])
def test_a_truncated_shard_is_an_error_that_names_it(cut: int) -> None:
    data = make_tar({"a.png": b"x" * 300, "b.png": b"y" * 600})
    with pytest.raises(ShardError, match=r"some/x\.tar is truncated: it ends at byte"):
        list(read_samples(io.BytesIO(data[:cut]), "some/x.tar"))


def test_what_is_no_tar_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"x\.tar is no tar"):
        list(read_samples(io.BytesIO(b"z" * 5000), "x.tar"))


def test_a_member_twice_in_a_sample_is_refused_by_name() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    buffer.seek(0)
    with pytest.raises(ShardError, match=r"holds 'a\.png' twice"):
        list(read_samples(buffer, "x.tar"))
