"""Fetching MSD Task01: a download is checked before it is unpacked, and resumes; unpacking is safe and all or
nothing. A local server plays the network: it cuts the connection, stalls and answers with errors."""

import hashlib
import http.server
import io
import json
import re
import shutil
import socket
import tarfile
import threading
import time
from collections import namedtuple

import pytest

import download_brats_data
from ldm import UserError
from ldm.data import download
from ldm.data.download import TASK, DownloadError, RefusedArchive, fetch_task01

# Two cases and a test case whose bytes do not compress, repeat or resemble each other.
FILES = {
    f"{TASK}/{name}": hashlib.shake_128(name.encode()).digest(size)
    for name, size in {
        "imagesTr/BRATS_001.nii.gz": 70_000,
        "imagesTr/BRATS_002.nii.gz": 50_001,
        "labelsTr/BRATS_001.nii.gz": 1_003,
        "labelsTr/BRATS_002.nii.gz": 999,
        "imagesTs/BRATS_485.nii.gz": 20_000,
    }.items()
}
DATASET = {
    "name": "BRATS",
    "training": [
        {"image": f"./imagesTr/BRATS_00{i}.nii.gz", "label": f"./labelsTr/BRATS_00{i}.nii.gz"} for i in (1, 2)
    ],
    "test": ["./imagesTs/BRATS_485.nii.gz"],
}
FILES[f"{TASK}/dataset.json"] = json.dumps(DATASET).encode()


def make_tar(files=FILES, extra=()):
    """The bytes of a tar of files, {name: bytes}, and extra members as TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return buffer.getvalue()


def md5_of(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


ARCHIVE = make_tar()
MD5 = md5_of(ARCHIVE)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path, and keeps each request's Range header (None without one) in `asked`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = ARCHIVE
        self.cuts = []  # how many bytes of its answer each coming request gets before the connection is cut
        self.statuses = []  # HTTP errors that the coming requests get
        self.ranges = True
        self.stall = 0.0
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/{TASK}.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        body, total, start = server.content, len(server.content), 0
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        if wanted and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= total:
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        body = body[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.stall:
            time.sleep(server.stall)
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def base(tmp_path):
    return tmp_path / "data"


def content_of(folder):
    """{path: bytes} of all files below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


# ---- download ----------------------------------------------------------------------------------------------


def test_fetches_verifies_unpacks_and_leaves_nothing_else(server, base):
    (base / TASK).mkdir(parents=True)  # an empty folder is filled
    folder = fetch_task01(base, server.url, MD5)
    assert folder == (base / TASK).resolve()
    assert content_of(base) == FILES
    assert list(base.iterdir()) == [base / TASK]
    assert server.asked == [None]


def test_a_cut_download_resumes_in_the_same_call_and_in_a_later_one(server, base):
    server.cuts = [10_000] * download.ATTEMPTS
    with pytest.raises(DownloadError, match=re.escape(server.url)):
        fetch_task01(base, server.url, MD5)
    assert server.asked == [None, *(f"bytes={i}0000-" for i in range(1, download.ATTEMPTS))]  # bounded
    part = base / f"{TASK}.tar.part"
    assert part.read_bytes() == ARCHIVE[: 10_000 * download.ATTEMPTS]
    assert not (base / TASK).exists()

    server.asked.clear()
    fetch_task01(base, server.url, MD5.upper())
    assert server.asked == [f"bytes={10_000 * download.ATTEMPTS}-"]
    assert content_of(base) == FILES


def test_a_server_that_ignores_ranges(server, base):
    server.ranges, server.cuts = False, [40_000]
    fetch_task01(base, server.url, MD5)
    assert server.asked == [None, "bytes=40000-"]
    assert content_of(base) == FILES


def test_passing_server_errors_and_stalls_are_tried_again(server, base, monkeypatch):
    server.statuses = [503, 429]
    fetch_task01(base / "a", server.url, MD5)
    assert server.asked == [None] * 3
    assert content_of(base / "a") == FILES

    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.stall = 0.3
    with pytest.raises(DownloadError, match="timed out"):
        fetch_task01(base / "b", server.url, MD5)
    assert len(server.asked) == 3 + download.ATTEMPTS


def test_a_file_that_is_not_on_the_server_is_asked_for_once(server, base):
    server.statuses = [404]
    with pytest.raises(DownloadError, match="404"):
        fetch_task01(base, server.url, MD5)
    assert server.asked == [None]


def test_wrong_bytes_are_refused_before_unpacking_and_again(server, base):
    server.content = ARCHIVE[:-2000] + b"x" + ARCHIVE[-1999:]
    for attempt in (1, 2):
        with pytest.raises(RefusedArchive) as refusal:
            fetch_task01(base, server.url, MD5)
        for said in (server.url, MD5, md5_of(server.content)):
            assert said in str(refusal.value)
        assert list(base.iterdir()) == []
        assert server.asked == [None] * attempt


def test_too_little_disk_space_is_reported_before_the_download(server, base, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download, "GB", 1e3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2 * len(ARCHIVE) - 1))
    with pytest.raises(UserError) as error:
        fetch_task01(base, server.url, MD5)
    assert f"{2 * len(ARCHIVE) / 1e3:.2f} GB are needed" in str(error.value)
    assert str(base) in str(error.value)
    assert list(base.iterdir()) == []


# ---- unpack ------------------------------------------------------------------------------------------------


def packed_with(name, kind=tarfile.REGTYPE, target=""):
    """The archive with a further member."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return make_tar(extra=[info])


WITHOUT_ONE = {name: content for name, content in FILES.items() if "labelsTr/BRATS_002" not in name}
REFUSED = {  # an archive, and what is reported
    "outside": (packed_with(f"{TASK}/../../outside.txt"), "not a whole, safe tar"),
    "absolute path": (packed_with("/tmp/outside.txt"), "outside.txt' is an absolute path"),
    "link outside": (packed_with(f"{TASK}/link", tarfile.SYMTYPE, "../.."), "link' is neither"),
    "link inside": (packed_with(f"{TASK}/link", tarfile.SYMTYPE, "dataset.json"), "link' is neither"),
    "hard link": (packed_with(f"{TASK}/link", tarfile.LNKTYPE, f"{TASK}/dataset.json"), "link' is neither"),
    "device": (packed_with(f"{TASK}/device", tarfile.CHRTYPE), "device' is neither"),
    "missing": (make_tar(WITHOUT_ONE), "labelsTr/BRATS_002"),
    "empty": (make_tar({**FILES, f"{TASK}/imagesTs/BRATS_485.nii.gz": b""}), "imagesTs/BRATS_485.nii.gz"),
    "no cases": (make_tar({**FILES, f"{TASK}/dataset.json": b'{"training": []}'}), "no training cases"),
    "no json": (make_tar({**FILES, f"{TASK}/dataset.json": b"\xff"}), "cannot be read"),
    "another task": (make_tar({"Task04_Hippocampus/dataset.json": b"{}"}), "no dataset.json"),
    "truncated": (ARCHIVE[:30_000], "not a whole, safe tar"),
    "html": (b"<html>Please log in</html>", "not a whole, safe tar"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsafe_and_incomplete_archives_are_refused_every_time(server, tmp_path, base, name):
    server.content, complaint = REFUSED[name]
    for attempt in (1, 2):
        with pytest.raises(RefusedArchive, match=complaint):
            fetch_task01(base, server.url, md5_of(server.content))
        assert content_of(tmp_path) == {} and list(base.iterdir()) == []
        assert server.asked == [None] * attempt


def test_an_interrupted_unpacking_starts_again(server, base, monkeypatch):
    written = []
    makefile = tarfile.TarFile.makefile

    def stop_at_the_third(tar, info, path):
        written.append(info.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        makefile(tar, info, path)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", stop_at_the_third)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed: no clean-up
        with pytest.raises(KeyboardInterrupt):
            fetch_task01(base, server.url, MD5)
    assert not (base / TASK).exists()
    (base / f"{TASK}.unpacking" / TASK / "stale.txt").write_text("from the first try")

    fetch_task01(base, server.url, MD5)
    assert content_of(base) == FILES
    assert list(base.iterdir()) == [base / TASK]
    assert server.asked == [None, f"bytes={len(ARCHIVE)}-"]  # nothing was sent again


def test_dot_underscore_files_are_left_out(server, base):
    apple = {f"._{TASK}": b"a", f"{TASK}/imagesTr/._BRATS_001.nii.gz": b"a", f"{TASK}/._dataset.json": b"a"}
    server.content = make_tar({**apple, **FILES})
    fetch_task01(base, server.url, md5_of(server.content))
    assert content_of(base) == FILES


# ---- what is there already ---------------------------------------------------------------------------------


def test_what_exists_is_left_alone(server, base, capsys):
    fetch_task01(base, server.url, MD5)
    before = {p: p.stat().st_mtime_ns for p in base.rglob("*")}
    for where in (base, base / TASK):
        assert fetch_task01(where, server.url, MD5) == (base / TASK).resolve()
        assert "nothing to download" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in base.rglob("*")} == before
    (base / TASK / "labelsTr" / "BRATS_002.nii.gz").unlink()
    before = content_of(base)
    with pytest.raises(UserError, match="1 of the 5 files .*labelsTr/BRATS_002.nii.gz"):
        fetch_task01(base, server.url, MD5)
    assert content_of(base) == before
    assert server.asked == [None]


# ---- the script --------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path, base):
    path = tmp_path / "environment.json"
    folders = {key: str(tmp_path / key) for key in ("model_dir", "tfevent_path", "output_dir")}
    path.write_text(json.dumps({"data_base_dir": str(base), **folders}))
    return str(path)


def run(*argv):
    """The script's exit code."""
    try:
        download_brats_data.main([str(arg) for arg in argv])
    except SystemExit as exit:
        return exit.code or 0
    return 0


def last_error_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_script_takes_an_archive_from_a_disk(tmp_path, base, environment, capsys):
    carried = tmp_path / "carried in.tar"
    carried.write_bytes(ARCHIVE)
    argv = ["-e", environment, "--md5", MD5, "--url"]
    assert run(*argv, (tmp_path / "mistyped.tar").as_uri()) == 2
    assert "mistyped.tar" in last_error_line(capsys)
    assert run(*argv, carried.as_uri()) == 0
    assert content_of(base) == FILES
    assert carried.read_bytes() == ARCHIVE


def test_script_exit_code_1_for_the_network(server, base, environment, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/{TASK}.tar"
        assert run("-e", environment, "--url", nobody, "--md5", MD5) == 1
    assert nobody in last_error_line(capsys)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--md5", "0" * 32], "0" * 32),
        (["--md5", "240a"], "'240a'"),
        (["--url", "ftp://127.0.0.1/a.tar"], "must begin with http"),
        (["--url", "http://127.0.0.1:port/a.tar"], "port"),
        (["--url", "http://[127.0.0.1/a.tar"], "[127.0.0.1"),
    ],
)
def test_script_exit_code_2_for_what_the_user_can_mend(server, base, environment, capsys, argv, said):
    assert run("-e", environment, "--url", server.url, "--md5", MD5, *argv) == 2
    assert said in last_error_line(capsys)
    assert content_of(base) == {}


def test_script_exit_code_2_for_a_data_base_dir_that_cannot_be_one(server, base, environment, capsys):
    base.write_text("a file")
    assert run("-e", environment, "--url", server.url, "--md5", MD5) == 2
    assert "data_base_dir" in last_error_line(capsys)
    assert base.read_text() == "a file"
    assert server.asked == []
