"""Downloading MSD Task01: a download is checked before it is unpacked and resumes where it stopped; unpacking
is safe and whole. A loopback server plays the network: it cuts, stalls, changes its mind and lies."""

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
import urllib.request
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
        self.etag = '"first"'
        self.cuts = []  # how many bytes of its answer each coming request gets before the connection is cut
        self.statuses = []  # HTTP errors that the coming requests get
        self.ranges = True
        self.states_length = True
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
        if server.states_length:
            self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
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
    folder = fetch_task01(base, server.url, MD5)
    assert folder == (base / TASK).resolve()
    assert content_of(base) == FILES
    assert list(base.iterdir()) == [base / TASK]
    assert server.asked == [None]


@pytest.mark.parametrize("etag", ['"first"', None])
def test_a_cut_download_goes_on_where_it_was(server, base, etag):
    server.etag, server.cuts = etag, [40_000, 30_000]
    fetch_task01(base, server.url, MD5.upper())
    assert server.asked == [None, "bytes=40000-", "bytes=70000-"]
    assert content_of(base) == FILES


def test_a_later_call_goes_on_too(server, base):
    server.cuts = [10_000] * download.ATTEMPTS
    with pytest.raises(DownloadError, match=re.escape(server.url)):
        fetch_task01(base, server.url, MD5)
    assert len(server.asked) == download.ATTEMPTS  # bounded
    part = base / f"{TASK}.tar.part"
    assert part.read_bytes() == ARCHIVE[: 10_000 * download.ATTEMPTS]
    assert not (base / TASK).exists()

    server.asked.clear()
    fetch_task01(base, server.url, MD5)
    assert server.asked == [f"bytes={10_000 * download.ATTEMPTS}-"]
    assert content_of(base) == FILES


def test_a_server_that_ignores_ranges(server, base):
    server.ranges, server.cuts = False, [40_000]
    fetch_task01(base, server.url, MD5)
    assert server.asked == [None, "bytes=40000-"]
    assert content_of(base) == FILES


@pytest.mark.parametrize("etag", ['"second"', None])
def test_a_file_that_changed_in_between_is_fetched_anew(server, base, etag, monkeypatch):
    server.content, server.cuts = bytes(len(ARCHIVE)), [40_000]  # another file of the same length

    def change(_):
        server.content, server.etag = ARCHIVE, etag

    monkeypatch.setattr(time, "sleep", change)
    fetch_task01(base, server.url, MD5)
    assert server.asked == [None, "bytes=40000-", None]
    assert content_of(base) == FILES


def test_a_file_that_shrank_in_between_is_fetched_anew(server, base, monkeypatch):
    server.content, server.cuts = ARCHIVE + bytes(9_000), [len(ARCHIVE) + 10]
    monkeypatch.setattr(time, "sleep", lambda _: setattr(server, "content", ARCHIVE))
    fetch_task01(base, server.url, MD5)
    assert server.asked == [None, f"bytes={len(ARCHIVE) + 10}-", None]
    assert content_of(base) == FILES


def test_a_part_from_another_address_is_not_continued(server, base):
    server.cuts = [10_000] * download.ATTEMPTS
    with pytest.raises(DownloadError):
        fetch_task01(base, server.url, MD5)
    server.asked.clear()
    fetch_task01(base, server.url + "?mirror", MD5)
    assert server.asked == [None]
    assert content_of(base) == FILES


def test_notes_half_written_when_the_process_died_mean_a_fresh_start(server, base):
    base.mkdir()
    (base / f"{TASK}.tar.part").write_bytes(b"whatever")
    (base / f"{TASK}.tar.part.json").write_text('{"url": "http')
    fetch_task01(base, server.url, MD5)
    assert server.asked == [None]
    assert content_of(base) == FILES


def test_a_server_that_states_no_length(server, base):
    server.states_length = False
    fetch_task01(base, server.url, MD5)
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

    server.content = ARCHIVE
    fetch_task01(base, server.url, MD5)
    assert content_of(base) == FILES


def test_the_default_address_and_hash_are_those_that_monai_knows(server, base, monkeypatch):
    from monai.apps import DecathlonDataset

    asked = []

    def open_locally(request, timeout):
        asked.append(request.full_url)
        return urllib.request.urlopen(server.url, timeout=timeout)

    monkeypatch.setattr(download, "urlopen", open_locally)
    with pytest.raises(RefusedArchive, match=DecathlonDataset.md5[TASK]):
        fetch_task01(base)
    assert asked == [DecathlonDataset.resource[TASK]]


def test_too_little_disk_space_is_said_before_the_download(server, base, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download, "GB", 1e3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2 * len(ARCHIVE) - 1))
    with pytest.raises(UserError) as error:
        fetch_task01(base, server.url, MD5)
    assert f"{2 * len(ARCHIVE) / 1e3:.2f} GB are needed" in str(error.value)
    assert str(base) in str(error.value)
    assert (base / f"{TASK}.tar.part").stat().st_size == 0

    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2 * len(ARCHIVE)))
    fetch_task01(base, server.url, MD5)
    assert content_of(base) == FILES


# ---- unpack ------------------------------------------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member(f"{TASK}/../../outside.txt"),
        member("../outside.txt"),
        member("{tmp}/outside.txt"),
        member(f"{TASK}\\..\\..\\outside.txt"),
        member("C:outside.txt"),
        member("C:/outside.txt"),
        member("\\\\host\\share\\outside.txt"),
        member(f"{TASK}/link", tarfile.SYMTYPE, "../.."),
        member(f"{TASK}/link", tarfile.SYMTYPE, "dataset.json"),
        member(f"{TASK}/link", tarfile.LNKTYPE, f"{TASK}/dataset.json"),
        member(f"{TASK}/link", tarfile.LNKTYPE, "{tmp}/precious.txt"),
        member(f"{TASK}/._link", tarfile.SYMTYPE, "/etc/passwd"),
        member(f"{TASK}/pipe", tarfile.FIFOTYPE),
        member(f"{TASK}/device", tarfile.CHRTYPE),
    ],
    ids=lambda evil: f"{evil.name}-{evil.type.decode()}",
)
def test_unsafe_archives_are_refused_every_time(server, tmp_path, base, evil):
    (tmp_path / "precious.txt").write_text("mine")
    evil = evil.replace(name=evil.name.format(tmp=tmp_path.as_posix()), deep=True)
    evil.linkname = evil.linkname.format(tmp=tmp_path.as_posix())
    server.content = make_tar(extra=[evil])
    for attempt in (1, 2):
        with pytest.raises(RefusedArchive) as refusal:
            fetch_task01(base, server.url, md5_of(server.content))
        assert repr(evil.name) in str(refusal.value)
        assert content_of(tmp_path) == {"precious.txt": b"mine"}
        assert list(base.iterdir()) == []
        assert server.asked == [None] * attempt


def listing(content: bytes) -> bytes:
    """The archive with this dataset.json."""
    return make_tar({**FILES, f"{TASK}/dataset.json": content})


INCOMPLETE = {  # an archive, and what is said of it
    "missing": (
        make_tar({k: v for k, v in FILES.items() if "labelsTr/BRATS_002" not in k}),
        "labelsTr/BRATS_002",
    ),
    "empty": (make_tar({**FILES, f"{TASK}/imagesTs/BRATS_485.nii.gz": b""}), "imagesTs/BRATS_485.nii.gz"),
    "no cases": (listing(b'{"training": []}'), "no training cases"),
    "no image": (listing(b'{"training": [{}]}'), "KeyError"),
    "no json": (listing(b"\xff"), "cannot be read"),
    "elsewhere": (listing(b'{"training": [{"image": "/no", "label": "/no"}]}'), "/no"),
    "another task": (make_tar({"Task04_Hippocampus/dataset.json": b"{}"}), "no dataset.json"),
    "a name too long": (make_tar({**FILES, f"{TASK}/{'long' * 100}": b"a"}), "not a whole, safe tar"),
    "truncated": (ARCHIVE[:30_000], "not a whole, safe tar"),
    "html": (b"<html>Please log in</html>", "not a whole, safe tar"),
    "nothing": (b"", "not a whole, safe tar"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_incomplete_archives_are_refused_every_time(server, base, name):
    server.content, complaint = INCOMPLETE[name]
    for _ in (1, 2):
        with pytest.raises(RefusedArchive, match=complaint):
            fetch_task01(base, server.url, md5_of(server.content))
        assert list(base.iterdir()) == []


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_interrupted_unpacking_is_done_again_from_the_start(server, base, monkeypatch, how):
    written = []
    makefile = tarfile.TarFile.makefile

    def stop_at_the_third(tar, info, path):
        written.append(info.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        makefile(tar, info, path)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", stop_at_the_third)
        if how == "killed":  # no clean-up
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            fetch_task01(base, server.url, MD5)
    assert len(written) == 3
    assert not (base / TASK).exists()
    leftovers = base / f"{TASK}.unpacking"
    assert leftovers.exists() == (how == "killed")
    if how == "killed":
        assert (leftovers / TASK / "imagesTr" / "BRATS_001.nii.gz").is_file()
        (leftovers / TASK / "stale.txt").write_text("from the first try")

    fetch_task01(base, server.url, MD5)
    assert content_of(base) == FILES
    assert list(base.iterdir()) == [base / TASK]
    assert server.asked == [None]  # the archive was still there, and was checked again


def test_dot_underscore_files_are_left_out(server, base):
    apple = {f"._{TASK}": b"a", f"{TASK}/imagesTr/._BRATS_001.nii.gz": b"a", f"{TASK}/._dataset.json": b"a"}
    server.content = make_tar({**apple, **FILES})
    fetch_task01(base, server.url, md5_of(server.content))
    assert content_of(base) == FILES


# ---- what is there already ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", TASK], ids=["parent", "folder itself"])
def test_a_complete_data_set_is_left_alone(server, base, where, capsys):
    for name, content in FILES.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    (base / TASK / "notes.txt").write_text("mine")
    before = {p: p.stat().st_mtime_ns for p in base.rglob("*")}
    assert fetch_task01(base / where, server.url, MD5) == (base / TASK).resolve()
    assert "complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in base.rglob("*")} == before
    assert server.asked == []


def test_an_incomplete_data_set_is_named_and_left_alone(server, base):
    fetch_task01(base, server.url, MD5)
    (base / TASK / "labelsTr" / "BRATS_002.nii.gz").unlink()
    before = content_of(base)
    with pytest.raises(UserError, match="1 of the 5 files .*labelsTr/BRATS_002.nii.gz"):
        fetch_task01(base, server.url, MD5)
    assert content_of(base) == before
    assert server.asked == [None]


def test_an_empty_folder_is_filled(server, base):
    (base / TASK).mkdir(parents=True)
    assert fetch_task01(base / TASK, server.url, MD5) == (base / TASK).resolve()
    assert content_of(base) == FILES


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


def test_script_fetches_once(server, base, environment, capsys):
    argv = ["-e", environment, "--url", server.url, "--md5", MD5]
    assert run(*argv) == 0
    assert str(base / TASK) in capsys.readouterr().out
    assert content_of(base) == FILES
    assert run(*argv) == 0
    assert "nothing to download" in capsys.readouterr().out
    assert server.asked == [None]


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

    server.cuts = [100] * download.ATTEMPTS
    assert run("-e", environment, "--url", server.url, "--md5", MD5) == 1
    assert "run again to resume" in last_error_line(capsys)
    assert run("-e", environment, "--url", server.url, "--md5", MD5) == 0
    assert content_of(base) == FILES


def test_script_stopped_by_the_user(server, environment, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_read", stop)
    assert run("-e", environment, "--url", server.url, "--md5", MD5) == 1
    assert "run the same command again" in capsys.readouterr().err


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
