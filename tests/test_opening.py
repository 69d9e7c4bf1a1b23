"""Files wherever they lie: read from any byte, whatever the server does, or named in an error."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from glowscale.data.cache import ShardCache
from glowscale.data.errors import DataError, ShardError
from glowscale.data.manifest import Shard
from glowscale.data.opening import Retry, Source
from tests.servers import FileServer, serving

DATA = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
QUICK = Retry(attempts=4, pause=0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(DATA)
    with serving(tmp_path / "served") as server:
        yield server


def read_all(location: str, start: int = 0, piece: int = 100_000) -> bytes:
    parts = []
    with Source(location, start, len(DATA), QUICK) as source:
        while part := source.read(piece):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("start", [0, 1, 2_500_000])
@pytest.mark.parametrize("behaviour", ["well", "truncates", "busy", "rangeless"])
def test_every_server_gives_the_right_bytes(
    server: FileServer, behaviour: str, start: int
) -> None:
    assert read_all(f"{server.url(behaviour)}/a.tar", start) == DATA[start:]


def test_a_range_is_all_that_is_sent(server: FileServer) -> None:
    assert read_all(f"{server.url('well')}/a.tar", 2_900_000) == DATA[2_900_000:]
    assert server.sent == 100_000
    server.sent = 0
    assert read_all(f"{server.url('truncates')}/a.tar") == DATA  # from where it broke
    assert server.sent < 1.1 * len(DATA)


@pytest.mark.parametrize("start", [0, 2_500_000])
def test_pipes_stores_and_plain_files_are_read_alike(tmp_path: Path, start: int) -> None:
    import fsspec

    (tmp_path / "a.tar").write_bytes(DATA)
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(DATA)
    for location in (
        str(tmp_path / "a.tar"),
        f"file://{tmp_path}/a.tar",
        f"pipe:cat {tmp_path}/a.tar",
        "memory://bucket/a.tar",
    ):
        assert read_all(location, start) == DATA[start:], location


def test_what_cannot_be_read_is_named_with_its_url(server: FileServer, tmp_path: Path) -> None:
    missing = f"{server.url('well')}/b.tar"
    with pytest.raises(
        ShardError, match=rf"^{missing} cannot be read from byte 0: HTTP Error 404"
    ):
        read_all(missing)
    assert len(server.requests) == 0  # asked once, and not counted as a file's
    busy = f"{server.url('always_busy')}/a.tar"
    with pytest.raises(ShardError, match=rf"{busy} .* after 4 attempts: HTTP Error 503"):
        read_all(busy)
    with pytest.raises(DataError, match=r"has 3000000 bytes; the manifest says 7"):
        Source(f"{server.url('well')}/a.tar", size=7, retry=QUICK).read(10)
    with pytest.raises(ShardError, match=r"http://127\.0\.0\.1:9/x .* after 4 attempts"):
        Source("http://127.0.0.1:9/x", retry=QUICK).read(1)
    with pytest.raises(DataError, match="nowhere is missing"):
        Source(str(tmp_path / "nowhere")).read(1)
    with pytest.raises(DataError, match=r"odd://x/y cannot be opened"):
        Source("odd://x/y", retry=QUICK).read(1)


def shards(folder: Path, count: int, size: int = 10_000) -> list[tuple[str, Shard]]:
    folder.mkdir()
    found = []
    for i in range(count):
        data = bytes([i]) * size
        (folder / f"{i}.tar").write_bytes(data)
        found.append((f"{i}.tar", Shard(f"{i}.tar", 1, size, hashlib.sha256(data).hexdigest())))
    return found


def test_a_cache_is_filled_once_bounded_and_forgets_the_least_recently_used(
    tmp_path: Path,
) -> None:
    served = shards(tmp_path / "far", 5)
    cache = ShardCache(tmp_path / "near", 35_000)
    with serving(tmp_path / "far") as server:
        urls = [f"{server.url('well')}/{name}" for name, _ in served]

        def fetch(i: int) -> bytes:
            return cache.fetch(urls[i], served[i][1]).read_bytes()

        with ThreadPoolExecutor(8) as pool:
            copies = list(pool.map(fetch, [0] * 16))
        assert copies == [bytes([0]) * 10_000] * 16
        assert len(server.requests) == 1
        for i in (1, 2, 0, 3):  # 1 is the least recently used when 3 comes
            assert fetch(i) == bytes([i]) * 10_000
        kept = {path.stat().st_size for path in (tmp_path / "near").glob("*.tar")}
        assert kept == {10_000}
        assert len(list((tmp_path / "near").glob("*.tar"))) == 3
        before = len(server.requests)
        fetch(0), fetch(2), fetch(3)
        assert len(server.requests) == before
        fetch(1)
        assert len(server.requests) == before + 1


def test_a_cache_holds_only_what_verifies_and_what_a_killed_process_left_goes(
    tmp_path: Path,
) -> None:
    (name, shard), *_ = shards(tmp_path / "far", 1)
    cache = ShardCache(tmp_path / "near", 15_000)
    (tmp_path / "near").mkdir()
    left = tmp_path / "near" / "x.tar.123.partial"
    left.write_bytes(bytes(14_000))
    (tmp_path / "far" / name).write_bytes(b"\1" * 10_000)
    with pytest.raises(ShardError, match=r"0\.tar is damaged: its hash is not the manifest's"):
        cache.fetch(str(tmp_path / "far" / name), shard)
    assert not left.exists()
    assert not [p for p in (tmp_path / "near").iterdir() if p.suffix != ".lock"]
    with pytest.raises(DataError, match=r"more than the whole cache of 9; raise data\.cache"):
        ShardCache(tmp_path / "near", 9).fetch("x", shard)
