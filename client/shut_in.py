"""Become another program with less around it: `python -m client.shut_in SETTINGS PROGRAM ARGUMENT...`.

The last step before the trainer, inside bubblewrap or in place of it. It imports nothing but the standard library and
calls Linux itself, so that a site needs no further program: unshare(2), mount(2), mount_setattr(2), capset(2).
Nothing here is undone: it ends in exec. Namespaces need Linux 5.12 and leave to make user namespaces, or root.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

DEVICES = ("null", "zero", "full", "random", "urandom")
GPUS = ("nvidia*", "dri", "kfd", "dxg")
MASKED = ("/tmp", "/var/tmp", "/run")  # What programs leave for others: files, and sockets that reach past a network.

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = -100, 0x8000, 1, 2
_SYS_MOUNT_SETATTR = 442  # The same number on every architecture.
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def gpu_nodes() -> list[str]:
    """The device files that CUDA, ROCm and WSL open, as far as this machine has them."""
    return sorted(path for pattern in GPUS for path in glob.glob(f"/dev/{pattern}"))


def main() -> NoReturn:
    settings, program = json.loads(sys.argv[1]), sys.argv[2:]
    _die_with_parent()
    if settings["namespaces"]:
        _enter_namespaces()
        _rearrange(settings["readable"], settings["hidden"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # A core file would hold records.
    if settings["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"],) * 2)
    _drop_capabilities()
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execv(program[0], program)


def _die_with_parent() -> None:
    # Linux counts the thread that started this process as its parent.
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _enter_namespaces() -> None:
    """Go on in new namespaces; the processes that stay behind end as this one ends."""
    kinds = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(kinds | _NEWUSER) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    else:  # Where user namespaces are switched off root can still do without one.
        _call("unshare", kinds)
    _leave_behind()
    # The first process of a namespace is deaf to its own signals and has orphans to bury: the program is the second.
    _leave_behind()


def _leave_behind() -> None:
    """Fork and go on as the child; the parent waits, buries whatever else ends, and ends as the child did."""
    child = os.fork()
    while child:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
    _die_with_parent()


def _rearrange(readable: list[str], hidden: list[str]) -> None:
    """Everything read-only, nothing of other programs, `readable` where it was, `hidden` empty or gone."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV)
    devices = [f"/dev/{name}" for name in DEVICES] + gpu_nodes()
    # Held open, as what is mounted next covers their names.
    kept = {path: os.open(path, os.O_PATH) for path in [*devices, *readable]}
    read_only = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID)
    _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, read_only, ctypes.c_size_t(32))
    for path in (*MASKED, "/dev"):
        if os.path.isdir(path):
            _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV)
    for path, descriptor in kept.items():
        _bind(descriptor, path)
        os.close(descriptor)
    os.makedirs("/dev/shm", exist_ok=True)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"/dev/{name}")
    for path in hidden:
        # What lay below a folder that is masked is gone with it.
        if os.path.isdir(path):
            _mount("tmpfs", path, "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir("/")


def _bind(descriptor: int, path: str) -> None:
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.mkdir(path)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    _mount(f"/proc/self/fd/{descriptor}", path, None, _MS_BIND | _MS_REC)


def _drop_capabilities() -> None:
    """Give up for good what root may do beyond its own files: lift a mask, enter the host's namespaces again."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # Past the last one, or not root: then there is nothing to drop.
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    _call("mount", _bytes(source), _bytes(target), _bytes(kind), ctypes.c_ulong(flags), None)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


if __name__ == "__main__":
    main()
