"""Downloads that break, and archives that lie, against a server on this machine."""
import hashlib
import io
import os
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from robustcv.data import load_tiny_imagenet
from robustcv.download import download, download_tiny_imagenet, unpack_zip

CONTENT = bytes(range(256))*40

def md5(content): return hashlib.md5(content).hexdigest()

@pytest.fixture
def serve(monkeypatch):
    "Start a server; `events`, one a request: None (all of it), bytes to send before breaking, a status, or raw bytes to answer."
    monkeypatch.setenv("no_proxy", "*")
    servers = []
    def start(content=CONTENT, events=(), ranges=True):
        events, sent = list(events), [] # sent: first byte and number of bytes of each answer
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                event, asked = events.pop(0) if events else None, self.headers.get("Range")
                first = int(asked.removeprefix("bytes=").removesuffix("-")) if ranges and asked else 0
                if isinstance(event, bytes): sent.append((first, 0)); self.wfile.write(event); return
                if event in (404, 503): sent.append((first, 0)); self.send_error(event); return
                self.send_response(206 if ranges and asked else 200)
                if ranges and asked: self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - first)); self.end_headers()
                body = content[first:][:event]
                sent.append((first, len(body))); self.wfile.write(body)
            def log_message(self, *args): pass
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/file.zip", sent
    yield start
    for s in servers: s.shutdown(); s.server_close()

def fetch(url, dest, content=CONTENT, **kwargs): return download(url, dest, len(content), md5(content), **kwargs)


def test_a_file_is_fetched_once(serve, tmp_path):
    url, sent = serve()
    for _ in range(2): assert fetch(url, tmp_path/"new"/"file").read_bytes() == CONTENT
    assert sent == [(0, len(CONTENT))] and [f.name for f in (tmp_path/"new").iterdir()] == ["file"]

def test_a_broken_transfer_is_continued_where_it_broke(serve, tmp_path):
    url, sent = serve(events=[3000, 2000])
    assert fetch(url, tmp_path/"file", tries=1).read_bytes() == CONTENT
    assert sent == [(0, 3000), (3000, 2000), (5000, len(CONTENT) - 5000)]

def test_a_server_that_cannot_continue_sends_all_of_it_again(serve, tmp_path):
    url, sent = serve(events=[3000], ranges=False)
    assert fetch(url, tmp_path/"file").read_bytes() == CONTENT and sent == [(0, 3000), (0, len(CONTENT))]

def test_a_later_call_continues_an_interrupted_one(serve, tmp_path):
    url, sent = serve(events=[3000, 503])
    with pytest.raises(ConnectionError, match=r"503.*run again to continue at 3,000 of 10,240 bytes, or put the file at .*file"):
        fetch(url, tmp_path/"file", tries=1)
    assert not (tmp_path/"file").exists()
    assert fetch(url, tmp_path/"file").read_bytes() == CONTENT and sent[-1] == (3000, len(CONTENT) - 3000)

def test_a_wrong_checksum_is_refused_and_the_damaged_file_removed(serve, tmp_path):
    damaged = b"x" + CONTENT[1:]
    url, _ = serve(damaged)
    with pytest.raises(ValueError, match=f"checksum {md5(damaged)} instead of {md5(CONTENT)}"): fetch(url, tmp_path/"file")
    assert not list(tmp_path.iterdir())

def test_a_wrong_checksum_leaves_an_older_file_alone(serve, tmp_path):
    (tmp_path/"file").write_text("older")
    with pytest.raises(ValueError): fetch(serve(b"x" + CONTENT[1:])[0], tmp_path/"file")
    assert (tmp_path/"file").read_text() == "older"

def test_more_bytes_than_expected_are_refused(serve, tmp_path):
    url, _ = serve(CONTENT*3)
    with pytest.raises(ConnectionError, match="more than the expected 10,240 bytes"): fetch(url, tmp_path/"file", tries=2)
    assert not (tmp_path/"file").exists() and sum(f.stat().st_size for f in tmp_path.iterdir()) <= len(CONTENT)

def test_fewer_bytes_than_expected_end_in_an_error(serve, tmp_path):
    with pytest.raises(ConnectionError, match="cannot download"): fetch(serve(CONTENT[:100])[0], tmp_path/"file", tries=2)

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n" + CONTENT[:500]

@pytest.mark.parametrize("event", [404, 503, b"", b"nonsense\r\n\r\n", CHUNKED], ids=["404", "503", "hangs up", "not HTTP", "broken chunk"])
def test_a_failing_server_is_named_with_the_way_out(serve, tmp_path, event):
    times = 4 if event == CHUNKED else 3 # its first answer brings something, and costs no try
    url, sent = serve(events=[event]*times)
    with pytest.raises(ConnectionError, match=f"(?s)cannot download {url}: .*put the file at {tmp_path}/file yourself"):
        fetch(url, tmp_path/"file", tries=3)
    assert len(sent) == times and not (tmp_path/"file").exists()

def test_tries_count_attempts_that_bring_nothing(serve, tmp_path):
    url, sent = serve(events=[1000]*9) # every connection breaks after as many bytes
    assert fetch(url, tmp_path/"file", tries=1).read_bytes() == CONTENT and len(sent) == 10

def test_a_server_that_is_down_is_named(serve, tmp_path):
    with pytest.raises(ConnectionError, match="cannot download http://127.0.0.1:1/x.*refused"):
        fetch("http://127.0.0.1:1/x", tmp_path/"file")


def archive(path, entries=(("top/a.txt", b"a"), ("top/deep/b.txt", b"b")), link=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            if name == link: info.external_attr = (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path

def test_an_archive_is_unpacked(tmp_path):
    unpack_zip(archive(tmp_path/"a.zip"), tmp_path/"out", "top")
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")} == {"a.zip", "out", "out/a.txt", "out/deep", "out/deep/b.txt"}

@pytest.mark.parametrize("name", ["../evil", "top/../../evil", "/evil", "other/evil", "evil", "..\\evil", "C:\\evil", "top/..\\..\\evil",
                                  "top/link"])
def test_an_archive_that_reaches_outside_is_refused_whole(tmp_path, name):
    (tmp_path/"in").mkdir(); file = archive(tmp_path/"in"/"a.zip", [("top/a.txt", b"a"), (name, b"/etc/passwd")], link="top/link")
    with pytest.raises(ValueError, match="refuses to unpack"): unpack_zip(file, tmp_path/"in"/"out", "top")
    assert [f.name for f in tmp_path.rglob("*")] == ["in", "a.zip"]

@pytest.mark.parametrize("size, limit", [(5_000_000, 4 << 30), (5000, 1000)], ids=["ratio", "limit"])
def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path, size, limit):
    file = archive(tmp_path/"a.zip", [("top/zeros", bytes(size))])
    with pytest.raises(ValueError, match=f"would unpack to {size:,} bytes"): unpack_zip(file, tmp_path/"out", "top", limit)
    assert [f.name for f in tmp_path.iterdir()] == ["a.zip"]

def test_unpacking_does_not_replace_what_is_there(tmp_path):
    (tmp_path/"out").mkdir(); (tmp_path/"out"/"mine").write_text("mine")
    with pytest.raises(OSError): unpack_zip(archive(tmp_path/"a.zip"), tmp_path/"out", "top")
    assert [f.name for f in (tmp_path/"out").iterdir()] == ["mine"] and len(list(tmp_path.iterdir())) == 2

def test_a_damaged_archive_leaves_nothing(tmp_path):
    file = archive(tmp_path/"a.zip", [("top/a", os.urandom(1000))])
    file.write_bytes(file.read_bytes().replace(file.read_bytes()[200:210], b"0123456789"))
    with pytest.raises(ValueError, match="a.zip: not a sound zip archive"): unpack_zip(file, tmp_path/"out", "top")
    assert [f.name for f in tmp_path.iterdir()] == ["a.zip"]


@pytest.fixture(scope="session")
def packed(tiny):
    "The tiny set as the official archive would hold it."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for f in sorted(tiny.rglob("*")): z.write(f, f"tiny-imagenet-200/{f.relative_to(tiny)}")
    return out.getvalue()

def get(root, url, packed): return download_tiny_imagenet(root, url, len(packed), md5(packed))

def test_the_set_is_fetched_unpacked_and_then_left_alone(serve, packed, tiny, tmp_path):
    (tmp_path/"mine").write_text("mine")
    url, sent = serve(packed, events=[20_000])
    for _ in range(2): assert get(tmp_path, url, packed) == tmp_path/"tiny-imagenet-200"
    assert sent == [(0, 20_000), (20_000, len(packed) - 20_000)]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["mine", "tiny-imagenet-200"]
    assert load_tiny_imagenet(tmp_path, download=True).fingerprint == load_tiny_imagenet(tiny).fingerprint

def test_a_file_that_is_no_archive_is_refused(serve, tmp_path):
    with pytest.raises(ValueError, match="not a sound zip archive"): get(tmp_path, serve()[0], CONTENT)
    assert not (tmp_path/"tiny-imagenet-200").exists()

def test_a_half_unpacked_folder_is_not_overwritten_and_nothing_is_fetched(serve, packed, tmp_path):
    (tmp_path/"tiny-imagenet-200").mkdir(); (tmp_path/"tiny-imagenet-200"/"mine").write_text("mine")
    url, sent = serve(packed)
    with pytest.raises(FileExistsError, match="tiny-imagenet-200"): get(tmp_path, url, packed)
    assert not sent and (tmp_path/"tiny-imagenet-200"/"mine").read_text() == "mine"
