"""What the stores on a local disk share: private files and folders, and where they refuse to work."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from harness.errors import CheckpointError

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse.ceph", "fuse.davfs", "fuse.gcsfuse",
        "fuse.glusterfs", "fuse.goofys", "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs",
        "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "smb", "smb3", "smbfs",
    }
)  # fmt: skip
"""Types of file systems that other machines write to as well, as the kernel's mount table names them."""


def private_folder(path: Path) -> None:
    """Create a folder that only its owner may enter, with its parents, durably.

    Raises:
        CheckpointError: it cannot be created.
    """
    if path.is_dir():
        return
    if path.parent != path:
        private_folder(path.parent)
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(PermissionError):  # a parent of somebody else's may be closed to reading
            sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot create the folder {str(path)!r}: {error.strerror}; name another one") from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: a new file is lost at a power cut while its folder is not synced."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def create_private_file(path: Path) -> bool:
    """Create an empty file that only its owner may read, durably. Returns whether it was missing."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    sync_folder(path.parent)
    return True


def write_private_file(path: Path, data: bytes, *, at: float | None = None) -> None:
    """Write a file that only its owner may read, durably and all at once.

    Args:
        path: the file; its folder exists.
        data: what it holds.
        at: when it is said to have been written, seconds since the epoch.
    """
    draft = path.with_name(f".{secrets.token_hex(8)}")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            if at is not None:
                os.utime(fd, (at, at))
            os.fsync(fd)
        draft.rename(path)
        sync_folder(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def file_system(path: Path, mounts: str) -> str:
    r"""Return the type of the file system a path is on.

    Args:
        path: an absolute path; it need not exist.
        mounts: the text of ``/proc/mounts``.

    >>> file_system(Path("/data/my runs/runs.db"), "disk / ext4 rw 0 0\nnas:/x /data/my\\040runs nfs4 rw 0 0\n")
    'nfs4'
    """
    found, depth = "", -1
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # The kernel writes blanks and backslashes of a path as octal escapes.
        point = Path(fields[1].encode("utf-8", "surrogateescape").decode("unicode_escape", "replace"))
        # A later mount on the same point covers an earlier one, hence >=.
        if path.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = fields[2], len(point.parts)
    return found


def refuse_network(path: Path) -> None:
    """Refuse a path that other machines write to as well: their locks and mapped memory do not reach this one.

    Raises:
        CheckpointError: the path is on a network file system. Without a mount table nothing is refused.
    """
    try:
        mounts = Path("/proc/mounts").read_text(errors="surrogateescape")
    except OSError:
        return
    if not any(f" {kind} " in mounts for kind in NETWORK_FILE_SYSTEMS):
        return  # as nearly everywhere; taking every line of the table apart costs as much as opening a database
    kind = file_system(path.resolve(), mounts)
    if kind in NETWORK_FILE_SYSTEMS:
        raise CheckpointError(
            f"{str(path)!r} is on a network file system ({kind}), where SQLite cannot keep a journal safe: "
            "name a path on a local disk, or use a store that is made for many machines"
        )
