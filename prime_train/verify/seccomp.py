"""System calls that code in the sandbox does not get: a filter in classic BPF, for bubblewrap's --seccomp.

Namespaces decide what the sandbox can see; the filter takes away what would let it hold memory that no limit counts
(SysV shared memory, memfd), touch another process (ptrace, process_vm_*), make namespaces of its own, in which it
would have capabilities again, or reach rarely used parts of the kernel (io_uring, bpf, keyrings, any socket but
AF_UNIX). Denied calls fail with EPERM.
"""

import errno
import platform
import struct

# number on x86_64, number on aarch64
_DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
_CLONE, _SOCKET, _CLONE3 = (56, 220), (41, 198), 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{USER,PID,NET,IPC,UTS,NS,CGROUP}
_AF_UNIX = 1
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# BPF opcodes: load a word of seccomp_data, jump, return, and with a constant
_LD, _JEQ, _JGE, _RET, _AND = 0x20, 0x15, 0x35, 0x06, 0x54
_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in seccomp_data; the low word of the first argument


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """The filter as an array of struct sock_filter, or None for a machine whose call numbers are not known here."""
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        return None
    column = list(_AUDIT_ARCH).index(machine)

    def op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, jump_true, jump_false, k)

    denied = op(_RET, _ERRNO | errno.EPERM)
    program = [op(_LD, _ARCH), op(_JEQ, _AUDIT_ARCH[machine], 1, 0), op(_RET, _KILL), op(_LD, _NR)]
    if machine == "x86_64":  # the x32 numbers of the same calls
        program += [op(_JGE, 0x40000000, 0, 1), denied]
    for numbers in _DENIED.values():
        program += [op(_JEQ, numbers[column], 0, 1), denied]
    # Its flags lie in memory, where a filter cannot look; the C library then falls back on clone.
    program += [op(_JEQ, _CLONE3, 0, 1), op(_RET, _ERRNO | errno.ENOSYS)]
    # A new process, but in no namespace of its own.
    program += [op(_JEQ, _CLONE[column], 0, 5), op(_LD, _ARG0), op(_AND, _NEW_NAMESPACES)]
    program += [op(_JEQ, 0, 0, 1), op(_RET, _ALLOW), denied]
    program += [op(_JEQ, _SOCKET[column], 0, 3), op(_LD, _ARG0), op(_JEQ, _AF_UNIX, 1, 0), denied]
    program += [op(_RET, _ALLOW)]
    return b"".join(program)
